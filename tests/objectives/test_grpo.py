"""GRPO and RLOO: the first pass of a rollout, layouts, what the loss is a mean of, parity, learning."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe.core import device_profile
from llmrecipe.core.errors import RecipeError
from llmrecipe.engine.generation import generate
from llmrecipe.engine.logprob import Post, token_logprobs
from llmrecipe.engine.sampling import Sampling
from llmrecipe.objectives.alignment.grpo import Grpo
from llmrecipe.objectives.alignment.rloo import Rloo
from llmrecipe.recipe.compose import compose
from tests.objectives.rollouts import (
    REWARD,
    ROWS,
    Numbers,
    gradients,
    mean_loss,
    samples_of,
    setting,
    updates,
)
from tests.tiny import tiny_model
from tests.trainings import curve, events, learned, resume, stop_after, train_recipe

ANSWERS = [[8, 9, 10, 2], [11, 2], [13], [14, 15, 16, 17, 2], [25, 26], [27, 2], [30, 31, 32], [33, 2]]
OWNER = [0, 0, 1, 1, 2, 2, 3, 3]
SCORES = [1.0, 0.0, 0.2, 0.9, 0.5, 0.1, 0.7, 0.0]


def known(objective: Any, packing: bool = True, **options: Any) -> tuple[Any, Any]:
    """(roles, batch): known answers, measured and judged as a rollout's are."""
    roles = setting(objective, packing, **options)
    samples = samples_of(ANSWERS, OWNER, SCORES)
    objective.live.measure(samples, roles)
    objective.advantages(samples, roles)
    return roles, objective.live.lay_out(samples, roles)


def moved(batch: Any, seed: int = 1) -> Any:
    """The batch as if the policy had moved since it was sampled."""
    generator = torch.Generator().manual_seed(seed)
    old = batch.extra["old"]
    return batch.with_extra(old=old + 0.3 * torch.randn(old.shape, generator=generator))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", [Grpo, Rloo])
def test_the_first_pass_has_ratio_one_to_the_bit(kind: Any, packing: bool) -> None:
    objective = kind(reward=REWARD, answers=3, max_new_tokens=6, minibatches=2, epochs=2, temperature=0.8, beta=0.1)
    roles = setting(objective, packing)
    roles.micro_rows = 2
    steps = list(updates(objective, roles, rollouts=1))
    assert len(steps) == objective.updates() == 4
    for micros in steps[:2]:
        for batch in micros:
            metrics = objective.loss(batch, roles).metrics
            total, count = metrics["policy/ratio"]
            assert float(total) == count
            assert float(metrics["policy/approxkl"][0]) == float(metrics["policy/clipfrac"][0]) == 0.0
    assert sum(b.extra["score"].numel() for micros in steps[:2] for b in micros) == 3 * len(ROWS)


def test_boundaries_lie_between_rollouts() -> None:
    objective = Grpo(reward=REWARD, answers=2, max_new_tokens=3, epochs=2, minibatches=2)
    seen = [objective.at_boundary() for _ in updates(objective, setting(objective), rollouts=2)]
    assert seen == [False, False, False, True] * 2
    assert objective.state() == {"rollouts": 2}


@pytest.mark.parametrize("kind", [Grpo, Rloo])
def test_answers_that_share_their_prompt_equal_padded_rows(kind: Any) -> None:
    results = []
    for packing in (True, False):
        objective = kind(reward=REWARD, answers=2, max_new_tokens=8, beta=0.2)
        roles, batch = known(objective, packing)
        loss = mean_loss(objective, moved(batch), roles)
        loss.backward()
        results.append((loss.detach(), gradients(roles)))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-5)
    assert max(float(g.abs().max()) for g in results[0][1].values()) > 1e-3
    for name, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][name], atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", [Grpo, Rloo])
def test_no_advantage_no_gradient(kind: Any) -> None:
    objective = kind(reward=REWARD, answers=2, max_new_tokens=8, beta=0.0)
    roles, batch = known(objective)
    mean_loss(objective, batch.with_extra(advantages=torch.zeros_like(batch.extra["advantages"])), roles).backward()
    assert max(float(g.abs().max()) for g in gradients(roles).values()) == 0.0


