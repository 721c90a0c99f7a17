"""The golden prompt of an exported folder: one input and what the folder computes from it, for any software that loads it.

`golden.json` names the input, how it was computed, and what came out:

- of a model that writes: `answer_ids`, the greedy answer, and `logprobs`, log p of each of its tokens given those before;
- of a model that fills in words: `likeliest_ids`, the likeliest token of every place, and `logprobs`;
- of a classifier: `logits`, a row per text or picture, or per token; of a text encoder: `vector`.

The numbers depend on the dtype in which they were computed and, by a rounding, on the machine. So `largest`, the largest
absolute logit or vector entry, is the unit of what may differ (see `explained_by`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from pydantic import TypeAdapter
from torch import Tensor

from llmrecipe.core.foreign import read_json, reading
from llmrecipe.engine.decoders import decoder_start
from llmrecipe.engine.generation import generate
from llmrecipe.engine.sampling import Sampling
from llmrecipe.engine.trunk import token_logits
from llmrecipe.interop.verify_logits import BOUNDS, GOLDEN_PROMPT, golden_ids, logits_of, probe_pictures

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmrecipe.models.pretrained import LanguageModel

GOLDEN_FILE = "golden.json"
ANSWER_TOKENS = 24
"""Longest answer; a shorter one ends with an end token."""
DIGITS = 6
"""Decimals of the numbers that are kept."""


@dataclass(frozen=True, kw_only=True)
class Golden:
    """One input of an exported folder, what the folder gives for it, and how that was computed."""

    prompt: str | None = None
    """The text; None for a picture."""
    prompt_ids: list[int] = field(default_factory=list)
    """Its token ids, under the chat template where the model writes and the tokenizer has one."""
    front_ids: list[int] = field(default_factory=list)
    """Those of them that neither tokenizer nor chat template writes."""
    picture: list[int] = field(default_factory=list)
    """Shape of a picture: `torch.randn(shape, generator=torch.Generator().manual_seed(20))`."""
    answer: str | None = None
    answer_ids: list[int] = field(default_factory=list)
    likeliest_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    logits: list[list[float]] = field(default_factory=list)
    vector: list[float] = field(default_factory=list)
    largest: float
    dtype: Literal["float64", "float32", "bfloat16", "float16"]
    """In which the model computed; log-probabilities are taken in float32."""
    attention: str | None = None
    device: str = "cpu"
    torch: str = torch.__version__
    transformers: str = transformers.__version__
    head: str | None = None
    """Of an adapter: the head its base is opened with."""
    labels: list[str] = field(default_factory=list)
    """Of an adapter with a classifier: what the base's own head would not know."""
    model: dict[str, Any] = field(default_factory=dict)
    """Of an adapter: further keys of the `model` section its base is opened with."""
    quantized: list[str] = field(default_factory=list)
    """Of an adapter: what its base was quantized by, which the folder does not name."""
    config: dict[str, Any] = field(default_factory=dict)
    """Of a GGUF file: settings that it holds and Transformers does not read from it."""

    @property
    def bound(self) -> float:
        """Return the largest logit difference that rounding explains, as a share of `largest`."""
        return BOUNDS[getattr(torch, self.dtype)]

    def write(self, folder: Path) -> None:
        """Write the file next to the weights, a key per line."""
        found = {key: value for key, value in asdict(self).items() if value not in (None, [], {})}
        lines = [f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in found.items()]
        (folder / GOLDEN_FILE).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Golden:
        """Return what a folder keeps.

        Raises:
            RunError: the file is damaged.
        """
        found = read_json(folder / GOLDEN_FILE)
        with reading(str(folder / GOLDEN_FILE), "export the run again"):
            return TypeAdapter(cls).validate_python(found)


