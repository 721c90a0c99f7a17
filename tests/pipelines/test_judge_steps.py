"""`critique` and `label_ai`: the rows they leave, what they count, and that nothing is asked twice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.core.errors import Interrupted, RecipeError, RunError, UserError
from llmrecipe.data import prepare
from llmrecipe.data.toy import grammar
from llmrecipe.feedback.judges.rule import Rule, judge_rule
from llmrecipe.pipelines.steps.run_step import run_step
from llmrecipe.recipe.data_section import DataSection
from llmrecipe.recipe.step_spec import compose_step
from tests.data.toys import byte_tokenizer

OWL = "The owl is green and likes cake."
COW = "The cow is white and likes corn."
QUESTION = "Tell me about the owl, not the cow."


def turn(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def done(kind: str, folder: Path, *words: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and metrics of a step."""
    run_step(compose_step(kind, [*words, f"run.dir={folder}", "log.live=off"]))
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    return rows, json.loads((folder / "final" / "metrics.json").read_text())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the questions that reach a rule."""
    keys: list[str] = []
    for name in ("write", "choose"):
        original = getattr(Rule, name)

        def spy(self: Rule, asks: Any, *more: Any, original: Any = original, name: str = name) -> Any:
            for index, reply in original(self, asks, *more):
                keys.append(asks[index].key("", name))
                yield index, reply

        monkeypatch.setattr(Rule, name, spy)
    return keys


@pytest.fixture
def drafts(tmp_path: Path) -> str:
    answers = [f"{grammar.RUDE[0]} {OWL}", f"{grammar.POLITE[1]} {OWL}", f"{grammar.RUDE[2]} {COW}"]
    return written(tmp_path / "drafts.jsonl", [{"prompt": turn(QUESTION), "completion": a, "topic": "owl"} for a in answers])


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    good, rude, wrong = f"{grammar.POLITE[0]} {OWL}", f"{grammar.RUDE[0]} {OWL}", f"{grammar.RUDE[0]} {COW}"
    two = [[good, rude], [rude, good], [good, good], [rude, wrong], [rude, f"{grammar.POLITE[0]} {COW}"]]
    return written(tmp_path / "pairs.jsonl", [{"prompt": turn(QUESTION), "completions": a, "topic": "owl"} for a in two])


# --- critique ---------------------------------------------------------------------------------------------------------


def test_every_revision_is_a_row(drafts: str, tmp_path: Path) -> None:
    rows, metrics = done("critique", tmp_path / "c", f"answers={drafts}", "constitution=manners", "revisions=2")
    assert [(r["completion"], r["round"]) for r in rows[:4]] == [
        (f"{grammar.POLITE[0]} {OWL}", 1),
        (f"{grammar.POLITE[0]} {OWL}", 2),
        (f"{grammar.POLITE[1]} {OWL}", 1),
        (f"{grammar.POLITE[1]} {OWL}", 2),
    ]
    assert len(rows) == metrics["train/rows"] == 6 and all(r["prompt"] == turn(QUESTION) and r["topic"] == "owl" for r in rows)
    # Two of three first answers were changed, and nothing after that.
    assert metrics["train/change_rate"] == pytest.approx(2 / 6)
    assert (metrics["train/change_rate/round1"], metrics["train/change_rate/round2"]) == (pytest.approx(2 / 3), 0.0)
    assert metrics["train/distinct"] == pytest.approx(len({r["completion"] for r in rows}) / 6)
    assert (metrics["train/leaks"], metrics["train/cut_short"], metrics["failures"]) == (0, 0, 0)
    last, _ = done("critique", tmp_path / "l", f"answers={drafts}", "constitution=manners", "revisions=2", "keep=last")
    assert [r["completion"] for r in last] == [r["completion"] for r in rows[1::2]]


def test_principles_are_redrawn_each_round_and_follow_the_seed(drafts: str, tmp_path: Path) -> None:
    words = (f"answers={drafts}", "constitution=assistant", "revisions=8")
    one, other = (done("critique", tmp_path / str(s), *words, f"seed={s}")[0] for s in (0, 1))
    again = done("critique", tmp_path / "again", *words, "seed=0")[0]
    drawn = [[r["principle"] for r in rows] for rows in (one, other, again)]
    assert drawn[0] == drawn[2] != drawn[1]
    assert all(len(set(drawn[0][i : i + 8])) > 2 for i in (0, 8, 16))


def test_nothing_of_a_critique_reaches_a_target(drafts: str, tmp_path: Path, own_rules: None) -> None:
    def chatty(ask: Any, options: Any) -> Any:
        answer = ask.parts["answer"]
        if ask.task == "critique":
            return "It is rude."
        if "cow" in answer:
            return "Critique: it is rude, and I stop here."
        return f"Critique: rude.\nRevision: Certainly. {answer}\n\nCritique Request: anything else?"

    judge_rule(chatty)
    rows, metrics = done("critique", tmp_path / "c", f"answers={drafts}", "revisions=1", "judge={kind: rule, rule: chatty}")
    assert [r["completion"] for r in rows] == [f"Certainly. {grammar.RUDE[0]} {OWL}", f"Certainly. {grammar.POLITE[1]} {OWL}"]
    assert metrics["train/leaks"] == 2 and metrics["train/cut_short"] == 1


def test_few_shot_examples_are_no_targets(drafts: str, tmp_path: Path) -> None:
    example = {"prompt": "EXAMPLE p", "answer": "EXAMPLE a", "critique": "EXAMPLE c", "revision": "EXAMPLE r"}
    text = {"principles": [{"id": "x", "critique": "c?", "revision": "r!"}], "few_shot": {"critique": [example]}}
    (tmp_path / "own.yaml").write_text(json.dumps(text))
    rows, _ = done("critique", tmp_path / "c", f"answers={drafts}", f"constitution={tmp_path / 'own.yaml'}", "revisions=1")
    assert rows and not any("EXAMPLE" in json.dumps(r) for r in rows)


def test_a_stopped_critique_asks_nothing_twice(
    drafts: str, tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (f"answers={drafts}", "constitution=manners", "revisions=3", "batch=2")
    whole = done("critique", tmp_path / "whole", *words)[0]
    every = list(asked)
    assert len(every) == len(set(every))
    for stop_at in range(1, len(every), 3):
        asked.clear()
        folder = tmp_path / f"stopped{stop_at}"

        def stop(self: Rule, asks: Any, original: Any = Rule.write, stop_at: int = stop_at) -> Any:
            for index, reply in original(self, asks):
                yield index, reply
                if len(asked) == stop_at:
                    raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Rule, "write", stop)
            with pytest.raises(Interrupted):
                done("critique", folder, *words)
        assert done("critique", folder, *words)[0] == whole
        assert sorted(asked) == sorted(every)


# --- label_ai ---------------------------------------------------------------------------------------------------------


def test_labels_of_the_rule(pairs: str, tmp_path: Path) -> None:
    """Pairs 1 and 2 are one pair in two orders, 3 is one answer twice, in 4 one is off the topic, 5 is a tie of halves."""
    rows, metrics = done("label_ai", tmp_path / "l", f"answers={pairs}", "constitution=manners", "truth=manners", "ensemble=2")
    good, rude = f"{grammar.POLITE[0]} {OWL}", f"{grammar.RUDE[0]} {OWL}"
    assert [(r["chosen"], r["rejected"], r["swapped"]) for r in rows[:2]] == [(good, rude, False), (good, rude, True)]
    assert [r["p"] for r in rows] == pytest.approx([0.9, 0.9, 0.9, 0.5])
    assert rows[0]["principles"] in (["polite", "topic"], ["topic", "polite"]) and rows[0]["judge"] == "rule:manners:0.9"
    # principle, order, letter
    assert [len(rows[0]["logprobs"]), len(rows[0]["logprobs"][0]), len(rows[0]["logprobs"][0][0])] == [2, 2, 2]
    assert rows[0]["logprobs"][0] == [
        pytest.approx([math.log(0.9), math.log(0.1)]),
        pytest.approx([math.log(0.1), math.log(0.9)]),
    ]
    assert rows[0]["topic"] == "owl" and rows[0]["prompt"] == turn(QUESTION)
    assert metrics["train/rows"] == 4 and metrics["train/dropped/same"] == 1
    assert metrics["train/position_bias"] == 0.0 and metrics["train/letter_a"] == pytest.approx(0.5)
    assert metrics["train/confidence"] == pytest.approx(0.3) and metrics["train/mass"] == pytest.approx(1.0)
    # The first two pairs are one pair for the truth, and the tie is left out.
    assert (metrics["train/agreement"], metrics["train/agreement_pairs"]) == (1.0, 2)


def test_margin_and_hard_labels(pairs: str, tmp_path: Path) -> None:
    words = (f"answers={pairs}", "constitution=manners")
    rows, metrics = done("label_ai", tmp_path / "m", *words, "min_margin=0.1")
    assert len(rows) == 3 and metrics["train/dropped/margin"] == 1
    hard, metrics = done("label_ai", tmp_path / "h", *words, "hard=true")
    assert [r["p"] for r in hard] == [1.0, 1.0, 1.0] and metrics["train/dropped/margin"] == 1
    assert [r["chosen"] for r in hard] == [r["chosen"] for r in rows]


def test_position_bias_mass_and_failures(pairs: str, tmp_path: Path, own_rules: None) -> None:
    def first(ask: Any, options: Any) -> Any:
        return None if "cow" in ask.parts["first"] + ask.parts["second"] else [3.0, 1.0]

    judge_rule(first)
    words = (f"answers={pairs}", "constitution=manners", "judge={kind: rule, rule: first, sure: 1.0}")
    rows, metrics = done("label_ai", tmp_path / "l", *words)
    assert [r["p"] for r in rows] == [0.5, 0.5]
    assert (metrics["train/position_bias"], metrics["train/letter_a"]) == (1.0, pytest.approx(0.75))
    assert metrics["train/dropped/failed"] == 2 and metrics["failures"] == 4
    one_order, metrics = done("label_ai", tmp_path / "o", *words, "swap=false")
    assert [r["p"] for r in one_order] == pytest.approx([0.75, 0.75]) and "train/position_bias" not in metrics


def test_letters_without_mass_give_no_label(pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def quiet(self: Rule, asks: Any, options: Any) -> Any:
        yield from ((i, [math.log(0.2), math.log(0.1)]) for i in range(len(asks)))

    monkeypatch.setattr(Rule, "choose", quiet)
    words = (f"answers={pairs}", "constitution=manners")
    with pytest.raises(RunError, match=r"no pair of answers has a label; left out: failed 0, mass 4, margin 0, same 1"):
        done("label_ai", tmp_path / "l", *words)
    rows, metrics = done("label_ai", tmp_path / "m", *words, "min_mass=0.25")
    assert len(rows) == 4 and metrics["train/mass"] == pytest.approx(0.3)


def test_agreement_with_human_rows(pairs: str, tmp_path: Path) -> None:
    """The human liked the rude answer in the first pair and agreed on the fourth; other rows do not count."""
    good, rude, wrong = f"{grammar.POLITE[0]} {OWL}", f"{grammar.RUDE[0]} {OWL}", f"{grammar.RUDE[0]} {COW}"
    human = [
        {"prompt": QUESTION, "chosen": rude, "rejected": good},
        {"prompt": turn(QUESTION), "chosen": rude, "rejected": wrong},
        {"prompt": "another", "chosen": "x", "rejected": "y"},
    ]
    truth = written(tmp_path / "human.jsonl", human)
    _, metrics = done("label_ai", tmp_path / "l", f"answers={pairs}", "constitution=manners", f"truth={truth}")
    assert (metrics["train/agreement"], metrics["train/agreement_pairs"]) == (0.5, 2)


def test_a_chain_of_thought_is_kept_and_clamped(pairs: str, tmp_path: Path) -> None:
    rows, _ = done("label_ai", tmp_path / "l", f"answers={pairs}", "constitution=manners", "cot=true", "clamp=[0.3,0.7]")
    assert [r["p"] for r in rows] == pytest.approx([0.7, 0.7, 0.7, 0.5]) and len(rows[0]["rationales"]) == 2


@pytest.mark.parametrize("kind", ["preference", "unpaired"])
def test_rows_are_ready_for_training(pairs: str, tmp_path: Path, kind: str) -> None:
    hard = ["hard=true"] if kind == "unpaired" else []
    rows, _ = done("label_ai", tmp_path / "l", f"answers={pairs}", "constitution=manners", *hard)
    data = prepare(DataSection(path=str(tmp_path / "l"), cache=False), byte_tokenizer(), kind, seed=0)
    if kind == "preference":
        assert [data[i]["p"] for i in range(4)] == pytest.approx([r["p"] for r in rows])
    else:
        assert [data[i]["label"] for i in range(6)] == [True, False] * 3  # the tie says nothing


def test_a_stopped_labelling_asks_nothing_twice(
    pairs: str, tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (f"answers={pairs}", "constitution=manners", "batch=2", "ensemble=2")
    whole = done("label_ai", tmp_path / "whole", *words)[0]
    every = list(asked)
    assert len(every) == len(set(every)) == 12
    asked.clear()
    choose = Rule.choose

    def stop(self: Rule, asks: Any, options: Any) -> Any:
        for index, reply in choose(self, asks, options):
            yield index, reply
            if len(asked) == 5:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Rule, "choose", stop)
        with pytest.raises(Interrupted):
            done("label_ai", tmp_path / "stopped", *words)
    assert len(asked) == 5 and not (tmp_path / "stopped" / "train.jsonl").exists()
    assert done("label_ai", tmp_path / "stopped", *words)[0] == whole
    assert sorted(asked) == sorted(every)
    asked.clear()
    assert done("label_ai", tmp_path / "stopped", *words)[0] == whole and asked == []


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("critique", ["answers=nowhere.jsonl"], r"critique.answers: nowhere.jsonl: no such file"),
        ("critique", ["answers=DRAFTS", "constitution=maners"], r"critique.constitution: .*did you mean 'manners'"),
        ("critique", ["answers=DRAFTS", "principles=[plian]"], r"critique.principles: .*did you mean 'plain'"),
        ("critique", ["answers=DRAFTS", "judge={kind: rul}"], r"critique.judge.kind: .*did you mean 'rule'"),
        ("critique", ["answers=DRAFTS", "judge={kind: local}"], r"critique.judge.path: must be given"),
        ("critique", ["answers=DRAFTS", "splits=[]"], r"critique.splits: names no split"),
        ("critique", ["answers=DRAFTS", "revizions=1"], r"revizions: .*did you mean 'revisions'"),
        ("label_ai", ["answers=DRAFTS"], r"label_ai.answers: .*expected 2 answers .*generate n=2"),
        ("label_ai", ["answers=PAIRS", "clamp=[0.4,0.7]"], r"label_ai.clamp: must be \[c, 1 - c\]"),
        ("label_ai", ["answers=PAIRS", "truth=maners"], r"label_ai.truth: maners is no judge rule; did you mean 'manners'"),
        ("label_ai", ["answers=PAIRS", "min_margin=0.7"], r"min_margin: must be <= 0.5"),
    ],
)
def test_mistakes_are_explained(kind: str, words: list[str], message: str, drafts: str, pairs: str, tmp_path: Path) -> None:
    words = [w.replace("DRAFTS", drafts).replace("PAIRS", pairs) for w in words]
    with pytest.raises(UserError, match=message) as caught:
        done(kind, tmp_path / "x", *words)
    assert isinstance(caught.value, RecipeError) or "answers" in message


def test_secrets_of_a_judge_stay_out_of_the_folder(pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.servers import server

    secret = "plain-words-of-the-test"
    monkeypatch.setenv("JUDGE_VARIABLE", secret)
    top = [{"token": "A", "logprob": -0.2}, {"token": "B", "logprob": -2.0}]
    choice = {"message": {"content": "A"}, "logprobs": {"content": [{"top_logprobs": top}]}}
    with server(
        (200, {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}), (200, {"choices": [choice]})
    ) as (
        url,
        requests,
    ):
        judge = f"judge={{kind: http, url: '{url}', model: judge, key_env: JUDGE_VARIABLE, price_in: 1000000.0}}"
        rows, metrics = done(
            "label_ai", tmp_path / "l", f"answers={pairs}", judge, "constitution=manners", "principles=[polite]"
        )
    assert len(requests) == 6 and requests[0]["key"] == f"Bearer {secret}"
    assert [r["p"] for r in rows] == [0.5] * 4 and metrics["train/position_bias"] == 1.0
    assert metrics["prompt_tokens"] == 3 and metrics["cost"] == pytest.approx(3.0)
    for file in (tmp_path / "l").rglob("*"):
        assert not file.is_file() or secret not in file.read_text(encoding="utf-8")


def test_a_certain_letter_whose_other_is_not_listed_is_certain(pairs: str, tmp_path: Path) -> None:
    """The server says A where the first answer is polite and lists a word besides: p is 1 but for 0.0001, not 1/2."""
    from tests.servers import server

    def graded(body: dict[str, Any]) -> dict[str, Any]:
        said = body["messages"][-1]["content"]
        letter = "A" if said.find(grammar.POLITE[0]) < said.find(grammar.RUDE[0]) else "B"
        top = [{"token": letter, "logprob": math.log(0.9999)}, {"token": "The", "logprob": math.log(0.0001)}]
        return {
            "choices": [{"message": {"content": letter}, "logprobs": {"content": [{"token": letter, "top_logprobs": top}]}}]
        }

    good, rude = f"{grammar.POLITE[0]} {OWL}", f"{grammar.RUDE[0]} {OWL}"
    two = written(tmp_path / "two.jsonl", [{"prompt": turn(QUESTION), "completions": [good, rude]}])
    with server((200, graded)) as (url, _):
        judge = f"judge={{kind: http, url: '{url}', model: judge}}"
        rows, metrics = done("label_ai", tmp_path / "l", f"answers={two}", judge, "constitution=manners", "principles=[polite]")
    assert [(r["chosen"], r["p"]) for r in rows] == [(good, pytest.approx(1.0, abs=1e-4))]
    assert metrics["train/mass"] == metrics["train/mass_min"] == pytest.approx(0.9999) and metrics["train/votes"] == 0.0
    assert metrics["by_logprobs"] == 2
    silent = (200, {"choices": [{"message": {"content": "Both are fine"}}]})
    with (
        server(silent) as (url, _),
        pytest.raises(RunError, match=r"mass 1, .*the least mass on the letters \(0\) was 'Both are"),
    ):
        done(
            "label_ai",
            tmp_path / "s",
            f"answers={two}",
            f"judge={{kind: http, url: '{url}', model: judge}}",
            "constitution=manners",
            "principles=[polite]",
        )
