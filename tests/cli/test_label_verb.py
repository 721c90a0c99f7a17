"""`llmrecipe label`: keys from a pipe, labellers apart, undo and resume, and agreement by hand."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.cli import app
from llmrecipe.data import prepare
from llmrecipe.data.formats.answered_prompts import read_answered
from llmrecipe.data.toy import grammar
from llmrecipe.evaluation.human_labels import Labels, questions
from llmrecipe.recipe.data_section import DataSection
from tests.data.toys import byte_tokenizer

GOOD, BAD = f"{grammar.POLITE[0]} The owl is green.", f"{grammar.RUDE[0]} The owl is green."


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    lines: list[dict[str, Any]] = [
        {"prompt": f"Question {i}", "completions": [f"one {i}", f"two {i}"], "topic": i} for i in range(4)
    ]
    lines.append({"prompt": "the same twice", "completions": ["x", "x"]})
    Path("rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return "rows.jsonl"


class Person:
    """Somebody at the keys."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, keys: str, *words: str, code: int = 0) -> dict[str, Any]:
        """What `label --json` says at the end."""
        self.monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{key}\n" for key in keys.split())))
        assert app.run_command(["label", "rows.jsonl", "--json", *words]) == code
        self.screen = self.capsys.readouterr()
        return json.loads(self.screen.out) if code == 0 else {}


@pytest.fixture
def person(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Person:
    return Person(monkeypatch, capsys)


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("labels", f"{name}.jsonl").read_text().splitlines()]


def wanted(name: str, *answers: str) -> str:
    """Keys that choose these answers, wherever the seed puts them."""
    labels = Labels(Path("labels"), name)
    asked = questions(read_answered("rows.jsonl", "train", 2))
    keys = []
    for question, answer in zip(asked, answers):
        place = {"one": 1, "two": 2}.get(answer)
        keys.append(answer if place is None else str(3 - place if labels.swapped(question) else place))
    labels.close()
    return " ".join(keys)


def test_choices_become_rows_whichever_was_shown_first(rows: str, person: Person) -> None:
    facts = person(wanted("ann", "one", "two", "one", "two"), "-l", "ann")
    found = read("ann")
    assert [(r["chosen"], r["rejected"]) for r in found] == [
        ("one 0", "two 0"), ("two 1", "one 1"), ("one 2", "two 2"), ("two 3", "one 3"),
    ]  # fmt: skip
    assert all(r["labeller"] == "ann" and r["topic"] == i and r["prompt"] == f"Question {i}" for i, r in enumerate(found))
    assert {r["swapped"] for r in found} <= {True, False} and facts["rows"] == 4 and facts["pairs"] == 4
    counts = facts["labellers"]["ann"]
    assert (counts["labelled"], counts["first"], counts["second"], counts["tie"], counts["skip"]) == (4, 2, 2, 0, 0)
    shown_first = sum((r["chosen"].startswith("one")) != r["swapped"] for r in found)
    assert counts["chose_the_one_shown_first"] == shown_first / 4
    assert "Question 0" in person.screen.err and "one 0" in person.screen.err
    data = prepare(DataSection(path="labels/ann.jsonl", cache=False), byte_tokenizer(), "preference", seed=0)
    assert len(data) == 4


def test_ties_skips_and_wrong_keys(rows: str, person: Person) -> None:
    facts = person("tie x 7 skip " + wanted("ann", "-", "-", "one").split()[2] + " quit", "-l", "ann")
    assert person.screen.err.count("is no key here") == 2
    counts = facts["labellers"]["ann"]
    assert (counts["tie"], counts["skip"], counts["labelled"], facts["rows"]) == (1, 1, 3, 1)
    assert read("ann")[0]["chosen"] == "one 2"


def test_undo_and_resume(rows: str, person: Person) -> None:
    person(wanted("ann", "one", "one"), "-l", "ann")
    assert [r["chosen"] for r in read("ann")] == ["one 0", "one 1"]
    # Another start: take two back, judge the first one anew, stop; the file of decisions only grew.
    journal = Path("labels/ann.journal.jsonl")
    before = journal.read_text()
    person("u u " + wanted("ann", "two"), "-l", "ann")
    assert [r["chosen"] for r in read("ann")] == ["two 0"]
    assert journal.read_text().startswith(before) and len(journal.read_text().splitlines()) == 5
    person(wanted("ann", "-", "two", "two", "two").partition(" ")[2], "-l", "ann")
    assert [r["chosen"] for r in read("ann")] == ["two 0", "two 1", "two 2", "two 3"]
    facts = person("1 1 1", "-l", "ann")
    assert "every pair is labelled" in person.screen.err and facts["rows"] == 4
    person("u u u u u u q", "-l", "ann")
    assert person.screen.err.count("nothing to undo") == 2 and read("ann") == []


def test_a_cut_line_of_the_journal_costs_one_decision(rows: str, person: Person) -> None:
    person(wanted("ann", "one", "one", "one"), "-l", "ann")
    journal = Path("labels/ann.journal.jsonl")
    journal.write_bytes(journal.read_bytes()[:-9])
    facts = person("", "-l", "ann")
    assert facts["rows"] == 2 and [r["chosen"] for r in read("ann")] == ["one 0", "one 1"]


