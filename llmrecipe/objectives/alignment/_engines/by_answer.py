"""Values per token of a rollout's batch, summed to values per answer.

Letters: B answers, N tokens of all answers.
"""

from __future__ import annotations

from torch import Tensor

from llmrecipe.data.collate import Batch


def answer_count(batch: Batch) -> int:
    """Return B, the number of answers of a batch."""
    return batch.extra["score"].numel()


def sum_by_answer(batch: Batch, values: Tensor) -> Tensor:
    """Sum values per token, (N,), to values per answer, (B,)."""
    return values.new_zeros(answer_count(batch)).index_add(0, batch.extra["answer"], values)