def by_hand(objective: Grpo, roles: Any, batch: Any) -> float:
    """The loss of `ANSWERS`, token by token in Python's floats."""
    t = roles.engine(batch, temperature=objective.temperature)["logprobs"].tolist()
    old, ref, adv = (batch.extra[k].tolist() for k in ("old", "reference", "advantages"))
    lengths = [len(a) for a in ANSWERS]
    tokens, at = [], 0
    for n in lengths:
        ratios = [t[i] - old[i] for i in range(at, at + n)]
        if objective.ratio == "sequence":
            ratios = [sum(ratios) / n] * n
        row = []
        for i, r in zip(range(at, at + n), ratios, strict=True):
            rho = math.exp(r)
            surrogate = max(-adv[i] * rho, -adv[i] * min(max(rho, 0.8), 1.28))
            kl = math.exp(ref[i] - t[i]) - 1 - (ref[i] - t[i])
            row.append(surrogate + objective.beta * kl * (rho if objective.kl_correction else 1.0))
        tokens.append(row)
        at += n
    if objective.loss_type == "dapo":
        return sum(map(sum, tokens)) / sum(lengths)
    if objective.loss_type == "grpo":
        return sum(sum(row) / len(row) for row in tokens) / len(tokens)
    return sum(map(sum, tokens)) / (len(tokens) * objective.max_new_tokens)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_what_the_loss_is_a_mean_of(loss_type: Any, ratio: Any) -> None:
    options: dict[str, Any] = {"loss_type": loss_type, "ratio": ratio, "kl_correction": ratio == "token"}
    objective = Grpo(reward=REWARD, answers=2, max_new_tokens=9, clip_high=0.28, temperature=1.3, beta=0.3, **options)
    roles, batch = known(objective)
    batch = moved(batch)
    assert mean_loss(objective, batch, roles).item() == pytest.approx(by_hand(objective, roles, batch), rel=2e-5)


def test_rloo_by_hand() -> None:
    """R = score - beta KL of the answer; with two answers the advantage is the difference; one ratio an answer."""
    objective = Rloo(reward=REWARD, answers=2, max_new_tokens=8, beta=0.3)
    roles, batch = known(objective)
    kl = batch.sum_by_sequence(batch.extra["old"] - batch.extra["reference"])
    leaves = [i for i in range(batch.sequences) if batch.counts()[i]]
    rewards = [s - 0.3 * float(kl[i]) for s, i in zip(SCORES, leaves, strict=True)]
    wanted = [rewards[i] - rewards[i ^ 1] for i in range(8)]
    assert batch.extra["advantages"].tolist() == pytest.approx(wanted, abs=1e-5)
    assert max(abs(float(kl[i])) for i in leaves) > 1e-2
    assert mean_loss(objective, batch, roles).item() == pytest.approx(-sum(wanted) / 8, abs=1e-6)


def test_an_empty_share_reports_the_same_metrics() -> None:
    """The last batch of an epoch may leave a process without prompts; it still takes part in every reduction."""
    for objective in (Grpo(reward=REWARD, answers=2, max_new_tokens=4), Rloo(reward=REWARD, answers=2, max_new_tokens=4)):
        roles = setting(objective)
        full = objective.loss(next(iter(updates(objective, roles)))[0], roles)
        (empty,) = next(iter(updates(objective, roles, rows=[])))
        nothing = objective.loss(empty, roles)
        assert set(nothing.metrics) == set(full.metrics)
        assert nothing.total.item() == 0.0 and objective.weight(empty) == 0.0
        nothing.total.backward()


def test_a_missing_end_replaces_the_score() -> None:
    objective = Grpo(reward=REWARD, answers=2, max_new_tokens=2, missing_end=-1.0)
    roles = setting(objective)
    samples = objective.live.draw(ROWS, roles)
    assert {s.score == -1.0 for s in samples if not s.answer.finished} == {True}
    assert all(s.score >= 0 for s in samples if s.answer.finished)


