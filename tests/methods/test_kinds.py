"""Every registered wrapper on every kind of model: right gradients, or one line that says why not."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from llmrecipe.core import registry
from llmrecipe.core.errors import UserError
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models.module_map import anatomy
from tests.contract import KINDS
from tests.methods.additive.harness import model_of
from tests.methods.kinds import CHANGES, EXACT, FAMILIES, cell, matrix, slopes, wide_norms


def no_encoder(model: nn.Module) -> bool:
    """Whether every token of a block may be seen by earlier ones' successors only."""
    return not any(s.role == "block" and s.side == "encoder" for s in anatomy(model).sites)


def bias_free(model: nn.Module) -> bool:
    """Whether a projection of attention or feed-forward has no bias."""
    parts = [s for s in anatomy(model).sites if s.role.startswith(("attn.", "mlp.", "cross."))]
    return any(isinstance(s.module, nn.Linear) and s.module.bias is None for s in parts)


def dense(model: nn.Module) -> bool:
    """Whether it has no experts."""
    return not any(s.role == "experts" for s in anatomy(model).sites)


REFUSED: dict[str, tuple[Callable[[nn.Module], bool], str]] = {
    "coda": (no_encoder, "causal: prompt_only"),
    "esft": (dense, "no mixture of experts"),
    "bitfit": (bias_free, "missing=add_zero"),
    "s4": (lambda _: True, "budget"),
    "vpt": (lambda _: True, "images, and this one reads text; use prompt_tuning .* or prefix_tuning"),
}
"""Kind -> on which models its defaults are refused, and the option that the refusal names."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_defaults_fit_every_kind_of_model_or_one_line_names_the_option(kind: str, family: str) -> None:
    """On the meta device, as `check` builds it: nothing has been read."""
    with torch.device("meta"):
        model = model_of(family)
    stack = Stack([registry.load_class("stack", kind)(name="method")])
    when, option = REFUSED.get(kind, (lambda _: False, ""))
    if not when(model):
        stack.attach(model)
        return
    with pytest.raises(UserError) as error:
        stack.attach(model)
    assert str(error.value).startswith("stack.method") and re.search(option, str(error.value)) and "\n" not in str(error.value)


@pytest.mark.parity("{kind}", "central differences of the loss, float64")
@pytest.mark.parametrize(("kind", "family"), matrix(CHANGES, FAMILIES))
def test_gradients_equal_central_differences_in_float64(kind: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cell(kind, family, moved=True, **EXACT.get(kind, {}))
    wide_norms(monkeypatch, made.model)
    slope, wanted = slopes(made)
    assert wanted > 0.5
    torch.testing.assert_close(slope, wanted, rtol=1e-5, atol=0.0)
