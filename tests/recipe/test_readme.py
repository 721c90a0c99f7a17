"""The README tells the truth about what is registered."""

from __future__ import annotations

from llmrecipe.core import registry
from llmrecipe.recipe.methods_table import BEGIN, END, methods_table
from tests.support import ROOT


def rows(table: str) -> list[str]:
    """The lines of a table of methods that tell of one."""
    return [line for line in table.splitlines() if line.count(" | ") == 3 and "`" in line]


def test_every_row_of_the_table_is_true() -> None:
    """What it tells is registered and told as it is; a method that is new may wait for the next `make readme`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    told = rows(text.partition(BEGIN)[2].partition(END)[0])
    assert len(told) > 20
    assert not set(told) - set(rows(methods_table())), "run `make readme`"


def test_every_method_is_in_the_table_that_is_generated() -> None:
    table = methods_table()
    for group in ("stack", "objective"):
        for name in registry.names(group):
            assert f"| `{name}` |" in table