def test_sampling_ignores_what_the_checkpoint_says() -> None:
    """Settings that travel with a checkpoint would make samples that the policy's log-probabilities do not describe."""
    model = tiny_model()
    sampling = Sampling(8, 1.0, seed=1)
    plain = generate(model, Numbers(), [[5, 6, 7]] * 4, sampling)
    model.generation_config.update(repetition_penalty=50.0, top_k=1, top_p=0.1, min_new_tokens=8, temperature=0.1)
    model.generation_config.bad_words_ids = [[i] for i in range(3, 30)]
    kept = model.generation_config
    assert generate(model, Numbers(), [[5, 6, 7]] * 4, sampling) == plain
    assert model.generation_config is kept


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("post", [Post(), Post(scale=0.5, cap=4.0)])
def test_temperature_divides_the_logits(trained: bool, post: Post) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 20, bias=False).requires_grad_(trained)
    hidden, target = torch.randn(5, 8, requires_grad=True), torch.randint(20, (5,))
    got = token_logprobs(hidden, target, head, dataclasses.replace(post, temperature=0.6), entropy=True)
    wanted = (post(head(hidden)) / 0.6).log_softmax(-1)
    torch.testing.assert_close(got["logprobs"], wanted.gather(1, target[:, None])[:, 0])
    torch.testing.assert_close(got["entropy"], -(wanted.exp() * wanted).sum(-1).detach())
    weights = torch.randn(5)
    (mine,) = torch.autograd.grad((got["logprobs"] * weights).sum(), hidden)
    (theirs,) = torch.autograd.grad((wanted.gather(1, target[:, None])[:, 0] * weights).sum(), hidden)
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


def test_wrong_recipes_stop_before_any_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmrecipe.runs import open_model

    def unreachable(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(open_model, "open_model", unreachable)
    for overrides, message in (
        (["objective.answers=1"], "objective.answers: a group of one"),
        (["objective.reward.rule.rule=maners"], "did you mean 'manners'"),
        (["objective.reward={}"], "objective.reward: no reward is given"),
        (["objective.reward.rule.rul=polite"], "objective.reward.rule.rul: .*did you mean 'rule'"),
    ):
        with pytest.raises(RecipeError, match=message):
            train_recipe(tmp_path / "x", "grpo", *overrides)


def test_steps_count_updates() -> None:
    from llmrecipe.training.build_run import step_count

    recipe = compose("grpo", ["steps=null", "epochs=1", "batch.size=100"]).recipe
    assert step_count(recipe, 1000, Grpo(reward=REWARD, epochs=2, minibatches=3).updates()) == 60


SHORT = ["batch.size=4", "objective.answers=3", "objective.max_new_tokens=12", "objective.epochs=2", "eval.batches=1"]


def test_a_run_stopped_inside_a_rollout_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """The signal comes after the first of two updates; the checkpoint is written after the second."""
    options = [*SHORT, "steps=6"]
    train_recipe(tmp_path / "whole", "grpo", *options)
    stop_after(1, tmp_path / "cut", "grpo", *options)
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-000002"]
    resume(tmp_path / "cut")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    one, other = learned(tmp_path / "whole"), learned(tmp_path / "cut")
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    check = events(tmp_path / "whole", "check")[0]
    assert check["policy/ratio"] == 1.0 and check["policy/approxkl"] == 0.0 and abs(check["objective/kl"]) < 1e-3
    assert {"prompt", "answer", "score"} <= events(tmp_path / "whole", "sample")[0].keys()


@pytest.mark.slow
def test_a_run_that_samples_in_tensors_of_fixed_shape_is_the_same(tmp_path: Path) -> None:
    """Two rollouts: the second one is sampled from weights that the first one changed."""
    for way in ("continuous", "static"):
        run = train_recipe(tmp_path / way, "grpo", *SHORT, "steps=4", f"runtime.decoding={way}")
        assert [name for name, right in run.roles.model.decoders_tried.items() if right] == [way]
    for own, wanted in zip(curve(tmp_path / "static"), curve(tmp_path / "continuous"), strict=True):
        assert own == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    one, other = learned(tmp_path / "static"), learned(tmp_path / "continuous")
    assert all(torch.allclose(one[k], other[k], atol=1e-5) for k in one) and one.keys() == other.keys()


def test_a_way_to_sample_that_the_device_decided_and_cannot_go_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided = dataclasses.replace(device_profile.TABLE["cpu"], decoding="graphs")
    monkeypatch.setattr(device_profile, "TABLE", {"cpu": decided})
    train_recipe(tmp_path, "grpo", *SHORT, "steps=4")
    found = [e["message"] for e in events(tmp_path, "warning") if e["message"].startswith("runtime.decoding: ")]
    assert len(found) == 1 and "is not decoded by graphs: it needs a CUDA GPU, and the device is cpu" in found[0]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["grpo", "rloo"])
