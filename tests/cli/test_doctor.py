"""`doctor` says of every requirement and extra what is installed, and each extra is there for code that uses it."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from llmrecipe.cli import doctor
from llmrecipe.cli.app import run_command as command
from llmrecipe.models import fused_kernels
from tests.models.test_fused_kernels import stand_ins, wrong

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {name: lines for name, lines in PROJECT["optional-dependencies"].items() if name != "dev"}
IMPORTED = {"mlflow-skinny": "mlflow", "lm-eval": "lm_eval", "rouge-score": "rouge_score", "liger-kernel": "liger_kernel"}
"""Package -> the module it installs, where that has another name."""
BEHIND = {"scipy": "optuna.samplers.GPSampler"}
"""Package that another one imports -> what it is imported for."""


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What is installed, instead of what is on this machine; the requirements are those of the project's file."""
    from importlib import metadata

    lines = [*PROJECT["dependencies"], *(f"{one}; extra == '{name}'" for name, all_ in EXTRAS.items() for one in all_)]
    found: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in found:
            raise metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    monkeypatch.setattr(metadata, "version", version)
    return found


def test_every_extra_is_used_by_code() -> None:
    code = "\n".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "llmrecipe").rglob("*.py") if path.name != "doctor.py"
    )
    for extra, lines in EXTRAS.items():
        for line in lines:
            name = Requirement(line).name
            used = BEHIND.get(name) or IMPORTED.get(name, name)
            assert re.search(rf"(import|from) {used}\b|[\"'.]{used}[\"'.]|\b{re.escape(used)}\(?,", code), f"{extra}: {name}"


def test_the_tested_versions_are_those_the_suite_runs_with() -> None:
    lines = set((ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").split())
    named = {line.lower() for line in doctor.TESTED.read_text(encoding="utf-8").split()}
    assert named <= {line.lower() for line in lines}
    ours = [Requirement(line).name.lower() for line in PROJECT["dependencies"]]
    assert {name for name in ours if any(line.lower().startswith(f"{name}==") for line in lines)} <= set(
        doctor.tested_versions()
    )


def test_an_extra_is_ready_only_with_all_of_its_packages(installed: dict[str, str]) -> None:
    installed |= {"optuna": "5.0.0", "sacrebleu": "2.6.0", "rouge-score": "0.1.2"}
    found = doctor.extras()
    assert set(found) == set(EXTRAS)
    assert found["search"] == "without scipy (pip install 'llmrecipe[search]')"
    assert found["eval"] == "not installed (pip install 'llmrecipe[eval]')"
    assert found["metrics"] == "ready: sacrebleu 2.6.0, rouge-score 0.1.2"
    installed["sacrebleu"] = "2.0"
    assert doctor.extras()["metrics"] == "ready: sacrebleu 2.0 (too old: needs >=2.4), rouge-score 0.1.2"


def test_a_version_that_is_too_old_missing_or_untested_is_named(installed: dict[str, str]) -> None:
    installed |= {"torch": "2.7.1", "transformers": "99.0.0", "numpy": doctor.tested_versions()["numpy"]}
    found = doctor.packages()
    assert found["torch"] == "2.7.1 (too old: needs >=2.9)"
    assert found["transformers"] == f"99.0.0 (untested: newer than {doctor.tested_versions()['transformers']})"
    assert found["numpy"] == installed["numpy"] and found["accelerate"] == "missing"


def test_kernels_are_tried_where_the_machine_has_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert doctor.kernels() == "liger-kernel needs a CUDA GPU, and the device is cpu"
    found = stand_ins()
    monkeypatch.setattr(fused_kernels, "kernels_lacking", lambda device: None)
    monkeypatch.setattr(fused_kernels, "load_kernels", lambda: found)
    assert doctor.kernels() == "liger-kernel works on cpu"
    found["silu"] = wrong(found["silu"], backward=False)
    assert doctor.kernels().startswith("liger-kernel gives wrong numbers on cpu (")
    del found["silu"]
    assert doctor.kernels() == "liger-kernel does not work here: KeyError: 'silu'"


def test_the_verb_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["doctor", "--json"]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert facts["packages"] == doctor.packages() or facts["packages"] == doctor.UNKNOWN
    assert command(["doctor"]) == 0
    assert "nf4" in capsys.readouterr().out
