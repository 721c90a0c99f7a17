"""Every registered wrapper, and every objective, on two processes: what one process learns, the same on both ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmrecipe.core import registry
from tests.contract import IMAGES, KINDS, MIXTURES, OPTIONS
from tests.methods.kinds import BASES
from tests.support import ROOT
from tests.trainings import curve, events

WORKER = ROOT / "tests" / "runtime" / "worker.py"
LAUNCH = (
    "import sys; from llmrecipe.runtime.distributed_launch import launch; "
    "sys.exit(launch(sys.argv[2:], 2, program=[sys.executable, sys.argv[1]]))"
)
LIMIT = {
    "classification": ["data.limit=34"],
    "hyper_mtf": ["data.limit=48"],
    "image_classification": ["data.limit=34"],
    "vqa": ["data.limit=120"],
}
"""Rows without which a label would be missing."""


def words_of(kind: str) -> list[str]:
    """An SFT run, or one on pictures, under a wrapper; what trains nothing by itself carries LoRA."""
    stack = [kind, "lora"] if kind in BASES else [kind]
    options = [f"stack.{kind}.{key}={str(value).lower()}" for key, value in OPTIONS.get(kind, {}).items()]
    if kind in IMAGES:
        return ["image_classification", f"stack=[{kind}]", *LIMIT["image_classification"], *options]
    return ["sft", *(["model=native_moe"] if kind in MIXTURES else []), f"stack=[{','.join(stack)}]", *options]


def results(cases: dict[str, list[str]], folder: Path, processes: int) -> None:
    """Run every case in one launch (see worker.py)."""
    folder.mkdir()
    listed = folder / "cases.json"
    listed.write_text(json.dumps(cases), encoding="utf-8")
    start = [sys.executable, str(WORKER)] if processes == 1 else [sys.executable, "-c", LAUNCH, str(WORKER)]
    done = subprocess.run([*start, str(listed), str(folder)], capture_output=True, text=True, timeout=3000, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


class Matrix:
    """The cases of a module, each run once on one process and once on two."""

    def __init__(self, folder: Path, cases: dict[str, list[str]]):
        self.folder = folder
        for processes in (1, 2):
            results(cases, folder / str(processes), processes)

    def said(self, processes: int, name: str, rank: int) -> dict[str, Any]:
        """What a process said of a case."""
        return json.loads((self.folder / str(processes) / name / f"rank{rank}.json").read_text(encoding="utf-8"))

    def learned(self, processes: int, name: str, rank: int) -> dict[str, torch.Tensor]:
        """What a process's own model learned."""
        return load_file(str(self.folder / str(processes) / name / f"rank{rank}.safetensors"))

    def compare(self, name: str) -> None:
        """Both ranks to the bit; one process up to the order of additions, choices exactly."""
        for rank in (0, 1):
            said = self.said(2, name, rank)
            assert "error" not in said, said
            assert (said["world"], said["rank"]) == (2, rank)
        ours, other = self.learned(2, name, 0), self.learned(2, name, 1)
        alone = self.learned(1, name, 0)
        assert ours.keys() == other.keys() == alone.keys() and ours
        assert [step for step, *_ in curve(self.folder / "2" / name / "run")] == [1, 2]
        points = [[(loss, norm or 0.0) for _, loss, norm, _ in curve(self.folder / str(n) / name / "run")] for n in (1, 2)]
        for one, two in zip(*points, strict=True):
            assert two == pytest.approx(one, rel=1e-3, abs=1e-5), "loss and gradient norm (none without gradients)"
        held = [
            [e["eval/loss"] for e in events(self.folder / str(n) / name / "run", "evaluation") if "eval/loss" in e]
            for n in (1, 2)
        ]
        assert held[1] == pytest.approx(held[0], rel=1e-3, abs=1e-5), "the same rows are evaluated"
        for key, value in ours.items():
            assert torch.equal(value, other[key]), f"{key} differs between the ranks"
            if value.is_floating_point():
                torch.testing.assert_close(value, alone[key], atol=5e-4, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}")
            else:
                assert torch.equal(value, alone[key]), f"another choice at {key}"
        folder = self.folder / "2" / name / "run"
        assert json.loads((folder / "status.json").read_text(encoding="utf-8"))["status"] == "done"
        assert (folder / "final" / "metrics.json").is_file()


