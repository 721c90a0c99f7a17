"""Resolving the path of a model and checking that it can be read: everything that can go wrong before a weight is read.

Weights are safetensors. Pickle weights can run code while they are read, so they are refused unless `model.allow_pickle`
is set, and even then only tensors are unpickled.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from llmrecipe.core.console import lasting
from llmrecipe.core.errors import ModelError, RunError, did_you_mean
from llmrecipe.core.foreign import parse_json, read_json
from llmrecipe.core.path_hints import near_path, plain_path, runs_inside
from llmrecipe.core.paths import ASSETS
from llmrecipe.models.weight_headers import read_header
from llmrecipe.recipe.rights import how_to_give

TINY = ASSETS / "tiny"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
SAFE = ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
STACK_FILE = "stack.yaml"
"""File that identifies the `final` folder of a run that trained a stack (see `runs.delta`)."""
DELTA_FILE = "delta.safetensors"
"""File of the tensors that such a run learned."""


def locate(path: str, key: str = "model.path") -> tuple[str, bool]:
    """Resolve `path` to (folder or hub name, whether it is a folder).

    Raises:
        ModelError: a folder that does not exist, a file, or a name that can be neither a folder nor a hub name.
    """
    if path == "tiny":
        if not (TINY / "config.json").is_file():
            raise ModelError(f"{key}: the embedded model is missing from this installation ({TINY}); reinstall llmrecipe")
        return str(TINY), True
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder), True
    if folder.is_file():
        raise ModelError(f"{key}: {path} is a file; give the folder that holds config.json and the weights{_hint(folder.name)}")
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path or not HUB_NAME.fullmatch(path)
    if looks_local:
        raise ModelError(f"{key}: there is no folder {path}{plain_path(path) or near_path(folder)}")
    return path, False


def describe_base(path: str, folder: Path) -> dict[str, Any]:
    """Return how a result names its base, so that it opens from any folder and after a move.

    A folder is named by its absolute path and by the one relative to the result; a hub name is marked as one.

    Args:
        folder: of the result.
    """
    place, local = locate(path)
    if path == "tiny":
        return {"path": path}
    if not local:
        return {"path": path, "hub": True}
    return {"path": str(Path(place).absolute()), "relative": os.path.relpath(Path(place).absolute(), folder.absolute())}


def find_base(base: Mapping[str, Any], folder: Path) -> str:
    """Return the path of the base that a result names (see `describe_base`).

    A relative path of an older result is looked for in every folder above it.

    Raises:
        ModelError: the folder is in neither place; or a hub model that is not in the cache has the name of a folder here.
    """
    path = str(base["path"])
    if base.get("hub") and Path(path).exists():
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(path, "config.json", revision=(base.get("section") or {}).get("revision"))
        if isinstance(config, str):
            return str(Path(config).parent)
        raise ModelError(
            f"model.path: {folder} stands on the hub model '{path}', which is not in the cache, and here is a folder of that "
            "name; give the command in another folder"
        )
    if "relative" in base:
        near = Path(os.path.normpath(folder.absolute() / str(base["relative"])))
        if found := next((place for place in (Path(path), near) if place.is_dir()), None):
            return str(found)
        raise ModelError(
            f"model.path: the base of {folder} is gone: there is neither {path} nor {near}. Put it back, or write its new "
            f"place into {folder / STACK_FILE} (base: path) and delete checksums.json there"
        )
    if path != "tiny" and not Path(path).expanduser().is_absolute() and not Path(path).is_dir():
        above = (place / path for place in folder.absolute().parents)
        return next((str(place) for place in above if (place / "config.json").is_file()), path)
    return path


def run_folder(path: str) -> Path | None:
    """Return the `final` folder of a run directory, when a path names one (or the folder itself), else None.

    Raises:
        RunError: the run has not finished.
    """
    for folder in (Path(path) / "final", Path(path)):
        if (folder / STACK_FILE).is_file() or (folder / "model" / "config.json").is_file():
            return folder
    if (Path(path) / "status.json").is_file():
        raise RunError(f"model.path: {path} is a run that has not finished (no final/ folder); continue it with resume={path}")
    return None


def finished_run(path: str) -> Path:
    """Return the `final` folder of a run directory.

    Raises:
        RunError: the path is something else, or the run has not finished.
    """
    folder = run_folder(path)
    if folder is None:
        holds = f"it holds no final/ folder with {STACK_FILE} or model/"
        raise RunError(f"{path} is not a run directory: {holds}{plain_path(path) or runs_inside(Path(path))}")
    return folder


def is_adapter(path: str) -> bool:
    """Return whether a path is an adapter folder, of PEFT or of adapter-hub's library."""
    return (Path(path) / "adapter_config.json").is_file() and not (Path(path) / "config.json").is_file()


