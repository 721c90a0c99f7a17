"""Golden runs: small trainings through the command line, and what has to come out of them.

A run is kept as the events it wrote (without times, speeds, memory and paths) and a SHA-256 of what lies in its `final/`
folders: the tensors' dtypes, shapes and bytes, their names by themselves, and the contents of `stack.yaml` and `metrics.json`.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open

STEPS = 6
SMALL = (f"steps={STEPS}", "eval.batches=2", "eval.test=false", "data.cache=false")
FEW = ("batch.size=4", "objective.max_new_tokens=8")
"""Options of runs that sample answers."""
TOKENS = "batch.tokens=512"
"""What a CPU whose memory is not looked at decides; the processes that a command starts would look."""
STAGES = [f"stages.{stage}.{word}" for stage in ("sft", "dpo") for word in (*SMALL, "batch.size=4", TOKENS)]

RUNS: dict[str, list[str]] = {
    "clm": ["train", "recipe=clm", "batch.size=4", *SMALL],
    "sft": ["train", "recipe=sft", "batch.size=4", "optim.lr=1e-3", *SMALL],
    "classify": ["train", "recipe=classify", "batch.size=8", *SMALL],
    "choices": ["train", "recipe=choices", "batch.size=4", *SMALL],
    "dpo": ["train", "recipe=dpo", "batch.size=4", *SMALL],
    "dpo_lora": ["train", "recipe=dpo_lora", "batch.size=4", *SMALL],
    "ipo_lora": ["train", "recipe=ipo_lora", "batch.size=4", *SMALL],
    "kto_lora": ["train", "recipe=kto_lora", "batch.size=4", *SMALL],
    "orpo_lora": ["train", "recipe=orpo_lora", "batch.size=4", *SMALL],
    "simpo_lora": ["train", "recipe=simpo_lora", "batch.size=4", *SMALL],
    "reward_lora": ["train", "recipe=reward_lora", "batch.size=4", *SMALL],
    "grpo": ["train", "recipe=grpo", *FEW, *SMALL],
    "ppo": ["train", "recipe=ppo", *FEW, "batch.size=8", *SMALL],
    "rloo": ["train", "recipe=rloo", *FEW, *SMALL],
    "adapter": ["train", "recipe=adapter", "batch.size=4", *SMALL],
    "apt": ["train", "recipe=apt", "batch.size=4", *SMALL],
    "coda": ["train", "recipe=coda", "batch.size=4", *SMALL],
    "ia3": ["train", "recipe=ia3", "batch.size=4", *SMALL],
    "prefix_tuning": ["train", "recipe=prefix_tuning", "batch.size=4", *SMALL],
    "prompt_tuning": ["train", "recipe=prompt_tuning", "batch.size=4", *SMALL],
    "sft_lora": ["train", "recipe=sft_lora", "batch.size=4", "batch.micro=2", "stack.lora.dropout=0.1", *SMALL],
    "adalora": ["train", "recipe=adalora", "batch.size=4", *SMALL],
    "dora": ["train", "recipe=dora", "batch.size=4", *SMALL],
    "dylora": ["train", "recipe=dylora", "batch.size=4", *SMALL],
    "bitfit": ["train", "recipe=bitfit", "batch.size=4", *SMALL],
    "child_tuning": ["train", "recipe=child_tuning", "batch.size=4", *SMALL],
    "diff_pruning": ["train", "recipe=diff_pruning", "batch.size=4", *SMALL],
    "fishmask": ["train", "recipe=fishmask", "batch.size=4", *SMALL],
    "spt": ["train", "recipe=spt", "batch.size=4", *SMALL],
    "mezo": ["train", "recipe=mezo", "batch.size=4", *SMALL],
    "qlora": ["train", "recipe=qlora", "batch.size=4", *SMALL],
    "sft_dpo": ["train", "recipe=sft_dpo", *STAGES],
    "search_lora": ["search", "recipe=search_lora", "search.trials=2", "eval.every=3", TOKENS, *SMALL],
}
"""Name -> words of the command line, one run for each kind of thing that trains."""
QUICK = ("classify", "dpo_lora", "grpo", "sft_lora", "prefix_tuning")
"""The runs of the fast suite."""
SAMPLED = ("grpo", "ppo", "rloo")
"""Runs that train on answers they sample: where bits differ, answers may too, so losses compare up to the first step only."""
RELATIVE, ABSOLUTE = 1e-4, 1e-6
"""How far losses may be apart on another machine."""
UNSTEADY = ("_per_s", "_mb", "seconds", "path")
"""Ends of the names of values that are times, speeds, memory or places."""


def record(name: str, folder: Path) -> dict[str, Any]:
    """Train one of `RUNS` into a folder.

    Returns:
        `events`: run (its folder without content keys) -> events; `final`: run -> what is in its `final/` -> SHA-256.

    Raises:
        RuntimeError: the command failed.
    """
    from llmrecipe.cli import app

    with one_thread(), own_cache(folder.parent / "cache"), redirect_stdout(io.StringIO()) as said:
        code = app.run_command([*RUNS[name], "log.live=off", f"run.dir={folder}"])
    if code:
        raise RuntimeError(f"golden run {name}: exit code {code}\n{said.getvalue()[-2000:]}")
    return outcome(folder)


def outcome(folder: Path) -> dict[str, Any]:
    """Return what a command left in its folder: `events` and `final`, as `record` does."""
    return {
        "events": {_place(path.parent, folder): _events(path, folder) for path in sorted(folder.rglob("events.jsonl"))},
        "final": {_place(path.parent, folder): _final(path, folder) for path in sorted(folder.rglob("final"))},
    }


@contextmanager
def own_cache(folder: Path) -> Iterator[None]:
    """Keep caches of tokens and reference scores apart: scores of another run's batches differ in their last bits."""
    told = os.environ.get("LLMRECIPE_CACHE")
    os.environ["LLMRECIPE_CACHE"] = str(folder)
    try:
        yield
    finally:
        if told is None:
            del os.environ["LLMRECIPE_CACHE"]
        else:
            os.environ["LLMRECIPE_CACHE"] = told


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, here and in child processes, so that sums are always added in the same order."""
    threads, told = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if told is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = told


def _place(path: Path, folder: Path) -> str:
    """Return a folder relative to the run, without the content keys of stages."""
    return _steady(path.relative_to(folder).as_posix())


def _steady(text: str) -> str:
    return re.sub(r"-[0-9a-f]{8}(?![0-9a-f])", "", text)


def _events(path: Path, folder: Path) -> list[dict[str, Any]]:
    text = _steady(path.read_text(encoding="utf-8").replace(str(folder), "RUN"))
    found = [json.loads(line) for line in text.splitlines()]
    steady = [event for event in found if event["event"] != "memory"]
    return [{k: v for k, v in event.items() if not k.endswith(UNSTEADY)} for event in steady]


def _final(final: Path, folder: Path) -> dict[str, str]:
    """Hash what a run leaves; tensors are taken in the order of their hashes, so that no name enters into `tensors`."""
    tensors: list[str] = []
    names: list[str] = []
    for path in sorted(final.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                tensors.append(tensor_hash(file.get_tensor(name)))
                names.append(name)
    stack, metrics = final / "stack.yaml", final / "metrics.json"
    hashes = {"tensors": _sha(sorted(tensors)), "names": _sha(sorted(names))}
    if stack.is_file():
        text = _steady(stack.read_text(encoding="utf-8").replace(str(folder), "RUN"))
        hashes["stack.yaml"] = _sha(yaml.safe_load(text))
    if metrics.is_file():
        values = json.loads(metrics.read_text(encoding="utf-8"))
        hashes["metrics.json"] = _sha({k: v for k, v in values.items() if not k.endswith(UNSTEADY)})
    return hashes


def tensor_hash(tensor: torch.Tensor) -> str:
    """Hash a tensor's dtype, shape and bytes."""
    data = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + data).hexdigest()


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def differences(kept: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """List what is not equal between two records, the first event of each run only."""
    lines = []
    for part in ("events", "final"):
        if kept[part].keys() != found[part].keys():
            lines.append(f"runs with {part}: {sorted(kept[part])} became {sorted(found[part])}")
    for place in kept["events"].keys() & found["events"].keys():
        lines += _first_change(place, kept["events"][place], found["events"][place])
    for place in kept["final"].keys() & found["final"].keys():
        old, new = kept["final"][place], found["final"][place]
        lines += [
            f"{place}/final: {name} changed" for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)
        ]
    return lines