def golden_answer(model: LanguageModel, tokenizer: PreTrainedTokenizerBase, front: Sequence[int] = ()) -> Golden:
    """Return the golden prompt of a model with what the model gives for it.

    Args:
        front: tokens that the prompt begins with, where the chat template does not write them.
    """
    how: dict[str, Any] = {"dtype": dtype_name(next(model.parameters()).dtype), "attention": model.config._attn_implementation}
    if model.main_input_name == "pixel_values":
        picture = probe_pictures(model, 1)
        return Golden(picture=list(picture.shape), **_classified(logits_of(model, picture)[0]), **how)
    writes = hasattr(model, "generate") and model.can_generate()
    ids = golden_ids(tokenizer, chat=writes)
    own = [] if ids[: len(front)] == list(front) else list(front)
    ids = [*own, *ids]
    how |= {"prompt": GOLDEN_PROMPT, "prompt_ids": ids, "front_ids": own}
    if not writes:
        logits = logits_of(model, torch.tensor([ids]))[0]
        if not type(model).__name__.endswith("ForMaskedLM"):
            return Golden(**_classified(logits), **how)
        likeliest = logits.argmax(-1).tolist()
        return Golden(likeliest_ids=likeliest, logprobs=_logprobs(logits, likeliest), largest=_largest(logits), **how)
    answer = generate(model, tokenizer, [ids], Sampling(max_new_tokens=ANSWER_TOKENS))[0]
    logits = answer_logits(model, ids, answer)
    return Golden(
        answer=str(tokenizer.decode(answer, skip_special_tokens=True)),
        answer_ids=answer,
        logprobs=_logprobs(logits, answer),
        largest=_largest(logits),
        **how,
    )


def golden_vector(vector: Tensor, ids: list[int], dtype: torch.dtype) -> Golden:
    """Return the golden prompt of a text encoder with its vector (D,)."""
    return Golden(
        prompt=GOLDEN_PROMPT,
        prompt_ids=ids,
        vector=[round(x, DIGITS) for x in vector.tolist()],
        largest=_largest(vector),
        dtype=dtype_name(dtype),
    )


def dtype_name(dtype: torch.dtype) -> Any:  # noqa: ANN401 (one of the literals of `Golden.dtype`)
    """Return the name under which a dtype is kept."""
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def answer_logits(model: LanguageModel, prompt: list[int], answer: list[int]) -> Tensor:
    """Return the float32 logits (N, V) from which the N tokens of an answer were picked: one pass, on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    pair = bool(getattr(model.config, "is_encoder_decoder", False))
    ids = torch.tensor([prompt if pair else [*prompt, *answer[:-1]]], device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if pair:
        inputs["decoder_input_ids"] = torch.tensor([[decoder_start(model), *answer[:-1]]], device=device)
    return token_logits(model(**inputs))[0, -len(answer) :].float().cpu()


def explained_by(golden: Golden, logits: Tensor) -> tuple[float, str]:
    """Return the smallest logit difference that explains what differs, as a share of `largest`, and where it is.

    With z the logits and e the largest difference of any of them: a log-probability moves by at most 2 e, and a token that was
    the likeliest is at most 2 e behind the likeliest now. So of a token y with log-probability l

        e = max(|log p(y) - l|, max_v z_v - z_y) / 2

    and of numbers, e is their largest difference.

    Args:
        logits: (N, V) of the tokens, (N, C) of the classes, or a vector (D,).
    """
    ids = golden.answer_ids or golden.likeliest_ids
    if not ids:
        wanted = torch.tensor(golden.vector or golden.logits)
        if wanted.shape != logits.shape:
            return float("inf"), f"{tuple(logits.shape)} numbers instead of {tuple(wanted.shape)}"
        apart = (wanted - logits).abs()
        return _share(apart.max(), golden), f"number {int(apart.argmax()) + 1}"
    own = logits.gather(-1, torch.tensor(ids)[:, None])[:, 0]
    moved = (own - logits.logsumexp(-1) - torch.tensor(golden.logprobs)).abs()
    behind = logits.max(-1).values - own
    apart = torch.maximum(moved, behind) / 2
    return _share(apart.max(), golden), f"token {int(apart.argmax()) + 1}"


def _share(apart: Tensor, golden: Golden) -> float:
    # Half a unit of the last kept digit is no difference.
    return max(0.0, float(apart) - 0.5 * 10.0**-DIGITS) / max(golden.largest, 10.0**-DIGITS)


def _classified(logits: Tensor) -> Mapping[str, Any]:
    rows = logits if logits.dim() == 2 else logits[None]
    return {"logits": [[round(x, DIGITS) for x in row] for row in rows.tolist()], "largest": _largest(logits)}


def _logprobs(logits: Tensor, ids: list[int]) -> list[float]:
    found = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
    return [round(x, DIGITS) for x in found.tolist()]


def _largest(numbers: Tensor) -> float:
    # A family may give a token that must not be written -inf.
    finite = numbers[numbers.isfinite()]
    return round(float(finite.abs().max()), DIGITS) if finite.numel() else 0.0
