"""Validation: every misspelt key at every depth, wrong values, stack rules, and building the objects."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError, did_you_mean
from llmrecipe.recipe.compose import compose, compose_mapping, section_defaults
from llmrecipe.recipe.schema import Recipe
from llmrecipe.recipe.section import Section
from llmrecipe.recipe.validate import build_component, instantiate, validate

Project = Callable[..., Path]


def slips(word: str, seed: int) -> Iterator[str]:
    """One letter more, less, other, and two swapped, at drawn places."""
    rng = random.Random(f"{word}{seed}")
    at = rng.randrange(len(word))
    letter = rng.choice(string.ascii_lowercase.replace(word[at], "") if word[at] in string.ascii_lowercase else "abc")
    yield word[:at] + letter + word[at:]
    if len(word) > 2:
        yield word[:at] + word[at + 1 :]
    if len(word) > 1:
        yield word[:at] + letter + word[at + 1 :]
        if at + 1 < len(word) and word[at] != word[at + 1]:
            yield word[:at] + word[at + 1] + word[at] + word[at + 2 :]


def schema_keys() -> list[tuple[str, ...]]:
    """Every key of the schema and of the components of one recipe, at every depth."""
    keys: list[tuple[str, ...]] = [(name,) for name in Recipe.model_fields]
    for name, value in section_defaults().items():
        field = Recipe.model_fields[name].annotation
        if isinstance(field, type) and issubclass(field, Section):
            keys += [(name, key) for key in value]
    keys += [("objective", key) for key in registry.spec("objective", "dpo").options]
    keys += [("optim", key) for key in registry.spec("optim", "adamw").options]
    keys += [("schedule", key) for key in registry.spec("schedule", "cosine").options]
    keys += [("stack", "lora", key) for key in registry.spec("stack", "lora").options]
    return keys


def siblings(mapping: dict[str, Any], key: tuple[str, ...]) -> set[str]:
    node: Any = mapping
    for part in key[:-1]:
        node = node[part]
    return set(node)


def nearly(given: str, suggested: str) -> bool:
    """Whether a suggestion is one slip away, by the same function the message uses."""
    return did_you_mean(given, [suggested]) != ""


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return compose_mapping("dpo_lora", [])[2]


@pytest.mark.parametrize("key", schema_keys(), ids=".".join)
def test_a_misspelt_key_is_refused_with_the_right_spelling(whole: dict[str, Any], key: tuple[str, ...]) -> None:
    for wrong in {w for seed in range(3) for w in slips(key[-1], seed)} - siblings(whole, key):
        mapping = {k: dict(v) if isinstance(v, dict) else v for k, v in whole.items()}
        mapping["stack"] = {name: dict(entry) for name, entry in whole["stack"].items()}
        node: Any = mapping
        for part in key[:-1]:
            node = node[part]
        node[wrong] = node.pop(key[-1])
        with pytest.raises(RecipeError) as caught:
            validate(mapping)
        line = next(row for row in str(caught.value).splitlines() if row.startswith(".".join([*key[:-1], wrong]) + ": "))
        near = line.split("did you mean '")[-1].split("'")[0]
        assert near == key[-1] or nearly(wrong, near), line


COMPOSED = [
    ("optim", "lr"),
    ("stack", "lora", "r"),
    ("data", "path"),
    ("objective", "beta"),
    ("schedule", "warmup"),
    ("eval", "every"),
]
"""One key a section goes the whole way; validation above covers every key."""


@pytest.mark.parametrize("key", COMPOSED, ids=".".join)
def test_a_misspelt_override_ends_in_the_same_message(key: tuple[str, ...]) -> None:
    wrong = key[-1] + "q"
    with pytest.raises(RecipeError, match=f"did you mean '{key[-1]}'"):
        compose("dpo_lora", [".".join([*key[:-1], wrong]) + "=1"])


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("stack.lora.rank", "r"),
        ("stack.lora.scale", "alpha"),
        ("stack.lora.rank_patern", "rank_pattern"),
        ("optim.learning_rate", "lr"),
        ("optim.l", "lr"),
    ],
)
def test_a_key_called_by_what_it_means_is_understood(said: str, meant: str) -> None:
    with pytest.raises(RecipeError, match=f"did you mean '{meant}'"):
        compose("dpo_lora", [f"{said}=1"])


def test_a_meaning_counts_by_its_first_whole_words_before_a_longer_look_alike_and_after_a_slip() -> None:
    meanings = {"r": "Rank of A and B.", "rank_pattern": "Rank by site path.", "seed": "Ranking seed.", "ranks": "Ranks."}
    assert did_you_mean("rank", ["rank_pattern", "r", "seed"], meanings) == "; did you mean 'r'?"
    assert did_you_mean("rank", ["rank_pattern", "r", "ranks"], meanings) == "; did you mean 'ranks'?"
    assert did_you_mean("rank", ["seed"], meanings) == ""
    assert did_you_mean("rank_of", ["seed", "r"], meanings) == "; did you mean 'r'?"


def test_a_word_of_a_name_and_its_beginning_come_before_look_alikes() -> None:
    known = ["target", "r", "alpha", "lr_ratio", "init", "init_batches", "rank_pattern", "alpha_pattern", "bias", "lora_bias"]
    assert did_you_mean("lr", known) == "; did you mean 'lr_ratio'?"
    assert did_you_mean("rr", known) == "; did you mean 'r'?"
    assert did_you_mean("init_b", known) == "; did you mean 'init_batches'?"
    assert did_you_mean("ratio", known) == "; did you mean 'lr_ratio'?"
    assert did_you_mean("pattern", known) == "; did you mean 'rank_pattern'?"
    assert did_you_mean("alphas", known) == "; did you mean 'alpha'?"
    assert did_you_mean("tg", known) == ""


@pytest.mark.parametrize(
    ("half", "full"),
    [("weight", "weight_decay"), ("lab", "label_smoothing"), ("max_len", "max_length"), ("weight-decay", "weight_decay")],
)
def test_half_a_key_is_not_accepted_but_understood(half: str, full: str) -> None:
    group = "data" if full == "max_length" else "objective" if full == "label_smoothing" else "optim"
    with pytest.raises(RecipeError, match=f"did you mean '{full}'"):
        compose("dpo_lora", [f"{group}.{half}=1"])


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("data: {packing: onn}", "must be one of 'auto', 'on', 'off'; got 'onn'; did you mean 'on'?"),
        ("data: {packing: true}", "must be one of 'auto', 'on', 'off'; got true; write on"),
        ("runtime: {deterministic: yes}", "must be true or false; got 'yes'; write true"),
        ("runtime: {deterministic: 1}", "must be true or false; got 1"),
        ("model: {path: 3}", "must be text; got 3; put it in quotes"),
        ("model: {path: }", "must be text; got null (there is nothing after the colon)"),
        ("seed: 010", "must be a whole number; got '010'"),
        ("seed: -1", "must be >= 0; got -1"),
        ("seed: 1.5", "must be a whole number; got 1.5"),
        ("seed: true", "must be a whole number; got true"),
        ("epochs: '3'", "must be a number; got '3'; write it without quotes"),
        ("epochs: .nan", "must be"),
        ("data: {validation: 1.5}", "must be text or < 1; got 1.5"),
        ("data: {columns: [a]}", "must be a mapping"),
        ("data: {columns: {a: 1}}", "data.columns.a: must be text; got 1"),
        ("plugins: x", "must be a list"),
        ("tokenizer: {add_tokens: [a, 3]}", "tokenizer.add_tokens.1: must be text; got 3"),
        ("data: [a]", "must be a mapping"),
        ("stack: [lora]", "must be a mapping"),
        ("objective: dpo", "must be a mapping with a kind"),
        ("data: {path: '???'}", "the recipe requires a value here"),
    ],
)
def test_a_wrong_value_says_what_is_allowed(project: Project, section: str, expected: str) -> None:
    path = project("wrong.yaml", section + "\n")
    with pytest.raises(RecipeError) as caught:
        compose(path)
    assert expected in str(caught.value), str(caught.value)
    assert "wrong.yaml:1" in str(caught.value)


def test_on_and_off_are_text_where_text_is_meant(project: Project) -> None:
    path = project("fine.yaml", "data: {packing: on}\nlog: {live: off}\noptim: {lr: 1e-5}\n")
    recipe = compose(path, ["save.keep=3"]).recipe
    assert (recipe.data.packing, recipe.log.live, recipe.optim["lr"]) == ("on", "off", 1e-5)


# --- components of a made-up package ----------------------------------------------------------------------------------


def test_a_plugin_is_known_only_where_a_recipe_names_it(project: Project, madeup: str) -> None:
    with pytest.raises(RecipeError, match="no method 'alpha'"):
        compose(project("without.yaml", "defaults: [/base, override /stack: [alpha]]\n"))
    stack = compose(project("with.yaml", f"defaults: [/base, override /stack: [alpha]]\nplugins: [{madeup}]\n")).recipe.stack
    assert stack == {"alpha": {"kind": "alpha", "width": 4, "shapes": [1, 2]}}


@pytest.mark.parametrize(
    ("stack", "expected"),
    [
        ("[alpha, beta]", "alpha and beta cannot share a stack: both rewrite the same weights"),
        ("[beta, alpha]", "cannot share a stack"),
        ("[rule_one, rule_two]", "rule_one and rule_two both replace the update rule"),
        ("[gamma]", "gamma needs alpha in the stack too"),
        ("[alpha, gamma]", "stack.gamma.needed: must be given"),
    ],
)
def test_an_impossible_stack_is_explained(project: Project, madeup: str, stack: str, expected: str) -> None:
    path = project("mine.yaml", f"defaults: [/base, override /stack: {stack}]\nplugins: [{madeup}]\n")
    with pytest.raises(RecipeError) as caught:
        compose(path)
    assert expected in str(caught.value)


def test_a_conflict_holds_for_named_instances_too(project: Project, madeup: str) -> None:
    path = project("mine.yaml", f"stack: {{one: {{kind: alpha}}, two: {{kind: beta}}}}\nplugins: [{madeup}]\n")
    with pytest.raises(RecipeError, match="one and two cannot share a stack"):
        compose(path)


def test_instantiate_builds_wrappers_in_order_with_their_key_as_name(project: Project, madeup: str) -> None:
    body = "stack: {late: {kind: alpha, shapes: [3]}, early: {kind: alpha, width: 9}}\n"
    parts = instantiate(compose(project("mine.yaml", body + f"plugins: [{madeup}]\n")).recipe)
    assert [(w.name, w.width, w.shapes) for w in parts.wrappers] == [("late", 4, (3,)), ("early", 9, (1, 2))]
    assert type(parts.objective).__name__ == "Sft"
    assert type(parts.optimizer).__name__ == "AdamW"
    assert type(parts.schedule).__name__ == "Cosine"


def test_build_component_fills_defaults_and_names_the_path() -> None:
    assert build_component("stack", {"kind": "lora", "r": 2}, "stack.x")["alpha"] == 16.0
    with pytest.raises(RecipeError, match=r"stack\.x\.rr: lora has no option 'rr'; did you mean 'r'\?"):
        build_component("stack", {"kind": "lora", "rr": 2}, "stack.x")
    with pytest.raises(RecipeError, match=r"stack\.x\.kind: there is no stack 'lorra'; did you mean 'lora'\?"):
        build_component("stack", {"kind": "lorra"}, "stack.x")


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("lora.r=8", "; did you mean 'stack.lora.r=8'?"),
        ("adamw.lr=0.5", "; did you mean 'optim.lr=0.5'?"),
        ("lora=3", "; its options are written stack.lora.OPTION=VALUE"),
        ("vera.r=4", "; vera is chosen by stack=[lora, vera], and its options are written stack.vera.OPTION=VALUE"),
        ("dpo.beta=1", "; dpo is chosen by objective=dpo, and its options are written objective.OPTION=VALUE"),
        ("r=8", "; did you mean 'stack.lora.r'?"),
        ("objective.alpha=2", "; did you mean 'stack.lora.alpha'?"),
        ("objective.head_only=true", "; it is an option of the objective "),
        ("objective.beta=1", "; it is an option of the objective cpo, distill, dpo, "),
    ],
)
def test_a_key_at_the_wrong_place_is_answered_from_the_components_of_the_recipe(word: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        compose("sft_lora", [word])
    assert hint in str(caught.value)
    assert f"did you mean '{word.partition('=')[0]}'" not in str(caught.value)


def test_no_suggestion_is_the_word_itself() -> None:
    assert did_you_mean("beta", ["beta"]) == ""
    assert did_you_mean("beta", ["beta", "betas"]) == "; did you mean 'betas'?"


@pytest.mark.parametrize(
    ("recipe", "word", "message"),
    [
        ("s4", "stack.s4.assign={G1: [X]}", "stack.s4.assign.G1.0: must be one of 'A', 'P', 'B', 'L'; got 'X'"),
        ("s4", "stack.s4.assign={G5: [A]}", "stack.s4.assign.G5: must be one of 'G1', 'G2', 'G3', 'G4'; got 'G5'"),
        ("mam", "stack.mam.scale=learn", "stack.mam.scale: must be a number or 'learned'; got 'learn'"),
        (
            "loreft",
            "stack.loreft.positions=g7",
            r"stack.loreft.positions: must be text that matches ^(f\d+(\+l\d+)?|l\d+)$; got 'g7'",
        ),
    ],
)
def test_a_wrong_value_inside_a_union_is_named_at_its_own_place(recipe: str, word: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        compose(recipe, [word])
    assert message in str(error.value) and "or one of 'A'" not in str(error.value)
