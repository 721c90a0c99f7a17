"""Human-readable token rows: pieces of text, each trained or not, and statistics of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrecipe.data.features.table import Features

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmrecipe.data.token_data import TokenData

PARTS = ("ids", "prompt_ids", "completion_ids", "chosen_ids", "rejected_ids", "choice_ids", "ids_a", "ids_b", "ids_c")
ANSWERS = ("completion_ids", "chosen_ids", "rejected_ids", "choice_ids")


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of one kind."""

    ids: list[int]
    text: str
    trained: bool


def pieces(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, each: bool = False) -> dict[str, list[Piece]]:
    """Return the token columns of a row as pieces of text.

    Args:
        each: one piece per token instead of one per run of tokens.
    """
    found: dict[str, list[Piece]] = {}
    for name in PARTS:
        if name not in row or (name == "ids_c" and not row[name]):
            continue
        ids = row[name]
        trained = row["trained"] if name == "ids" and "trained" in row else [int(name in ANSWERS)] * len(ids)
        keys = [(flag, i if each else 0) for i, flag in enumerate(trained)]
        found[name] = []
        for (flag, _), run in groupby(zip(keys, ids), key=lambda pair: pair[0]):
            part = [token for _, token in run]
            found[name].append(Piece(part, str(tokenizer.decode(part)), bool(flag)))
    return found


def row_facts(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return one row as JSON values: each token with its id, text and whether it is trained."""
    tokens = {
        name: [{"id": p.ids[0], "text": p.text, "trained": p.trained} for p in parts]
        for name, parts in pieces(row, tokenizer, each=True).items()
    }
    rest = {k: v for k, v in row.items() if k not in PARTS and k not in ("trained", "type_ids") and (k != "weights" or v)}
    if isinstance(rest.get("features"), Features):
        rest["features"] = {"file": rest["features"].path, "shape": [*rest["features"].shape]}
    return {**rest, "tokens": tokens}


def length_facts(data: TokenData, batch: int, seed: int) -> dict[str, float]:
    """Return lengths in tokens, and the share of padding if batches of rows were padded instead of packed."""
    lengths = data.lengths()
    shuffled = np.random.default_rng(seed).permutation(lengths)
    rows = len(lengths)
    padded = sum(int(shuffled[i : i + batch].max()) * len(shuffled[i : i + batch]) for i in range(0, rows, batch))
    low, middle, high = np.percentile(lengths, [5, 50, 95])
    return {
        "shortest": int(lengths.min()),
        "p5": float(low),
        "median": float(middle),
        "p95": float(high),
        "longest": int(lengths.max()),
        "mean": float(lengths.mean()),
        "padding_if_padded": 1.0 - float(lengths.sum()) / padded if padded else 0.0,
    }
