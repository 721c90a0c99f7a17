"""Kills at every file-system call of every kind of run: what goes on ends bit for bit where an untouched run ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.sweep import Sweep

SMALL = [
    "steps=4",
    "batch.size=2",
    "data.limit=12",
    "save.every=1",
    "save.keep=1",
    "eval.every=2",
    "eval.batches=1",
    "log.live=off",
    "run.dir=run",
]
SAMPLED = ["objective.max_new_tokens=4"]
RUNS = {
    "sft_lora": ["train", "recipe=sft_lora", *SMALL],
    "sft": ["train", "recipe=sft", *SMALL],
    "dpo": ["train", "recipe=dpo", *SMALL],
    "grpo": ["train", "recipe=grpo", *SMALL, *SAMPLED],
    "mezo": ["train", "recipe=mezo", *SMALL],
}
TRAINING = "data: {limit: 8, max_length: 128}, batch: {size: 2}, eval: {batches: 1, test: false}, save: {every: 1}"
PIPELINE = f"""
stages:
  sft: {{recipe: sft_lora, steps: 2, {TRAINING}}}
  said: {{kind: generate, model: "${{stage:sft}}", prompts: builtin:preference, limit: 3, n: 2, max_new_tokens: 4}}
  ranked: {{kind: label_ai, answers: "${{stage:said}}", constitution: manners}}
  dpo: {{recipe: dpo_lora, with: ["model.path=${{stage:sft}}", "data.path=${{stage:ranked}}"], steps: 2, {TRAINING}}}
"""
SEARCH = """
defaults: [/sft_lora, _self_]
steps: 2
data: {limit: 8}
batch: {size: 2}
eval: {every: 1, batches: 1, test: false}
save: {every: 1}
search: {space: {optim.lr: [1e-5, 1e-2]}, sampler: grid, prune: off}
"""
GROUPS = {
    "pipeline": (["train", "recipe=pipe", "log.live=off"], {"recipes/pipe.yaml": PIPELINE}),
    "search": (["search", "recipe=tune", "run.dir=run", "log.live=off"], {"recipes/tune.yaml": SEARCH}),
}
COMMANDS = {**{name: (words, {}) for name, words in RUNS.items()}, **GROUPS}
FILLING = ("sft_lora", "pipeline")
"""Commands that fill their caches; the others find them filled, as these cover the states of filling."""

PARTS = 2
"""Each sweep is this many tests, so that as many processes share it."""


def faults(sweep: Sweep, part: int = 0, parts: int = 1) -> list[str]:
    """Return what went wrong at each of the sweep's states, or at those of one of several parts in a row."""
    first, end = (len(sweep.points) * n // parts for n in (part, part + 1))
    return [wrong for point in sweep.points[first:end] if (wrong := sweep.wrong(point)) is not None]


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_killed_at_any_call(name: str, part: int, tmp_path: Path) -> None:
    words, files = COMMANDS[name]
    assert faults(Sweep(words, tmp_path, files, cached=name not in FILLING), part, PARTS) == []


def test_a_run_killed_where_states_change_hands(tmp_path: Path) -> None:
    """A process that is really killed leaves the recorded files; a start, a result and a finished run can be gone on from."""
    sweep = Sweep([*RUNS["sft_lora"], "steps=2"], tmp_path)
    for call, suffix in (("os.rename", "recipe.yaml.writing"), ("os.rename", ".writing-final"), ("os.rename", "best")):
        point = next(p for p in sweep.points if p.torn is None and p.call.startswith(call) and p.call.endswith(suffix))
        assert sweep.same_as_killed(point)
        assert sweep.wrong(point) is None