def _first_change(place: str, kept: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[str]:
    for old, new in zip(kept, found, strict=False):
        if changed := [k for k in old.keys() | new.keys() if old.get(k) != new.get(k)]:
            told = ", ".join(f"{k} {old.get(k)!r} became {new.get(k)!r}" for k in sorted(changed))
            return [f"{place}: {old['event']} of step {old['step']}: {told}"]
    return [f"{place}: {len(kept)} events became {len(found)}"] if len(kept) != len(found) else []


def far_losses(name: str, kept: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """List losses that are further apart than another machine explains."""
    lines = []
    for place, events in kept["events"].items():
        old, new = _losses(name, events), _losses(name, found["events"].get(place, []))
        if old.keys() != new.keys():
            lines.append(f"{place}: losses {sorted(old)} became {sorted(new)}")
        lines += [
            f"{place}: {key} {old[key]} became {new[key]}"
            for key in sorted(old.keys() & new.keys())
            if not math.isclose(old[key], new[key], rel_tol=RELATIVE, abs_tol=ABSOLUTE)
        ]
    return lines


def _losses(name: str, events: list[dict[str, Any]]) -> dict[str, float]:
    last = 1 if name in SAMPLED else math.inf
    return {
        f"{event['event']} of step {event['step']}: {key}": value
        for event in events
        if event["event"] in ("step", "evaluation") and event["step"] <= last
        for key, value in event.items()
        if key.rpartition("/")[2] == "loss"
    }