def test_a_heavy_leash_holds_the_policy(recipe: str, tmp_path: Path) -> None:
    """The control: with beta = 10 the score falls back to where it started."""
    train_recipe(tmp_path, recipe, "objective.show=0", "objective.beta=10.0")
    first, *_, last = events(tmp_path, "evaluation")
    assert last["eval/kl"] < 0.5 and abs(last["eval/score"] - first["eval/score"]) < 0.15


def trl_inputs(batch: Any) -> dict[str, torch.Tensor]:
    """The batch as the reference trainers have it: prompts padded on the left, answers on the right."""
    prompts = [ROWS[i]["prompt_ids"] for i in OWNER]
    width, length = max(map(len, prompts)), max(map(len, ANSWERS))
    ids: Callable[[list[list[int]], bool, int, int], torch.Tensor] = lambda rows, left, size, value: torch.tensor(  # noqa: E731
        [
            ([0] * (size - len(r)) if left else [])
            + (r if value < 0 else [value] * len(r))
            + ([] if left else [0] * (size - len(r)))
            for r in rows
        ]
    )

    def padded(name: str) -> torch.Tensor:
        parts = batch.extra[name].split([len(a) for a in ANSWERS])
        return torch.stack([torch.cat([p, torch.zeros(length - p.numel())]) for p in parts])

    first = torch.tensor([0, *torch.tensor([len(a) for a in ANSWERS]).cumsum(0).tolist()[:-1]])
    advantages = batch.extra["advantages"]
    return {
        "prompt_ids": ids(prompts, True, width, -1),
        "prompt_mask": ids(prompts, True, width, 1),
        "completion_ids": ids(ANSWERS, False, length, -1),
        "completion_mask": ids(ANSWERS, False, length, 1),
        "advantages": advantages if advantages.numel() == len(ANSWERS) else advantages[first],
        "old_per_token_logps": padded("old"),
        "old_logps": padded("old").sum(1),
        "ref_per_token_logps": padded("reference"),
        "num_items_in_batch": torch.tensor(float(sum(map(len, ANSWERS)))),
    }


def trl_weights(inputs: dict[str, torch.Tensor], batch: Any, ours: Grpo) -> torch.Tensor:
    """Truncated weights as the reference trainer makes them, (B, T) or (B, 1)."""
    parts = batch.extra["sampler"].split([len(a) for a in ANSWERS])
    sampler = torch.stack([torch.cat([p, torch.zeros(inputs["completion_mask"].shape[1] - p.numel())]) for p in parts])
    apart = (inputs["old_per_token_logps"] - sampler) * inputs["completion_mask"]
    if ours.sampler_correction == "sequence":
        apart = apart.sum(-1, keepdim=True)
    return apart.exp().clamp(max=ours.sampler_cap)


