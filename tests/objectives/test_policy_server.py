"""Rollouts by a server: what it is asked, the adapter it gets, the proof that it answers with it, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe.core.errors import ModelError, RecipeError, RunError
from llmrecipe.objectives.alignment.grpo import Grpo
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.schema import ModelSection
from llmrecipe.runs.open_model import LoadedModel
from tests.objectives.rollouts import REWARD, ROWS, Numbers, setting, updates
from tests.objectives.vllm_stand_in import StandIn, serving
from tests.tiny import tiny_model
from tests.trainings import events, train_recipe

pytest.importorskip("peft")


@contextmanager
def trained_by(objective_options: dict[str, Any]) -> Iterator[tuple[Grpo, Any, StandIn]]:
    """An objective whose answers a stand-in samples, on a policy with a filled adapter."""
    torch.manual_seed(0)
    with serving(tiny_model()) as (address, state):
        objective = Grpo(reward=REWARD, answers=2, max_new_tokens=6, sampler=address, **objective_options)
        roles = setting(objective)
        loaded = LoadedModel(roles.model, Numbers(), ModelSection(path="tiny"))
        objective.prepare_roles(loaded, True)
        yield objective, roles, state


def rollout(objective: Grpo, roles: Any) -> Any:
    """The single batch of one rollout."""
    (batch,) = [b for micros in updates(objective, roles) for b in micros]
    return batch


def move(roles: Any, by: float) -> None:
    """Change the adapter as an update would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in roles.model.parameters():
            if parameter.requires_grad:
                parameter += by * torch.randn(parameter.shape, generator=generator)


def test_the_server_answers_with_the_policy_of_every_update() -> None:
    """Its log-probabilities are those of training, before and after the adapter changes."""
    with trained_by({"temperature": 0.8}) as (objective, roles, state):
        for _ in range(3):
            batch = rollout(objective, roles)
            assert batch.extra["score"].numel() == 2 * len(ROWS)
            torch.testing.assert_close(batch.extra["sampler"], batch.extra["old"], atol=2e-5, rtol=1e-4)
            move(roles, 0.05)
        loads = [body for path, body in state.asked if path.endswith("/load_lora_adapter")]
        unloads = [body["lora_name"] for path, body in state.asked if path.endswith("/unload_lora_adapter")]
        names = [body["lora_name"] for body in loads]
        assert len(set(names)) == 3 and unloads == names[:2]
        assert not Path(loads[0]["lora_path"]).exists() and Path(loads[2]["lora_path"]).exists()


def test_sampling_is_named_in_full_and_each_answer_has_a_seed() -> None:
    """A server fills what a request leaves open from the checkpoint's generation settings."""
    with trained_by({"temperature": 0.8, "stop": ["7 7"]}) as (objective, roles, state):
        torch.manual_seed(4)
        first = rollout(objective, roles).extra["length"].tolist()
        asked = [body for path, body in state.asked if "seed" in body]
        assert len(asked) == 2 * len(ROWS) and len({body["seed"] for body in asked}) == len(asked)
        neutral = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
                   "frequency_penalty": 0.0, "ignore_eos": True, "stop_token_ids": [2], "stop": ["7 7"],
                   "include_stop_str_in_output": True, "max_tokens": 6, "temperature": 0.8}  # fmt: skip
        for body in asked:
            assert {key: body[key] for key in neutral} == neutral
        torch.manual_seed(4)
        assert rollout(objective, roles).extra["length"].tolist() == first


def test_answers_end_where_the_own_decoders_end_them() -> None:
    """A server may go on behind a stop text that begins inside a token; what follows is cut off."""
    with trained_by({"stop": ["1", "2", "3", "4", "5"]}) as (objective, roles, _):
        batch = rollout(objective, roles)
        ends = objective.live.plan
        assert ends.stop and batch.extra["length"].max() <= 6
        texts = [str(t) for t in batch.target.tolist()]
        lengths = [int(n) for n in batch.extra["length"].tolist()]
        at = 0
        for n in lengths:
            own = texts[at : at + n]
            at += n
            assert not any(set("12345") & set(t) for t in own[:-1])


@pytest.mark.parametrize("size", [0.05, 0.4])
def test_a_server_that_keeps_old_weights_ends_the_run(size: float) -> None:
    with trained_by({}) as (objective, roles, state):
        state.stale_after = 1
        rollout(objective, roles)
        move(roles, size)
        with pytest.raises(RunError, match=r"objective\.sampler: the server at .* (still answers with the weights|differ)"):
            rollout(objective, roles)


