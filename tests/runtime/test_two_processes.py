"""Two processes train what one process trains: the same losses, the same norms, the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainings import curve, events, learned

# Ten rows in batches of eight: the second step of each epoch has two rows, one a process.
SHORT = ["batch.size=8", "batch.micro=2", "data.limit=10", "log.live=off", "eval.test=false", "eval.batches=1", "steps=4"]

ANSWERS = ["recipe=sft", "stack=[lora,mezo]", "optim=sgd", "objective.loss_type=metric", "objective.max_new_tokens=8"]


def command(folder: Path, processes: int, *words: str) -> list[str]:
    verb = ["launch", "--nproc", str(processes)] if processes > 1 else ["train"]
    return [sys.executable, "-m", "llmrecipe", *verb, *SHORT, *words, f"run.dir={folder}"]


def run(folder: Path, processes: int, *words: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LLMRECIPE_CACHE": str(folder.parent / "cache")}
    done = subprocess.run(command(folder, processes, *words), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def compare(tmp_path: Path, *words: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run(one, 1, *words)
    run(two, 2, *words)
    for a, b in zip(curve(one), curve(two), strict=True):
        assert a[0] == b[0]
        assert a[1] == pytest.approx(b[1], abs=1e-5)
        assert (a[2] or 0) == pytest.approx(b[2] or 0, abs=1e-4)
        assert a[3] == b[3]
    for a, b in zip(events(one, "evaluation"), events(two, "evaluation"), strict=True):
        assert a["eval/loss"] == pytest.approx(b["eval/loss"], abs=1e-5), "the rows of one batch, shared out"
    ours, theirs = learned(one), learned(two)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=5e-4, rtol=1e-3)


def test_sft_lora(tmp_path: Path) -> None:
    compare(tmp_path, "recipe=sft_lora")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["recipe=sft"],
        ["recipe=dpo_lora"],
        ["recipe=dpo"],
        ["recipe=kto_lora"],
        ["recipe=kto", "optim.lr=1e-3"],
        ["recipe=classify", "data.limit=34"],
        ["recipe=clm"],
        ["recipe=clm", "batch.warmup.start=1", "batch.warmup.batches=3"],
        ["recipe=mezo_lora"],
        [*ANSWERS, "objective.metric=token_f1", "optim.lr=1e-2", "stack.mezo.eps=1e-1"],
        ["recipe=sft", "stack=[bitfit]", "stack.bitfit.missing=add_zero"],
        ["recipe=sft", "objective.kl_to_base=1"],
        ["recipe=sft_lora", "objective.kl_to_base=1", "optim.lr=1e-2"],
    ],
    ids=lambda words: "-".join(words).replace("recipe=", ""),
)
def test_every_corner(words: list[str], tmp_path: Path) -> None:
    compare(tmp_path, *words)


def weighted_talk(i: int) -> dict[str, Any]:
    """Answers whose weights differ within a conversation and between rows, one of them 0."""
    turns = [
        {"role": "user", "content": f"Say {i}."},
        {"role": "assistant", "content": f"{i} it is.", "weight": 0.25 * (i % 4)},
    ]
    return {
        "messages": [*turns, {"role": "user", "content": "And then?"}, {"role": "assistant", "content": f"{i + 1} and {i}."}]
    }


def weighted_tokens(i: int) -> dict[str, Any]:
    """Token ids with a weight each."""
    ids = [5 + (3 * i + j) % 90 for j in range(4 + i % 3)]
    return {"input_ids": ids, "labels": [-100, *ids[1:]], "weights": [0.5 * ((i + j) % 4) for j in range(len(ids))]}


@pytest.mark.slow
@pytest.mark.parametrize("row", [weighted_talk, weighted_tokens])
def test_weights_count_over_the_step_of_both_processes(row: Callable[[int], dict[str, Any]], tmp_path: Path) -> None:
    """The processes' rows weigh differently: dividing by a process's own weights, or by its tokens, gives other losses."""
    for split, first, last in (("train", 0, 10), ("valid", 10, 14)):
        lines = [json.dumps(row(i)) + "\n" for i in range(first, last)]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    mask = ["objective.mask=assistant"] if row is weighted_talk else []
    compare(tmp_path, "recipe=sft_lora", f"data.path={tmp_path}", *mask)


@pytest.mark.slow
def test_ktos_reference_point_belongs_to_the_step_over_both_processes(tmp_path: Path) -> None:
    """Four rows a process, then one: z is the one-process mean over mismatched pairs of the whole step, clamped after it."""
    words = ["recipe=kto_lora", "schedule.warmup=0", "steps=8"]
    compare(tmp_path, *words)
    points = [[(e["kl"], e["kl/raw"]) for e in events(tmp_path / name)] for name in ("one", "two")]
    for one, two in zip(*points, strict=True):
        assert one == pytest.approx(two, abs=2e-4)
    assert {z > 0 for z, _ in points[0]} == {True, False}, "both a divergence and a clamped one were seen"
    assert all(z == max(0.0, raw) for z, raw in points[0])


@pytest.mark.slow
def test_a_process_without_rows_takes_part(tmp_path: Path) -> None:
    """Nine rows: the last batch of an epoch has one row, so the second process trains an empty micro-batch."""
    compare(tmp_path, "recipe=sft_lora", "data.limit=9")


@pytest.mark.slow
def test_a_run_over_blocks_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    # Ten documents in rows of 16 tokens are some sixty rows; the run stops after 16 of them, in the middle of the only source.
    words = ["recipe=clm", "data.blocks=true", "data.max_length=16", "save.every=2", "optim.lr=1e-4", "schedule=constant"]
    run(tmp_path / "whole", 1, *words)
    run(tmp_path / "parts", 1, *words, "steps=2")
    verb = ["launch", "--nproc", "2", f"resume={tmp_path / 'parts'}", "steps=4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LLMRECIPE_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "llmrecipe", *verb], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for a, b in zip(curve(tmp_path / "whole"), curve(tmp_path / "parts"), strict=True):
        assert a[0] == b[0] and a[1] == pytest.approx(b[1], abs=1e-5)
    ours, theirs = learned(tmp_path / "whole"), learned(tmp_path / "parts")
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=5e-5, rtol=1e-3)
