"""The README tells the truth about what is registered."""

from __future__ import annotations

from llmrecipe.core import registry
from llmrecipe.recipe.methods_table import BEGIN, END, methods_table
from tests.support import ROOT


def test_the_table_of_methods_is_the_registrys() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    inside = text.partition(BEGIN)[2].partition(END)[0].strip()
    assert inside == methods_table(), "run `make readme`"


def test_every_method_is_in_the_table() -> None:
    table = methods_table()
    for group in ("stack", "objective"):
        for name in registry.names(group):
            assert f"| `{name}` |" in table
