"""DPO worked by hand, its invariants, and parity with the reference trainer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.objectives.alignment.dpo import Dpo, dpo_loss
from tests.methods.reparameterized.test_lora import fill
from tests.tiny import roles_for, tiny_model

ROWS: list[dict[str, Any]] = [
    {"row": 0, "prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 10, 2], "rejected_ids": [11, 2]},
    {"row": 1, "prompt_ids": [12], "chosen_ids": [13, 2], "rejected_ids": [14, 15, 16, 17, 2]},
    {"row": 2, "prompt_ids": [20, 21, 22, 23, 24], "chosen_ids": [25], "rejected_ids": [26, 27]},
]


def test_sigmoid_loss_by_hand() -> None:
    """h = 0.1 * ((-1 + 2) - (-3 + 2.5)) = 0.15; log(1 + e^-0.15) = 0.62096."""
    h = torch.tensor([0.1 * ((-1.0 + 2.0) - (-3.0 + 2.5))], dtype=torch.float64)
    assert float(dpo_loss(h)) == pytest.approx(math.log1p(math.exp(-0.15)), abs=1e-12)
    smooth = 0.9 * math.log1p(math.exp(-0.15)) + 0.1 * math.log1p(math.exp(0.15))
    assert float(dpo_loss(h, smoothing=0.1)) == pytest.approx(smooth, abs=1e-12)
    robust = (0.9 * math.log1p(math.exp(-0.15)) - 0.1 * math.log1p(math.exp(0.15))) / 0.8
    assert float(dpo_loss(h, "robust", 0.1)) == pytest.approx(robust, abs=1e-12)
    assert float(dpo_loss(h, "hinge")) == pytest.approx(0.85, abs=1e-12)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_loss_is_log_two_at_step_zero(packing: bool, beta: float) -> None:
    model = tiny_model()
    stack = Stack([Lora(name="lora")])
    stack.attach(model)
    roles = roles_for(model, stack, packing)
    objective = Dpo(beta=beta)
    batch = objective.collate(ROWS, roles)
    loss = objective.loss(batch, roles)
    assert float(loss.total) / objective.weight(batch) == pytest.approx(math.log(2), abs=1e-6)
    assert float(loss.metrics["rewards/margins"][0]) == pytest.approx(0, abs=1e-5)
    assert float(loss.metrics["rewards/accuracies"][0]) == 0.0


def test_packed_pairs_with_a_shared_prompt_equal_padded_rows_in_loss_and_gradient() -> None:
    results = []
    for packing in (True, False):
        model = tiny_model().double()
        stack = Stack([Lora(name="lora", target="all-linear")])
        stack.attach(model)
        fill(model)
        model.double()
        roles = roles_for(model, stack, packing)
        objective = Dpo(beta=0.3)
        loss = objective.loss(objective.collate(ROWS, roles), roles).total
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-6)
    for name, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][name], atol=1e-5, rtol=1e-4)


def test_equal_answers_give_log_two_and_no_gradient() -> None:
    model = tiny_model()
    roles = roles_for(model, Stack([]))
    roles.stack.snapshot = {n: p.detach().clone() + 0.01 for n, p in model.named_parameters()}
    objective = Dpo(beta=0.5)
    same = [{"row": 0, "prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [7, 2]}]
    loss = objective.loss(objective.collate(same, roles), roles).total
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-6)
    assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) < 1e-6


def test_the_reference_stays_while_the_policy_moves() -> None:
    model = tiny_model()
    stack = Stack([])
    stack.attach(model)
    roles = roles_for(model, stack)
    stack.snapshot_reference(model)
    objective = Dpo()
    batch = objective.collate(ROWS, roles)
    before = roles.reference_tokens(batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        objective.loss(batch, roles).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.allclose(roles.engine(batch)["logprobs"], before)
    assert torch.equal(roles.reference_tokens(batch), before)


def trl_batch(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """[chosen; rejected], right-padded, with completion masks."""
    texts = [(r["prompt_ids"], r[k]) for k in ("chosen_ids", "rejected_ids") for r in rows]
    width = max(len(p) + len(a) for p, a in texts)
    ids = torch.tensor([p + a + [0] * (width - len(p) - len(a)) for p, a in texts])
    attention = torch.tensor([[1] * (len(p) + len(a)) + [0] * (width - len(p) - len(a)) for p, a in texts])
    completion = torch.tensor([[0] * len(p) + [1] * len(a) + [0] * (width - len(p) - len(a)) for p, a in texts])
    return {"input_ids": ids, "attention_mask": attention, "completion_mask": completion}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({"beta": 0.1}, {}),
        ({"beta": 0.5}, {}),
        ({"beta": 0.1, "loss_type": "robust", "label_smoothing": 0.1}, {"loss_type": ["robust"], "label_smoothing": 0.1}),
        ({"beta": 0.1, "loss_type": "hinge"}, {"loss_type": ["hinge"]}),
        ({"beta": 0.7, "length_norm": True}, {"loss_type": ["sigmoid_norm"]}),
    ],
)
def test_loss_and_gradients_equal_trl(options: dict, config: dict, tmp_path: Any) -> None:
    """The same ids through TRL's trainer and through ours: loss and every LoRA gradient."""
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    words = {f"w{i}": i for i in range(64)}
    raw = Tokenizer(models.WordLevel({**words}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="w0", eos_token="w2", bos_token="w1")
    text = lambda ids: " ".join(f"w{i}" for i in ids)  # noqa: E731
    dataset = Dataset.from_list(
        [{"prompt": text(r["prompt_ids"]), "chosen": text(r["chosen_ids"]), "rejected": text(r["rejected_ids"])} for r in ROWS]
    )
    arguments = DPOConfig(
        str(tmp_path), bf16=False, use_cpu=True, gradient_checkpointing=False, report_to="none", beta=options["beta"],
        per_device_train_batch_size=3, max_length=64, **config,
    )  # fmt: skip
    theirs = DPOTrainer(
        tiny_model(), args=arguments, train_dataset=dataset, processing_class=tokenizer,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    )  # fmt: skip
    model = tiny_model()
    stack = Stack([Lora(name="lora", r=4, alpha=8.0)])
    stack.attach(model)
    fill(model)
    from llmrecipe.models.hooks.hook import all_hooks

    hooks = {path: hook for path, _, _, hook in all_hooks(model)}
    pairs = []
    for name, module in theirs.model.named_modules():
        if hasattr(module, "lora_A"):
            hook = hooks[name.removeprefix("base_model.model.")]
            module.lora_A["default"].weight.data.copy_(hook.A.data)
            module.lora_B["default"].weight.data.copy_(hook.B.data)
            pairs.append((hook, module))
    loss_theirs = theirs.compute_loss(theirs.model, trl_batch(ROWS))
    loss_theirs.backward()
    roles = roles_for(model, stack)
    objective = Dpo(**options)
    batch = objective.collate(ROWS, roles)
    ours = objective.loss(batch, roles).total / objective.weight(batch)
    ours.backward()
    torch.testing.assert_close(ours, loss_theirs, atol=1e-6, rtol=1e-5)
    assert pairs
    for hook, module in pairs:
        torch.testing.assert_close(hook.A.grad, module.lora_A["default"].weight.grad, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(hook.B.grad, module.lora_B["default"].weight.grad, atol=1e-6, rtol=1e-4)
