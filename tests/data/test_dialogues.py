"""Whole dialogues beside a prompt: the question is in the prompt once and never in the answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.core.errors import DataError
from llmrecipe.data import prepare
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.formats.data_format import Conversion, data_format
from llmrecipe.data.formats.detect import detect
from llmrecipe.recipe.data_section import DataSection
from tests.data.toys import byte_tokenizer, turn
from tests.support import shared

S, U, U2 = turn("system", "Be brief."), turn("user", "Which river is it?"), turn("user", "And the sea?")
A, A2, GOOD, BAD = (turn("assistant", c) for c in ("The Elbe.", "A.", "The North Sea.", "No idea."))
Row = dict[str, Any]

SPLIT: list[tuple[Row, list[Row], list[Row], list[Row]]] = [
    # text beside dialogues, as in TRL's comment
    ({"prompt": U["content"], "chosen": [U, GOOD], "rejected": [U, BAD]}, [U], [GOOD], [BAD]),
    ({"prompt": U2["content"], "chosen": [U, A, U2, GOOD], "rejected": [U, A, U2, BAD]}, [U, A, U2], [GOOD], [BAD]),
    ({"prompt": U["content"], "chosen": [S, U, A, U2, GOOD], "rejected": [S, U, A, U2, BAD]}, [S, U, A, U2], [GOOD], [BAD]),
    ({"prompt": "", "chosen": [U, GOOD], "rejected": [U, BAD]}, [U], [GOOD], [BAD]),
    # turns after the first difference belong to the answers
    ({"prompt": U["content"], "chosen": [U, A, U2, GOOD], "rejected": [U, A2, U2, BAD]}, [U], [A, U2, GOOD], [A2, U2, BAD]),
    # no prompt: the dialogues hold it
    ({"chosen": [U, A, U2, GOOD], "rejected": [U, A, U2, BAD]}, [U, A, U2], [GOOD], [BAD]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "prompt", "chosen", "rejected"), SPLIT)
def test_the_shared_leading_turns_are_the_prompt_as_in_trl(
    row: Row, prompt: list[Row], chosen: list[Row], rejected: list[Row]
) -> None:
    trl = pytest.importorskip("trl.data_utils")
    wanted = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    found = detect([row], "preference", "auto", "x").convert(row, Conversion("preference", template=True))
    assert found == [wanted]
    assert trl.maybe_extract_prompt(row) == wanted


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"prompt": [U], "chosen": [U, GOOD], "rejected": [U, BAD]}, [U], [GOOD], [BAD]),
        ({"prompt": [U], "chosen": [U, A, U2, GOOD], "rejected": [U, A, U2, BAD]}, [U, A, U2], [GOOD], [BAD]),
        ({"prompt": [S, U], "chosen": [U, GOOD], "rejected": [U, BAD]}, [S, U], [GOOD], [BAD]),
        ({"prompt": [U], "chosen": [S, U, GOOD], "rejected": [S, U, BAD]}, [S, U], [GOOD], [BAD]),
        ({"prompt": [S], "chosen": [U, GOOD], "rejected": [U, BAD]}, [S, U], [GOOD], [BAD]),
        ({"prompt": [U, A], "chosen": [U2, GOOD], "rejected": [U2, BAD]}, [U, A, U2], [GOOD], [BAD]),
        # one of the two alone
        ({"prompt": [U], "chosen": [U, GOOD], "rejected": [BAD]}, [U], [GOOD], [BAD]),
        ({"prompt": U["content"], "chosen": [U, GOOD], "rejected": "No idea."}, [U], [GOOD], [BAD]),
        # answers alone, as they are
        ({"prompt": [U], "chosen": [GOOD], "rejected": [BAD]}, [U], [GOOD], [BAD]),
        ({"prompt": U["content"], "chosen": [GOOD], "rejected": [BAD]}, [U], [GOOD], [BAD]),
        ({"prompt": [U, A], "chosen": [A, GOOD], "rejected": [A, BAD]}, [U, A], [A, GOOD], [A, BAD]),
    ],
)
def test_a_prompt_of_messages_is_repeated_in_no_answer(row: Row, prompt: Any, chosen: Any, rejected: Any) -> None:
    (found,) = data_format("preference").convert(row, Conversion("preference", template=True))
    assert found == {"prompt": prompt, "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("preference", {"prompt": "Translate.", "chosen": [U, GOOD], "rejected": [U, BAD]}, "the prompt is not in"),
        ("preference", {"prompt": [U2], "chosen": [U, GOOD], "rejected": [U, BAD]}, "the prompt is not in"),
        ("preference", {"prompt": [U], "chosen": [U, GOOD], "rejected": [U2, BAD]}, "an answer begins with a question"),
        ("preference", {"prompt": [U], "chosen": [U2, GOOD], "rejected": [BAD]}, "an answer begins with a question"),
        ("preference", {"chosen": [S, U, GOOD], "rejected": [S, U2, BAD]}, "an answer begins with a question"),
        ("unpaired", {"prompt": [U], "completion": [U2, GOOD], "label": True}, "the prompt is not in"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_a_bad_row(name: str, row: Row, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        data_format(name).convert(row, Conversion("unpaired" if "label" in row else "preference", template=True))


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": U["content"], "completion": [U, GOOD]}, [U], [GOOD]),
        ({"prompt": [S, U], "completion": [S, U, GOOD]}, [S, U], [GOOD]),
        ({"prompt": [U, A, U2], "completion": [U, A, U2, GOOD]}, [U, A, U2], [GOOD]),
        ({"prompt": U2["content"], "completion": [U, A, U2, GOOD]}, [U, A, U2], [GOOD]),
        ({"prompt": U["content"], "completion": [U, A, U2, GOOD]}, [U], [A, U2, GOOD]),
        ({"prompt": [U], "completion": [GOOD]}, [U], [GOOD]),
    ],
)
def test_single_answers_are_treated_alike(row: Row, prompt: Any, answer: Any) -> None:
    (liked,) = data_format("unpaired").convert({**row, "label": 1}, Conversion("unpaired", template=True))
    assert liked == {"prompt": prompt, "completion": answer, "label": True}
    (taught,) = data_format("prompt_completion").convert(row, Conversion("dialogue", template=True))
    assert taught == {"prompt": prompt, "completion": answer}
    wrong = {"options": [[*row["completion"][:-1], BAD]]}
    (choice,) = data_format("choices").convert({**row, **wrong}, Conversion("choices", template=True))
    assert choice["choices"] == [[GOOD], [BAD]]


def test_text_answers_that_both_repeat_the_prompt_lose_it() -> None:
    def pair(*texts: str) -> Row:
        row = dict(zip(("prompt", "chosen", "rejected"), texts))
        return data_format("preference").convert(row, Conversion("preference"))[0]

    assert pair("Q: one and one?\nA:", "Q: one and one?\nA: two", "Q: one and one?\nA: six")["chosen"] == " two"
    assert pair("Hi", "Hi there", "Hi. What?")["chosen"] == "Hi there", "so short a prompt may begin an answer by chance"
    assert pair("one and one is", "one and one is two", "no")["chosen"] == "one and one is two"
    talk = ["\n\nHuman: hi\n\nAssistant: " + word for word in ("good", "gone")]
    assert pair("hi", *talk)["prompt"] == "\n\nHuman: hi\n\nAssistant:" and pair("hi", *talk)["chosen"] == " good"


SHORT = [
    ("Hi", "Hi there", "Hi. What?"),
    ("Sum?", "Sum? 2", "Sum? 6"),
    ("Go", "Go on", "Go\nout"),
    ("Who", "Who? Me", "Who, you"),
    ("a b", "a b c", "a b!"),
]


@pytest.mark.parametrize(
    ("rows", "repeats"),
    [
        (SHORT, True),
        (SHORT[:3], False),
        (SHORT[:1] * 20, False),
        ([*SHORT, *[(p, "Yes.", "No.") for p, *_ in SHORT[:1]]], False),
        ([*SHORT * 2, ("Yes", "Yesterday", "No")], True),
        ([(p, c + "x" if p == "Go" else c[: len(p)] + "x" + c[len(p) :], r) for p, c, r in SHORT], False),
    ],
    ids=["all", "too few prompts", "one prompt", "one in six does not", "one in eleven does not", "the word goes on"],
)
@pytest.mark.parametrize("kind", ["preference", "unpaired", "dialogue"])
def test_a_file_whose_answers_repeat_short_prompts_trains_none_of_them(
    tmp_path: Path, rows: list[tuple[str, str, str]], repeats: bool, kind: str
) -> None:
    """The file is the evidence: an answer may begin with a short prompt by chance, those of every row do not."""
    name = "chosen" if kind == "preference" else "completion"
    lines = [{"prompt": p, name: c, **({"rejected": r} if kind == "preference" else {"label": True})} for p, c, r in rows]
    if kind == "dialogue":
        lines = [{k: v for k, v in line.items() if k != "label"} for line in lines]
    found = prepare(DataSection(path=str(save(tmp_path / "a.jsonl", lines)), cache=False), byte_tokenizer(), kind, seed=0)
    assert found is not None
    answers = [
        byte_tokenizer()
        .decode([i for i, t in zip(row["ids"], row["trained"], strict=True) if t] if kind == "dialogue" else row[f"{name}_ids"])
        .removesuffix("</s>")
        for row in found
    ]
    begun = [p for p, c, _ in rows if c.startswith(p) and not c[len(p)].isalnum()]
    assert found.report.repeated == (len(begun) if repeats else 0)
    wanted = [c[len(p) :] if repeats and p in begun else c for p, c, _ in rows]
    assert answers == wanted
    said = f"answers that began with their prompt: it was removed from those of {len(begun)} rows"
    assert (said in found.report.lines()) is repeats


def test_an_answer_that_is_only_its_prompt_is_empty_where_the_file_repeats_prompts(tmp_path: Path) -> None:
    lines = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in [*SHORT, ("Wind", "Wind.", "Wind")]]
    path = save(tmp_path / "a.jsonl", lines)
    with pytest.raises(DataError, match=r"1 x 'rejected' is empty, first at .*a.jsonl:6"):
        prepare(DataSection(path=str(path), cache=False), byte_tokenizer(), "preference", seed=0)


def ids(path: Path) -> list[tuple[list[int], ...]]:
    found = prepare(DataSection(path=str(path), cache=False), byte_tokenizer(), "preference", seed=0)
    assert found is not None and found.report.lost == 0 and found.report.moved == 0
    return [(r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]) for r in found]


def save(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_files_that_mix_the_layouts_row_by_row_give_the_same_tokens(tmp_path: Path) -> None:
    bare = {"prompt": [U], "chosen": [GOOD], "rejected": [BAD]}
    text = {"prompt": U["content"], "chosen": [U, GOOD], "rejected": [U, BAD]}
    talk = {"chosen": [U, GOOD], "rejected": [U, BAD]}
    rows = [bare, text, talk, {**talk, "prompt": None}, {**talk, "prompt": [U]}]
    wanted = ids(save(tmp_path / "bare.jsonl", [bare]))
    assert byte_tokenizer().decode(wanted[0][1]) == "The North Sea.<|im_end|>\n"
    assert ids(save(tmp_path / "mixed.jsonl", rows)) == wanted * 5
    assert ids(save(tmp_path / "turned.jsonl", rows[::-1])) == wanted * 5


@pytest.mark.parametrize("name", ["c02.jsonl", "c02_mixed.jsonl"])
def test_prompt_text_with_whole_dialogues(name: str) -> None:
    folder = shared("cases", "pref-prompt-text-with-whole-dialogues")
    assert ids(folder / name) == ids(folder / "c02_ok.jsonl")
