"""Reward modelling by hand, pooling, saved heads, scores without neighbours, parity with the reference trainer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmrecipe import load
from llmrecipe.core.errors import DataError, ModelError, RunError
from llmrecipe.data import prepare
from llmrecipe.engine.role_models import Roles
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.models.heads.scalar_head import ScalarHead
from llmrecipe.models.optimizations import speed_up
from llmrecipe.objectives.alignment._engines.scoring import add_reward, score_sequences
from llmrecipe.objectives.alignment.reward import Reward, calibration_error, normalisation, reward_loss
from llmrecipe.objectives.correlations import correlation
from llmrecipe.recipe.data_section import DataSection
from llmrecipe.recipe.schema import ModelSection, TokenizerSection
from llmrecipe.runs.open_model import open_model
from tests.data.toys import byte_tokenizer
from tests.methods.reparameterized.test_lora import fill
from tests.objectives.parity import PAIRS, arguments, lora_config, mean_loss, share_weights, word_tokenizer
from tests.recipes.learning import COMPARISONS
from tests.tiny import roles_for, tiny_model
from tests.trainings import events, train_recipe


def reward_model(packing: bool = True, adapter: bool = True, **options: Any) -> tuple[nn.Module, Roles, Reward]:
    model, objective = tiny_model(), Reward(**options)
    objective.prepare_model(model, 5)
    stack = Stack([Lora(name="lora", r=4, alpha=8.0)] if adapter else [])
    stack.attach(model)
    fill(model)
    return model, roles_for(model, stack, packing), objective


def scores_by_hand(model: nn.Module, lines: list[list[int]], at: int = -1) -> list[float]:
    """w . h of one token of each line, one line at a time."""
    found = []
    for line in lines:
        with torch.no_grad():
            h = model.base_model(input_ids=torch.tensor([line])).last_hidden_state[0, at]
            found.append(float(h @ model.task_head["reward"].weight[0]))
    return found


def lines_of(rows: list[dict[str, Any]], side: str) -> list[list[int]]:
    return [r["prompt_ids"] + r[f"{side}_ids"] for r in rows]


def test_loss_by_hand() -> None:
    """s_w = 1, s_l = -0.5, margin 0.5: d = 1; soft label 0.8; center 0.1 adds 0.1 (0.5)^2."""
    w, l = torch.tensor([[1.0], [-0.5]], dtype=torch.float64)
    better, worse = math.log1p(math.exp(-1)), math.log1p(math.exp(1))
    assert float(reward_loss(w, l, 0.5)) == pytest.approx(better)
    assert float(reward_loss(w, l, 0.5, 0.8)) == pytest.approx(0.8 * better + 0.2 * worse)
    assert float(reward_loss(w, l, 0.5, 1.0, 0.1)) == pytest.approx(better + 0.025)
    assert float(reward_loss(w, w)) == pytest.approx(math.log(2))


def test_a_constant_changes_nothing_and_swapped_sides_mirror() -> None:
    w, l = torch.randn(2, 5, dtype=torch.float64)
    torch.testing.assert_close(reward_loss(w + 3, l + 3), reward_loss(w, l))
    assert not torch.allclose(reward_loss(w + 3, l + 3, center=0.1), reward_loss(w, l, center=0.1))
    torch.testing.assert_close(reward_loss(l, w, p=0.3), reward_loss(w, l, p=0.7))


def test_statistics_by_hand() -> None:
    """Two pairs at sigma = 0.75 with one right: an error of 0.25 over both. Normalised scores have mean 0 and deviation 1."""
    d = torch.tensor([math.log(3.0), -math.log(3.0)], dtype=torch.float64)
    assert calibration_error(d) == pytest.approx(0.25)
    assert correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0])) == pytest.approx(1.0, abs=1e-6)
    chosen, rejected = torch.tensor([4.0, 6.0]), torch.tensor([0.0, 2.0])
    gain, bias = normalisation(chosen, rejected, "zscore")
    both = gain * torch.cat((chosen, rejected)) + bias
    assert float(both.mean()) == pytest.approx(0, abs=1e-6) and float(both.std(correction=0)) == pytest.approx(1, abs=1e-6)
    assert normalisation(chosen, rejected, "demo_bias") == (1.0, -5.0)


@pytest.mark.parametrize("packing", [True, False])
def test_scores_are_those_of_each_answer_alone(packing: bool) -> None:
    """Shared prompts, packing and padding change no score; the last token is scored, also where it is the padding id."""
    model, roles, objective = reward_model(packing)
    rows = [*PAIRS, {"row": 3, "prompt_ids": [9, 9], "chosen_ids": [4, 0, 0], "rejected_ids": [0]}]
    with torch.no_grad():
        scores = roles.engine(objective.collate(rows, roles), want="reward")["reward"].view(-1, 3)
    for k, side in ((1, "chosen"), (2, "rejected")):
        torch.testing.assert_close(
            scores[:, k], torch.tensor(scores_by_hand(model, lines_of(rows, side))), atol=1e-5, rtol=1e-4
        )
    both = lines_of(rows, "chosen") + lines_of(rows, "rejected")
    wanted = torch.tensor(scores_by_hand(model, both))
    for tokens in (4, 20, 9000):
        torch.testing.assert_close(score_sequences(model, both, tokens=tokens), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("packing", [True, False])
def test_other_pooling_takes_the_token_before_padding_ids(packing: bool) -> None:
    model, roles, objective = reward_model(packing, pooling="last_non_pad_id")
    rows = [{"row": 0, "prompt_ids": [9, 8], "chosen_ids": [4, 7, 0], "rejected_ids": [0]}]
    with torch.no_grad():
        scores = roles.engine(objective.collate(rows, roles), want="reward")["reward"]
    wanted = scores_by_hand(model, [[9, 8, 4, 7], [9, 8]])
    torch.testing.assert_close(scores[1:], torch.tensor(wanted), atol=1e-5, rtol=1e-4)


def test_margins_of_rows_are_subtracted() -> None:
    _, roles, objective = reward_model()
    rows = [{**r, "margin": m} for r, m in zip(PAIRS, (0.5, 0.0, 2.0), strict=True)]
    with torch.no_grad():
        d = roles.engine(objective.collate(rows, roles), want="reward")["reward"].view(-1, 3)
        wanted = sum(math.log1p(math.exp(-(float(w - l) - m))) for (_, w, l), m in zip(d, (0.5, 0.0, 2.0), strict=True)) / 3
    assert float(mean_loss(objective, roles, rows).detach()) == pytest.approx(wanted, rel=1e-5)


def test_a_row_without_a_margin_among_rows_with_one_is_named(tmp_path: Path) -> None:
    """Before training for the rows of a file, at its batch for those of a stream."""
    lines = [{"prompt": "q", "chosen": "yes", "rejected": "no", "margin": m} for m in (0.5, None, 2.0)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    data = prepare(DataSection(path=str(path), cache=False), byte_tokenizer(), "preference", seed=0)
    message = r"row 1 has no margin, and other rows have one: .*objective\.margin=false"
    with pytest.raises(DataError, match=message):
        Reward().check(None, data)  # type: ignore[arg-type]
    Reward(margin=False).check(None, data)  # type: ignore[arg-type]
    _, roles, objective = reward_model()
    rows = [{**r, "margin": m} for r, m in zip(PAIRS, (0.5, None, 2.0), strict=True)]
    with pytest.raises(DataError, match=message):
        objective.collate([{**r, "row": i} for i, r in enumerate(rows)], roles)
    assert "margin" not in Reward(margin=False).collate(rows, roles).extra
    assert "margin" not in objective.collate([{**r, "margin": None} for r in PAIRS], roles).extra


def test_soft_labels_reach_the_loss_from_the_file(tmp_path: Path) -> None:
    """A row's `p` is the weight of its chosen answer; a row without one is certain."""
    lines = [
        {"prompt": "q", "chosen": c, "rejected": "no", **p} for c, p in (("yes", {"p": 0.7}), ("maybe", {}), ("so", {"p": 0}))
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    data = prepare(DataSection(path=str(path), cache=False), byte_tokenizer(), "preference", seed=0)
    rows = [data[i] for i in range(3)]
    assert [r.get("p") for r in rows] == [0.7, None, 0.0]
    model = tiny_model(vocab_size=300)
    objective = Reward()
    objective.prepare_model(model, 5)
    roles = roles_for(model)
    with torch.no_grad():
        d = roles.engine(objective.collate(rows, roles), want="reward")["reward"].view(-1, 3)
    wanted = 0.0
    for (_, w, l), p in zip(d.tolist(), (0.7, 1.0, 0.0), strict=True):
        wanted += p * math.log1p(math.exp(l - w)) + (1 - p) * math.log1p(math.exp(w - l))
    assert float(mean_loss(objective, roles, rows).detach()) == pytest.approx(wanted / 3, rel=1e-5)


def test_head_is_float32_without_bias_and_the_language_head_does_not_train() -> None:
    model, _, _ = reward_model(adapter=False)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert "task_head.reward.weight" in trained and "lm_head.weight" not in trained
    assert "model.layers.0.self_attn.q_proj.weight" in trained
    head = ScalarHead(4000, 4001**-0.5, 1)
    assert float(head.weight.std()) == pytest.approx(4001**-0.5, rel=0.05)
    assert head(torch.ones(2, 4000, dtype=torch.bfloat16)).dtype == torch.float32


def test_scores_without_a_head_or_a_token_are_refused() -> None:
    with pytest.raises(ModelError, match="no reward head"):
        score_sequences(tiny_model(), [[1, 2]])
    with pytest.raises(ModelError, match="empty sequence"):
        score_sequences(reward_model()[0], [[]])


SMALL = ["steps=2", "batch.size=4", "eval.batches=1", "data.max_length=64"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["reward_lora", "reward"])
def test_a_finished_run_gives_the_scores_it_was_left_with(recipe: str, tmp_path: Path) -> None:
    """Bit for bit, with gain and bias, from the adapter's delta and from a whole model's folder."""
    run = train_recipe(tmp_path / "run", recipe, *SMALL)
    lines = [[1, 5, 6, 7, 9], [1, 30, 31]]
    wanted = score_sequences(run.model, lines)
    head = run.model.task_head["reward"]
    assert float(head.gain) != 1.0 and float(head.bias) != 0.0
    model, _ = load(tmp_path / "run", device="cpu")
    speed_up(model)  # as in the run: the same kernels in the same order
    assert torch.equal(score_sequences(model, lines), wanted)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_reward_adapter_lies_beside_a_policy_on_one_base(tmp_path: Path) -> None:
    """The shared SFT stack is mounted once; the policy does not feel the reward's adapter, nor the reward the policy's."""
    sft, reward = tmp_path / "sft", tmp_path / "reward"
    train_recipe(sft, "sft_lora", *SMALL)
    run = train_recipe(reward, "reward_lora", f"model.path={sft}", *SMALL)
    lines = [[1, 5, 6, 7, 9], [1, 30, 31]]
    wanted = score_sequences(run.model, lines)
    loaded = open_model(ModelSection(path=str(sft)), TokenizerSection())
    ids = torch.tensor([lines[0]])
    with torch.no_grad():
        before = loaded.model(input_ids=ids).logits
        shared = add_reward(loaded, str(reward))
        assert len(shared.added) == 1 and not shared.off
        assert torch.equal(loaded.model(input_ids=ids).logits, before)
    torch.testing.assert_close(score_sequences(loaded.model, lines, role="reward", off=shared.off), wanted)
    stack = Stack([Lora(name="policy", r=4)])
    stack.attach(loaded.model)
    assert "task_head.reward.weight" not in {n for n, p in loaded.model.named_parameters() if p.requires_grad}
    fill_only(loaded.model, "policy")
    torch.testing.assert_close(score_sequences(loaded.model, lines, role="reward", off=shared.off | {"policy"}), wanted)
    with pytest.raises(RunError, match="no reward head"):
        add_reward(loaded, str(sft))


def fill_only(model: nn.Module, owner: str) -> None:
    from llmrecipe.models.hooks.hook import all_hooks

    for _, _, _, hook in all_hooks(model, owner):
        for parameter in hook.parameters():
            parameter.data = torch.randn_like(parameter) * 0.2


def accuracy(folder: Path) -> float:
    """Share of held-out pairs whose better answer has the higher score after the last step."""
    return float(events(folder, "evaluation")[-1]["eval/rewards/accuracies"])


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model after supervised fine-tuning."""
    folder = tmp_path_factory.mktemp("sft") / "run"
    train_recipe(folder, "sft_lora")
    return folder


@pytest.mark.slow
def test_the_shipped_recipe_tells_the_better_answer(tuned: Path, tmp_path: Path) -> None:
    """Each rejected answer has one fault: who sees rudeness alone is right in three of four."""
    train_recipe(tmp_path / "run", "reward_lora", f"model.path={tuned}")
    assert accuracy(tmp_path / "run") >= 0.95


@pytest.mark.slow
def test_swapped_labels_teach_nothing(tuned: Path, tmp_path: Path) -> None:
    """The control: chosen and rejected change places in a random half of the training pairs."""
    train_recipe(tmp_path / "run", "reward_lora", *COMPARISONS(tmp_path / "data"), f"model.path={tuned}")
    assert 0.3 < accuracy(tmp_path / "run") < 0.7


@pytest.mark.slow
@pytest.mark.parametrize("case", ["plain", "margin", "center", "pad_is_eos"])
def test_loss_scores_and_gradients_equal_the_reference_trainer(case: str, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    rows = [{**r, "margin": 0.3 * i + 0.2} if case == "margin" else dict(r) for i, r in enumerate(PAIRS)]
    options: dict[str, Any] = {"center": 0.05} if case == "center" else {}
    if case == "pad_is_eos":
        options["pooling"] = "last_non_pad_id"
    model, roles, objective = reward_model(**options)
    causal = tiny_model()
    theirs_model = AutoModelForSequenceClassification.from_config(causal.config)
    theirs_model.config.num_labels = 1
    theirs_model.score = nn.Linear(32, 1, bias=False)
    theirs_model.model.load_state_dict(causal.model.state_dict())
    theirs_model.score.weight.data.copy_(model.task_head["reward"].weight.data)
    pad = 2 if case == "pad_is_eos" else 0
    theirs_model.config.pad_token_id = roles.tokenizer.pad_token_id = pad
    config = RewardConfig(**arguments(tmp_path, 3, center_rewards_coefficient=options.get("center")))
    theirs = RewardTrainer(
        theirs_model, args=config, processing_class=word_tokenizer("w02" if pad else "w00"), peft_config=lora_config("SEQ_CLS"),
        train_dataset=Dataset.from_dict({"chosen": ["w03"] * 3, "rejected": ["w04"] * 3}),
    )  # fmt: skip
    pairs = share_weights(theirs.model, model)
    lines = lines_of(rows, "chosen") + lines_of(rows, "rejected")
    width = max(map(len, lines))
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([line + [pad] * (width - len(line)) for line in lines]),
        "attention_mask": torch.tensor([[1] * len(line) + [0] * (width - len(line)) for line in lines]),
    }
    if case == "margin":
        inputs["margin"] = torch.tensor([r["margin"] for r in rows])
    wanted = theirs.compute_loss(theirs.model, inputs)
    loss = mean_loss(objective, roles, rows)
    torch.testing.assert_close(loss, wanted, atol=1e-6, rtol=1e-5)
    loss.backward()
    wanted.backward()
    for hook, module in pairs:
        torch.testing.assert_close(hook.A.grad, module.lora_A["default"].weight.grad, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(hook.B.grad, module.lora_B["default"].weight.grad, atol=1e-6, rtol=1e-4)
    saved = theirs.model.base_model.model.score
    trained = saved.modules_to_save["default"].weight
    torch.testing.assert_close(model.task_head["reward"].weight.grad, trained.grad, atol=1e-6, rtol=1e-4)
