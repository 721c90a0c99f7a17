"""AdaLoRA in PEFT's layout.

ADALORA      <path>.lora_A (k, in), .lora_B (out, k), .lora_E (k, 1): the k triplets that were kept
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmrecipe.interop.peft.layout import PREFIX, Adapter
from llmrecipe.methods.reparameterized.adalora import Adalora, SvdLowRank
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.models.site_finder import widths


@torch.no_grad()
def adalora_adapter(wrapper: Adalora, model: nn.Module) -> Adapter | None:
    """Return an AdaLoRA folder with its rank pattern; None where two parts of one fused layer are adapted."""
    hooks = [(path, module, hook) for path, module, _, hook in all_hooks(model, wrapper.name) if isinstance(hook, SvdLowRank)]
    if len({path for path, _, _ in hooks}) < len(hooks):
        return None
    total, first, last = wrapper.phases(model)
    config: dict[str, Any] = {
        "peft_type": "ADALORA",
        "target_modules": sorted(path for path, _, _ in hooks),
        "init_r": wrapper.init_r,
        "target_r": wrapper.target_r,
        "lora_alpha": int(wrapper.alpha) if wrapper.alpha == int(wrapper.alpha) else wrapper.alpha,
        "lora_dropout": wrapper.dropout,
        "bias": "none",
        "tinit": first,
        "tfinal": last,
        "deltaT": wrapper.deltaT,
        "beta1": wrapper.beta1,
        "beta2": wrapper.beta2,
        "orth_reg_weight": wrapper.orth_reg_weight,
        "total_step": total,
        "rank_pattern": {f"{path}.lora_E": _pattern(hook, wrapper.init_r) for path, _, hook in hooks},
        "inference_mode": True,
    }
    tensors: dict[str, Tensor] = {}
    for path, module, hook in hooks:
        B = hook.B.detach()[:, hook.kept]
        if hook.rows is not None:
            B = B.new_zeros(widths(module, 0)[1], B.shape[1]).index_copy(0, hook.rows, B)
        home = PREFIX + path
        tensors |= {
            f"{home}.lora_A": hook.A.detach()[hook.kept],
            f"{home}.lora_B": B,
            f"{home}.lora_E": hook.E.detach()[hook.kept],
        }
    return Adapter(config, tensors)


def _pattern(hook: SvdLowRank, init_r: int) -> list[bool]:
    """Return which of `init_r` triplets are kept; of a pruned module only their number is known, all that PEFT reads."""
    return [*hook.kept.tolist(), *[False] * (init_r - len(hook.kept))]
