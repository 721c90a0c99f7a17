"""What the tests of objectives that sample share: a run-free loop, answers of known tokens, a reward by function."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from llmrecipe.data.collate import Batch
from llmrecipe.engine.role_models import Roles
from llmrecipe.feedback.rewards.function import reward_function
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.objectives.alignment._engines.rollout import Sample
from llmrecipe.objectives.reward_interface import Answer
from tests.methods.reparameterized.test_lora import fill
from tests.tiny import Tokenizer, roles_for, tiny_model

ROWS: list[dict[str, Any]] = [
    {"row": i, "prompt_ids": ids, "columns": "{}"} for i, ids in enumerate([[5, 6, 7], [12], [20, 21, 22, 23, 24], [9, 9]])
]
REWARD = {"score": {"kind": "function", "function": "low_tokens"}}


@reward_function
def low_tokens(text: str, answer: Answer) -> float:
    """The share of an answer's tokens below 32."""
    return sum(i < 32 for i in answer.ids) / max(len(answer.ids), 1)


class Numbers(Tokenizer):
    """Token ids as text."""

    all_special_tokens: ClassVar[list[str]] = ["<pad>", "<bos>", "<eos>", "<mask>"]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(str(i) for i in ids if i > 2 or not skip_special_tokens)


def setting(objective: Any, packing: bool = True, filled: bool = True, seed: int = 0, target: str = "attn.q|v") -> Roles:
    """A small Llama under LoRA, with the adapters and heads the objective brings."""
    torch.manual_seed(seed)
    model = tiny_model()
    own = [Lora(name="lora", target=target)]
    stack = Stack([*own, *objective.role_wrappers(own)])
    objective.prepare_model(model, seed)
    stack.attach(model)
    if filled:
        fill(model)
    stack.set_trainable(model)
    roles = roles_for(model, stack, packing)
    roles.tokenizer = Numbers()
    roles.engine.eval()
    return roles


def updates(objective: Any, roles: Roles, rows: list[dict[str, Any]] = ROWS, rollouts: int = 1) -> Iterator[list[Batch]]:
    """The micro-batches of each step of some rollouts."""
    return objective.batches(iter([rows] * rollouts), roles)


def samples_of(answers: list[list[int]], rows: list[int] | None = None, scores: list[float] | None = None) -> list[Sample]:
    """Answers of known tokens to the prompts of `ROWS`."""
    found = []
    for i, ids in enumerate(answers):
        row = ROWS[rows[i] if rows else i]
        answer = Answer("", "", {}, row["prompt_ids"], ids, ids[-1] == 2)
        sampler = {"sampler": -4.0 + 0.1 * torch.arange(len(ids)) - 0.3 * i}
        found.append(Sample(row["row"], answer, scores[i] if scores else 0.0, tokens=sampler, numbers={"rewards/score": 0.0}))
    return found


def mean_loss(objective: Any, batch: Batch, roles: Roles) -> torch.Tensor:
    """The loss a step optimises, for one micro-batch."""
    return objective.loss(batch, roles).total / objective.weight(batch)


def gradients(roles: Roles) -> dict[str, torch.Tensor]:
    """Gradients by name; zeros where there is none."""
    trained = {n: p for n, p in roles.model.named_parameters() if p.requires_grad}
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trained.items()}
