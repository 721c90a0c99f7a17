"""Rows that an objective cannot take are named for what they are, with the objective that takes them and the right mapping."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.core import registry
from llmrecipe.core.errors import DataError
from llmrecipe.data import prepare
from llmrecipe.data.formats.data_format import Conversion, data_format, formats_of
from llmrecipe.data.formats.detect import detect
from llmrecipe.recipe.data_section import DataSection
from tests.data.toys import byte_tokenizer

NEEDS = {name: str(registry.spec("objective", name).facts["rows"]) for name in registry.names("objective")}
REGISTERED = registry.names("format")
IMPOSSIBLE = [
    (objective, name) for objective, rows in NEEDS.items() for name in registry.names("format") if name not in formats_of(rows)
]


@pytest.mark.parametrize(("objective", "name"), IMPOSSIBLE)
def test_every_impossible_pair_says_what_the_rows_are_or_makes_what_they_also_hold(objective: str, name: str) -> None:
    """Rows that also hold those of another format (a label beside a text) may be read as that; else the message names both."""
    row = json.loads(data_format(name).example)
    try:
        found = detect([row], NEEDS[objective], "auto", "f.jsonl:1")
    except DataError as error:
        said = str(error)
        # A row may have the columns of several formats: it is called one of them, with who takes that.
        fits = {f: {o for o, rows in NEEDS.items() if f in formats_of(rows)} for f in REGISTERED if data_format(f).matches(row)}
        named = [takers for f, takers in fits.items() if f"{data_format(f).summary}; objective=" in said]
        assert said.startswith("f.jsonl:1: ")
        if "could be any of the columns" in said:
            return
        assert not fits[name] or any(takers and all(taker in said for taker in takers) for takers in named)
    else:
        assert found.name != name and set(found.format.matches({**row, **found.aliases}) or ()) - set(found.aliases) <= set(row)


def read(tmp_path: Path, row: dict[str, Any], kind: str = "dialogue", **data: Any) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps(row) + "\n") * 3)
    return prepare(DataSection(path=str(path), **data), byte_tokenizer(), kind, seed=0)


@pytest.mark.parametrize("row", [
    {"prompt": "p", "completion": "c", "label": False}, {"instruction": "p", "output": "c", "kto_tag": True},
    {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}], "label": False},
])  # fmt: skip
def test_disliked_answers_are_not_learned_unless_their_format_is_named(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(
        DataError, match=r"these are not dialogue rows.* liked or not; objective=kto takes such rows.*data.format="
    ) as e:
        read(tmp_path, row)
    named = str(e.value).rpartition("data.format=")[2]
    assert len(read(tmp_path, row, format=named)) == 3
    assert len(read(tmp_path, {**row, "label": "a class", "kto_tag": None})) == 3


@pytest.mark.parametrize(("columns", "hint"), [
    ({"question": "prompt", "answer": "completion"}, r"way round.*data.columns='\{prompt: question, completion: answer\}'"),
    ({"prompt": "answer"}, r"data.columns='\{prompt: question, completion: answer\}' fits"),
    ({"promt": "question"}, r"data.columns='\{prompt: question, completion: answer\}' fits"),
    ({"prompt": "nothing"}, r"has no column 'nothing'.*data.columns='\{prompt: question, completion: answer\}' fits"),
])  # fmt: skip
def test_a_wrong_mapping_gets_the_right_one(tmp_path: Path, columns: dict[str, str], hint: str) -> None:
    with pytest.raises(DataError, match=f"(?s){hint}"):
        read(tmp_path, {"question": "q", "answer": "a"}, columns=columns)


def test_a_mapping_that_is_not_needed_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the columns fit as they are: leave data.columns out"):
        read(tmp_path, {"prompt": "q", "completion": "a"}, columns={"completion": "prompts"})


ASK = [{"role": "user", "content": "A colour?"}]


@pytest.mark.parametrize(("row", "prompt"), [
    ({"question": "A colour?"}, "A colour?"), ({"input": "A colour?"}, "A colour?"),
    ({"messages": ASK}, ASK), ({"conversations": [{"from": "human", "value": "A colour?"}]}, ASK),
    ({"instruction": "Name one.", "input": "A colour?"}, "Below is an instruction.*Name one.*### Input:\nA colour"),
])  # fmt: skip
@pytest.mark.parametrize(("chosen", "rejected"), [
    ("The sky is blue.", "The sky is seven."),
    ({"role": "assistant", "content": "The sky is blue."}, [{"from": "gpt", "value": "The sky is seven."}]),
    ({"from": "gpt", "value": "The sky is blue."}, {"from": "gpt", "value": "The sky is seven."}),
])  # fmt: skip
@pytest.mark.parametrize("rows", ["preference", "unpaired", "choices", "prompt"])
def test_a_pair_keeps_the_question_of_another_column_and_its_answers_whole(
    row: dict[str, Any], prompt: Any, chosen: Any, rejected: Any, rows: str
) -> None:
    """What the answers have in common is not their prompt where another column asks; both sides are text, or messages."""
    given = {**row, "chosen": chosen, "rejected": rejected}
    found = detect([given], rows, "auto", "f.jsonl:1").convert(given, Conversion(rows))
    for one in found:
        said = one["prompt"] if isinstance(one["prompt"], str) else one["prompt"][-1]["content"]
        wanted = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        # An instruction becomes messages where the answers are.
        assert re.search(wanted, said, re.DOTALL) or (row.get("instruction") and said == "Name one.\n\nA colour?")
    answers = [one[name] for one in found for name in ("chosen", "rejected", "completion") if name in one]
    answers += [answer for one in found for answer in one.get("choices", ())]
    assert len({isinstance(side, str) for side in [*answers, *(one["prompt"] for one in found)]}) == 1
    texts = [answer if isinstance(answer, str) else answer[-1]["content"] for answer in answers]
    assert texts == ([] if rows == "prompt" else ["The sky is blue.", "The sky is seven."])


def test_dialogues_that_hold_their_question_are_read_without_another_column() -> None:
    talks = {name: [*ASK, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    for more in ({"messages": talks["chosen"]}, {"question": "A colour?"}, {"source": "web"}):
        (pair,) = detect([{**more, **talks}], "preference", "auto", "f").convert({**more, **talks}, Conversion("preference"))
        assert pair["prompt"] == ASK and pair["chosen"] == talks["chosen"][1:]


@pytest.mark.parametrize("row", [
    {"prompt": "p", "response": "c", "label": False}, {"question": "p", "answer": "c", "kto_tag": "false"},
    {"prompt": "p", "completion": "c", "desirable": True}, {"query": "p", "output": "c", "Thumbs-Up": 1},
    {"instruction": "p", "response": "c", "liked": "True"},
])  # fmt: skip
def test_a_judgement_under_any_name_is_not_lost(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"these are not dialogue rows.* liked or not; objective=kto takes such rows"):
        read(tmp_path, row)


@pytest.mark.parametrize(("kind", "row"), [
    ("labelled", {"text": "t", "label": True, "question": "p", "answer": "c"}),
    ("dialogue", {"prompt": "p", "completion": "c", "label": 3}),
])  # fmt: skip
def test_a_label_that_is_read_or_is_no_judgement_stops_nothing(tmp_path: Path, kind: str, row: dict[str, Any]) -> None:
    assert len(read(tmp_path, row, kind)) == 3
