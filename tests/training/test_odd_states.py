"""Contents of a checkpoint that no run writes, under checksums that are right: each is one message."""

from __future__ import annotations

import base64
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmrecipe.core import registry
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
        ("step", "two", "step of .* is 'two', no tensor"),
        ("step", torch.tensor(float("nan")), "step of .* is nan"),
    ],
)
def test_an_odd_state_of_an_optimizer_is_refused(name: str, value: object, said: str) -> None:
    assert step_of()["exp_avg"].shape == (3, 4)
    with pytest.raises(ValueError, match=said):
        step_of(**{name: value})


def state_of(kind: str, **options: Any) -> tuple[Any, dict[str, torch.Tensor], dict[str, Any]]:
    """A fresh optimizer and the state of one that made a step: a matrix with an 8-bit state where there is one, a vector."""
    from llmrecipe.optim.optimizer import Group, build_optimizer

    torch.manual_seed(0)
    config = registry.load_class("optim", kind)(**options)

    def made() -> Any:
        shapes = {"w": (72, 64), "b": (6,)}
        own = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
        groups = [Group(k, 0.1, 0.0, 1.0, (n,), (own[n],)) for k, n in (("matrix", "w"), ("vector", "b"))]
        return build_optimizer(config, groups)

    stepped = made()
    for group in stepped.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    stepped.step()
    tensors, facts = optimizer_state(stepped)
    return made(), {name: value.clone() for name, value in tensors.items()}, facts


EVERY = [
    ("adafactor", {"beta1": 0.9}),
    ("sgd", {"momentum": 0.9}),
    ("rmsprop", {"momentum": 0.9}),
    *((k, {}) for k in registry.names("optim")),
]


@pytest.mark.parametrize(("kind", "options"), EVERY, ids=lambda value: value if isinstance(value, str) else str(len(value)))
def test_a_state_is_of_the_shapes_that_its_optimizer_keeps(kind: str, options: dict[str, Any]) -> None:
    """Kernels read behind a state that is too small; one for rows is none for entries, whichever dimensions it shares."""
    fresh, tensors, facts = state_of(kind, **options)
    restore_optimizer(fresh, tensors, facts)
    again, _ = optimizer_state(fresh)
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)
    shapes = [(), (1,), (72,), (64,), (64, 72), (72 * 64,), (1, 64), (72, 64), (73, 64), (0,), (6, 1), (6,)]
    for name, value in tensors.items():
        for shape in shapes:
            if shape != tuple(value.shape):
                wrong = {**tensors, name: torch.zeros(shape, dtype=value.dtype)}
                with pytest.raises(ValueError, match="the state "):
                    restore_optimizer(state_of(kind, **options)[0], wrong, facts)
        with pytest.raises(ValueError, match=rf"{name.partition('//')[2]} of a parameter .* is (missing|of torch.int16)"):
            restore_optimizer(state_of(kind, **options)[0], {**tensors, name: value.to(torch.int16)}, facts)
        others = [n for n in {**tensors, **facts["shared"]} if n != name and n.startswith(name[:3])]
        if name not in facts["shared"].values() and others:
            with pytest.raises(ValueError, match="is missing"):
                restore_optimizer(state_of(kind, **options)[0], {n: v for n, v in tensors.items() if n != name}, facts)
    if tensors:
        with pytest.raises(ValueError, match=r"the state other of a parameter of shape .* is none of its"):
            restore_optimizer(state_of(kind, **options)[0], {**tensors, "w//other": torch.zeros(72, 64)}, facts)


@pytest.mark.parametrize("value", ["two", [1], float("nan")])
def test_an_odd_number_of_an_optimizer_is_refused(value: object) -> None:
    fresh, tensors, facts = state_of("adafactor")
    facts["values"]["w"]["step"] = value
    with pytest.raises(ValueError, match=r"the state step is .*no finite|step is nan"):
        restore_optimizer(fresh, tensors, facts)


def test_an_optimizer_of_somebody_else_restores_what_it_keeps() -> None:
    """Of shapes that are its own affair: a projection to four rows."""

    class Projected(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["low"] = torch.ones(4, parameter.shape[1])

    made = [Projected([{"params": [torch.nn.Parameter(torch.zeros(9, 5))], "names": ["w"]}]) for _ in range(2)]
    made[0].step()
    restore_optimizer(made[1], *optimizer_state(made[0]))
    assert torch.equal(made[1].state[made[1].param_groups[0]["params"][0]]["low"], torch.ones(4, 5))


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
