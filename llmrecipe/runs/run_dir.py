"""The run directory: the files of a run, and the lock that decides who may write to it.

    runs/<recipe>/<time>-<key>/
        recipe.yaml (of a step step.yaml)  command.txt  environment.json  identity.json  events.jsonl  status.json
        checkpoints/  final/

`status.json` says running, done, failed or interrupted. A lock on the file `lock`, held by the operating system for as long
as the process lives, keeps a second writer out; a run whose status is `running` and whose lock is free was killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shlex
import sys
import time
import uuid
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrecipe.core.errors import RunError
from llmrecipe.core.file_lock import hold, is_held
from llmrecipe.core.foreign import parse_json, read_json
from llmrecipe.core.path_hints import near_path, plain_path, runs_inside
from llmrecipe.core.redact import redact_text
from llmrecipe.runs.durable import clear_leftovers, delete, unfinished_path, write_text
from llmrecipe.runs.events import is_step, last_step
from llmrecipe.runs.run_names import fresh_folder

if TYPE_CHECKING:
    from llmrecipe.recipe.compose import Composition
    from llmrecipe.runtime.processes import Runtime

STATES = ("running", "done", "failed", "interrupted")
PACKAGES = (
    "llmrecipe",
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "safetensors",
    "numpy",
)
VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "WORLD_SIZE", "CUBLAS_WORKSPACE_CONFIG")
"""Environment variables that affect what a run computes; no others are recorded."""
DESCRIPTIONS = ("recipe.yaml", "step.yaml")
"""Files that describe a run: a training's recipe, or a step's options."""
BEST = "best"
"""Folder of the best weights, where a checkpoint holds trained tensors alone."""
IDENTITY = "identity.json"
"""File of the run's own name and of the fingerprints of what it is trained on (see `runs.identity`)."""
FORGETTING = "forgetting.json"
"""File of what the rows of `eval.forgetting` scored before the first step."""
OWN_FILES = ("recipe.yaml", "command.txt", "environment.json", IDENTITY, FORGETTING, "events.jsonl", "status.json", "lock")


