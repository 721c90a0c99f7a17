"""Words with a newer name: recipes in old words compose as in new ones with a line for each, and an old run opens."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from llmrecipe import __version__
from llmrecipe.cli import app
from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError
from llmrecipe.pipelines.search.study import Search
from llmrecipe.pipelines.search.trial import Trial
from llmrecipe.pipelines.steps.workspace import Work
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.content_key import content_key
from llmrecipe.recipe.pipeline_plan import plan
from llmrecipe.recipe.renames import RENAMES, VALUES
from llmrecipe.recipe.rewrite import rewrite_recipe
from llmrecipe.recipe.step_spec import compose_step
from llmrecipe.recipe.yaml_file import dotted
from llmrecipe.runs.run_dir import RunDir

NEW = """
stages:
  a:
    matrix: {lr: [0.1, 0.2], size: {x: {steps: 2}, y: {}}}
    recipe: sft_lora
    optim: {lr: "${matrix:lr}"}
"""
JUDGES = """
stages:
  critique: {kind: critique, answers: rows.jsonl, judge: {kind: rule, sure: 0.8}, constitution: manners}
  labels: {kind: label_ai, answers: rows.jsonl, judge: {kind: rule, rule: manners}, constitution: manners}
  rl:
    recipe: grpo
    objective: {reward: {judge: {judge: {kind: rule}, constitution: manners}, again: {kind: judge, judge: {kind: rule}}}}
"""
COMPILED = """
model: {path: tiny, "compile": blocks}  # each block
stages:
  a:
    recipe: sft_lora
    model:
      compile: off