def adapter_base(path: str) -> str:
    """Return the base model that an adapter folder of PEFT or adapter-hub names.

    Raises:
        ModelError: it names none.
    """
    config = read_json(Path(path) / "adapter_config.json", "model.path", "save the adapter again", ModelError)
    base = config.get("base_model_name_or_path") or config.get("model_name")
    if not base:
        raise ModelError(
            f"model.path: the adapter {path} does not name its base model; "
            f"give model.path=BASE 'model.adapters={{{path}: 1.0}}'"
        )
    return str(base)


def _hint(name: str) -> str:
    return "; GGUF files are for inference and cannot be trained" if name.endswith(".gguf") else ""


def offline() -> str | None:
    """Return why the model hub cannot be reached, or None; checked before a hub name is used, to avoid waiting for retries."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return "HF_HUB_OFFLINE is set"
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return None
    host = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname or "huggingface.co"
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return f"{host} cannot be reached from here"
    return None


def shown_reading(name: str, local: bool) -> contextlib.AbstractContextManager[None]:
    """Say every few seconds that something of a model is read; of a hub name, how much of it has been downloaded."""

    def downloaded() -> str:
        from huggingface_hub.constants import HF_HUB_CACHE

        size = 0
        for blob in Path(HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "blobs").glob("*"):
            with contextlib.suppress(OSError):  # it was renamed meanwhile: the download of this file ended
                size += blob.stat().st_size
        return f"{size >> 20:,} MB of it in the hub cache"

    return lasting(f"reading {name}", None if local else downloaded)


def unreachable(name: str, reason: str, key: str = "model.path") -> ModelError:
    """Return the error for a hub name that is neither cached nor reachable."""
    near = near_path(Path(name)) if "/" in name and Path(name).parent.is_dir() else did_you_mean(name, ["tiny"])
    return ModelError(
        f"{key}: '{name}' is no folder here and is not in the local hub cache, and {reason}{near}. Give a local folder "
        f"(model.path=FOLDER), `tiny` for the embedded model, or download it where there is a network: hf download {name}"
    )


def check_folder(folder: Path, allow_pickle: bool = False, weights: bool = True, key: str = "model.path") -> None:
    """Refuse a folder that is not a model folder, or whose weights cannot be read safely.

    Args:
        weights: False where only the config is needed (random weights).

    Raises:
        ModelError: what the folder is instead, and what to do about it.
    """
    names = {path.name for path in folder.iterdir()}
    if "config.json" not in names:
        raise ModelError(f"{key}: {folder} is not a model folder: it has no config.json{_what_else(folder, names)}")
    read_json(folder / "config.json", key, "download or save the model again", ModelError)
    if not weights:
        return
    if "model.safetensors" in names:
        _check_tensors(folder / "model.safetensors", key)
    elif "model.safetensors.index.json" in names:
        for shard in _shards(folder / "model.safetensors.index.json", key):
            _check_tensors(folder / shard, key)
    elif names & set(PICKLED):
        if not allow_pickle:
            raise ModelError(
                f"{key}: {folder} holds pickle weights only ({', '.join(sorted(names & set(PICKLED)))}). Reading a pickle can "
                f"run code, so it is refused. Convert it to safetensors, or, if you trust its origin, "
                f"{how_to_give('allow_pickle')}"
            )
    else:
        raise ModelError(
            f"{key}: {folder} has a config.json but no weights (model.safetensors){_what_else(folder, names)}. "
            "Set model.init=random to start from fresh weights of this config"
        )


def _what_else(folder: Path, names: set[str]) -> str:
    if "adapter_config.json" in names:
        return "; it is a PEFT adapter: give its base model's folder"
    if "recipe.yaml" in names and "status.json" in names:
        return "; it is a run directory that has no final/ folder yet"
    if any(name.endswith(".gguf") for name in names):
        return "; its GGUF file is for inference and cannot be trained: get the safetensors folder of the same model"
    inner = [path.name for path in folder.iterdir() if path.is_dir() and (path / "config.json").is_file()]
    return f"; did you mean {folder / inner[0]}?" if inner else runs_inside(folder)


def _shards(index: Path, key: str) -> list[str]:
    try:
        shards = sorted(set(parse_json(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{key}: {index} is not an index of weights: {error}") from error
    for shard in shards:
        if not shard.endswith(".safetensors") or Path(shard).name != shard:
            raise ModelError(f"{key}: {index.name} points to '{shard}'; only safetensors files in the same folder are read")
        if not (index.parent / shard).is_file():
            raise ModelError(f"{key}: {index.parent} lacks {shard}, one of the {len(shards)} files {index.name} names")
    return shards


def _check_tensors(path: Path, key: str) -> None:
    """Read the header and compare the promised size with the file's."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(8) == b"version ":
            raise ModelError(f"{key}: {path} is a Git LFS pointer, not the weights; run `git lfs pull` in that repository")
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
    try:
        promised = 8 + length + max((entry["data_offsets"][1] for entry in read_header(path).values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ModelError(f"{key}: {path} is not a readable safetensors file: {error}") from error
    if promised != size:
        raise ModelError(f"{key}: {path} is damaged: {size:,} bytes instead of {promised:,}; download it again")
