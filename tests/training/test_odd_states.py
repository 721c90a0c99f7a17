"""Contents of a checkpoint that no run writes, under checksums that are right: each is one message."""

from __future__ import annotations

import base64
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmrecipe.core.errors import RunError
from llmrecipe.core.foreign import reading
from llmrecipe.training.optimizer_state import optimizer_state, random_state, restore_optimizer, restore_random_state

GENERATORS: dict[str, Callable[[dict[str, Any]], object]] = {
    "few words of Python's": lambda s: s.update(python=[3, [1, 2], None]),
    "negative words of Python's": lambda s: s.update(python=[3, [-1] * 625, None]),
    "a place beyond NumPy's words": lambda s: s["numpy"].__setitem__(2, 10**6),
    "a negative place in NumPy's words": lambda s: s["numpy"].__setitem__(2, -7),
    "few of NumPy's words": lambda s: s["numpy"].__setitem__(1, "AAAA"),
    "another of NumPy's generators": lambda s: s["numpy"].__setitem__(0, "PCG64"),
    "a short state of torch": lambda s: s.update(torch="AAAA"),
    "zeros for torch": lambda s: s.update(torch=base64.b64encode(bytes(5056)).decode()),
    "no base64": lambda s: s.update(torch="é"),
}


@pytest.mark.parametrize("name", GENERATORS)
def test_odd_states_of_generators_are_one_message(name: str) -> None:
    before = random_state()
    state = copy.deepcopy(before)
    GENERATORS[name](state)
    try:
        with pytest.raises(RunError, match=r"^the state: "), reading("the state"):
            restore_random_state(state)
    finally:
        restore_random_state(before)


def step_of(**changes: object) -> dict[str, Any]:
    """Restore a step's state of AdamW for a matrix of 3 x 4, with some tensors or values changed."""
    parameter = torch.nn.Parameter(torch.zeros(3, 4))
    made = torch.optim.AdamW([{"params": [parameter], "names": ["w"]}])
    parameter.grad = torch.ones(3, 4)
    made.step()
    tensors, facts = optimizer_state(made)
    for name, value in changes.items():
        if isinstance(value, torch.Tensor):
            tensors[f"w//{name}"] = value
        else:
            facts["values"]["w"] = {name: value}
    fresh = torch.optim.AdamW([{"params": [parameter], "names": ["w"]}])
    restore_optimizer(fresh, tensors, facts)
    return dict(fresh.state[parameter])


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("exp_avg", torch.zeros(5), r"shape \(3, 4\) is of torch.float32 and shape \(5,\)"),
        ("exp_avg", torch.zeros(3, 4, dtype=torch.int64), "is of torch.int64"),
        ("step", "two", "step is 'two', no finite number"),
        ("step", [1], r"step is \[1\], no finite"),
        ("step", float("nan"), "step is nan"),
    ],
)
def test_an_odd_state_of_an_optimizer_is_refused(name: str, value: object, said: str) -> None:
    assert step_of()["exp_avg"].shape == (3, 4)
    with pytest.raises(ValueError, match=said):
        step_of(**{name: value})


STATES: list[tuple[str, dict[str, Any]]] = [
    ("mezo", {"past": [["one", 0.1, [1.0]]]}), ("mezo", {"past": [[1, float("inf"), [1.0]]]}),
    ("mezo", {"past": [[1, 0.1, ["x"]]]}), ("mezo", {"past": 4}),
    ("freeze", {"active": ["x"], "mean": []}), ("freeze", {"active": 3}), ("freeze", {"mean": [None]}),
    ("kl", {"coef": "x"}), ("kl", {"coef": float("nan")}), ("kl", {}), ("gkd", {"step": -1}), ("gkd", {"step": 1.5}),
    ("dae", {"variance": []}),
]  # fmt: skip


@pytest.mark.parametrize(("part", "state"), STATES)
def test_odd_states_of_methods_and_objectives_are_one_message(part: str, state: dict[str, Any]) -> None:
    from llmrecipe.core import registry
    from llmrecipe.objectives.alignment._engines.kl import KlController

    if part == "kl":
        made: Any = KlController(0.1)
    else:
        group = "stack" if part in ("mezo", "freeze") else "objective"
        made = registry.load_class(group, part)(**({"name": part} if group == "stack" else {}))
    with pytest.raises(RunError, match=r"^the state: "), reading("the state"):
        made.load_state(state)
