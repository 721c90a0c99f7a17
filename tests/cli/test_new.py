"""What `llmrecipe new` writes passes its own test and the contract as it stands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmrecipe.cli.app import run_command
from tests.support import ROOT

KINDS = ("method", "objective", "metric")


def pytest_in(folder: Path, *words: str, **variables: str) -> None:
    """Run pytest as somebody who stands in a folder."""
    path = os.pathsep.join([str(folder), str(ROOT)])
    words = ("-q", "-p", "no:cacheprovider", *words)
    env = {**os.environ, "PYTHONPATH": path, **variables}
    done = subprocess.run([sys.executable, "-m", "pytest", *words], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in which one of each kind was written."""
    monkeypatch.chdir(tmp_path)
    for kind in KINDS:
        assert run_command(["new", kind, f"fresh_{kind}", "--dir", "kit"]) == 0
    return tmp_path


def test_a_component_comes_with_its_recipe_and_its_test(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = ("kit/{}.py", "recipes/{}.yaml", "tests/test_{}.py")
    wanted = ["kit/__init__.py", *(place.format(f"fresh_{kind}") for kind in KINDS for place in places)]
    assert sorted(str(p.relative_to(written)) for p in written.rglob("*.*")) == sorted(wanted)
    for kind in ("objective", "metric"):
        lines = (written / "kit" / f"fresh_{kind}.py").read_text().splitlines()
        assert {line.split()[1] for line in lines if line.startswith("from llmrecipe")} == {"llmrecipe.plugin"}
    pytest_in(written, "tests", "-k", "hand")
    assert run_command(["new", "metric", "other", "--dir", "kit"]) == 0
    assert "python -m pytest tests/test_other.py; python -m llmrecipe train recipe=other" in capsys.readouterr().out
    (written / "recipes" / "other.yaml").unlink()
    assert run_command(["new", "metric", "other", "--dir", "kit"]) == 2
    assert "other.py exists already" in capsys.readouterr().err and not (written / "recipes" / "other.yaml").exists()


@pytest.mark.slow
def test_its_test_passes(written: Path) -> None:
    pytest_in(written, "tests")


@pytest.mark.slow
def test_it_keeps_the_promises_of_its_kind(written: Path) -> None:
    files = [str(ROOT / "tests" / name) for name in ("contract.py", "objectives/contract.py", "feedback/contract.py")]
    pytest_in(written, *files, "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "--plugins", "kit", "-k", "fresh")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["method"], "llmrecipe new method NAME"),
        (["methd", "x"], "did you mean 'method'?"),
        (["method", "lora"], "there is a stack of that name already"),
        (["objective", "qlora"], "there is a recipe of that name already"),
        (["metric", "My-Metric"], "small letters, digits and _; try my_metric"),
        (["metric", "class"], "small letters, digits and _"),
        (["metric", "mine", "--dir", "my-kit"], "--dir my-kit: a package's name is letters, digits and _"),
    ],
)
def test_a_name_that_cannot_be_is_refused_and_nothing_is_written(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(["new", *words]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_a_recipe_is_written_with_or_without_saying_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(["new", "mine", "--stack", "lora"]) == run_command(["new", "recipe", "yours", "--stack", "lora"]) == 0
    mine, yours = ((tmp_path / "recipes" / f"{n}.yaml").read_text() for n in ("mine", "yours"))
    assert mine.replace("mine", "yours") == yours


def test_a_place_that_cannot_be_written_is_named_with_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").write_text("a file where the folder would be")
    (tmp_path / "rows.csv").write_text("prompt,completion\n" + "Who?,Me.\n" * 4)
    for words, remedy in (
        (["mine"], "`new FOLDER/mine.yaml`"),
        (["mine", "--from-data", "rows.csv"], "`new FOLDER/mine.yaml`"),
        (["metric", "close", "--dir", "recipes/kit"], "--dir FOLDER/my_components"),
    ):
        assert run_command(["new", *words]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "cannot be written" in said and remedy in said


def test_inside_the_package_files_go_where_the_tree_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmrecipe.cli import skeletons

    root = tmp_path / "llmrecipe"
    for folder in ("llmrecipe/methods/selective", "recipes/selective", "tests/methods/selective"):
        (root / folder).mkdir(parents=True)
    monkeypatch.setattr(skeletons, "PACKAGE", root / "llmrecipe")
    monkeypatch.setattr(skeletons, "packaged", lambda: root / "recipes")
    files = skeletons.write_skeleton("method", "fresh", root / "llmrecipe" / "methods" / "selective")
    places = ["llmrecipe/methods/selective/fresh.py", "recipes/selective/fresh.yaml", "tests/methods/selective/test_fresh.py"]
    assert [str(p.relative_to(root)) for p in files] == places
    assert "from llmrecipe.methods.selective.fresh import RankOne" in files[2].read_text()
    assert "plugins" not in files[1].read_text()
