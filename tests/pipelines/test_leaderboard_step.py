"""The leaderboard step: files and table from finished runs, each run asked once, recipes that hold every method."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe.cli import app
from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError, RunError
from llmrecipe.evaluation.leaderboard_page import LEADERBOARD_SECTIONS
from llmrecipe.pipelines import run_stages
from llmrecipe.pipelines.steps.leaderboard import Leaderboard
from llmrecipe.pipelines.steps.run_step import run_step
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.inheritance import DefaultsChain
from llmrecipe.recipe.pipeline_plan import plan
from llmrecipe.recipe.pipeline_spec import WrittenStage, parse_stages
from llmrecipe.recipe.recipe_paths import find_recipe
from llmrecipe.recipe.step_spec import compose_step
from tests.evaluation.test_leaderboard_table import LORA, SFT, finished
from tests.pages import checked


def step(folder: Path, *words: str) -> Path:
    return run_step(compose_step("leaderboard", [*words, f"run.dir={folder}", "log.live=off"])).path


@pytest.fixture
def runs(tmp_path: Path) -> str:
    """The `runs=` word for two seeds of LoRA and a full run."""
    made = [(LORA, 0.75), ({**LORA, "seed": 1}, 0.5), (SFT, 0.875)]
    paths = [finished(tmp_path / f"run{i}", recipe, value) for i, (recipe, value) in enumerate(made)]
    return "runs=[" + ",".join(f'"{p}"' for p in paths) + "]"


def test_files_hold_the_ranked_table_and_the_runs(runs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    folder = step(tmp_path / "board", runs)
    table = (folder / "leaderboard.md").read_text()
    assert table.splitlines()[2] == "| 1 | full | full | 0.875 | 100 | 10 | 0.04 | 300 | 2.5 | 1 |"
    assert table.splitlines()[3] == "| 2 | lora | reparameterized | 0.625 ± 0.18 | 100 | 10 | 0.04 | 300 | 2.5 ± 0 | 2 |"
    assert table.splitlines()[0] in capsys.readouterr().out
    board = json.loads((folder / "leaderboard.json").read_text())
    assert [(r["method"], r["mean"]["score"]) for r in board["rows"]] == [("full", 0.875), ("lora", 0.625)]
    assert [(r["method"], r["seed"], r["score"]) for r in board["runs"]] == [
        ("lora", 0, 0.75),
        ("lora", 1, 0.5),
        ("full", 0, 0.875),
    ]
    assert (folder / "leaderboard.png").read_bytes()[1:4] == b"PNG"
    page = checked((folder / "leaderboard.html").read_text(), [heading for _, heading in LEADERBOARD_SECTIONS])
    assert "0.625 ± 0.18" in [cell.text() for cell in page.one("table").all("td")]
    outcome = " ".join(e.text() for e in page.one("section", id="outcome").all() if e.tag in ("dt", "dd"))
    assert "full, 0.875 over 1 seed Second" in outcome and "lora, 0.625 ± 0.18 over 2 seeds, 0.25 behind" in outcome
    assert [t.text() for t in page.all("title")[1:]] == [
        "1. full: trained 100, test/accuracy 0.875 over 1 seed",
        "2. lora: trained 100, test/accuracy 0.625 ± 0.18 over 2 seeds",
    ]
    metrics = json.loads((folder / "final" / "metrics.json").read_text())
    assert metrics == {"runs": 3, "methods": 2, "best": "full", "best/score": 0.875}


def test_rows_are_compared_with_one_of_them(runs: str, tmp_path: Path) -> None:
    """LoRA has seed 0 in common with the full run: 0.75 - 0.875."""
    folder = step(tmp_path / "board", runs, "baseline=full", "plot=false")
    table = (folder / "leaderboard.md").read_text().splitlines()
    assert [line.split(" | ")[1:5] for line in table[2:4]] == [
        ["full", "full", "0.875", "-"], ["lora", "reparameterized", "0.625 ± 0.18", "-0.125"]
    ]  # fmt: skip
    assert table[0].split(" | ")[4] == "against full" and "score minus that of full" in table[-6]


def test_a_pipeline_that_has_not_run_names_its_rows_by_the_runs_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = json.loads((step(tmp_path / "board", "of=[nsp_qa]", "plot=false") / "leaderboard.json").read_text())["rows"]
    assert [(r["method"], r["seeds"]) for r in rows] == [
        ("nsp", []), ("nsp (start.data.control.text=words)", []), ("fresh", [])
    ]  # fmt: skip


def test_a_run_that_was_asked_is_not_asked_again(runs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def facts(self: Leaderboard, referee: Any, path: str) -> dict[str, float]:
        if len(asked) == 3:
            asked.append("stop")
            raise KeyboardInterrupt
        asked.append(Path(path).name)
        return {"win_rate": 0.1 * len(asked), "kl": 0.0}

    monkeypatch.setattr(Leaderboard, "_head_to_head", lambda self, seed: None)
    monkeypatch.setattr(Leaderboard, "_facts", facts)
    words = (runs, "against=tiny", "plot=false", "prompts=builtin:prompts", "reward={rule: {}}")
    with pytest.raises(Exception, match="stopped"):
        step(tmp_path / "board", *words)
    folder = step(tmp_path / "board", *words)
    assert asked == ["tiny", "run0", "run1", "stop", "run2"]
    rows = json.loads((folder / "leaderboard.json").read_text())["rows"]
    assert [(r["method"], round(r["mean"]["win_rate"], 6)) for r in rows] == [("full", 0.5), ("lora", 0.25), ("tiny", 0.1)]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["runs=[]"], "runs: names no run"),
        (["metrik=x"], "did you mean 'metric'?"),
        (["against=tiny"], "prompts: no prompts are given for the models to answer"),
        (["against=tiny", "prompts=builtin:prompts"], "reward: no reward is given to score the answers"),
        (
            ["against=tiny", "prompts=builtin:prompts", "reward={rul: {}}"],
            "reward.rul: 'rul' is not a kind of reward; did you mean 'rule'?",
        ),
        (["best=most"], "must be one of 'min', 'max'"),
        (["metric=test/acuracy"], "did you mean 'test/accuracy'"),
        (["across=test/loss"], "across: 'test/loss' is not a column of the table; "),
        (["across=[trained,secnds]"], "did you mean 'seconds'?"),
        (["tuned=optim.lr", "by=test/loss"], "by: 'test/loss' is not measured on the validation split"),
        (["of=[sft]"], "of: no stage of sft is a leaderboard"),
        (["baseline=fll"], "baseline: no row is called 'fll'; did you mean 'full'? (the rows are full; lora)"),
    ],
)
def test_a_mistake_is_one_clear_message(runs: str, tmp_path: Path, words: list[str], told: str) -> None:
    with pytest.raises((RecipeError, RunError)) as caught:
        step(tmp_path / "board", runs, *words)
    assert told in str(caught.value) and "\n" not in str(caught.value)


# --- the recipes ------------------------------------------------------------------------------------------------------


def stages_of(recipe: str, *words: str) -> dict[str, WrittenStage]:
    return {s.name: s for s in parse_stages(compose(recipe, list(words)))}


def chosen(recipe: str, group: str) -> Any:
    """The component that a recipe's defaults list chooses."""
    chain = DefaultsChain(find_recipe(recipe))
    return chain.choice(chain.primary.id, group)