"""
CASES = {
    "each": (
        NEW,
        NEW.replace("matrix", "each"),
        [
            "stages.a.each is called stages.a.matrix",
            "stages.a.optim.lr: ${each:...} is called ${matrix:...}",
        ],
    ),
    "agent": (
        JUDGES,
        JUDGES.replace("judge: {kind: rule", "agent: {kind: rule"),
        [
            "stages.critique.agent is called stages.critique.judge",
            "stages.labels.agent is called stages.labels.judge",
            "stages.rl.objective.reward.judge.agent is called stages.rl.objective.reward.judge.judge",
            "stages.rl.objective.reward.again.agent is called stages.rl.objective.reward.again.judge",
        ],
    ),
    "model.compile": (
        COMPILED,
        COMPILED.replace("blocks", "true").replace("off", "False"),
        [
            "model.compile: true is called blocks",
            "stages.a.model.compile: false is called off",
        ],
    ),
}
"""Old word -> a recipe in new words, the same in the old one, and the lines it prints."""


def write(folder: Path, text: str) -> Path:
    path = folder / "pipeline.yaml"
    path.write_text(text)
    return path


def test_every_rename_has_a_case() -> None:
    assert {rename.old for rename in RENAMES} | {dotted(value.key) for value in VALUES} == set(CASES)


@pytest.mark.parametrize("word", CASES)
def test_old_words_compose_to_the_same_mapping_and_print_a_line(tmp_path: Path, word: str) -> None:
    new, old, lines = CASES[word]
    wanted = compose(write(tmp_path, new))
    assert wanted.notes == []
    made = compose(write(tmp_path, old))
    assert made.mapping == wanted.mapping
    assert list(made.origins) == list(wanted.origins)
    assert [str(o) for o in made.origins.values()] == [str(o) for o in wanted.origins.values()]
    assert made.notes == lines


@pytest.mark.parametrize("word", CASES)
def test_keys_of_results_do_not_depend_on_the_word(tmp_path: Path, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "a", "completions": ["b", "c"]}\n')
    new, old, _ = CASES[word]
    wanted = [stage.key for stage in plan(compose(write(tmp_path, new))).stages]
    assert [stage.key for stage in plan(compose(write(tmp_path, old))).stages] == wanted


def test_a_key_is_that_of_the_first_words() -> None:
    rule = {"kind": "rule"}
    new = {
        "kind": "critique",
        "judge": rule,
        "deep": {"reward": {"judge": {"judge": rule, "scale": 3}}},
        "judges": {"judge": 1},
    }
    old = {
        "kind": "critique",
        "agent": rule,
        "deep": {"reward": {"judge": {"agent": rule, "scale": 3}}},
        "judges": {"judge": 1},
    }
    digest = hashlib.sha256(json.dumps(old, sort_keys=True).encode()).hexdigest()[:8]
    assert content_key(new, {}) == content_key(old, {}) == digest


def test_a_key_does_not_depend_on_whether_compile_is_left_out() -> None:
    """What is keyed is what the first version of `model.compile` had in the place of each value."""
    keys = {value: content_key({"model": {"compile": value}}, {}) for value in ("auto", "off", False, "blocks", True)}
    assert keys["auto"] == keys["off"] == keys[False] != keys["blocks"] == keys[True]


def test_old_words_on_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, NEW)
    made = compose(path, ["stages.a.each.lr=[0.3]", "~stages.a.each.size"])
    assert made.recipe.stages is not None
    assert made.recipe.stages["a"]["matrix"] == {"lr": [0.3]}
    assert made.notes == [
        "stages.a.each.lr is called stages.a.matrix.lr",
        "stages.a.each.size is called stages.a.matrix.size",
    ]


def test_old_options_of_components_on_the_command_line() -> None:
    made = compose("rlaif", ["stages.labels.agent.sure=0.8", "stages.critique={kind: critique, agent: {kind: rule}}"])
    assert made.recipe.stages is not None
    assert made.recipe.stages["labels"]["judge"] == {"kind": "rule", "sure": 0.8}
    assert made.recipe.stages["critique"]["judge"] == {"kind": "rule"}
    assert made.notes == [
        "stages.labels.agent.sure is called stages.labels.judge.sure",
        "stages.critique.agent is called stages.critique.judge",
    ]
    words = ["objective.reward={judge: {agent: {kind: rule}, constitution: manners}}", "objective.reward.judge.agent.sure=0.7"]
    made = compose("grpo", words)
    assert made.mapping["objective"]["reward"]["judge"] == {"judge": {"kind": "rule", "sure": 0.7}, "constitution": "manners"}
    assert len(made.notes) == 2


def test_old_options_of_a_step_by_itself(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "What is the owl?", "completion": "That is boring. The owl is brown."}\n')
    words = [f"answers={rows}", "constitution=manners", "agent={kind: rule, sure: 0.8}", "agent.sure=0.7"]
    made = compose_step("critique", words)
    assert made.mapping["judge"] == {"kind": "rule", "sure": 0.7}
    assert made.notes == ["agent is called judge"]
    assert app.run_command(["step", "critique", *words, f"run.dir={tmp_path / 'out'}"]) == 0
    assert "agent is called judge" in capsys.readouterr().out
    assert "judge:" in (tmp_path / "out" / "step.yaml").read_text()


def test_old_words_in_the_space_of_a_search_and_its_earlier_trials(tmp_path: Path) -> None:
    reward = "{judge: {judge: {kind: rule, sure: 0.9}, constitution: manners}}"
    space = "{objective.reward.judge.agent.sure: [0.7, 0.8]}"
    text = f"defaults: [/grpo]\nobjective: {{reward: {reward}}}\nsearch: {{space: {space}}}"
    made = compose(write(tmp_path, text))
    assert made.recipe.search is not None
    assert made.recipe.search.space == {"objective.reward.judge.judge.sure": [0.7, 0.8]}
    assert made.notes == [
        "search.space.objective.reward.judge.agent.sure is called search.space.objective.reward.judge.judge.sure"
    ]
    search = Search(str(tmp_path / "pipeline.yaml"), [f"run.dir={tmp_path / 'found'}"], made)
    journal = search.journal
    journal.path = tmp_path / "trials.jsonl"
    head = journal._head()
    assert head["search"]["space"] == {"objective.reward.judge.agent.sure": [0.7, 0.8]}
    trial = {"number": 0, "point": {"objective.reward.judge.agent.sure": 0.7}, "values": [1.0], "reports": {"2": 1.0}}
    (tmp_path / "trials.jsonl").write_text(f"{json.dumps(head)}\n{json.dumps(trial)}\n")
    assert journal.read() == [Trial(0, {"objective.reward.judge.judge.sure": 0.7}, [1.0], reports={2: 1.0})]


@pytest.mark.parametrize(("old", "new"), [(r.old, r.new) for r in RENAMES if r.group])
def test_old_names_of_groups_list_and_show(old: str, new: str, capsys: pytest.CaptureFixture[str]) -> None:
    first = registry.names(new)[0]
    for words in (["list", new, "--json"], ["show", f"{new}.{first}", "--json"]):
        assert app.run_command(words) == 0
        wanted = capsys.readouterr()
        assert app.run_command([words[0], words[1].replace(new, old), "--json"]) == 0
        assert capsys.readouterr() == (wanted.out, f"note: {old} is called {new}\n")


def test_replies_kept_under_an_old_name_are_found(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "agent.jsonl").write_text('{"key": "a", "value": 1}\n')
    work = Work(RunDir(tmp_path), 0, "off")
    assert work.journal("judge")["a"] == 1
    work.close()


def test_a_new_word_over_an_old_file_and_an_old_one_over_a_new_file(tmp_path: Path) -> None:
    for below, above in (("matrix", "each"), ("each", "matrix")):
        (tmp_path / "below.yaml").write_text(NEW.replace("matrix", below))
        path = write(tmp_path, f"defaults: [/below]\nstages: {{a: {{{above}: {{lr: [0.5]}}}}}}\n")
        stages = compose(path).recipe.stages
        assert stages is not None
        assert stages["a"]["matrix"] == {"lr": [0.5], "size": {"x": {"steps": 2}, "y": {}}}


def test_a_misspelt_new_word_is_suggested(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'matrix'"):
        plan(compose(write(tmp_path, "stages: {a: {recipe: sft_lora, matrx: {seed: [1]}}}")))


def test_a_column_of_that_name_stays() -> None:
    made = compose("sft_lora", ["data.columns={each: text, agent: x}"])
    assert made.mapping["data"]["columns"] == {"each": "text", "agent": "x"}
    assert made.notes == []


def test_an_old_word_is_read_for_one_minor_version_after_its_renaming() -> None:
    """Where this fails the version has grown: take the rename out, and its case here."""
    assert [word for word in (*RENAMES, *VALUES) if not word.is_read_in(__version__)] == []


@pytest.mark.parametrize("word", CASES)
def test_migrate_rewrites_a_recipe_in_old_words_and_leaves_the_rest(
    tmp_path: Path, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    new, old, notes = CASES[word]
    path, out = write(tmp_path, f"# each agent: a comment\n{old}"), tmp_path / "new.yaml"
    assert app.run_command(["migrate", str(path), "--out", str(out)]) == 0
    assert out.read_text() == f"# each agent: a comment\n{new}"
    assert capsys.readouterr().out.splitlines()[: len(notes)] == notes
    assert app.run_command(["migrate", str(path), "--out", str(out)]) == 2
    assert rewrite_recipe(out) is None


def test_what_cannot_be_rewritten_by_itself_is_named(tmp_path: Path) -> None:
    line = "stages: {c: {kind: critique, answers: 'agent: x', agent: {kind: rule}}}"
    with pytest.raises(RecipeError, match=r"by hand:\n  stages.c.agent is called stages.c.judge"):
        rewrite_recipe(write(tmp_path, line))
