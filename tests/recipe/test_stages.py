"""Pipelines are planned before anything runs: order, rounds, keys, and every mistake named at its place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmrecipe.core.errors import RecipeError
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.content_key import content_key, local_files
from llmrecipe.recipe.overrides import parse_overrides as parse_words
from llmrecipe.recipe.overrides import word_text
from llmrecipe.recipe.pipeline_plan import Plan, for_check, in_order, plan, refuse_stages
from llmrecipe.recipe.pipeline_spec import parse_stages

Project = Callable[..., Path]
ROWS = '{"prompt": "a", "completion": "b"}\n'
PAIR = """
model: {path: tiny}
stages:
  sft: {recipe: sft_lora, with: [steps=3, "model.path=${model.path}", data.path=rows.jsonl]}
  dpo: {recipe: dpo_lora, with: ["model.path=${stage:sft}"], steps: 4, optim: {lr: 1e-3}}
"""


def planned(project: Project, text: str = PAIR, *words: str) -> Plan:
    project("rows.jsonl", ROWS)
    return plan(compose(project("pair.yaml", text), list(words)))


def refusal(project: Project, text: str, *words: str) -> str:
    with pytest.raises(RecipeError) as caught:
        planned(project, text, *words)
    return str(caught.value)


def keys(made: Plan) -> dict[str, str]:
    return {s.name: s.key for s in made.stages}


def order(project: Project, text: str) -> dict[str, tuple[str, ...]]:
    composition = compose(project("p.yaml", text))
    return {s.name: s.words for s in in_order(parse_stages(composition), composition)}


def test_a_stage_is_its_recipe_with_words_and_keys_and_the_directory_of_its_input(project: Project) -> None:
    made = planned(project)
    sft, dpo = made.stages
    assert (sft.name, sft.composition.recipe.steps, sft.composition.recipe.data.path) == ("sft", 3, "rows.jsonl")
    assert sft.dir == Path("runs/pair") / f"sft-{sft.key}"
    assert dpo.composition.recipe.model.path == str(sft.dir)
    assert dpo.words == [f"model.path={sft.dir}", "steps=4", "optim.lr=0.001"]
    assert (dpo.composition.recipe.steps, dpo.composition.recipe.optim["lr"]) == (4, 1e-3)
    assert dpo.mapping["model"]["path"] == "${stage:sft}"


def test_results_decide_the_order_and_the_file_decides_the_rest(project: Project) -> None:
    text = """
stages:
  last: {recipe: sft, with: ["model.path=${stage:first}", 'data.path="${stage:second}/x"']}
  free: {recipe: sft}
  second: {recipe: sft, with: ["model.path=${stage:first}"]}
  first: {recipe: sft}
"""
    assert list(order(project, text)) == ["first", "second", "last", "free"]


def test_stages_that_wait_for_each_other_are_shown(project: Project) -> None:
    text = """
stages:
  a: {recipe: sft, with: ["model.path=${stage:b}"]}
  b: {recipe: sft, with: ["model.path=${stage:c}"]}
  c: {recipe: sft, with: ["model.path=${stage:b}"]}
"""
    message = refusal(project, text)
    assert "b -> c -> b" in message and "pair.yaml:4" in message


def test_every_mistake_of_every_stage_is_told_at_once(project: Project) -> None:
    text = """
stages:
  sft: {recipe: sft_loar}
  dpo: {recipe: dpo_lora, with: ["model.path=${stage:sft}", optim.lrr=1]}
