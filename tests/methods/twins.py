"""Two models that train side by side: ours and the one it must equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

IDS = torch.tensor([[5, 9, 3, 60, 7, 7, 2]])

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Without decay, which references apply to other tensors than we do."""
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)


def momentum(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Where gradients are rounding and nothing else (key biases), of which Adam would make steps."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def next_token_loss(model: nn.Module) -> Tensor:
    """Of the one row of ids."""
    return nn.functional.cross_entropy(model(input_ids=IDS).logits[0, :-1], IDS[0, 1:])


def side_by_side(
    models: tuple[nn.Module, nn.Module],
    steps: int = 5,
    make: Make = adamw,
    loss: Callable[[nn.Module], Tensor] = next_token_loss,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Train both; a turn gives their losses, gradients in place, and their step is made when the next one is asked for."""
    optimizers = [make([p for p in model.parameters() if p.requires_grad]) for model in models]
    for _ in range(steps):
        ours, theirs = (loss(model) for model in models)
        ours.backward()
        theirs.backward()
        yield ours, theirs
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
