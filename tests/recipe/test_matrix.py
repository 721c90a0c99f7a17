"""Stages written once: `matrix` runs them for many values, `inherit` passes on what the pipeline's own recipe sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llmrecipe.core.errors import RecipeError
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.matrix import expand
from llmrecipe.recipe.pipeline_plan import Plan, plan

Project = Callable[..., Path]
GRID = """
model: {path: tiny}
steps: 5
stages:
  run:
    matrix:
      method: {sft_lora: {optim: {lr: 0.5}, with: [stack.lora.r=2]}, bitfit: {}}
      seed: [3, 4]
    recipe: "${matrix:method}"
    with: [batch.size=2]
    inherit: [model, steps]
    seed: "${matrix:seed}"
"""


def planned(project: Project, text: str = GRID, *words: str) -> Plan:
    return plan(compose(project("grid.yaml", text), list(words)))


def refusal(project: Project, text: str, *words: str) -> str:
    with pytest.raises(RecipeError) as caught:
        planned(project, text, *words)
    return str(caught.value)


# --- matrix -----------------------------------------------------------------------------------------------------------


def test_a_stage_is_written_out_for_every_combination_the_last_axis_fastest(project: Project) -> None:
    made = planned(project)
    assert [s.name for s in made.stages] == ["run-sft_lora-3", "run-sft_lora-4", "run-bitfit-3", "run-bitfit-4"]
    recipes = {s.name: s.composition.recipe for s in made.stages}
    assert [r.seed for r in recipes.values()] == [3, 4, 3, 4]
    assert [list(r.stack) for r in recipes.values()] == [["lora"], ["lora"], ["bitfit"], ["bitfit"]]
    # Keys of one value reach its stages only; `with` of the stage and of the value stand one after the other.
    assert recipes["run-sft_lora-4"].optim["lr"] == 0.5 and recipes["run-bitfit-3"].optim["lr"] == 2e-2
    assert recipes["run-sft_lora-3"].stack["lora"]["r"] == 2
    assert {r.batch.size for r in recipes.values()} == {2} and {r.steps for r in recipes.values()} == {5}
    assert len({s.key for s in made.stages}) == 4


def test_a_word_changes_the_values_of_an_axis_or_what_one_of_them_gets(project: Project) -> None:
    made = planned(project, GRID, "stages.run.matrix.seed=[9]", "stages.run.matrix.method.bitfit.optim.lr=0.25")
    assert [(s.name, s.composition.recipe.optim["lr"]) for s in made.stages] == [
        ("run-sft_lora-9", 0.5),
        ("run-bitfit-9", 0.25),
    ]
    assert planned(project, GRID, "stages.run.matrix.seed=[]").stages == []


def test_a_value_keeps_its_type_alone_and_becomes_text_inside_text() -> None:
    made = expand({"s": {"matrix": {"n": [2, 0.5]}, "steps": "${matrix:n}", "with": ["a=${matrix:n}"]}})
    assert made.bodies == {"s-2": {"steps": 2, "with": ["a=2"]}, "s-0_5": {"steps": 0.5, "with": ["a=0.5"]}}
    assert made.written == {"s-2": "s", "s-0_5": "s"} and made.mistakes == []


def test_a_list_item_stands_for_all_stages_written_out(project: Project) -> None:
    made = expand({"board": {"runs": ["${stage:s}", "${stage:x}"]}, "s": {"matrix": {"n": [1, 2]}}, "x": {}})
    assert made.bodies["board"]["runs"] == ["${stage:s-1}", "${stage:s-2}", "${stage:x}"]


def test_a_text_names_the_stage_of_the_same_values() -> None:
    """The axes may be in another order, a value a number here and a key there, and more axes do not matter."""
    first = {"matrix": {"n": [1, 2], "m": {"a": {}, "b": {}}}}
    after = {"matrix": {"m": ["a", "b"], "k": [7], "n": [1, 2]}, "model": {"path": "${stage:s}"}, "with": ["x=[${stage:s}]"]}
    made = expand({"s": first, "t": after}).bodies
    assert made["t-b-7-1"] == {"model": {"path": "${stage:s-1-b}"}, "with": ["x=[${stage:s-1-b}]"]}
    assert made["t-a-7-2"]["model"] == {"path": "${stage:s-2-a}"}


def test_a_text_that_names_several_stages_is_refused(project: Project) -> None:
    """A stage without the axis, and one whose values are others."""
    after = {"recipe": "sft", "model": {"path": "${stage:s}"}}
    for body in (after, {**after, "matrix": {"n": [3]}}):
        (mistake,) = expand({"s": {"matrix": {"n": [1, 2]}}, "t": body}).mistakes
        assert mistake[0] == ("stages", "t", "model", "path") and mistake[1] == (
            "stages.t.model.path: ${stage:s} is one of 2 stages here; name one (s-1, ...), or give this stage the axes of 's' "
            "(n) and a value of it on each"
        )


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("{matrix: [1], recipe: sft}", "stages.a.matrix: must be a mapping such as {seed: [0, 1, 2]}; got [1]"),
        ("{matrix: {seed: 1}, recipe: sft}", "stages.a.matrix.seed: must be a list of values or a mapping"),
        ("{matrix: {m: {sft: [x]}}, recipe: sft}", "stages.a.matrix.m.sft: must be keys of a stage"),
        ('{matrix: {seed: [1, 2]}, recipe: sft, seed: "${matrix:sed}"}', "no axis 'sed'; did you mean 'seed'?"),
        ('{recipe: sft, seed: "${matrix:seed}"}', "no axis 'seed'; this stage has no `matrix`"),
        ('{matrix: {lr: [0.1, "0_1"]}, recipe: sft}', "two of its values make the same name"),
        ("{matrx: {seed: [1]}, recipe: sft}", "a stage has no key 'matrx'; did you mean 'matrix'?"),
    ],
)
def test_a_wrong_matrix_is_named_with_what_is_allowed(project: Project, body: str, told: str) -> None:
    message = refusal(project, f"stages: {{a: {body}}}\n")
    assert told in message and "grid.yaml:1" in message


def test_one_mistake_of_a_stage_written_out_is_told_once(project: Project) -> None:
    message = refusal(project, GRID, "stages.run.optim.lrr=1")
    assert message.count("\n") == 0 and message.startswith("stages.run: optim.lrr") and "did you mean 'lr'?" in message


def test_an_axis_means_nothing_outside_a_pipeline(project: Project) -> None:
    from llmrecipe.recipe.pipeline_plan import refuse_stages

    composition = compose(project("plain.yaml", "defaults: [/sft, _self_]\ndata: {path: '${matrix:x}'}\n"))
    with pytest.raises(RecipeError, match=r"data.path: \$\{matrix:x\} is a value of `matrix` in a stage"):
        refuse_stages(composition.mapping)


# --- inherit ----------------------------------------------------------------------------------------------------------

ONE = """
defaults: [/classify, _self_]
steps: 5
stages: {a: {recipe: sft_lora, inherit: [model, data, objective, optim, steps]}}
"""


def test_a_stage_takes_over_what_the_pipeline_sets_and_keeps_the_rest_of_its_own(project: Project) -> None:
    recipe = planned(project, ONE).stages[0].composition.recipe
    assert recipe.objective["kind"] == "classification" and recipe.data.path == "builtin:classify" and recipe.steps == 5
    assert recipe.data.max_length == 128 and recipe.optim["lr"] == 5e-4
    # Not inherited, or not set by the pipeline: the stage's own recipe speaks.
    assert recipe.batch.size == 16 and recipe.epochs == 3 and list(recipe.stack) == ["lora"]


def test_a_component_of_the_pipeline_goes_with_its_options_to_every_stage(project: Project) -> None:
    words = (
        "objective.label_smoothing=0.1",
        "optim=sgd",
        "optim.lr=0.125",
        "model=gpt2",
        "data.path={a.jsonl: 1.0}",
        "steps=7",
    )
    recipe = planned(project, ONE, *words).stages[0].composition.recipe
    assert recipe.objective["label_smoothing"] == 0.1
    assert (recipe.optim["kind"], recipe.optim["lr"], recipe.steps) == ("sgd", 0.125, 7)
    assert (recipe.model.path, recipe.data.path) == ("openai-community/gpt2", {"a.jsonl": 1.0})


def test_a_word_for_a_key_that_no_stage_inherits_is_refused(project: Project) -> None:
    message = refusal(project, ONE, "batch.size=3")
    assert "a pipeline has no batch of its own" in message and "data, model, objective, optim, steps" in message


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ("model", "stages.a.inherit: must be a list of keys such as [model, data]; got 'model'"),
        ("[modle]", "stages.a.inherit: 'modle' cannot be inherited; did you mean 'model'?"),
        ("[run]", "stages.a.inherit: 'run' cannot be inherited"),
    ],
)
def test_a_wrong_inherit_is_named_with_what_is_allowed(project: Project, keys: str, told: str) -> None:
    assert told in refusal(project, f"stages: {{a: {{recipe: sft, inherit: {keys}}}}}\n")


def test_stages_of_a_group_inherit_too(project: Project) -> None:
    text = "steps: 4\nstages: {g: {rounds: 2, stages: {a: {recipe: sft, inherit: [steps]}}}}\n"
    assert [(s.name, s.composition.recipe.steps) for s in planned(project, text).stages] == [("a-1", 4), ("a-2", 4)]


def test_stages_that_differ_in_values_are_merged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of a stage are merged once for all seeds and rates, and each stage has a mapping of its own."""
    from llmrecipe.recipe import hydra_compose

    file = tmp_path / "board.yaml"
    file.write_text(
        "stages:\n  sft:\n    matrix: {seed: [0, 1, 2], rate: [1e-3, 1e-4]}\n    recipe: sft_lora\n    seed: '${matrix:seed}'\n"
        "    optim: {lr: '${matrix:rate}'}\n"
    )
    calls: list[list[str]] = []
    merge = hydra_compose._merge
    monkeypatch.setattr(hydra_compose, "_merge", lambda chain, words: calls.append(words) or merge(chain, words))
    made = plan(compose(file))
    assert len(made.stages) == 6 and len(calls) == 2  # the pipeline's own file, and sft_lora
    for planned in made.stages:
        alone = compose("sft_lora", list(planned.words))
        assert planned.composition.mapping == alone.mapping
    seeds = [planned.composition.mapping["seed"] for planned in made.stages]
    assert sorted(seeds) == [0, 0, 1, 1, 2, 2]
