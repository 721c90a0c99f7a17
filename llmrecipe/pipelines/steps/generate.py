"""`generate`: a model answers prompts; the answers are rows to train on, to judge or to read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmrecipe.core.errors import DataError, RecipeError
from llmrecipe.core.option_types import (
    ClassVar,
    Field,
    Fraction,
    Literal,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    StopText,
)
from llmrecipe.core.registry import register
from llmrecipe.pipelines.step import Row, Step
from llmrecipe.recipe.step_spec import unfinished

if TYPE_CHECKING:
    from llmrecipe.data.formats.prompts import Prompt
    from llmrecipe.evaluation.evaluate_model import Subject
    from llmrecipe.pipelines.steps.workspace import Work

GUESSED = 64
"""Number of example rows where the prompts do not exist yet."""


@register
class Generate(Step):
    """Rows from prompts: y_1..y_n ~ p(y | x) for each prompt x, tokens drawn from softmax(logits / temperature) cut to top_p.

    With n = 1 a row is {prompt, completion}, ready for supervised training; with n > 1 it is {prompt, completions: [..]}, for
    a step that compares. Other columns of the prompt's row are kept, an answer it had as `reference`. Prompts are rendered by
    the model's own chat template as in `llmrecipe chat`; then `prompt` is written as messages, so that training renders it
    alike. A run's adapters are mounted. Prompts that leave no room for an answer are left out and counted.
    """

    gives: ClassVar[str] = "rows"
    needs: ClassVar[dict[str, str]] = {"model": "model", "prompts": "rows"}

    model: str
    """A run directory, a model folder, a hub name or `tiny`."""
    prompts: str
    """File, folder, `builtin:NAME` or hub data set whose rows hold prompts."""
    splits: list[Literal["train", "validation", "test"]] = Field(["train"])
    """Splits of the prompts; each becomes the same split of the result."""
    limit: PositiveInt | None = None
    """Maximum number of prompts of each split, from the first."""
    n: PositiveInt = 1
    """Answers to a prompt."""
    temperature: NonNegativeFloat = 1.0
    """0 is greedy."""
    top_p: Fraction = 1.0
    """Draw from the likeliest tokens that hold this share of the probability."""
    top_k: NonNegativeInt = 0
    """Draw from this many likeliest tokens; 0 is all."""
    max_new_tokens: PositiveInt = 128
    """Maximum number of tokens of an answer."""
    stop: list[StopText] = Field(default_factory=list)
    """Texts before which an answer ends, such as a newline."""
    cut: Literal["keep", "drop"] = "keep"
    """What happens to answers that reached `max_new_tokens` before their end."""
    system: str | None = None
    """System message put before prompts that have none."""
    batch: PositiveInt = 16
    """Answers generated at once."""
    words: list[str] = Field(default_factory=list)
    """Words for the model's own recipe, such as model.dtype=bfloat16 or runtime.device=cpu."""

    def check(self, where: str) -> None:
        """Refuse equal answers, prompts that cannot be read and models that cannot be found."""
        from llmrecipe.evaluation.evaluate_model import check_subject

        if self.n > 1 and self.temperature == 0:
            raise RecipeError(f"{where}.temperature: 0 is greedy, so the {self.n} answers to a prompt would be the same; "
                              "set n: 1 or a temperature such as 1.0")  # fmt: skip
        if not self.splits:
            raise RecipeError(f"{where}.splits: names no split; write [train]")
        if not unfinished(self.model):
            check_subject(self.model, self.words)
        if not unfinished(self.prompts):
            for split in self.splits:
                self._prompts(split, f"{where}.prompts")

    def example(self) -> Mapping[str, Sequence[Row]]:
        """Return the prompts, where they exist, with an invented answer."""
        from llmrecipe.data.formats.prompts import Prompt

        answer = "This is an example of an answer."
        rows: dict[str, list[Row]] = {}
        for split in self.splits:
            known = not unfinished(self.prompts)
            prompts = self._prompts(split) if known else [Prompt(f"Example {i} of {split}.", {}) for i in range(GUESSED)]
            rows[split] = [self._row(p, p.turns, [answer] * self.n) for p in prompts]
        return rows

    def run(self, work: Work) -> dict[str, Any]:
        """Answer the prompts of each split."""
        from llmrecipe.evaluation.evaluate_model import open_subject

        subject = open_subject(self.model, self.words)
        facts: dict[str, Any] = {}
        total, finished, tokens = 0, 0, 0
        for split in self.splits:
            requested, left_out = self._encoded(subject, split)
            if left_out:
                work.events.warning(f"{split}: {left_out} prompts leave no room for {self.max_new_tokens} new tokens")
            values = work.streamed(
                [ids for _, ids in requested],
                lambda part, keys: self._ask(subject, part, keys, work.seed),
                batch=max(1, self.batch // self.n),
                name=split,
                count=lambda answers: {"tokens": sum(a["tokens"] for each in answers for a in each)},
            )
            rows = []
            for (prompt, _), answers in zip(requested, values, strict=True):
                total, tokens = total + len(answers), tokens + sum(a["tokens"] for a in answers)
                finished += sum(a["finished"] for a in answers)
                kept = [a["text"] for a in answers if a["finished"] or self.cut == "keep"]
                if len(kept) == self.n:
                    rows.append(self._row(prompt, self._turns(subject, prompt), kept))
            if not rows:
                raise DataError(f"{split}: no answer ended within max_new_tokens={self.max_new_tokens}; give more, or cut=keep")
            facts[f"{split}/rows"] = work.write(rows, split)
        for prompt, answer in [(r["prompt"], r.get("completion") or r["completions"][0]) for r in rows[:3]]:
            work.events.sample(len(values), prompt if isinstance(prompt, str) else prompt[-1]["content"], answer)
        return {**facts, "answers": total, "finished": finished / total, "tokens": tokens / total}

    def _prompts(self, split: str, where: str = "prompts") -> list[Prompt]:
        from llmrecipe.data.formats.prompts import read_prompts

        return read_prompts(self.prompts, split, self.limit, where)

    def _turns(self, subject: Subject, prompt: Prompt) -> str | list[dict[str, Any]]:
        """Return the prompt as the model received it: messages where a template renders it."""
        from llmrecipe.data.tokenize.chat_templates import is_prompted_raw

        if is_prompted_raw(subject.loaded.tokenizer):
            return prompt.prompt
        has_system = prompt.turns[0]["role"] in ("system", "developer")
        return prompt.turns if has_system or not self.system else [{"role": "system", "content": self.system}, *prompt.turns]

    def _encoded(self, subject: Subject, split: str) -> tuple[list[tuple[Prompt, list[int]]], int]:
        """Return prompts with their token ids, and how many leave no room for an answer."""
        from llmrecipe.data.tokenize.chat_templates import prompt_ids

        tokenizer = subject.loaded.tokenizer
        room = getattr(subject.loaded.model.config, "max_position_embeddings", None)
        requested = []
        prompts = self._prompts(split)
        for prompt in prompts:
            turns = self._turns(subject, prompt)
            ids = prompt_ids(tokenizer, turns if isinstance(turns, list) else prompt.turns, prompt.tools, prompt.kwargs)
            if room is None or len(ids) + self.max_new_tokens <= room:
                requested.append((prompt, ids))
        if not requested:
            raise DataError(f"prompts: with max_new_tokens={self.max_new_tokens} none fits into the model's {room} positions")
        return requested, len(prompts) - len(requested)

    def _ask(
        self, subject: Subject, part: list[list[int]], keys: list[str], seed: int
    ) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Yield (index, n answers) of each prompt, once the last of them has ended."""
        from llmrecipe.engine.answer_ends import answer_ends
        from llmrecipe.engine.generation import answered
        from llmrecipe.engine.sampling import Sampling

        model, tokenizer = subject.roles.model, subject.loaded.tokenizer
        sampling = Sampling(self.max_new_tokens, self.temperature, self.top_p, self.top_k, self.batch, seed, tuple(self.stop))
        ends = answer_ends(model, tokenizer, sampling)
        prompts = [ids for ids in part for _ in range(self.n)]
        streams = [f"{key}/{j}" for key in keys for j in range(self.n)]
        found: list[dict[int, dict[str, Any]]] = [{} for _ in part]
        for i, ids in answered(model, tokenizer, prompts, sampling, keys=streams):
            place, which = divmod(i, self.n)
            found[place][which] = {"text": ends.text(ids), "tokens": len(ids), "finished": ends.finished(ids)}
            if len(found[place]) == self.n:
                yield place, [found[place][j] for j in range(self.n)]

    def _row(self, prompt: Prompt, turns: object, answers: list[str]) -> Row:
        answer = {"completion": answers[0]} if self.n == 1 else {"completions": answers}
        extras = {"tools": prompt.tools, "chat_template_kwargs": prompt.kwargs}
        return {"prompt": turns, **{name: value for name, value in extras.items() if value}, **answer, **prompt.columns}
