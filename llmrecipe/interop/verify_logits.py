"""Verification of an export before it is reported: the written folder, loaded again, gives the logits of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.core.foreign import read_json
from llmrecipe.data.tokenize.call_tokenizer import call_tokenizer
from llmrecipe.data.tokenize.chat_templates import prompt_ids
from llmrecipe.engine.trunk import token_logits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmrecipe.models.pretrained import LanguageModel


GOLDEN_PROMPT = "What is the capital of France?"
BOUNDS = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest logit difference that passes, as a share of the largest logit, by the dtype of the exported weights."""
ROWS, TOKENS = 3, 24
SEED = 20
PIXELS = 64
"""Side of a probe's pictures for models that read any size."""


@dataclass(frozen=True)
class Difference:
    """How far the logits of two models are apart on the same tokens."""

    largest: float
    mean: float
    scale: float
    """Largest absolute logit: the unit of the bound."""
    bound: float
    """Largest share of `scale` that passes."""

    @property
    def passes(self) -> bool:
        """Return whether the largest difference is within the bound (NaN is not)."""
        return self.largest <= self.bound * self.scale

    def facts(self) -> dict[str, float]:
        """Return the JSON form."""
        return asdict(self)

    def __str__(self) -> str:
        return f"largest logit difference {self.largest:.3g}, mean {self.mean:.3g}, at logits up to {self.scale:.3g}"


def probe_inputs(model: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return seeded inputs of a model: token ids (ROWS, TOKENS), special tokens included, or pictures (ROWS, C, S, S).

    The golden prompt is at the start of the first row of tokens.
    """
    if model.main_input_name == "pixel_values":
        return probe_pictures(model, ROWS)
    size = int(model.get_input_embeddings().num_embeddings)
    ids = torch.randint(0, size, (ROWS, TOKENS), generator=torch.Generator().manual_seed(SEED))
    prompt = torch.tensor(golden_ids(tokenizer)[:TOKENS])
    ids[0, : len(prompt)] = prompt
    # Families that pool at the last real token look for padding: a probe has none.
    pad = getattr(model.config, "pad_token_id", None)
    if pad is not None:
        ids[ids == pad] = (pad + 1) % size
    return ids


def probe_pictures(model: LanguageModel, count: int) -> Tensor:
    """Return seeded pictures (count, C, S, S) of the size that a model reads."""
    size = getattr(model.config, "image_size", None) or PIXELS
    high, wide = size if isinstance(size, list | tuple) else (size, size)
    shape = (count, int(model.config.num_channels), int(high), int(wide))
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED))


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor, front: Sequence[int] = ()) -> Tensor:
    """Return float32 logits (R, T, V), or (R, classes), on the CPU, dropout off; row by row, so that no family needs padding.

    Args:
        ids: tokens (R, T), or pictures (R, C, H, W).
        front: tokens before every row, whose own logits are left out.
    """
    model.eval()
    device = next(model.parameters()).device
    ids = ids.to(device)
    if ids.is_floating_point():
        dtype = next(model.parameters()).dtype
        return torch.cat([model(pixel_values=row.to(dtype)).logits.float().cpu() for row in ids.split(1)])
    more = torch.tensor([list(front)], dtype=ids.dtype, device=device)
    rows = []
    for row in ids.split(1):
        whole = torch.cat((more, row), 1)
        inputs: dict[str, Tensor] = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
        if getattr(model.config, "is_encoder_decoder", False) and "Classification" not in type(model).__name__:
            inputs["decoder_input_ids"] = row[:, : TOKENS // 2]
        logits = token_logits(model(**inputs)).float().cpu()
        own = logits.dim() == 3 and "decoder_input_ids" not in inputs
        rows.append(logits[:, len(front) :] if own else logits)
    return torch.cat(rows)


def compare_logits(
    wanted: Tensor, got: Tensor, dtype: torch.dtype, bound: float | None = None, added: Sequence[int] = ()
) -> Difference:
    """Compare two logit tensors of one shape.

    Args:
        added: tokens that `got` has and `wanted` does not; logits of a vocabulary are compared up to the first of them.

    Raises:
        ModelError: their shapes differ.
    """
    if added and wanted.dim() == 3:
        wanted, got = wanted[..., : min(added)], got[..., : min(added)]
    if wanted.shape != got.shape:
        raise ModelError(f"export: the written model gives logits of shape {tuple(got.shape)}, the run {tuple(wanted.shape)}")
    apart = (wanted - got).abs()
    limit = BOUNDS.get(dtype, BOUNDS[torch.float32]) if bound is None else bound
    return Difference(float(apart.max()), float(apart.mean()), float(wanted.abs().max()), limit)


def demand(difference: Difference, what: str, advice: str) -> None:
    """Refuse an export whose logits differ.

    Raises:
        ModelError: the difference is over its bound.
    """
    if not difference.passes:
        raise ModelError(
            f"export: {what} does not compute what the run computes: {difference}; allowed is {difference.bound:g} of the "
            f"largest logit. Nothing was written. {advice}"
        )


def golden_ids(tokenizer: PreTrainedTokenizerBase, chat: bool = True) -> list[int]:
    """Return token ids of the golden prompt.

    Args:
        chat: as the user's turn under the chat template, where there is one; else as a plain text.
    """
    if not chat:
        return list(call_tokenizer(tokenizer, GOLDEN_PROMPT)["input_ids"])
    return prompt_ids(tokenizer, [{"role": "user", "content": GOLDEN_PROMPT}])


def adapter_head(folder: Path) -> str:
    """Return the head an adapter folder was made for: adapter-hub names a model class, PEFT a task."""
    config = read_json(folder / "adapter_config.json", "model.path", "save the adapter again", ModelError)
    if config.get("model_class"):
        return next((head for ending, head in HEADS if str(config["model_class"]).endswith(ending)), "causal")
    return TASK_HEADS.get(str(config.get("task_type")), "causal")


TASK_HEADS = {
    "SEQ_CLS": "classification",
    "TOKEN_CLS": "token_classification",
    "QUESTION_ANS": "question_answering",
    "SEQ_2_SEQ_LM": "seq2seq",
}
"""PEFT's name of a task -> the head an objective requests from the loader; anything else is causal."""
HEADS = (
    ("ForSequenceClassification", "classification"),
    ("ForImageClassification", "image"),
    ("ForTokenClassification", "token_classification"),
    ("ForQuestionAnswering", "question_answering"),
    ("ForMaskedLM", "masked"),
    ("ForConditionalGeneration", "seq2seq"),
)
"""End of an architecture's name -> the head an objective requests from the loader; anything else is causal."""
