"""Small trainings give what they gave: the same events and the same tensors, bit for bit on the machine that kept them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden import kept, machine
from tests.golden.runs import QUICK, RUNS, differences, far_losses, record, tensor_hash

CASES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RUNS]
REMEDY = 'if this is meant: make golden-renew REASON="why" ONLY='


@pytest.mark.parametrize("name", CASES)
def test_a_run_gives_what_it_gave(name: str, tmp_path: Path) -> None:
    golden = kept.read(kept.RUNS / f"{name}.json")
    found = record(name, tmp_path / "run")
    unlike = machine.unlike(golden["machine"], machine.fingerprint())
    changed = far_losses(name, golden, found) if unlike else differences(golden, found)
    assert not changed, "\n".join([*changed, REMEDY + name])
    if unlike:
        pytest.skip(f"losses agree; bits are not compared on another machine: {unlike}")


def test_every_file_belongs_to_a_run_and_has_a_reason() -> None:
    files = {path.stem: kept.read(path) for path in kept.RUNS.glob("*.json")}
    assert files.keys() == RUNS.keys()
    assert all(file["reason"].strip() for file in files.values())


def example() -> dict[str, Any]:
    step = {"event": "step", "step": 1, "loss": 2.0, "lr": 0.1}
    return {
        "events": {".": [step, {**step, "step": 2, "loss": 1.5}]},
        "final": {"final": {"tensors": "a", "names": "b"}},
    }


def test_the_first_changed_event_is_told_and_a_last_bit_counts() -> None:
    golden, found = example(), example()
    assert differences(golden, found) == far_losses("sft", golden, found) == []
    found["events"]["."][1]["loss"] = 1.5 + 2**-52
    assert differences(golden, found) == [".: step of step 2: loss 1.5 became 1.5000000000000002"]
    assert far_losses("sft", golden, found) == []
    found["events"]["."][1]["loss"] = 1.5003
    assert far_losses("sft", golden, found) == [".: step of step 2: loss 1.5 became 1.5003"]
    assert far_losses("grpo", golden, found) == []


@pytest.mark.parametrize("part", ["events", "final"])
def test_what_is_missing_or_new_is_a_difference(part: str) -> None:
    golden, more = example(), example()
    more[part]["other"] = copy.deepcopy(more[part].popitem()[1])
    assert differences(golden, more) and differences(more, golden)
    fewer = example()
    fewer["events"]["."].pop()
    del fewer["final"]["final"]["names"]
    assert len(differences(golden, fewer)) == len(differences(fewer, golden)) == 2
    assert far_losses("sft", golden, fewer)


def test_a_hash_tells_values_types_and_shapes_apart() -> None:
    x = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    others = [x.reshape(3, 2), x.double(), x + 1e-7 * x, x.to(torch.bfloat16), x.t()]
    assert tensor_hash(x) == tensor_hash(x.clone()) == tensor_hash(x.t().contiguous().t())
    assert len({tensor_hash(t) for t in [x, *others]}) == 6


def test_what_differs_between_machines_is_named() -> None:
    here = machine.fingerprint()
    assert machine.unlike(here, dict(here)) == ""
    assert machine.unlike({**here, "torch": "1.0"}, here) == f"torch 1.0 there, {here['torch']} here"
