"""`runtime.shard` on two processes: the losses and weights of one process, each with its part of the memory, and resumption."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe.core.errors import RecipeError, RunError
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.schema import RuntimeSection
from llmrecipe.runs.checkpoint_io import PARTS, fault, read_checkpoint
from llmrecipe.runtime.processes import Runtime
from llmrecipe.training.train import train
from tests.runtime.worker import SHORT
from tests.support import ROOT
from tests.trainings import QUIET, curve, learned

pytestmark = pytest.mark.timeout(1800)
WORKER = ROOT / "tests" / "runtime" / "worker.py"
LAUNCH = (
    "import sys; from llmrecipe.runtime.distributed_launch import launch; "
    "sys.exit(launch(sys.argv[3:], int(sys.argv[1]), program=[sys.executable, sys.argv[2]]))"
)
STEADY = ["schedule=constant", "schedule.warmup=0"]
"""Steps do not depend on the length of the run, so a longer one goes on as a shorter one."""


def launched(folder: Path, cases: dict[str, list[str]], processes: int = 2) -> None:
    """Run every case on some processes, each in `folder/NAME/run` (see worker.py)."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = folder / "cases.json"
    listed.write_text(json.dumps(cases), encoding="utf-8")
    start = [sys.executable, "-c", LAUNCH, str(processes), str(WORKER), str(listed), str(folder)]
    done = subprocess.run(start, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    for name in cases:
        for rank in range(processes):
            said = json.loads((folder / name / f"rank{rank}.json").read_text(encoding="utf-8"))
            assert "error" not in said, said


def alone(folder: Path, recipe: str, *words: str) -> Path:
    """The same run on one process."""
    train(compose(recipe, [*QUIET, *SHORT, *STEADY, f"run.dir={folder}", *words]))
    return folder


def equal(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    """Losses, gradient norms and what was learned, up to the order of additions."""
    ours, theirs = curve(one), curve(other)
    assert [step for step, *_ in ours] == [step for step, *_ in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert b[1] == pytest.approx(a[1], abs=tolerance)
        assert b[2] == (a[2] and pytest.approx(a[2], rel=1e-4)), "no norm where there is no gradient"
    left, right = learned(one), learned(other)
    assert left and left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, atol=5e-4, rtol=1e-3)


def proved(run: Path) -> dict[str, Any]:
    """What the run has proved of its division."""
    found: dict[str, Any] = json.loads((run / "report.json").read_text(encoding="utf-8"))["proved"]["sharding"]
    return found


DIVIDED = {
    "zero1": ["sft", "runtime=zero1", *STEADY],
    "zero2": ["sft_lora", "runtime=zero2", "runtime.state_dict=sharded", *STEADY],
    "zero3": ["sft", "runtime=zero3", "runtime.offload=cpu", *STEADY],
}
"""Cases that are compared with the same run on one process."""
SMALL = ["steps=1", "data.limit=4", "batch.size=4", "data.validation=null", "save.every=null", *STEADY]
OTHERS = {
    "zero2_full": ["sft", "runtime=zero2"],
    "zero1_lora": ["sft_lora", "runtime=zero1"],
    "zero3_lora": ["sft_lora", "model.gradient_checkpointing=true", "runtime=zero3"],
    "zero1_micro": ["sft_lora", "batch.micro=1", "runtime=zero1"],
    "zero2_offload": ["sft", "runtime=zero2", "runtime.offload=cpu"],
    "zero3_dpo": ["dpo_lora", "runtime=zero3"],
    **{f"{shard}_ia3": ["sft", "stack=[ia3]", f"runtime={shard}"] for shard in ("zero1", "zero2", "zero3")},
}
"""Cases of one step, whose losses and held bytes are compared; a recipe has one run on one process."""
CASES = {**DIVIDED, **{name: [*words, *SMALL] for name, words in OTHERS.items()}}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case on two processes, in one launch."""
    folder = tmp_path_factory.mktemp("two")
    launched(folder, CASES)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full training and LoRA on one process."""
    folder = tmp_path_factory.mktemp("one")
    alone(folder / "sft", "sft")
    alone(folder / "sft_lora", "sft_lora")
    for words in dict.fromkeys(map(undivided, OTHERS)):
        alone(folder / short(words), words[0], *SMALL, *words[1:])
    return folder


def short(words: tuple[str, ...]) -> str:
    """The folder of a small case."""
    return "small-" + re.sub(r"\W+", "-", "-".join(words)).strip("-")


def undivided(name: str) -> tuple[str, ...]:
    """The words of a case on one process, without those that change nothing in its losses."""
    same = ("runtime", "batch.micro", "model.gradient_checkpointing")
    return tuple(word for word in OTHERS[name] if not word.startswith(same))


@pytest.mark.parametrize("name", OTHERS)
def test_methods_and_objectives_train_divided_what_they_train_whole(name: str, one: Path, two: Path) -> None:
    equal(one / short(undivided(name)), two / name / "run")
    facts = proved(two / name / "run")
    assert name[:5] == facts["shard"]
    # Each number once, on one of the two; a vector, which has one row, is whole on the first.
    held = [part["optimizer"] for part in facts["processes"]]
    assert sum(held) == pytest.approx(facts["whole"]["optimizer"], rel=0.01)
    assert name.endswith("ia3") or max(held) < 0.6 * sum(held)


@pytest.mark.parametrize("name", DIVIDED)
def test_two_processes_train_what_one_trains(name: str, one: Path, two: Path) -> None:
    equal(one / CASES[name][0], two / name / "run")


@pytest.mark.parametrize("name", DIVIDED)
def test_each_process_holds_its_part(name: str, two: Path) -> None:
    facts = proved(two / name / "run")
    whole, parts = facts["whole"], facts["processes"]
    assert len(parts) == 2
    for part in parts:
        assert part["optimizer"] == pytest.approx(whole["optimizer"] / 2, rel=0.01)
        for key in ("parameters", "gradients"):
            divided = name != "zero1"
            assert part[key] == pytest.approx(whole[key] / 2 if divided else whole[key], rel=0.01)
    if name == "zero3":
        assert max(sum(part.values()) for part in parts) < 0.6 * sum(whole.values())


def test_both_processes_end_with_the_same_weights(two: Path) -> None:
    from safetensors.torch import load_file

    for name in DIVIDED:
        ours, theirs = (load_file(str(two / name / f"rank{rank}.safetensors")) for rank in (0, 1))
        assert ours and [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def rows_in(folder: Path) -> dict[str, int]:
    """Tensor -> its rows in the files of a folder, which are two, one of each process."""
    from safetensors import safe_open

    rows: dict[str, int] = {}
    files = sorted(folder.iterdir())
    assert len(files) == 2 and {file.suffix for file in files} == {".safetensors"}
    for file in files:
        with safe_open(file, "pt") as part:
            for name in part.keys():  # noqa: SIM118
                rows[name] = rows.get(name, 0) + part.get_slice(name).get_shape()[0]
    return rows


def test_each_process_writes_its_part_of_the_state(two: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    kept = {name: two / name / "run" / "checkpoints" / "step-000002" for name in ("zero2", "zero3")}
    assert [path.name for path in kept["zero3"].iterdir() if path.is_dir()] == []
    assert load_file(kept["zero2"] / "delta.safetensors") == {}
    assert {name.rpartition("//")[2] for name in load_file(kept["zero2"] / "optimizer.safetensors")} == {"step"}
    trained = learned(two / "zero2" / "run")
    assert trained and rows_in(kept["zero2"] / f"delta{PARTS}") == {name: len(value) for name, value in trained.items()}
    # Two averages of AdamW: each row is there once for each.
    averages = {f"{name}//{key}": len(value) for name, value in trained.items() for key in ("exp_avg", "exp_avg_sq")}
    assert rows_in(kept["zero2"] / f"optimizer{PARTS}") == averages
    whole = read_checkpoint(kept["zero2"]).tensors["delta"]
    assert whole.keys() == trained.keys() and all(torch.equal(whole[name], trained[name]) for name in trained)
    copy = tmp_path / "checkpoints" / "step-000002"
    shutil.copytree(kept["zero2"], copy)
    assert fault(copy) is None
    files = sorted((copy / f"delta{PARTS}").iterdir())
    damaged = files[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert fault(copy) == f"{files[1].name} has changed since it was written"


def test_a_divided_run_goes_on_undivided_on_one_process(tmp_path: Path, two: Path) -> None:
    whole = alone(tmp_path / "whole", "sft_lora", "steps=3")
    part = two / "zero2" / "run"
    undivided = ["steps=3", "runtime.shard=none", "runtime.processes=1", "runtime.state_dict=full"]
    train(compose(part / "recipe.yaml", undivided), part)
    equal(whole, part)


def test_one_process_has_nothing_to_divide() -> None:
    with pytest.raises(RecipeError, match="zero3 divides a training over processes and one was started"):
        Runtime.start(RuntimeSection(shard="zero3"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_goes_on_with_other_processes_and_another_division(tmp_path: Path) -> None:
    """zero1 on 2, zero3 on 3, hybrid zero3 on 4 (2 groups of 2), zero2 on 2: the fifth step of one run of one process.

    The first and the last write whole states, the others their parts.
    """
    whole = alone(tmp_path / "whole", "sft", "steps=5")
    run = tmp_path / "a" / "parts" / "run"
    launched(tmp_path / "a", {"parts": ["sft", "runtime=zero1", *STEADY]})
    launched(tmp_path / "b", {"parts": [f"resume={run}", "steps=3", "runtime.shard=zero3", "runtime.state_dict=sharded"]}, 3)
    launched(tmp_path / "c", {"parts": [f"resume={run}", "steps=4", "runtime.shard=zero3", "runtime.dp_replicate=2"]}, 4)
    facts = proved(run)
    assert len(facts["processes"]) == 4
    assert max(sum(part.values()) for part in facts["processes"]) < 0.6 * sum(facts["whole"].values())
    launched(
        tmp_path / "d",
        {"parts": [f"resume={run}", "steps=5", "runtime.shard=zero2", "runtime.dp_replicate=1", "runtime.state_dict=full"]},
        2,
    )
    equal(whole, run, 5e-5)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_what_trains_stays_float32_in_a_low_precision_model(dtype: str, tmp_path: Path) -> None:
    words = [f"model.dtype={dtype}", *STEADY]
    launched(tmp_path / "two", {"lora": ["sft_lora", "runtime=zero3", *words], "sft": ["sft", "runtime=zero3", *words]})
    for name, recipe in (("lora", "sft_lora"), ("sft", "sft")):
        one = alone(tmp_path / name, recipe, f"model.dtype={dtype}")
        for a, b in zip(curve(one), curve(tmp_path / "two" / name / "run"), strict=True):
            assert b[1] == pytest.approx(a[1], rel=2e-2)
        facts = proved(tmp_path / "two" / name / "run")
        # AdamW keeps two float32 averages an entry: eight bytes of state for four of gradient.
        assert facts["whole"]["optimizer"] == pytest.approx(2 * facts["whole"]["gradients"], rel=0.01)


def test_parts_that_cannot_be_written_or_read_are_an_error_of_the_disk_or_the_run(tmp_path: Path) -> None:
    from llmrecipe.runtime.sharding import read_parts, write_parts

    state = {"a//exp_avg": torch.arange(12.0).reshape(4, 3)}
    with warnings.catch_warnings(action="ignore"):  # of one process that writes alone
        write_parts(tmp_path / "parts", state)
    found = {"a//exp_avg": torch.zeros(4, 3)}
    read_parts(tmp_path / "parts", found)
    assert torch.equal(found["a//exp_avg"], state["a//exp_avg"])
    with pytest.raises(RunError, match=r"cannot be read.*b//exp_avg"):
        read_parts(tmp_path / "parts", {"b//exp_avg": torch.zeros(4, 3)})
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_parts(tmp_path / "file" / "parts", state)


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["full", "sharded"])
def test_a_divided_run_goes_on_to_the_bit(kept: str, tmp_path: Path) -> None:
    words = ["sft", "runtime=zero3", f"runtime.state_dict={kept}", *STEADY]
    parts = tmp_path / "parts" / "run"
    cases = {"whole": [*words, "steps=3"], "parts": words, "again": [f"resume={parts}", "steps=3"]}
    launched(tmp_path, cases)
    assert curve(parts) == curve(tmp_path / "whole" / "run") and len(curve(parts)) == 3
    ours, theirs = learned(parts), learned(tmp_path / "whole" / "run")
    assert ours and ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


ZEROTH_ORDER = {
    "zero2": ["mezo", "runtime=zero2"],
    "zero3": ["mezo", "stack.mezo.optimizer=adam", "stack.mezo.moments=store", "optim.lr=1e-4", "runtime=zero3"],
    "lora": ["mezo_lora", "runtime=zero3"],
}


@pytest.mark.slow
def test_parts_of_weights_move_along_their_part_of_the_noise(tmp_path: Path) -> None:
    """Without gradients, each process draws the noise of the whole and moves what it holds; a resumed run draws the same."""
    again = tmp_path / "zero3" / "run"
    more = {"again": [f"resume={again}", "steps=3"], "whole": [*ZEROTH_ORDER["zero3"], "steps=3", *STEADY]}
    launched(tmp_path, {**{name: [*words, *STEADY] for name, words in ZEROTH_ORDER.items()}, **more})
    for name, (recipe, *words) in ZEROTH_ORDER.items():
        steps = ["steps=3"] if name == "zero3" else []
        one = alone(tmp_path / f"one-{name}", recipe, *(w for w in words if not w.startswith("runtime=")), *steps)
        equal(one, tmp_path / name / "run")
        facts = proved(tmp_path / name / "run")
        assert facts["whole"]["gradients"] == facts["whole"]["optimizer"] == 0
        assert all(
            part["parameters"] == pytest.approx(facts["whole"]["parameters"] / 2, rel=0.01) for part in facts["processes"]
        )
    assert curve(again) == curve(tmp_path / "whole" / "run") and len(curve(again)) == 3
    ours, theirs = learned(again), learned(tmp_path / "whole" / "run")
    assert ours and [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


SAMPLED = ["objective.max_new_tokens=6", "objective.epochs=1", "objective.minibatches=1"]
"""Short rollouts, as the matrix of processes has them."""
RECOMPUTED = {
    "zero1": {"grpo": ["grpo", "objective.answers=2", *SAMPLED], "ppo": ["ppo", *SAMPLED]},
    "zero2": {"dpo": ["dpo_lora"], "sft": ["sft"]},
    "zero3": {"dpo": ["dpo_lora"], "sft": ["sft"]},
}
"""Objectives that sample share whole parameters alone."""


@pytest.mark.slow
@pytest.mark.parametrize("shard", RECOMPUTED)
def test_recomputation_changes_nothing_in_a_divided_run(shard: str, tmp_path: Path) -> None:
    """Blocks whose parts are gathered once more for the backward pass compute what they computed, to the bit."""
    more = [f"runtime={shard}", "steps=1", "save.every=null", *STEADY]
    cases = {
        f"{name}_{on}": [*words, *more, f"model.gradient_checkpointing={on}"]
        for name, words in RECOMPUTED[shard].items()
        for on in ("true", "false")
    }
    launched(tmp_path, cases)
    for name in RECOMPUTED[shard]:
        own, whole = (tmp_path / f"{name}_{on}" / "run" for on in ("true", "false"))
        assert curve(own) == curve(whole) and len(curve(own)) == 1
        ours, theirs = learned(own), learned(whole)
        assert theirs and ours.keys() == theirs.keys()
        assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == [], name