def test_labellers_are_kept_apart_and_compared(rows: str, person: Person) -> None:
    """Pairs that ann and ben both judged: 1-1, 2-1, 1-1; p_o = 2/3, p_e = 2/3 * 1 = 2/3, kappa 0."""
    person(wanted("ann", "one", "two", "one", "two"), "-l", "ann")
    facts = person(wanted("ben", "one", "one", "one", "skip"), "-l", "ben")
    assert set(facts["labellers"]) == {"ann", "ben"} and len(read("ann")) == 4 and len(read("ben")) == 3
    (pair,) = facts["agreement"]
    assert (pair["one"], pair["other"], pair["items"]) == ("ann", "ben", 3)
    assert pair["share"] == pytest.approx(2 / 3) and pair["kappa"] == pytest.approx(0.0)
    facts = person(wanted("cleo", "one", "two", "tie", "two"), "-l", "cleo")
    kappas = {(p["one"], p["other"]): p for p in facts["agreement"]}
    # ann: 1 2 1 2, cleo: 1 2 t 2: p_o = 3/4, p_e = 1/2 * 1/4 + 1/2 * 1/2 = 3/8, kappa = 3/5.
    assert kappas["ann", "cleo"]["share"] == 0.75 and kappas["ann", "cleo"]["kappa"] == pytest.approx(0.6)


def test_the_order_shown_is_drawn_for_each_labeller_and_seed(rows: str) -> None:
    asked = questions(read_answered("rows.jsonl", "train", 2))

    def orders(name: str, seed: int) -> list[bool]:
        labels = Labels(Path("labels"), name, seed)
        labels.close()
        return [labels.swapped(q) for q in asked for _ in range(1)]

    drawn = {(name, seed): orders(name, seed) for name in ("ann", "ben", "cleo", "dora") for seed in range(4)}
    assert orders("ann", 0) == drawn["ann", 0] and len({tuple(o) for o in drawn.values()}) > 4
    assert 0.2 < sum(map(sum, drawn.values())) / (16 * len(asked)) < 0.8


def test_a_judge_labels_alike_and_is_asked_once(rows: str, person: Person) -> None:
    Path("rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"q{i}", "completions": two}) + "\n" for i, two in enumerate([[GOOD, BAD], [BAD, GOOD]]))
    )
    facts = person("", "--by", "rule", "--constitution", "manners")
    name = "rule:manners:0.9"
    assert [(r["chosen"], r["rejected"], r["judge"]) for r in read(name)] == [(GOOD, BAD, name)] * 2
    assert [r["p"] for r in read(name)] == pytest.approx([0.9, 0.9]) and facts["rows"] == 2
    asked = Path("labels", f"{name}.asked.jsonl").read_text()
    replies = [line for line in asked.splitlines() if '": {"logprobs"' in line]
    assert len(replies) == 4
    facts = person("", "--by", "{kind: rule}", "--constitution", "manners")
    assert facts["rows"] == 2 and Path("labels", f"{name}.asked.jsonl").read_text() == asked
    human = person("1 1", "-l", "ann")
    assert {human["agreement"][0]["one"], human["agreement"][0]["other"]} == {"ann", name}


def test_answers_of_a_model_are_made_once(tmp_path: Path, person: Person, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["label", "tiny", "--prompts", "builtin:prompts", "--limit", "3", "--max-new-tokens", "12", "-l", "ann", "--json"]
    for keys in ("1\n", "2\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(keys))
        assert app.run_command(words) == 0
        facts = json.loads(capsys.readouterr().out)
        answers = Path("labels/answers/train.jsonl").read_text()
    assert facts["rows"] == 2 and len(answers.splitlines()) == 3
    assert read("ann")[0]["chosen"] in answers


def test_a_table_for_people(rows: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("1\nt\n"))
    assert app.run_command(["label", rows, "-l", "ann"]) == 0
    out = capsys.readouterr().out
    assert "ann" in out and "1 preference rows" in out.replace("\n", " ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["rows.jsonl", "-l", "../up"], "--labeller: letters, digits"),
        (["rows.jsonl", "--by", "rul"], "there is no judge 'rul'; did you mean 'rule'"),
        (["rows.jsonl", "--by", "local"], "--by.path: must be given"),
        (["rows.jsonl", "--by", "rule", "--constitution", "maners"], "did you mean 'manners'"),
    ],
)
def test_mistakes_are_explained(rows: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run_command(["label", *words]) == 2
    assert message in capsys.readouterr().err


def test_one_labeller_sits_at_one_terminal(rows: str, person: Person, tmp_path: Path) -> None:
    """A second terminal is refused with who has it, changes nothing, and others label and are counted meanwhile."""
    child = subprocess.Popen(
        [sys.executable, "-m", "llmrecipe", "label", "rows.jsonl", "-l", "ann", "--json"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert child.stdin is not None
    child.stdin.write("1\n")
    child.stdin.flush()
    journal = Path("labels/ann.journal.jsonl")
    until = time.time() + 120
    while time.time() < until and not (journal.is_file() and journal.read_bytes().endswith(b"\n")):
        time.sleep(0.05)
    before = journal.read_bytes()
    person("2", "-l", "ann", code=2)
    told = told_to(person)
    assert f"ann is labelling in labels already (process {child.pid} since " in told
    assert "end that one, or choose another name with --labeller" in told
    assert journal.read_bytes() == before
    facts = person("1 2", "-l", "ben")
    assert facts["labellers"]["ann"]["labelled"] == 1 and facts["labellers"]["ben"]["labelled"] == 2
    out, _ = child.communicate("q\n", timeout=120)
    assert json.loads(out)["labellers"]["ann"]["labelled"] == 1
    assert person("2", "-l", "ann")["labellers"]["ann"]["labelled"] == 2


def told_to(person: Person) -> str:
    """What the last command said, on one line."""
    return " ".join((person.screen.out + person.screen.err).split())