"""
    message = refusal(project, text)
    assert "stages.sft: recipe=sft_loar" in message and "did you mean 'sft_lora'?" in message
    assert "stages.dpo: optim.lrr" in message and "did you mean 'lr'?" in message


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ('{a: {recipe: sft}, b: {recipe: sft, with: ["model.path=${stage:aa}"]}}', "no stage 'aa'; did you mean 'a'?"),
        ("{a: {recipe: sft, wiht: [steps=1]}}", "stages.a.wiht: a stage has no key 'wiht'; did you mean 'with'?"),
        ("{a: {recipe: sft, with: steps=1}}", "stages.a.with: must be a list of words"),
        ("{a: {with: [steps=1]}}", "stages.a: names no recipe"),
        ("{a: sft}", "stages.a: must be a mapping"),
        ("{a: {recipe: sft, rounds: 0}}", "stages.a.rounds: must be a whole number >= 1"),
        ('{a: {recipe: sft, rounds: 2, with: ["model.path=${stage:a}"]}}', "round 1 has none; give stages.a.start.a"),
        ("{g: {stages: {a: {recipe: sft}}}}", "stages.g: a group needs rounds: N"),
        ("{a: {recipe: sft, with: [run.dir=x]}}", "the pipeline chooses the folders"),
        ("{a-1: {recipe: sft}, a: {recipe: sft, rounds: 1}}", "two stages are called 'a-1'"),
        ("{a: {recipe: sft_dpo}}", "is itself a pipeline"),
    ],
)
def test_a_wrong_stage_is_named_with_what_is_allowed(project: Project, body: str, told: str) -> None:
    assert told in refusal(project, f"stages: {body}\n")


def test_a_word_that_would_reach_no_stage_is_refused(project: Project) -> None:
    message = refusal(project, PAIR, "steps=5")
    assert "a pipeline has no steps of its own" in message and "stages.sft.steps=5" in message and "model.path" in message
    assert planned(project, PAIR, "model.path=other").stages[0].composition.recipe.model.path == "other"
    assert planned(project, PAIR, "stages.dpo.objective.beta=0.3").stages[1].composition.recipe.objective["beta"] == 0.3


# --- steps ------------------------------------------------------------------------------------------------------------

STEPS = """
stages:
  sft: {recipe: sft_lora}
  rows: {kind: generate, model: "${stage:sft}", prompts: "builtin:prompts", limit: 5, seed: 4}
  dpo: {recipe: sft_lora, with: ["model.path=${stage:sft}", "data.path=${stage:rows}"]}
"""


def test_a_step_is_planned_like_a_training(project: Project) -> None:
    made = planned(project, STEPS)
    sft, rows, dpo = made.stages
    assert rows.stage.inputs == ("sft",) and dpo.stage.inputs == ("sft", "rows")
    assert rows.mapping["model"] == "${stage:sft}" and rows.composition.mapping["model"] == str(sft.dir)
    assert (rows.mapping["seed"], rows.mapping["n"], rows.gives) == (4, 1, "rows")
    assert dpo.composition.recipe.data.path == str(rows.dir) == f"runs/pair/rows-{rows.key}"
    before = keys(made)
    assert keys(planned(project, STEPS.replace("limit: 5", "limit: 5, batch: 8")))["dpo"] != before["dpo"]
    assert keys(planned(project, STEPS, "stages.rows.n=2"))["rows"] != before["rows"]
    assert keys(planned(project, STEPS, "stages.sft.steps=3"))["rows"] != before["rows"]
    assert keys(planned(project, STEPS, "stages.rows.log.live=off")) == before


def test_rows_that_are_not_there_yet_are_examples_in_a_check(project: Project) -> None:
    made = planned(project, STEPS)
    found = for_check(made, set(), lambda name: Path("examples") / name)
    assert found["rows"].mapping["model"] == "${stage:sft}"
    assert (found["dpo"].recipe.data.path, found["dpo"].recipe.model.path) == ("examples/rows", "tiny")
    later = for_check(made, {"sft", "rows"}, lambda name: pytest.fail("asked for examples of rows that are there"))
    assert later["dpo"].recipe.data.path == str(made["rows"].dir)


def test_a_step_draws_other_samples_each_round(project: Project) -> None:
    text = """
stages:
  loop:
    rounds: 2
    start: {policy: tiny}
    stages:
      rows: {kind: generate, model: "${stage:policy}", prompts: "builtin:prompts", seed: 7}
      policy: {recipe: sft_lora, with: ["model.path=${stage:policy}", "data.path=${stage:rows}"]}
