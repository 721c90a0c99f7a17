"""SQuAD rows: prompt and completion, spans that are kept and checked, a run through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.formats.data_format import Conversion, data_format, formats_of
from llmrecipe.data.row_formats.squad import spans_of
from tests.support import shared
from tests.trainings import events, train_recipe

ROW: dict[str, Any] = {
    "id": "a1",
    "context": "The blue hen lives in Oslo.",
    "question": "Where does the hen live?",
    "answers": {"text": ["Oslo", "in Oslo"], "answer_start": [22, 19]},
}


def test_a_row_is_a_prompt_and_its_first_span() -> None:
    (row,) = data_format("squad").convert(ROW, Conversion("dialogue"))
    prompt = "The blue hen lives in Oslo.\n\nWhere does the hen live?"
    assert row == {"prompt": prompt, "completion": "Oslo", "references": ["in Oslo"]}
    (spoken,) = data_format("squad").convert(ROW, Conversion("dialogue", wrap=True))
    assert spoken["prompt"][0]["role"] == "user" and spoken["completion"] == [{"role": "assistant", "content": "Oslo"}]


def test_rows_of_prompts_keep_every_span() -> None:
    (row,) = data_format("squad").convert(ROW, Conversion("prompt"))
    kept = row["columns"]
    assert kept["answers"] == ROW["answers"] and kept["answer"] == "Oslo" and kept["id"] == "a1"
    for text, start in zip(kept["answers"]["text"], kept["answers"]["answer_start"], strict=True):
        assert kept["context"][start : start + len(text)] == text


def test_answers_as_a_list_of_mappings_are_the_same() -> None:
    listed = [{"text": "Oslo", "answer_start": 22}, {"text": "in Oslo", "answer_start": 19}]
    assert spans_of({**ROW, "answers": listed}) == spans_of(ROW) == (["Oslo", "in Oslo"], [22, 19])


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ({"text": ["Oslo"], "answer_start": [21]}, "a span of the context is not its answer"),
        ({"text": ["Oslo"], "answer_start": []}, "not texts with their places"),
        ("Oslo", "not texts with their places"),
        ({"text": [], "answer_start": []}, "has no answer in its context"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(answers: Any, told: str) -> None:
    with pytest.raises(BadRow, match=told):
        data_format("squad").convert({**ROW, "answers": answers}, Conversion("dialogue"))


def test_it_is_detected_before_plain_prompts() -> None:
    assert next(name for name in formats_of("dialogue") if data_format(name).matches(ROW)) == "squad"
    assert next(name for name in formats_of("prompt") if data_format(name).matches(ROW)) == "squad"


def rows(folder: Path, count: int = 12) -> Path:
    """Passages of one sentence with the last word as the answer."""
    lines = []
    for place in ("Oslo", "Rome", "Bonn")[: max(1, count // 4)] * 4:
        context = f"The hen lives in {place}."
        answers = {"text": [place], "answer_start": [context.index(place)]}
        lines.append(json.dumps({"context": context, "question": "Where?", "answers": answers}))
    path = folder / "squad.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_run_trains_on_a_file(tmp_path: Path) -> None:
    path = rows(tmp_path)
    words = [f"data.path={path}", "steps=2", "epochs=null", "batch.size=4", f"data.validation={path}"]
    train_recipe(tmp_path / "run", "sft_lora", *words, "eval.metrics=[exact_match,token_f1]")
    last = events(tmp_path / "run", "evaluation")[-1]
    assert {"eval/exact_match", "eval/token_f1"} <= last.keys()


@pytest.mark.slow
def test_shared_data_has_no_such_rows_by_accident() -> None:
    """Real chat rows are not taken for passages."""
    path = next(shared("data", "alpaca_en").rglob("*.jsonl"))
    first = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert data_format("squad").matches(first) is None