class RunDir:
    """One run's folder. In a run of several processes only the main one writes; the others know the path."""

    def __init__(self, path: Path, main: bool = True):
        self.path = path
        self.main = main
        self._lock: Any = None

    # --- opening --------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, composition: Composition, runtime: Runtime | None = None) -> RunDir:
        """Create a run directory for a recipe, locked by this process.

        Raises:
            RunError: `run.dir` contains a finished run, another process writes to it, or it is not a run directory.
        """
        if runtime is not None and not runtime.is_main:
            return cls(_agreed(runtime), main=False)
        try:
            found = cls._create(composition)
        except Exception as error:
            _tell(runtime, {"error": str(error)})
            raise
        _tell(runtime, {"path": str(found.path)})
        return found

    @classmethod
    def _create(cls, composition: Composition) -> RunDir:
        section = composition.recipe.run
        if section.dir is not None:
            found = cls(Path(section.dir))
            found._claim()
        else:
            found = cls(fresh_folder(Path(section.root) / (section.name or composition.name), recipe_hash(composition.mapping)))
        found.lock()
        found._describe(composition)
        found.status("running")
        return found

    @classmethod
    def open(cls, path: str | Path, runtime: Runtime | None = None, write: bool = True) -> RunDir:
        """Open an existing run directory; `write=True` locks it, to continue the run.

        Raises:
            RunError: there is no run at the path, or another process is writing to it.
        """
        path = Path(path)
        if not (path / "status.json").is_file() or description(path) is None:
            hint = plain_path(str(path)) or (runs_inside(path) if path.is_dir() else near_path(path))
            raise RunError(f"{path} is not a run directory (it has no recipe.yaml and status.json){hint}")
        main = runtime is None or runtime.is_main
        found = cls(path, main)
        if write and main:
            found.lock()
        return found

    def lock(self) -> None:
        """Lock the directory against other writers until this process ends.

        Raises:
            RunError: another living process holds the lock.
        """
        self._lock = hold(self.path / "lock", f"{self.path} is being written by another process")

    def unlock(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def tidy(self) -> None:
        """Delete what a finished run does not need: its best weights, which are in `final/`, and leftovers of a kill.

        Best weights to which a run that continues from its end would return stay. Call when the status is `done`: until then
        a resume may need all of it. Only the main process deletes.
        """
        from llmrecipe.runs.checkpoint_io import best_after_end, keep_only

        if not self.main:
            return
        wanted = best_after_end(self.path / "checkpoints") if (self.path / BEST).exists() else None
        if wanted is not None:
            keep_only(self.path / BEST, {wanted})
        elif (self.path / BEST).exists():
            delete(self.path / BEST)
        for folder in (self.path, self.path / "checkpoints"):
            clear_leftovers(folder)

    def _tidy_again(self) -> None:
        """Delete what a kill between the end of the run and the end of its `tidy` left, where the folder may be written."""
        with contextlib.suppress(RunError, OSError):
            self.lock()
            self.tidy()
        self.unlock()

    def _claim(self) -> None:
        """Make sure that `run.dir` may be written: it is new, empty, or contains a run without checkpoints or result."""
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        if not (self.path / "status.json").is_file() and not self._barely_begun():
            raise RunError(f"run.dir: {self.path} exists and is not a run directory; choose a new folder")
        state = self.read_status()["status"] if (self.path / "status.json").is_file() else "interrupted"
        if state == "done":
            self._tidy_again()
            raise RunError(f"run.dir: {self.path} contains a finished run; choose another folder, or delete it")
        self.lock()
        if has_begun(self.path):
            raise RunError(
                f"run.dir: {self.path} contains a run ({state}) with checkpoints; continue it with resume={self.path}, "
                f"or choose another folder"
            )
        self.unlock()
        for name in OWN_FILES:
            (self.path / name).unlink(missing_ok=True)
            unfinished_path(self.path / name).unlink(missing_ok=True)

    def _barely_begun(self) -> bool:
        """Return whether the folder holds what a start that was killed before its first status leaves, and nothing else."""
        own = {name for file in OWN_FILES for name in (file, unfinished_path(self.path / file).name)}
        names = {path.name for path in self.path.iterdir()}
        return "lock" in names and names <= own

    # --- contents -------------------------------------------------------------------------------------------------

    def _describe(self, composition: Composition) -> None:
        from llmrecipe.recipe.compose import to_yaml

        self.describe("recipe.yaml", to_yaml(composition.mapping))
        self.identify({"run": uuid.uuid4().hex})

    def describe(self, name: str, text: str) -> None:
        """Record what is run (one of `DESCRIPTIONS`), by which command and in which environment."""
        self.write(name, text)
        self.write("command.txt", redact_text(shlex.join(sys.argv)) + "\n")
        here, run = Path.cwd(), self.path.absolute()
        folder = {"absolute": str(here), "relative": os.path.relpath(here, run), "run": str(run)}
        self.write("environment.json", json.dumps({**environment(), "started": now(), "folder": folder}, indent=1) + "\n")

    def redescribe(self, composition: Composition) -> None:
        """Replace the recipe by the one the run continues under, and add the command that continues it to those before it."""
        from llmrecipe.recipe.compose import to_yaml

        kept = self.recipe().get("run") or {}
        place = {key: kept[key] for key in ("dir", "root", "name") if key in kept}
        mapping = {**composition.mapping, "run": {**composition.mapping["run"], **place}}
        command = self.path / "command.txt"
        before = command.read_text(encoding="utf-8") if command.is_file() else ""
        self.write("command.txt", before + redact_text(shlex.join(sys.argv)) + "\n")
        self.write("recipe.yaml", to_yaml(mapping))

    def identity(self) -> dict[str, Any] | None:
        """Return `identity.json`; empty where it is damaged, None where there is none."""
        try:
            value = parse_json((self.path / IDENTITY).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    def identify(self, facts: Mapping[str, Any]) -> None:
        """Write `identity.json`: the run's own name under `run`, and fingerprints."""
        self.write(IDENTITY, json.dumps(facts, indent=1) + "\n")

    def recipe(self) -> dict[str, Any]:
        """Return the composed recipe (or the options of the step) of this run."""
        from llmrecipe.recipe.renames import renamed_file
        from llmrecipe.recipe.yaml_file import read_yaml

        return _unescape(renamed_file(read_yaml(description(self.path) or self.path / "recipe.yaml"), []).value)

    def status(self, state: str, error: str | None = None, **facts: object) -> None:
        """Write `status.json`: the state, the time, the error and further facts such as `step`."""
        if not self.main:
            return
        assert state in STATES, state
        value = {"status": state, "time": now(), "process": os.getpid(), **facts}
        if error is not None:
            value["error"] = redact_text(error)
        self.write("status.json", json.dumps(value, indent=1, ensure_ascii=False) + "\n")
        if state != "running":
            self.unlock()

    def read_status(self) -> dict[str, Any]:
        """Return `status.json`; a run marked `running` whose lock is free was killed, and is reported as `interrupted`.

        Raises:
            RunError: the file cannot be read.
        """
        value: dict[str, Any] = read_json(self.path / "status.json", "the state of the run cannot be read")
        if value.get("status") not in STATES:
            raise RunError(
                f"{self.path}/status.json: 'status' must be one of {', '.join(STATES)}; got {value.get('status')!r:.60}"
            )
        if "step" in value and not is_step(value["step"]):
            value["step"] = 0
        if value["status"] == "running" and "step" in value:
            value["step"] = max(value["step"], last_step(self.path) or 0)
        if value.get("status") == "running" and self._lock is None and not self.locked():
            value |= {"status": "interrupted", "error": "the process was killed"}
        return value

    def locked(self) -> bool:
        """Return whether a running process writes to this run."""
        return is_held(self.path / "lock")

    def latest_checkpoint(self) -> Path | None:
        """Return the newest intact checkpoint, or None."""
        from llmrecipe.runs.checkpoint_io import latest_checkpoint

        return latest_checkpoint(self.path / "checkpoints")

    def write(self, name: str, text: str) -> None:
        """Replace a file atomically and durably: no reader sees half of it, not even after a crash."""
        path = self.path / name
        try:
            write_text(path, text)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def has_begun(path: Path) -> bool:
    """Return whether a folder holds a run that has something to continue from; a run without is started again."""
    return (path / "status.json").is_file() and any((path / name).exists() for name in ("checkpoints", "final"))


def started_in(path: Path) -> Path | None:
    """Return the folder a run was started in, to which paths in its recipe are relative; None where that is not known.

    Of a run that was moved, it is the folder in the same place relative to it, where there is one.
    """
    try:
        kept = parse_json((path / "environment.json").read_bytes())["folder"]
        then, near, run = Path(kept["absolute"]), Path(os.path.normpath(path.absolute() / kept["relative"])), kept["run"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    places = (then, near) if str(path.absolute()) == run else (near, then)
    return next((place for place in places if place.is_dir()), None)


def description(path: Path) -> Path | None:
    """Return the file that describes what a folder was made from; None where there is none."""
    return next((path / name for name in DESCRIPTIONS if (path / name).is_file()), None)


def read_metrics(path: Path) -> dict[str, Any]:
    """Return `final/metrics.json` of a finished training or step; empty where there is none."""
    file = path / "final" / "metrics.json"
    return read_json(file, "the metrics of the run cannot be read") if file.is_file() else {}


def _unescape(mapping: dict[str, Any]) -> dict[str, Any]:
    """Return a mapping with `\\${` unescaped to `${` in every string."""
    return {key: _unescape_in(value) for key, value in mapping.items()}


def _unescape_in(value: object) -> object:
    if isinstance(value, dict):
        return _unescape(value)
    if isinstance(value, list):
        return [_unescape_in(v) for v in value]
    return value.replace("\\${", "${") if isinstance(value, str) else value


def recipe_hash(mapping: dict[str, Any]) -> str:
    """Return the 8-hex-digit hash of a composed recipe, independent of the folder it is written to."""
    content = {k: v for k, v in mapping.items() if k not in ("run", "log")}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _agreed(runtime: Runtime) -> Path:
    """Return the path the main process chose."""
    answer = runtime.broadcast_json(dict[str, str]())
    if "error" in answer:
        raise RunError(answer["error"])
    return Path(answer["path"])


def _tell(runtime: Runtime | None, value: dict[str, str]) -> None:
    if runtime is not None:
        runtime.broadcast_json(value)


def now() -> str:
    """Return the time in ISO format, to the second, with the offset from UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def environment() -> dict[str, Any]:
    """Return versions and devices of this process; no secrets, no user or host names."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "packages": versions,
        "variables": {k: os.environ[k] for k in VARIABLES if k in os.environ},
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        facts["threads"] = torch.get_num_threads()
        facts["cuda"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts
