"""A reward run inside PPO: on the policy's own base, or as a model of its own, with the same scores."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrecipe.core.errors import RecipeError
from llmrecipe.pipelines import run_stages
from llmrecipe.recipe.compose import compose
from tests.recipes.learning import COMPARISONS
from tests.trainings import curve, events, learned, train_recipe

SHORT = [
    "batch.size=4",
    "objective.max_new_tokens=10",
    "objective.epochs=2",
    "eval.batches=1",
    "eval.load_best=false",
    "objective.missing_end=null",
    "steps=4",
]


@pytest.fixture(scope="module")
def reward_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished reward run with adapters."""
    folder = tmp_path_factory.mktemp("reward") / "run"
    train_recipe(folder, "reward", "stack=[lora]", "steps=3", "batch.size=4", "eval.batches=1", "optim.lr=1e-2")
    return folder


def run_with(folder: Path, reward_run: Path, share: str, *more: str) -> Path:
    train_recipe(folder, "ppo", *SHORT, f"objective.reward={{model: {{path: {reward_run}, share: {share}}}}}", *more)
    return folder


def test_a_shared_base_scores_as_a_model_of_its_own(reward_run: Path, tmp_path: Path) -> None:
    shared, alone = run_with(tmp_path / "shared", reward_run, "on"), run_with(tmp_path / "alone", reward_run, "off")
    for one, other in zip(events(shared), events(alone), strict=True):
        assert one["objective/scores"] == pytest.approx(other["objective/scores"], abs=2e-4)
    assert len({round(e["objective/scores"], 4) for e in events(shared)}) > 1
    assert [c[1] for c in curve(shared)] == pytest.approx([c[1] for c in curve(alone)], abs=2e-3)
    tensors = learned(shared)
    assert tensors.keys() == learned(alone).keys()
    assert all(".lora." in name for name in tensors)
    assert any(v.abs().max() > 0 for k, v in tensors.items() if k.endswith(".B"))


@pytest.mark.slow
def test_a_base_that_trains_cannot_be_shared(reward_run: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot share the policy's base: the policy's stack trains it"):
        run_with(tmp_path / "x", reward_run, "on", "stack=[]")
    folder = run_with(tmp_path / "y", reward_run, "auto", "stack=[]", "steps=2", "objective.epochs=1")
    assert len(events(folder)) == 2
    assert not [name for name in learned(folder) if "task_head" in name]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_learned_reward_teaches_manners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped pipeline, SFT -> reward model -> PPO: the rule, which no training sees, rises on held-out prompts by half of
    the gap to 1, and neither the divergence nor the length of the answers runs away. A reward model of pairs that were turned
    round by chance teaches nothing."""
    monkeypatch.chdir(tmp_path)
    watch = "stages.ppo.objective.reward.rule={rule: manners, weight: 0.0}"
    quiet = [f"stages.{stage}.eval.test=false" for stage in ("sft", "reward", "ppo")]
    start, *_, last_stage = run_stages.run_all_stages(compose("rlhf", [watch, *quiet]))
    first, *_, last = events(Path(last_stage.dir), "evaluation")
    half = first["eval/rewards/rule"] + 0.5 * (1.0 - first["eval/rewards/rule"])
    assert last["eval/rewards/rule"] >= half
    assert last["eval/rewards/model"] > first["eval/rewards/model"]
    assert last["eval/kl"] < 12.0 and last["eval/eos_rate"] > 0.95
    assert last["eval/length"] < 1.5 * first["eval/length"]

    turned = [f"stages.reward.{word}" for word in COMPARISONS(tmp_path / "turned")]
    again, *_, control = run_stages.run_all_stages(compose("rlhf", [watch, *quiet, *turned]))
    assert again.dir == start.dir
    assert events(Path(control.dir), "evaluation")[-1]["eval/rewards/rule"] < half - 0.1
