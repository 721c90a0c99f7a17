"""Which kinds may share a stack: the table, the recipe and the run use one rule, and it is the one the classes declare."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrecipe.cli.app import run_command as command
from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError
from llmrecipe.methods._base.method import Wrapper
from llmrecipe.methods._base.stack import Stack
from llmrecipe.recipe.compatibility import pairs
from llmrecipe.recipe.stack_rules import Declared, refusals
from llmrecipe.recipe.validate import check_stack

KINDS = registry.names("stack")
GREEDY = ["adalora", "child_tuning", "diff_pruning", "ewc", "fishmask", "group_mask", "smt", "spt"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_source_declares_is_what_the_class_declares(kind: str) -> None:
    wrapper = registry.load_class("stack", kind)(name="one")
    assert Declared.of_spec("one", registry.spec("stack", kind)) == Declared.of_wrapper(wrapper)


@pytest.mark.parametrize("kind", KINDS)
def test_a_method_that_works_on_gradients_says_so(kind: str) -> None:
    cls = registry.load_class("stack", kind)
    assert bool(cls.needs_gradients) == cls.reads_gradients()
    # Where only an option reads gradients, the stack asks the built wrapper.
    if cls.after_backward is not Wrapper.after_backward and not cls.needs_gradients:
        assert cls.check_stack is not Wrapper.check_stack


def test_pairs_of_a_gradient_method_and_mezo_are_refused_by_table_recipe_and_run() -> None:
    table = {frozenset((p.first, p.second)): p.reason for p in pairs()}
    refused = {next(iter(pair - {"mezo"})) for pair, reason in table.items() if "mezo" in pair and reason and len(pair) == 2}
    assert refused == {*GREEDY}
    for kind in GREEDY:
        reason = table[frozenset((kind, "mezo"))]
        assert reason and reason.startswith(kind) and reason.endswith("mezo makes none")
        mistakes = check_stack({"mine": {"kind": kind}, "rule": {"kind": "mezo"}})
        assert [m.text for m in mistakes] == [f"mine and rule cannot share a stack: {reason}"]
        built = [registry.load_class("stack", name)(name=name) for name in ("mezo", kind)]
        with pytest.raises(RecipeError, match=f"{kind} .*, and mezo makes none"):
            Stack(built)


@pytest.mark.parametrize("verb", ["check", "train"])
def test_the_command_line_refuses_before_anything_is_loaded(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["recipe=sft_lora", "stack=[fishmask, mezo]", "model.path=/no/such/model", f"run.dir={tmp_path / 'run'}"]
    assert command([verb, *words]) == 2
    assert "fishmask and mezo cannot share a stack" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_two_rules_and_missing_company_by_hand() -> None:
    one, two = Declared("a", "x", is_rule=True), Declared("b", "y", is_rule=True, requires=("z",))
    assert [r.text for r in refusals([one, two])] == [
        "y needs z in the stack too",
        "a and b both replace the update rule; keep one",
    ]
    assert refusals([one, Declared("c", "z", conflicts={"w": "no"})]) == []
    assert refusals([Declared("d", "w"), Declared("c", "z", conflicts={"w": "no"})])[0].name == "c"


def test_options_of_mezo_that_cannot_be_are_refused_before_the_model(tmp_path: Path) -> None:
    mezo = registry.load_class("stack", "mezo")
    with pytest.raises(RecipeError, match=r"stack\.mezo\.moments: .*set store_history=true"):
        Stack([mezo(name="mezo", optimizer="adam", moments="store", store_history=False)])
    penalised = type("P", (Wrapper,), {"penalty": lambda self, model: 1.0})(name="p")
    with pytest.raises(RecipeError, match=r"stack\.mezo\.perturb: the penalty of p reads weights"):
        Stack([penalised, mezo(name="mezo", perturb="layerwise")])
    Stack([penalised, mezo(name="mezo")])
