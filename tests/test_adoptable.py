"""The package beyond this machine: systems without Unix's modules and bitsandbytes, and the wheel in a new environment."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HIDE = """
import os, pkgutil, psutil, sys
for name in ("bitsandbytes", "fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
del os.fork, os.sched_getaffinity
"""
"""What not every system has, taken away before anything is imported, except psutil: its Linux half imports resource, and
elsewhere it is another one."""


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, without the modules above."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-c", HIDE + code]
    return subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, timeout=600)


@pytest.mark.slow
def test_check_works_without_bitsandbytes_and_unix(tmp_path: Path) -> None:
    done = run("from llmrecipe.cli.app import main\nmain(['check', 'recipe=sft_lora'])", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "trained" in done.stdout
    done = run("from llmrecipe.cli.app import main\nmain(['check', 'recipe=sft_lora', 'stack=[nf4,lora]'])", tmp_path)
    assert done.returncode == 2 and "need bitsandbytes, which cannot be imported here" in done.stderr


@pytest.mark.slow
def test_every_module_is_imported_and_a_recipe_trains_without_bitsandbytes_and_unix(tmp_path: Path) -> None:
    done = run(
        """
import importlib, llmrecipe
names = [m.name for m in pkgutil.walk_packages(llmrecipe.__path__, "llmrecipe.") if not m.name.endswith("__main__")]
for name in names:
    if not name.endswith("bnb_layers"):
        importlib.import_module(name)
print(len(names), "modules")
from llmrecipe.cli.app import main
main(["train", "recipe=sft_lora", "steps=2", "eval.at_start=false", "eval.batches=1", "run.dir=run"])
""",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert int(re.match(r"(\d+) modules", done.stdout)[1]) > 500  # type: ignore[index]
    assert (tmp_path / "run" / "final" / "stack.yaml").is_file()


@pytest.mark.slow
def test_the_wheel_in_a_new_environment_runs_the_demo(tmp_path: Path) -> None:
    """Its dependencies are those installed here; the package itself is found nowhere but in the wheel."""
    pytest.importorskip("hatchling", reason="needs hatchling, which builds the wheel: pip install hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.startswith(("tests/", "recipes/"))]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    python, program = (str(tmp_path / "venv" / "bin" / name) for name in ("python", "llmrecipe"))
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    for number, place in enumerate(dependencies(tmp_path / "others")):
        (site / f"others{number}.pth").write_text(f"{place}\n")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def run_there(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=1500)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run_there(python, "-P", "-c", "import llmrecipe; print(llmrecipe.__file__)").startswith(str(site))
    demo = re.search(r"llmrecipe (train recipe=dpo_lora) .*?--prompt \"([^\"]*)\"", (ROOT / "Makefile").read_text(), re.S)
    assert demo is not None
    assert "done: demo" in run_there(program, *demo[1].split(), "run.dir=demo")
    assert run_there(program, "chat", "demo", "--prompt", demo[2]).strip()


def dependencies(folder: Path) -> list[Path]:
    """Make folders of links to every installed package except this one, which is installed from its sources here."""
    made = []
    places = [Path(place) for place in sys.path if place.endswith("site-packages")]
    for number, place in enumerate(places):
        target = folder / str(number)
        target.mkdir(parents=True)
        for one in place.iterdir():
            if not re.match(r"_*(editable_*)*llmrecipe|.*\.pth$", one.name):
                (target / one.name).symlink_to(one)
        made.append(target)
    return made