def test_slow_drift_behind_a_stale_server_shows_too() -> None:
    """No single update moves the policy by much; the sum of them does."""
    with trained_by({}) as (objective, roles, state):
        state.stale_after = 1

        def drift() -> None:
            for _ in range(40):
                rollout(objective, roles)
                move(roles, 0.003)

        with pytest.raises(RunError, match="still answers with the weights of an earlier update"):
            drift()
        assert 1 < state.loads < 20


def test_another_base_model_ends_the_run() -> None:
    with trained_by({}) as (objective, roles, state):
        state.scale = 6.0
        with pytest.raises(RunError, match="it serves another base model"):
            rollout(objective, roles)


def test_an_unchanged_policy_is_no_stale_server() -> None:
    with trained_by({}) as (objective, roles, _):
        for _ in range(2):
            rollout(objective, roles)


def test_a_server_without_runtime_adapters_says_how_to_start_it() -> None:
    with trained_by({}) as (objective, roles, state):
        state.forbidden = True
        with pytest.raises(RunError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
            rollout(objective, roles)


def test_an_answer_that_ends_by_itself_is_refused() -> None:
    with trained_by({}) as (objective, roles, state):
        state.short = True
        with pytest.raises(RunError, match="without an end token or stop text; is --max-model-len too small"):
            rollout(objective, roles)


@pytest.mark.parametrize("choice", [{}, {"logprobs": None}, {"logprobs": {"tokens": ["a"], "token_logprobs": [-1.0]}},
                                    {"logprobs": {"tokens": ["token_id:5"], "token_logprobs": [None]}},
                                    {"logprobs": {"tokens": [], "token_logprobs": []}}])  # fmt: skip
def test_replies_that_are_not_vllms_are_refused_without_a_traceback(choice: dict[str, Any]) -> None:
    with trained_by({}) as (objective, roles, state):
        plain = state.choice
        state.choice = lambda body: plain(body) if "prompt_logprobs" in body else choice  # type: ignore[method-assign]
        with pytest.raises(RunError, match="has no token ids with their log-probabilities"):
            rollout(objective, roles)


def test_held_out_answers_are_the_models_own() -> None:
    """An evaluation, and verify, need no server."""
    with trained_by({}) as (objective, roles, state):
        rows = [{**row, "held_out": True} for row in ROWS]
        objective.collate(rows, roles)
        assert state.asked == []


@pytest.mark.parametrize(("words", "says"), [
    (["stack=[]"], "this recipe trains the weights themselves"),
    (["stack=ia3"], "stack.ia3 is none"),
    (["objective.sampler=localhost:8000"], "objective.sampler.url: must be an address"),
    (["objective.sampler_key_env=NOT_SET_ANYWHERE"], "NOT_SET_ANYWHERE is not set"),
])  # fmt: skip
def test_refusals_before_weights_load(words: list[str], says: str, tmp_path: Path) -> None:
    more = [] if any("sampler=" in w for w in words) else ["objective.sampler=http://127.0.0.1:9/v1"]
    with pytest.raises(RecipeError, match=says.replace(".", r"\.")):
        train_recipe(tmp_path, "grpo", *more, *words)


def test_a_method_the_server_cannot_hold_is_refused_at_the_hand_over(tmp_path: Path) -> None:
    """An adapter with trained biases passes the check of names and is refused before an answer is sampled."""
    with (
        serving(tiny_model()) as (address, _),
        pytest.raises(ModelError, match=r"objective\.sampler: vLLM loads no such adapter"),
    ):
        train_recipe(tmp_path, "grpo", "steps=1", f"objective.sampler={address}", "stack.lora.lora_bias=true")


@pytest.mark.parametrize(
    "recipe", ["grpo", pytest.param("rloo", marks=pytest.mark.slow), pytest.param("ppo", marks=pytest.mark.slow)]
)
def test_a_run_through_the_command_line(recipe: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from llmrecipe.models.checkpoint_path import TINY

    with serving(AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)) as (address, state):
        words = [
            "steps=2",
            f"objective.sampler={address}",
            "objective.max_new_tokens=3",
            "objective.sampler_correction=sequence",
        ]
        train_recipe(tmp_path, recipe, *words, "batch.size=2", "eval.at_start=false", "eval.batches=1", "data.limit=20")
        steps = events(tmp_path, "step")
        assert len(steps) == 2 and state.loads >= 1
        assert all(step["sampler/logprob_diff"] < 1e-4 for step in steps)
        assert all(step["sampler/weight"] == pytest.approx(1.0, abs=1e-3) for step in steps)


def test_the_key_is_composed_and_kept(tmp_path: Path) -> None:
    composed = compose("grpo", ["objective.sampler=http://127.0.0.1:9/v1", f"run.dir={tmp_path}"])
    assert composed.recipe.objective["sampler"] == "http://127.0.0.1:9/v1"