def trl_trainer(kind: str, folder: Path, **config: Any) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="w0", eos_token="w2", bos_token="w1")
    arguments, trainer = (GRPOConfig, GRPOTrainer) if kind == "grpo" else (RLOOConfig, RLOOTrainer)
    return trainer(
        tiny_model(), args=arguments(
            str(folder), bf16=False, use_cpu=True, gradient_checkpointing=False, report_to="none", num_generations=2,
            per_device_train_batch_size=8, max_completion_length=9, **config,
        ),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_list([{"prompt": "w5 w6"}] * 8), processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Grpo(reward=REWARD, answers=2, max_new_tokens=9), {"beta": 0.04, "loss_type": "dapo"}),
        (Grpo(reward=REWARD, answers=2, max_new_tokens=9, loss_type="grpo"), {"beta": 0.04, "loss_type": "grpo"}),
        (Grpo(reward=REWARD, answers=2, max_new_tokens=9, loss_type="dr_grpo"), {"beta": 0.04, "loss_type": "dr_grpo"}),
        (Grpo(reward=REWARD, answers=2, max_new_tokens=9, loss_type="grpo", ratio="sequence", beta=0.1, clip_high=0.3,
              temperature=0.7),
         {"beta": 0.1, "loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_high": 0.3, "temperature": 0.7}),
        (Grpo(reward=REWARD, answers=2, max_new_tokens=9, sampler_correction="token", sampler_cap=1.5),
         {"beta": 0.04, "loss_type": "dapo"}),
        (Grpo(reward=REWARD, answers=2, max_new_tokens=9, sampler_correction="sequence", sampler_cap=2.5, loss_type="grpo"),
         {"beta": 0.04, "loss_type": "grpo"}),
        (Rloo(reward=REWARD, answers=2, max_new_tokens=9, beta=0.05, temperature=0.9), {"beta": 0.05, "temperature": 0.9}),
    ],
)  # fmt: skip
def test_loss_and_gradients_equal_trl(ours: Any, theirs: dict[str, Any], tmp_path: Path) -> None:
    from llmrecipe.models.hooks.hook import all_hooks

    roles, batch = known(ours)
    batch = moved(batch)
    trainer = trl_trainer("rloo" if isinstance(ours, Rloo) else "grpo", tmp_path, **theirs)
    trainer.current_gradient_accumulation_steps = 1
    hooks = {path: hook for path, _, _, hook in all_hooks(roles.model)}
    pairs = []
    for name, module in trainer.model.named_modules():
        if hasattr(module, "lora_A"):
            hook = hooks[name.removeprefix("base_model.model.")]
            module.lora_A["default"].weight.data.copy_(hook.A.data)
            module.lora_B["default"].weight.data.copy_(hook.B.data)
            pairs.append((hook, module))
    trainer.model.train()
    inputs = trl_inputs(batch)
    if ours.sampler_correction != "none":
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
        inputs["importance_sampling_ratio"] = trl_weights(inputs, batch, ours)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    mine = mean_loss(ours, batch, roles)
    mine.backward()
    torch.testing.assert_close(mine.detach(), loss.detach(), atol=1e-6, rtol=1e-5)
    assert pairs
    for hook, module in pairs:
        torch.testing.assert_close(hook.A.grad, module.lora_A["default"].weight.grad, atol=2e-6, rtol=1e-4)
        torch.testing.assert_close(hook.B.grad, module.lora_B["default"].weight.grad, atol=2e-6, rtol=1e-4)


def test_held_out_answers_belong_to_their_rows_and_training_answers_to_the_process() -> None:
    """Any number of processes, and any batch, draws the same held-out answers; what is trained on differs."""
    objective = Grpo(reward=REWARD, answers=2, max_new_tokens=6, temperature=1.0)
    roles = setting(objective)
    asked = [{**row, "held_out": True} for row in ROWS]

    def drawn(rows: list[dict[str, Any]], rank: int, seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        roles.runtime = types.SimpleNamespace(rank=rank, world=2)
        return [s.answer.ids for s in objective.live.draw(rows, roles)]

    whole = drawn(asked, 0, 1)
    assert drawn(asked[::2], 0, 2) == whole[::2] and drawn(asked[1::2], 1, 3) == whole[1::2]
    assert len({tuple(ids) for ids in whole}) == len(ROWS)
    trained = drawn(ROWS, 0, 1)
    assert drawn(ROWS, 0, 1) == trained and len(trained) == 2 * len(ROWS)
    assert drawn(ROWS, 1, 1) != trained != drawn(ROWS, 0, 2)
