"""Pipelines, leaderboards and searches learn as a whole, and with nothing to learn from they do not."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.cli import app
from llmrecipe.feedback.judges.rule import judge_rule
from llmrecipe.pipelines import run_stages
from llmrecipe.recipe.compose import compose
from tests.recipes.learning import LABELS, LISTS, PAIRS, shuffled_pictures
from tests.trainings import events

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
inside = pytest.mark.usefixtures("started")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs lie below a folder of the test's own, so that a stage which is the same twice is made once."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stages(recipe: str, *words: str) -> dict[str, Path]:
    """The folder every stage left."""
    return {r.stage: Path(r.dir) for r in run_stages.run_all_stages(compose(recipe, list(words)))}


def metrics(folder: Path) -> dict[str, Any]:
    """What a run or step ended with."""
    return dict(json.loads((folder / "final" / "metrics.json").read_text(encoding="utf-8")))


def better(folder: Path) -> float:
    """Share of the held-out pairs whose better answer has the larger reward after the last step."""
    return float([e[k] for e in events(folder, "evaluation") if (k := "eval/rewards/accuracies") in e][-1])


def moved(words: list[str], stage: str) -> str:
    """`data.path=FOLDER` of a recipe, for one stage."""
    return f"stages.{stage}.{words[0]}"


@inside
def test_dpo_on_a_fine_tuned_model_learns_the_preferences(place: Path) -> None:
    quiet = [f"stages.{stage}.eval.test=false" for stage in ("sft", "dpo")]
    made = stages("sft_dpo", *quiet)
    assert metrics(made["sft"])["eval/loss"] < 0.1 and better(made["dpo"]) >= 0.95
    control = stages("sft_dpo", *quiet, moved(PAIRS(place / "pairs"), "dpo"))
    assert control["sft"] == made["sft"] and better(control["dpo"]) <= 0.75


@inside
def test_dpo_on_the_best_of_a_search_learns_the_preferences(place: Path) -> None:
    made = stages("searched_dpo", "stages.dpo.eval.test=false")
    lines = (made["sft"] / "trials" / "trials.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    losses = [trial["values"][0] for trial in map(json.loads, lines) if trial["state"] == "done"]
    assert metrics(made["sft"])["eval/loss"] == min(losses) <= 0.6
    assert better(made["dpo"]) >= 0.85
    control = stages("searched_dpo", "stages.dpo.eval.test=false", moved(PAIRS(place / "pairs"), "dpo"))
    assert control["sft"] == made["sft"] and better(control["dpo"]) <= 0.75


@inside
def test_a_student_learns_what_its_teacher_knows(place: Path) -> None:
    made = stages("distill_answers")
    assert metrics(made["measured"])["eval/exact_match"] >= 0.95
    control = stages("distill_answers", moved(LISTS(place / "lists"), "teacher"))
    assert metrics(control["measured"])["eval/exact_match"] <= 0.05


@judge_rule
def by_chance(ask: Any, options: Any) -> Any:
    """Prefers one of two answers for no reason, the same one in both orders; otherwise it is the built-in rule."""
    from llmrecipe.feedback.judges.rule import manners

    if ask.task != "compare":
        return manners(ask, options)
    first, second = (hashlib.sha256(str(ask.parts[k]).encode()).digest() for k in ("first", "second"))
    return [float(first > second), float(first <= second)]


@inside
def test_labels_of_a_judge_teach_its_preferences(place: Path, own_rules: None) -> None:
    """Held-out pairs are those of the package, which no stage has seen."""
    held_out = "stages.dpo.data.validation=builtin:preference"
    made = stages("rlaif_dpo", held_out)
    assert better(made["dpo"]) >= 0.85
    assert metrics(made["labels"])["train/agreement"] == 1.0
    control = stages("rlaif_dpo", held_out, "stages.labels.judge.rule=by_chance")
    assert control["pairs"] == made["pairs"] and better(control["dpo"]) <= 0.7


def rule_scores(folder: Path) -> list[float]:
    """The rule's score on held-out prompts at each evaluation."""
    return [e["eval/rewards/rule"] for e in events(folder, "evaluation") if "eval/rewards/rule" in e]


@inside
def test_a_preference_model_teaches_what_its_labels_say(place: Path, own_rules: None) -> None:
    """The rule only labels; the policy is trained on its preference model, and its own score rises from stage to stage."""
    made = stages("rlaif")
    first, *_, last = rule_scores(made["ppo"])
    assert last >= first + 0.1 and last >= 0.75
    pairs = metrics(made["labels"])
    assert pairs["train/agreement"] == 1.0 and pairs["train/position_bias"] == 0.0
    assert better(made["reward"]) >= 0.65
    control = stages("rlaif", "stages.labels.judge.rule=by_chance")
    assert control["pairs"] == made["pairs"] and rule_scores(control["ppo"])[-1] < first + 0.05