def without_dropout(kind: str) -> list[str]:
    """A wrapper whose dropout is on by default, without it: each process draws masks of its own rows."""
    return [f"stack.{kind}.dropout=0"] if "dropout" in registry.spec("stack", kind).options else []


WRAPPERS = {kind: [*words_of(kind), *without_dropout(kind)] for kind in KINDS}
LORA = ["stack=[lora]", "stack.lora.r=4"]
SAMPLED = ["objective.answers=2", "objective.max_new_tokens=6", "objective.epochs=1", "objective.minibatches=1"]
"""Short rollouts; one minibatch, because each process deals its own prompts into minibatches."""


def sampled(name: str) -> list[str]:
    """Those of them that an objective has whose policy writes the rows it is trained on."""
    spec = registry.spec("objective", name)
    options = spec.options if spec.facts.get("samples") else ()
    return [w for w in SAMPLED if w.partition("=")[0].partition(".")[2] in options]


RECIPES = {"classification": "classify", "hyper_mtf": "hypertuning"}
"""Recipes of objectives that have another name."""
HYPERMODEL = ("caclm", "hyper_mtf")
"""Objectives that train a hypermodel, with which no other wrapper shares a stack."""


def objectives() -> dict[str, list[str]]:
    """Each objective's own recipe, under LoRA or the hypermodel that it trains."""
    stems = {path.stem for path in (ROOT / "recipes").rglob("*.yaml")}
    names = {name: RECIPES.get(name, name) for name in registry.names("objective")}
    stacks = {name: [] if name in HYPERMODEL else LORA for name in names}
    return {
        name: [f"{stem}_lora" if f"{stem}_lora" in stems else stem, *stacks[name], *LIMIT.get(name, []), *sampled(name)]
        for name, stem in names.items()
    }


OBJECTIVES = objectives()
CHOICES = {
    **{
        f"lora {init}": ["sft", *LORA, f"stack.lora.init={init}", "stack.lora.init_batches=3"]
        for init in ("eva", "corda", "lora_ga")
    },
    "lora loftq": ["sft", "stack=[nf4,lora]", "stack.lora.r=4", "stack.lora.init=loftq"],
    "lora loftq and codes": ["sft", "stack=[nf4,lora]", "stack.lora.r=4", "stack.lora.init=loftq", "stack.lora.loftq_iter=3"],
    "lora mica": ["sft", *LORA, "stack.lora.init=mica"],
    "dora biases": ["sft", "stack=[dora]", "stack.dora.bias=all", "model.init=random", "model.config={attention_bias: true}"],
    "lora biases": ["sft", "stack=[lora]", "stack.lora.bias=all", "model.init=random", "model.config={attention_bias: true}"],
    "neftune and forgetting": ["sft", "objective.neftune_alpha=5", "eval.forgetting={old: builtin:stories}"],
    "group gates": ["sft", "stack=[group_mask]", "stack.group_mask.hard_l0=true", "stack.group_mask.l0_steps=1"],
}
"""Options under which a wrapper looks at data, or opens what it leaves alone by default."""


@pytest.fixture(scope="module")
def wrappers(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    """Every wrapper."""
    return Matrix(tmp_path_factory.mktemp("wrappers"), WRAPPERS)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    """Every objective."""
    return Matrix(tmp_path_factory.mktemp("objectives"), OBJECTIVES)


@pytest.fixture(scope="module")
def choices(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    """Every choice."""
    return Matrix(tmp_path_factory.mktemp("choices"), CHOICES)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrapper_learns_on_two_processes_what_it_learns_on_one(kind: str, wrappers: Matrix) -> None:
    wrappers.compare(kind)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_learns_on_two_processes_what_it_learns_on_one(name: str, tasks: Matrix) -> None:
    tasks.compare(name)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_made_from_data_is_one_on_two_processes(name: str, choices: Matrix) -> None:
    choices.compare(name)
