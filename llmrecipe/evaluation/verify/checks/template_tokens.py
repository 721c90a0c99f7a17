"""The tokens of a dialogue in training, and when the trained model is prompted."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.errors import ProofError
from llmrecipe.core.registry import register
from llmrecipe.data.tokenize.chat_templates import prompt_ids
from llmrecipe.data.tokenize.encode import RowEncoder
from llmrecipe.evaluation.verify.bench import Bench
from llmrecipe.evaluation.verify.verification import Measured, NotApplicable, Verification
from llmrecipe.models.checkpoint_path import run_folder
from llmrecipe.recipe.schema import TokenizerSection
from llmrecipe.runs.open_model import tokenizer_of

TURNS = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris, which lies on the Seine."},
]


@register
class TemplateTokens(Verification):
    """Token ids of a dialogue's prompt in training = those the finished run's tokenizer gives the same dialogue."""

    order: ClassVar[int] = 60

    def measure(self, bench: Bench) -> Measured:
        """Encode one dialogue as training does, with the recipe's tokenizer, and as `chat` does, with that of the run."""
        recipe = (bench.given or bench.composition).recipe
        training = tokenizer_of(recipe.model, recipe.tokenizer)
        if not training.chat_template:
            raise NotApplicable("the recipe's tokenizer has no chat template")
        if bench.run.data.report.template.startswith("none"):
            raise NotApplicable("the training rows are raw text, without a template")
        folder = run_folder(str(bench.finished or bench.directory))
        assert folder is not None, "a finished run has a final folder"
        serving = tokenizer_of(recipe.model, TokenizerSection(path=str(folder)))
        encoder = RowEncoder(training, "dialogue", "last", recipe.data.model_copy(update={"columns": {}}), "messages")
        columns, _ = encoder.encode([(0, {"messages": TURNS}, "the probe dialogue")])
        if not columns["ids"]:
            raise NotApplicable("the probe dialogue does not fit into data.max_length")
        ids, trained = columns["ids"][0], columns["trained"][0]
        turns = ([{"role": "system", "content": recipe.data.system}] if recipe.data.system else []) + TURNS[:1]
        wanted, found = ids[: trained.index(1)], prompt_ids(serving, turns)
        text = "prompt tokens of a dialogue in training = under the finished run's tokenizer"
        if wanted == found:
            return Measured(text, 0.0, 0.0)
        at = next((i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b), min(len(wanted), len(found)))
        raise ProofError(
            f"{text}: they part at token {at} of {len(wanted)}: {training.decode(wanted[at : at + 6])!r} in training, "
            f"{serving.decode(found[at : at + 6])!r} when prompted; the chat template of {folder} is not the one of training"
        )