def test_the_search_finds_a_rate_that_learns(place: Path) -> None:
    """Trials are processes of their own, since one that is behind is stopped."""
    assert app.run_command(["search", "recipe=search_lora", "log.live=off"]) == 0
    lines = (place / "runs" / "search_lora-search" / "trials.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    losses = [t["values"][0] for t in map(json.loads, lines) if t.get("values")]
    assert min(losses) <= 0.6 and max(losses) >= 2 * min(losses)
    best = "runs/search_lora-search/searched.yaml"
    assert app.run_command(["train", f"recipe={best}", *LISTS(place / "lists"), "run.dir=control", "log.live=off"]) == 0
    assert metrics(Path("control"))["eval/loss"] >= 1.0


@inside
def test_sub_networks_that_were_found_learn_from_the_start(place: Path) -> None:
    """Four labels; the control has pictures of other labels, on which the same search ends near what is most frequent."""
    found = stages("noah_search")["search"]
    control = stages("noah_search", *shuffled_pictures("label")(place / "shuffled"))["search"]
    own, other = metrics(found), metrics(control)
    assert own["eval/loss"] <= 0.3 and other["eval/loss"] >= 1.0
    assert own["retrained/evolution"] <= 0.3 and own["parameters"] <= 5000 + 4 * 128 + 4
    plain = compose(found / "searched.yaml")
    assert sorted(plain.recipe.stack) == ["adapter", "lora", "vpt"] and plain.recipe.search is None


def scores(folder: Path) -> dict[str, dict[str, float]]:
    """Method -> means of its row on a board."""
    board = json.loads((folder / "leaderboard.json").read_text(encoding="utf-8"))
    return {row["method"]: row["mean"] for row in board["rows"]}


@inside
def test_every_method_of_the_board_learns(place: Path) -> None:
    """Four labels, 0.25 by chance, after 60 steps of 16 rows."""
    made = {name: row["score"] for name, row in scores(stages("peft_leaderboard")["board"]).items()}
    assert len(made) == 18 and min(made.values()) >= 0.36 and sum(v >= 0.5 for v in made.values()) >= 12
    some = {"sft", "sft_lora", "adapter"}
    every = compose("peft_leaderboard").recipe.stages["method"]["matrix"]["method"]
    dropped = [f"~stages.method.each.method.{name}" for name in every if name not in some]
    dropped += [f"~stages.again.each.method.{name}" for name in ("bitfit", "ia3")]
    control = scores(stages("peft_leaderboard", *LABELS(place / "labels"), *dropped)["board"])
    assert len(control) == 3 and max(row["score"] for row in control.values()) <= 0.36


@inside
def test_the_memory_of_methods_follows_their_formulas(place: Path) -> None:
    """Parts are counted, so they are those of the formulas on any machine: MeZO holds the weights alone."""
    every = compose("memory_leaderboard").recipe.stages["method"]["matrix"]["method"]
    some = ("sft", "sft_lora", "nf4", "mezo", "smt", "lora_fa")
    dropped = [f"~stages.method.matrix.method.{name}" for name in every if name not in some]
    rows = scores(stages("memory_leaderboard", "stages.board.plot=false", *dropped)["board"])
    full, held = rows["full"], {name: row["memory/held"] for name, row in rows.items()}
    assert held["mezo"] == full["memory/weights"] and held["full"] == max(held.values())
    assert rows["smt"]["memory/gradients"] <= 0.05 * full["memory/gradients"] and held["smt"] < 0.67 * held["full"]
    assert rows["lora_fa"]["memory/activations"] < rows["lora"]["memory/activations"] < full["memory/activations"]
    assert rows["nf4+lora"]["memory/weights"] < 0.5 * rows["lora"]["memory/weights"]
    assert min(rows[name]["score"] for name in ("full", "lora", "nf4+lora")) > rows["mezo"]["score"]


@inside
def test_what_is_done_against_forgetting_keeps_the_old_task(place: Path) -> None:
    """All learn the lists alike; what the conversations of the old task lose is what sets them apart."""
    made = scores(stages("forgetting_leaderboard", "stages.board.plot=false")["board"])
    rows = {"sft_replay" if " + " in name else name.partition(" ")[0]: row for name, row in made.items()}
    assert rows.keys() == {"full", "lora", "l2sp", "ewc", "sft_replay"}
    assert max(row["score"] for row in rows.values()) <= 0.25, "forgetting_leaderboard: not all learn the new task"
    lost = {name: row["forget/chat"] for name, row in rows.items()}
    assert lost["full"] >= 0.5
    assert all(lost[name] <= 0.5 * lost["full"] for name in ("l2sp", "ewc", "sft_replay"))


@inside
def test_hybrids_and_their_parts_learn(place: Path) -> None:
    """A hybrid and two of its parts; the control learns from lists whose answers are those of others."""
    every = compose("hybrid_leaderboard").recipe.stages["method"]["matrix"]["method"]
    dropped = [f"~stages.method.matrix.method.{name}" for name in every if name not in ("s4", "lora", "adapter")]
    words = ["stages.method.matrix.seed=[0]", "stages.method.matrix.rate=[5e-3]", "stages.board.plot=false", *dropped]
    made = scores(stages("hybrid_leaderboard", *words)["board"])
    control = scores(stages("hybrid_leaderboard", *words, *LISTS(place / "lists"))["board"])
    assert made.keys() == control.keys() == {"s4", "lora", "adapter"}
    assert max(row["score"] for row in made.values()) <= 0.9 and min(row["score"] for row in control.values()) >= 1.0


@inside
def test_methods_of_the_survey_learn(place: Path) -> None:
    """A full, a reparameterized and a hybrid method; the control learns from lists whose answers are those of others."""
    every = compose("survey_leaderboard").recipe.stages["method"]["matrix"]["method"]
    dropped = [f"~stages.method.matrix.method.{name}" for name in every if name not in ("sft", "sft_lora", "s4")]
    words = ["stages.method.matrix.seed=[0]", "stages.method.matrix.rate=[3e-3]", "stages.board.plot=false", *dropped]
    made = scores(stages("survey_leaderboard", *words)["board"])
    control = scores(stages("survey_leaderboard", *words, *LISTS(place / "lists"))["board"])
    assert made.keys() == control.keys() == {"full", "lora", "s4"}
    assert max(row["score"] for row in made.values()) <= 0.7 and min(row["score"] for row in control.values()) >= 1.0


@inside
def test_objectives_of_the_board_learn(place: Path) -> None:
    """Two of the pair objectives, at their full length, from one fine-tuned model, and the same on swapped pairs."""
    every = compose("alignment_leaderboard").recipe.stages["aligned"]["matrix"]["objective"]
    dropped = [f"~stages.aligned.each.objective.{name}" for name in every if name not in ("kto_lora", "orpo_lora")]
    words = ["~stages.reward", "stages.board.limit=40", "stages.board.n=2", *dropped]
    rows = scores(stages("alignment_leaderboard", *words)["board"])
    assert min(rows[name]["win_rate"] for name in ("kto", "orpo")) >= 0.7 and rows["sft"]["win_rate"] == 0.5
    pairs = PAIRS(place / "pairs")[0]
    control = ["~stages.aligned.each.objective.kto_lora", f"+stages.aligned.each.objective.orpo_lora.{pairs}"]
    # One objective alone goes by the name of its stack.
    (nothing,) = (r for name, r in scores(stages("alignment_leaderboard", *words, *control)["board"]).items() if name != "sft")
    assert nothing["win_rate"] <= 0.6


@dataclass(frozen=True)
class Helps:
    """What a pretext is worth to the next task, in the score of the table; losses count down."""

    start: str
    sign: int
    control: str
    """What tells the row that learned nothing from its pretext."""
    margin: float
    """By how much the control stays behind."""
    seeds: int = 3
    """Over how many seeds the 95 % interval is on one side of 0."""


@inside
@pytest.mark.parametrize(
    ("recipe", "proof"),
    [
        ("mmlm_caption", Helps("mmlm", -1, "start.data.control.image=rows", 0.05)),
        ("mmlm_vqa", Helps("mmlm", 1, "start.data.control.image=rows", 0.05)),
        ("nsp_qa", Helps("nsp", 1, "start.data.control.text=words", 0.05, seeds=6)),
        ("dae_sft", Helps("dae", -1, "start.objective.delete=1.0", 0.1)),
    ],
)
def test_pretraining_first_helps_over_seeds(place: Path, recipe: str, proof: Helps) -> None:
    """In the same steps a pretrained model is better on held-out rows than fresh weights, and its control is not as good."""
    plain = [f"stages.{stage}.eval.bootstrap=0" for stage in ("pretext", "pretrained", "fresh")]
    seeds = [f"stages.{stage}.matrix.seed={list(range(proof.seeds))}" for stage in ("pretrained", "fresh")]
    rows = scores(stages(recipe, "stages.board.plot=false", *plain, *seeds)["board"])
    own, control = rows[proof.start], rows[f"{proof.start} ({proof.control})"]
    assert min(proof.sign * own[f"difference/{end}"] for end in ("low", "high")) > 0.0
    assert proof.sign * (own["score"] - control["score"]) > proof.margin


@inside
def test_a_pretext_of_the_board_is_worth_something(place: Path) -> None:
    """One of its objectives at full length; three seeds of a few steps tell it from its control, hardly from fresh weights."""
    every = compose("pretraining_leaderboard").recipe.stages["task"]["matrix"]["pretext"]
    words = [f"~stages.pretext.matrix.pretext.{name}" for name in every if name != "nsp"]
    words += ["stages.task.matrix.pretext=[nsp]", "~stages.fresh.matrix.shape.decoder", "stages.board.plot=false"]
    rows = scores(stages("pretraining_leaderboard", *words)["board"])
    own, control = rows["nsp"], rows["nsp (start.data.control.text=words)"]
    assert own["difference"] > 0.0 and own["score"] - control["score"] > 0.1
