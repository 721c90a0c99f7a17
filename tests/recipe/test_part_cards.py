"""`show` explains the parts of the native transformer from their source, without torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError
from llmrecipe.core.paths import PACKAGE
from llmrecipe.recipe.component_card import find_cards

PARTS = PACKAGE / "models" / "native" / "parts"
FORMULAS = {
    "embedding": "X = M[ids]",
    "patch_embedding": "W vec(P_1) + b",
    "positional_encoding": "PE[t, 2i] = sin(t / 10000^(2i/D))",
    "self_attention": "softmax(Q K^T / sqrt(E) + mask)",
    "multi_head_attention": "[head_1; ...; head_H] W_o",
    "feed_forward": "W_down (f(W_gate x) * W_up x)",
    "mixture_of_experts": "L = N sum_e c_e m_e",
    "layer_norm": "x / sqrt(mean(x^2) + eps) * g",
    "add_norm": "y = norm(x + dropout(f(x)))",
    "width_scaling": "s / sqrt(m)",
}


def test_every_part_of_the_native_transformer_is_explained_with_its_formula_and_keys() -> None:
    family = next(card for card in find_cards("native") if card["group"] == "family")
    assert [part["name"] for part in family["parts"]] == list(FORMULAS)
    assert set(FORMULAS) == {path.stem for path in PARTS.glob("*.py")} - {"__init__"}, "a part that show leaves out"
    for part in family["parts"]:
        assert FORMULAS[part["name"]] in part["doc"] and "Config:" in part["doc"] and part["papers"], part["name"]


@pytest.mark.parametrize("name", FORMULAS)
def test_a_part_has_a_card_of_its_own(name: str) -> None:
    (card,) = find_cards(name)
    assert (card["group"], card["family"]) == ("part", "native") and FORMULAS[name] in card["doc"]


def test_a_misspelt_part_is_suggested() -> None:
    with pytest.raises(RecipeError, match="multi_head_attention"):
        find_cards("multi_head_atention")


def test_families_without_explained_parts_have_none() -> None:
    assert next(c for c in find_cards("llama") if c["group"] == "family")["parts"] == []
    assert registry.spec("family", "llama").facts.get("documents") is None


def test_show_prints_them_and_imports_no_torch() -> None:
    code = (
        "import sys\nfrom llmrecipe.cli.app import run_command\nrun_command(['show', 'native', *sys.argv[1:]])\n"
        "assert 'torch' not in sys.modules, 'torch'"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(formula in shown for formula in FORMULAS.values())
    cards = json.loads(
        subprocess.run([sys.executable, "-c", code, "--json"], capture_output=True, text=True, check=True).stdout
    )
    assert [part["name"] for part in cards[0]["parts"]] == list(FORMULAS)