"""
    made = planned(project, text)
    assert [s.name for s in made.stages] == ["rows-1", "policy-1", "rows-2", "policy-2"]
    assert [made[n].mapping["seed"] for n in ("rows-1", "rows-2")] == [7, 8]
    assert made["rows-2"].mapping["model"] == "${stage:policy-1}" and made["rows-1"].mapping["model"] == "tiny"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("{a: {kind: generat}}", "stages.a.kind: there is no step 'generat'; did you mean 'generate'?"),
        ("{a: {kind: generate, modl: tiny, prompts: x}}", "stages.a.modl: generate has no option 'modl'; did you"),
        ("{a: {kind: generate, model: tiny, prompts: x, n: two}}", "stages.a.n: must be a whole number"),
        ("{a: {kind: generate, recipe: sft}}", "stages.a.recipe: a step has no key 'recipe'"),
        ('{a: {recipe: sft}, b: {kind: generate, model: tiny, prompts: "${stage:a}"}}',
         "stages.b.prompts: ${stage:a} produces model, but rows are expected here"),
        ('{a: {kind: generate, model: tiny, prompts: x}, b: {recipe: sft, with: ["model.path=${stage:a}"]}}',
         "stages.b.model.path: ${stage:a} produces rows, but model is expected here"),
        ('{a: {recipe: sft}, b: {recipe: sft, with: ["data.path=${stage:a}"]}}', "stages.b.data.path: ${stage:a} produces"),
    ],
)  # fmt: skip
def test_a_wrong_step_is_named_with_what_is_allowed(project: Project, body: str, told: str) -> None:
    assert told in refusal(project, f"stages: {body}\n")


TEXTS = [
    "plain",
    'say "hi"',
    "two\nlines",
    "back\\",
    '\\"',
    "it's {a: b}, [c]",
    "",
    "1",
    "null",
    "true",
    "ünï",
    "a\\n",
    "~",
    "x=1",
]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_of_options_reach_the_step_as_they_are(project: Project, text: str) -> None:
    body = json.dumps({"a": {"kind": "generate", "model": "tiny", "prompts": "x", "system": text, "words": [text, "b"]}})
    found = planned(project, f"stages: {body}\n")["a"].composition.mapping
    assert (found["system"], found["words"]) == (text, [text, "b"])


def test_keys_of_a_mapping_reach_a_word_as_they_are() -> None:
    value = {"a b": 1, "c:d": "e", "f.g": {"h,i": [True, None]}, "(j)": 2.5}
    assert parse_words([f"x={word_text(value)}"])[0].value == value


# --- rounds -----------------------------------------------------------------------------------------------------------


def test_a_stage_repeats_on_its_own_result_with_other_samples(project: Project) -> None:
    text = """
stages:
  sft: {recipe: sft_lora}
  dpo: {recipe: dpo_lora, rounds: 3, start: "${stage:sft}", with: ["model.path=${stage:dpo}"], seed: 7}
  end: {recipe: sft_lora, with: ["model.path=${stage:dpo}"]}
"""
    made = planned(project, text)
    assert [s.name for s in made.stages] == ["sft", "dpo-1", "dpo-2", "dpo-3", "end"]
    assert [s.stage.inputs for s in made.stages] == [(), ("sft",), ("dpo-1",), ("dpo-2",), ("dpo-3",)]
    assert [s.composition.recipe.seed for s in made.stages] == [0, 7, 8, 9, 0]
    assert len(set(keys(made).values())) == 5


def test_a_group_takes_this_round_from_above_and_the_round_before_from_below(project: Project) -> None:
    text = """
stages:
  loop:
    rounds: 2
    start: {policy: tiny}
    stages:
      judge: {recipe: reward_lora, with: ["model.path=${stage:policy}"]}
      policy: {recipe: dpo_lora, with: ["model.path=${stage:policy}", "data.path=${stage:judge}"]}