def test_every_method_that_trains_few_parameters_is_on_the_board() -> None:
    stages = [s for n, s in stages_of("peft_leaderboard").items() if n.startswith("method-")]
    shown = {kind for s in stages for kind in chosen(s.what, "stack") or ["full"]}
    families = ("additive", "selective", "reparameterized")
    known = {n for n in registry.names("stack") if registry.spec("stack", n).family in families}
    # CoDA skips blocks of encoders; the recipe's head says how it joins in. Visual prompts have no place in a model of text.
    assert shown == known - {"coda", "vpt"} | {"full"}
    budget = {"steps=60", "batch.size=16", 'data.path="builtin:classify"', "objective=classification"}
    assert all(budget < set(s.words) for s in stages)


def test_words_for_the_board_reach_every_method(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": 1}\n')
    words = ["model=minilm", f"data.path={tmp_path}/rows.jsonl", "steps=7", "stages.method.each.seed=[3,4]",
             "+stages.method.each.method.coda={}", "stages.method.each.method.sft.optim.lr=0.25"]  # fmt: skip
    stages = {n: s for n, s in stages_of("peft_leaderboard", *words).items() if n.startswith("method-")}
    everywhere = {'model.path="sentence-transformers/all-MiniLM-L6-v2"', f'data.path="{tmp_path}/rows.jsonl"', "steps=7"}
    plain = [n for n in stages_of("peft_leaderboard") if n.startswith("method-")]
    assert len(stages) == 2 * (len(plain) + 1) and all(everywhere < set(s.words) for s in stages.values())
    assert stages["method-coda-4"].what == "coda" and "seed=4" in stages["method-coda-4"].words
    assert [n for n, s in stages.items() if "optim.lr=0.25" in s.words] == ["method-sft-3", "method-sft-4"]
    with pytest.raises(RecipeError, match=r"did you mean 'steps'\?"):
        compose("peft_leaderboard", ["stpes=7"])
    with pytest.raises(RecipeError, match="a pipeline has no optim of its own"):
        plan(compose("peft_leaderboard", ["optim.lr=1"]))


def test_every_objective_that_aligns_is_on_the_board() -> None:
    stages = {n: s for n, s in stages_of("alignment_leaderboard", "steps=3").items() if n != "board"}
    trained = {chosen(s.what, "objective"): s for s in stages.values()}
    known = {n for n in registry.names("objective") if registry.spec("objective", n).family == "alignment"}
    assert set(trained) == known | {"sft"}
    assert all("steps=3" in s.words for s in stages.values())
    assert {n for n, s in trained.items() if "sft" in s.inputs} == known
    assert trained["ppo"].inputs == ("reward", "sft")


def test_every_method_of_the_survey_is_on_its_board_with_one_rule_and_one_budget() -> None:
    """No rate of a recipe's own is left, and nothing else a run is given differs between methods."""
    stages = [s for n, s in stages_of("survey_leaderboard").items() if n.startswith("method-")]
    known = {n for n in registry.names("stack") if registry.spec("stack", n).family != "alignment"}
    once = [s for s in stages if {"seed=0", "optim.lr=0.003"} < set(s.words)]
    shown = {kind for s in once for kind in compose(s.what, list(s.words)).recipe.stack}
    assert shown == known - {"vpt", "esft", "hypertuning"}
    assert len(stages) == 9 * len(once) <= 400
    budget = {"steps=30", 'data.path="builtin:sft"', "objective=sft", 'model.path="tiny"'}
    assert all(budget < set(s.words) for s in stages)
    assert {w for s in stages for w in s.words if w.startswith("optim.lr=")} == {f"optim.lr={r}" for r in (0.003, 0.015, 0.075)}


def test_hybrids_and_their_parts_train_as_many_numbers_with_one_rule_and_one_budget() -> None:
    """4,608 a layer within 5 in 100, BitFit apart, which has but one size; only rate, seed and stack differ."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from llmrecipe.models.checkpoint_path import TINY

    once = ["stages.method.matrix.seed=[0]", "stages.method.matrix.rate=[5e-3]"]
    stages = {n: s for n, s in stages_of("hybrid_leaderboard", *once).items() if n.startswith("method-")}
    assert len(stages) == 10
    for name, stage in stages.items():
        assert {"steps=30", "seed=0", "optim.lr=0.005", 'data.path="builtin:sft"'} < set(stage.words)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY))
        count = trained_numbers(model, stage)
        assert count == 4 * 1728 if name.endswith("bitfit") else abs(count / (4 * 4608) - 1) < 0.05, (name, count)


def trained_numbers(model: torch.nn.Module, stage: WrittenStage) -> int:
    """How many numbers the stack of a stage trains in a model."""
    from llmrecipe.methods._base.stack import Stack
    from llmrecipe.models.attention import install_attention

    install_attention(model, "sdpa")
    options = compose(stage.what, list(stage.words)).recipe.stack
    made = [registry.load_class("stack", own.pop("kind"))(name=n, **own) for n, own in options.items()]
    Stack(made).attach(model)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_words_for_minilm_in_the_hybrid_board_give_each_method_as_many_numbers() -> None:
    """15,360 a layer within 5 in 100 on an encoder of MiniLM's shape, by the command in the recipe's comment."""
    from transformers import BertConfig, BertModel

    lines = find_recipe("hybrid_leaderboard").read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line.lstrip("# ").startswith("m="))
    last = next(i for i, line in enumerate(lines) if i >= first and not line.endswith("\\"))
    command = " ".join(line.lstrip("# ").rstrip("\\") for line in lines[first : last + 1])
    variable, _, rest = command.partition(";")
    words = shlex.split(rest.replace("$m", variable.removeprefix("m=")))[3:]
    words = [w for w in words if not w.startswith(("model", "data.path"))]
    once = ["stages.method.matrix.seed=[0]", "stages.method.matrix.rate=[5e-3]"]
    stages = {n: s for n, s in stages_of("hybrid_leaderboard", *words, *once).items() if n.startswith("method-")}
    assert len(stages) == 10
    for name, stage in stages.items():
        with torch.device("meta"):
            model = BertModel(BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6))
        count = trained_numbers(model, stage)
        assert name.endswith("bitfit") or abs(count / (6 * 15_360) - 1) < 0.05, (name, count)


SOME_OF_IT = ["steps=2", "batch.size=2", "data.limit=6", "data.max_length=64", "eval.forgetting={}", "stages.board.columns=[]",
              "stages.board.across=[trained,memory,seconds]", "stages.method.matrix.seed=[0]"]  # fmt: skip


@pytest.mark.slow
def test_a_survey_shows_what_has_run_and_leaves_the_rest_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[str]
) -> None:
    """Two methods at two rates; the table is asked for after one method has run, and again by the pipeline itself."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    drop = [f"~stages.method.matrix.method.{n}" for n in plan_names("survey_leaderboard") if n not in ("ia3", "bitfit")]
    words = [*SOME_OF_IT, *drop, "stages.method.matrix.rate=[1e-3,1e-2]"]
    first = ["~stages.method.matrix.method.bitfit", *words]
    of = "of=" + json.dumps(["survey_leaderboard", *words])
    nothing = json.loads((step(tmp_path / "nothing", of) / "leaderboard.json").read_text())["rows"]
    assert [(r["method"], r["seeds"]) for r in nothing] == [("bitfit", []), ("ia3", [])]
    run_stages.run_all_stages(compose("survey_leaderboard", first))
    ran = list(started)
    assert len(ran) == 3 and ran[-1] == "board"
    some = step(tmp_path / "some", of)
    rows = json.loads((some / "leaderboard.json").read_text())["rows"]
    assert [(r["method"], r["seeds"]) for r in rows] == [("ia3", [0]), ("bitfit", [])]
    by = {r["seed"]: r for r in json.loads((some / "leaderboard.json").read_text())["runs"]}
    assert by[0]["tuned"] in (1e-3, 1e-2) and rows[0]["mean"]["score"] == by[0]["score"]
    assert (some / "leaderboard.md").read_text().splitlines()[3].startswith("|  | bitfit | selective |  |  |")
    last = run_stages.run_all_stages(compose("survey_leaderboard", words))
    assert started[len(ran) :] == ["method-0-0_001-bitfit", "method-0-0_01-bitfit", "board"]
    whole = json.loads((Path(last[-1].dir) / "leaderboard.json").read_text())["rows"]
    assert {r["method"]: r["seeds"] for r in whole} == {"ia3": [0], "bitfit": [0]}


@pytest.mark.slow
def test_every_method_has_a_row_of_memory_at_one_task_and_one_budget() -> None:
    stages = [s for n, s in stages_of("memory_leaderboard").items() if n.startswith("method-")]
    known = {n for n in registry.names("stack") if registry.spec("stack", n).family != "alignment"}
    shown = {kind for s in stages for kind in compose(s.what, list(s.words)).recipe.stack}
    assert shown == known - {"vpt", "esft", "hypertuning"}
    assert all({"steps=60", 'data.path="builtin:sft"', "objective=sft", 'model.path="tiny"'} < set(s.words) for s in stages)


@pytest.mark.slow
def test_memory_is_compared_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two methods for two steps: AdamW keeps 8 bytes a trained number and 4 a tensor, MeZO holds the weights alone."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    drop = [f"~stages.method.matrix.method.{n}" for n in plan_names("memory_leaderboard") if n not in ("mezo", "bitfit")]
    words = ["steps=2", "batch.size=2", "data.limit=6", "data.max_length=64", *drop]
    board = Path(run_stages.run_all_stages(compose("memory_leaderboard", words))[-1].dir)
    rows = {r["method"]: r["mean"] for r in json.loads((board / "leaderboard.json").read_text())["rows"]}
    bitfit, mezo = rows["bitfit"], rows["mezo"]
    assert bitfit["memory/gradients"] == 4 * bitfit["trained"] and mezo["memory/held"] == mezo["memory/weights"]
    assert 0 < bitfit["memory/optimizer"] - 8 * bitfit["trained"] < 4 * 100
    parts = ("weights", "gradients", "optimizer", "activations", "logits")
    assert bitfit["memory/held"] == sum(bitfit[f"memory/{part}"] for part in parts)
    assert "| gradients MB |" in (board / "leaderboard.md").read_text()
    assert (board / "memory.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.slow
def test_both_boards_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two methods on one board, two objectives on the other: trained, read, asked, and reused as a whole."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    drop = [
        f"~stages.{stage}.each.method.{n}"
        for stage in ("method", "again")
        for n in plan_names("peft_leaderboard", stage)
        if n not in ("sft", "bitfit")
    ]
    quick = ["steps=2", "batch.size=4", "data.limit=20"]
    first = run_stages.run_all_stages(compose("peft_leaderboard", [*quick, *drop]))
    board = json.loads((Path(first[-1].dir) / "leaderboard.json").read_text())
    assert {r["method"] for r in board["rows"]} == {"full", "bitfit"}
    assert [r.how for r in run_stages.run_all_stages(compose("peft_leaderboard", [*quick, *drop]))] == ["reused"] * 3

    keep = ("dpo_lora", "simpo_lora")
    drop = [f"~stages.aligned.each.objective.{n}" for n in plan_names("alignment_leaderboard", "aligned") if n not in keep]
    small = ["steps=2", "~stages.reward", "stages.board.limit=4", "stages.board.n=2"]
    last = run_stages.run_all_stages(compose("alignment_leaderboard", [*small, *drop]))[-1]
    rows = {r["method"]: r["mean"] for r in json.loads((Path(last.dir) / "leaderboard.json").read_text())["rows"]}
    assert set(rows) == {"sft", "dpo", "simpo"}
    assert rows["sft"]["kl"] == 0.0 and rows["sft"]["win_rate"] == 0.5 and rows["dpo"]["kl"] >= 0.0
    assert app.run_command(["compare", first[0].dir, first[1].dir]) == 0


def plan_names(recipe: str, stage: str = "method") -> list[str]:
    """Names on the axis of a stage that is written as a mapping."""
    axes = compose(recipe).recipe.stages[stage]["matrix"].values()
    return list(next(axis for axis in axes if isinstance(axis, dict)))
