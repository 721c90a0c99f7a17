"""What the comparisons with the reference trainer share: a word-level tokenizer, equal LoRA weights, equal gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmrecipe.engine.role_models import Roles
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.models.hooks.hook import all_hooks
from tests.methods.reparameterized.test_lora import fill
from tests.tiny import roles_for, tiny_model

PAIRS: list[dict[str, Any]] = [
    {"row": 0, "prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 10, 2], "rejected_ids": [11, 2]},
    {"row": 1, "prompt_ids": [12], "chosen_ids": [13, 2], "rejected_ids": [14, 15, 16, 17, 2]},
    {"row": 2, "prompt_ids": [20, 21, 22, 23, 24], "chosen_ids": [25, 2], "rejected_ids": [26, 27, 2]},
]
"""Prompts and answers of unequal lengths, so that a sum taken for a mean shows."""


def word_tokenizer(pad: str = "w00") -> Any:
    """Token i is the word w and two digits; w01 begins, w02 ends."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({f"w{i:02d}": i for i in range(64)}, unk_token="w63"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=pad, eos_token="w02", bos_token="w01")


def words(ids: list[int]) -> str:
    """Ids as text of `word_tokenizer`."""
    return " ".join(f"w{i:02d}" for i in ids)


def pair_dataset(rows: list[dict[str, Any]] = PAIRS) -> Any:
    """Pairs as a data set of texts."""
    from datasets import Dataset

    answers = {"chosen": "chosen_ids", "rejected": "rejected_ids"}
    # The trainer joins prompt and answer as they are, so the space between them belongs to the answer.
    return Dataset.from_list(
        [{"prompt": words(r["prompt_ids"]), **{k: " " + words(r[v]) for k, v in answers.items()}} for r in rows]
    )


def arguments(folder: Path, rows: int, **more: Any) -> dict[str, Any]:
    """What every trainer configuration needs to compute in float32 on a CPU."""
    plain = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "report_to": "none", "max_length": 64}
    return {"output_dir": str(folder), "per_device_train_batch_size": rows, **plain, **more}


def lora_config(task: str = "CAUSAL_LM") -> Any:
    """The adapter of `ours`, for the trainer's side."""
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type=task)


def ours(packing: bool = True, seed: int = 3) -> tuple[nn.Module, Roles]:
    """Our policy: a tiny model under a filled LoRA; the reference is the model without it."""
    model = tiny_model()
    stack = Stack([Lora(name="lora", r=4, alpha=8.0)])
    stack.attach(model)
    fill(model, seed)
    return model, roles_for(model, stack, packing)


def share_weights(theirs: nn.Module, model: nn.Module) -> list[tuple[Any, Any]]:
    """Give their adapter our weights; returns (our hook, their module) for each adapted layer."""
    hooks = {path: hook for path, _, _, hook in all_hooks(model)}
    pairs = []
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_A"):
            hook: Any = hooks[name.removeprefix("base_model.model.")]
            module.lora_A["default"].weight.data.copy_(hook.A.data)
            module.lora_B["default"].weight.data.copy_(hook.B.data)
            pairs.append((hook, module))
    assert len(pairs) == 4
    return pairs


def assert_same(loss: Tensor, wanted: Tensor, pairs: list[tuple[Any, Any]]) -> None:
    """Equal losses, and after both backward passes equal adapter gradients, none of them zero."""
    torch.testing.assert_close(loss, wanted, atol=1e-6, rtol=1e-5)
    loss.backward()
    wanted.backward()
    for hook, module in pairs:
        for own, other in ((hook.A, module.lora_A), (hook.B, module.lora_B)):
            grad = other["default"].weight.grad
            assert float(grad.abs().max()) > 0
            torch.testing.assert_close(own.grad, grad, atol=1e-6, rtol=1e-4)


def mean_loss(objective: Any, roles: Roles, rows: list[dict[str, Any]]) -> Tensor:
    """The loss of one step, as the loop divides it."""
    micros = next(iter(objective.batches(iter([rows]), roles)))
    total = sum(objective.loss(m, roles).total for m in micros)
    return total / sum(objective.weight(m) for m in micros)


def answer_tensors(rows: list[dict[str, Any]], side: str) -> dict[str, Tensor]:
    """`{side}_input_ids`, attention mask and labels (answers only), right-padded."""
    lines = [(r["prompt_ids"], r[f"{side}_ids"]) for r in rows]
    width = max(len(p) + len(a) for p, a in lines)
    rest = [width - len(p) - len(a) for p, a in lines]
    return {
        f"{side}_input_ids": torch.tensor([p + a + [0] * n for (p, a), n in zip(lines, rest, strict=True)]),
        f"{side}_attention_mask": torch.tensor(
            [[1] * (len(p) + len(a)) + [0] * n for (p, a), n in zip(lines, rest, strict=True)]
        ),
        f"{side}_labels": torch.tensor([[-100] * len(p) + a + [-100] * n for (p, a), n in zip(lines, rest, strict=True)]),
    }