"""
    assert order(project, text) == {
        "judge-1": ("model.path=tiny",),
        "policy-1": ("model.path=tiny", "data.path=${stage:judge-1}"),
        "judge-2": ("model.path=${stage:policy-1}",),
        "policy-2": ("model.path=${stage:policy-1}", "data.path=${stage:judge-2}"),
    }


# --- keys -------------------------------------------------------------------------------------------------------------


def test_a_key_follows_what_decides_the_result_and_nothing_else(project: Project) -> None:
    before = keys(planned(project))
    same = ("run.root=elsewhere", "stages.sft.save.every=5", "stages.sft.log.every=2")
    assert keys(planned(project, PAIR, *same)) == before
    later = keys(planned(project, PAIR, "stages.dpo.objective.beta=0.3"))
    assert later["sft"] == before["sft"] and later["dpo"] != before["dpo"]
    first = keys(planned(project, PAIR, "stages.sft.steps=9"))
    assert first["sft"] != before["sft"] and first["dpo"] != before["dpo"]


def test_other_rows_in_a_file_of_the_same_name_and_size_change_the_key(project: Project) -> None:
    before = planned(project)
    facts = os.stat("rows.jsonl")
    path = project("rows.jsonl", ROWS.replace("b", "c"))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1_000_000))
    after = plan(compose("pair.yaml"))
    assert keys(after)["sft"] != keys(before)["sft"] and keys(after)["dpo"] != keys(before)["dpo"]


def test_files_of_folders_mixtures_and_built_in_sets_are_found(project: Project) -> None:
    inside, other = project("rows/train.jsonl", ROWS), project("more.jsonl", ROWS)
    prompt = project("template.jinja", "x")
    mapping = {
        "data": {"path": {"rows": 1.0, "more.jsonl": 2.0}, "validation": None},
        "tokenizer": {"chat_template": "template.jinja"},
        "objective": {"kind": "rows"},
    }
    found = {path.resolve(): data for path, data in local_files(mapping)}
    assert found == {inside: True, other: True, prompt: False}
    names = [path.name for path, _ in local_files({"data": {"path": ["builtin:sft"]}})]
    assert {"train.jsonl", "valid.jsonl", "test.jsonl"} <= set(names)
    assert content_key({"a": "${stage:x}"}, {"x": "1"}) != content_key({"a": "${stage:x}"}, {"x": "2"})


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_a_stage_that_would_draw_fresh_weights_over_trained_ones_is_refused(project: Project) -> None:
    """As a recipe of fresh weights does unless the stage says otherwise; a path of no stage stays the user's matter."""
    text = """
stages:
  mlm: {recipe: mlm, steps: 1}
  vqa: {recipe: vqa, model: {path: "${stage:mlm}"}}
"""
    told = "stages.vqa.model.init: random draws fresh weights, and what ${stage:mlm} has learned would be lost"
    assert told in refusal(project, text)
    kept = planned(project, text, "stages.vqa.model.init=pretrained", "+stages.vqa.with=['model.config={}']")
    assert kept["vqa"].composition.recipe.model.config == {}
    assert planned(project, text, "stages.vqa.model.path=other")["vqa"].composition.recipe.model.init == "random"


def test_a_check_builds_on_the_model_the_stages_above_start_from(project: Project) -> None:
    made = planned(project, PAIR, "model.path=some/model", "stages.sft.model.dtype=bfloat16")
    assert for_check(made, set())["dpo"].recipe.model.path == "some/model"
    assert for_check(made, set())["dpo"].recipe.model.dtype == "bfloat16"
    assert for_check(made, {"sft"})["dpo"].recipe.model.path == str(made["sft"].dir)


def test_a_check_reads_the_tokenizer_of_the_stages_above(project: Project) -> None:
    """As the run of such a stage will: its own vocabulary, under what a stage sets itself; one it names is read instead."""
    below = ("+stages.sft.tokenizer.path=own", "+stages.sft.tokenizer.mask_token=m")
    made = planned(project, PAIR, *below, "+stages.dpo.tokenizer.pad_token=p")
    tokenizer = for_check(made, set())["dpo"].recipe.tokenizer  # type: ignore[union-attr]
    assert (tokenizer.path, tokenizer.mask_token, tokenizer.pad_token) == ("own", "m", "p")
    assert for_check(made, {"sft"})["dpo"].recipe.tokenizer.path is None  # type: ignore[union-attr]
    other = planned(project, PAIR, *below, "+stages.dpo.tokenizer.path=other")
    tokenizer = for_check(other, set())["dpo"].recipe.tokenizer  # type: ignore[union-attr]
    assert (tokenizer.path, tokenizer.mask_token) == ("other", None)


def test_the_result_of_a_stage_means_nothing_outside_a_pipeline() -> None:
    with pytest.raises(RecipeError, match=r"model\.path: .*only a recipe with `stages`"):
        refuse_stages(compose("sft", ["model.path=${stage:x}"]).mapping)
    with pytest.raises(RecipeError, match="is a pipeline"):
        refuse_stages(compose("sft_dpo").mapping)


@pytest.mark.parametrize("name", ["sft_dpo", "rlhf", "distill_answers"])
def test_packaged_pipelines_are_planned_without_torch(name: str) -> None:
    code = (
        "import sys, json; from llmrecipe.recipe.compose import compose; from llmrecipe.recipe.pipeline_plan import plan; "
        f"made = plan(compose({name!r})); print(json.dumps([[s.name for s in made.stages], 'torch' in sys.modules]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, torch = json.loads(result.stdout)
    stages = {
        "sft_dpo": ["sft", "dpo"],
        "rlhf": ["sft", "reward", "ppo"],
        "distill_answers": ["teacher", "rows", "student", "measured"],
    }
    assert names == stages[name]
    assert not torch
