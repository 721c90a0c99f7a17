"""Data that contradicts what is declared, or cannot mean what it seems to, is said before training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from llmrecipe.core import registry
from llmrecipe.core.errors import DataError, RecipeError
from llmrecipe.data import TokenData, prepare
from llmrecipe.data.overlap import rows_with_shared_runs, shared_rows
from llmrecipe.data.validation import warnings
from llmrecipe.recipe.data_section import DataSection
from llmrecipe.runs.events import read_events
from llmrecipe.training.dry_run import check
from llmrecipe.training.read_rows import note_unread
from tests.data.toys import byte_tokenizer
from tests.trainings import train_recipe


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, kind: str, split: str = "train", **data: Any) -> TokenData:
    found = prepare(DataSection(path=str(path), cache=False, **data), byte_tokenizer(), kind, seed=0, split=split)
    assert isinstance(found, TokenData)
    return found


def test_columns_that_change_nothing_are_named_in_one_line(tmp_path: Path) -> None:
    row = {"prompt": "p", "chosen": "c", "rejected": "r", "margin": 1.0, "id": 7, "source": "web"}
    report = read(write(tmp_path / "a.jsonl", [row, {**row, "id": 8}]), "preference").report
    assert report.unused == ["id", "source"] and "columns not used: id, source" in report.lines()
    again = read(
        write(tmp_path / "b.jsonl", [{"q": "p", "a": "c", "task": "t"}]), "dialogue", columns={"prompt": "q", "completion": "a"}
    )
    assert again.report.unused == ["task"]
    assert read(write(tmp_path / "c.jsonl", [{"prompt": "p", "answer": "c"}]), "prompt").report.unused == []


@pytest.mark.parametrize(
    ("objective", "options", "unused"),
    [("dpo", {}, ["id", "gap"]), ("ipo", {}, ["id", "gap"]), ("cpo", {}, ["id", "gap"]), ("orpo", {}, ["id", "gap"]),
     ("simpo", {}, ["id", "gap"]), ("reward", {}, ["id"]), ("reward", {"margin": False}, ["id", "gap"])],
)  # fmt: skip
def test_a_column_that_only_another_objective_reads_is_named(
    tmp_path: Path, objective: str, options: dict[str, Any], unused: list[str]
) -> None:
    row = {"prompt": "p", "chosen": "c", "rejected": "r", "gap": 1.0, "id": 7}
    data = read(write(tmp_path / "a.jsonl", [row, {**row, "id": 8}]), "preference", columns={"margin": "gap"})
    note_unread(data, registry.load_class("objective", objective)(**options))
    assert f"columns not used: {', '.join(unused)}" in data.report.lines()
    bare = read(write(tmp_path / "b.jsonl", [{k: v for k, v in row.items() if k not in ("gap", "id")}]), "preference")
    note_unread(bare, registry.load_class("objective", objective)(**options))
    assert bare.report.unused == []


@pytest.mark.parametrize("kind", ["text", "labelled", "prompt"])
@pytest.mark.parametrize("name", ["image", "audio", "videos"])
def test_pictures_and_sound_under_a_text_objective_stop(tmp_path: Path, kind: str, name: str) -> None:
    row = {"text": "a", "label": "x", "prompt": "p", name: ["f.bin"]}
    path = write(tmp_path / "a.jsonl", [{**row, name: None}, row])
    with pytest.raises(DataError, match=rf"a.jsonl:2: 1 of 2 rows have something under '{name}'.*data.drop_fields=\[{name}\]"):
        read(path, kind)
    assert len(read(path, kind, drop_fields=[name])) == 2


@pytest.mark.parametrize(("kind", "row", "column"), [
    ("preference", {"prompt": "p", "chosen": "c", "rejected": "r"}, "margin"),
    ("pairs", {"text_a": "a", "text_b": "b"}, "score"),
    ("labelled", {"text": "a"}, "label"), ("labelled", {"text_a": "a", "text_b": "b"}, "score"),
    ("preference", {"prompt": "p", "chosen": "c", "rejected": "r"}, "p"),
])  # fmt: skip
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_named_with_its_row(
    tmp_path: Path, kind: str, row: dict[str, Any], column: str, value: float
) -> None:
    path = write(tmp_path / "a.jsonl", [{**row, column: 0.5}, {**row, column: value}])
    with pytest.raises(DataError, match=rf"1 x '{column}' is not a finite number, first at .*a.jsonl:2: {value}"):
        read(path, kind)


def test_one_class_only_is_a_warning(tmp_path: Path) -> None:
    same = read(write(tmp_path / "a.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "x"}]), "labelled")
    assert warnings(same.report) == ["all rows have the label 'x': there is nothing to tell apart"]
    liked = [{"prompt": "p", "completion": c, "label": True} for c in "ab"]
    assert "the label 'true'" in warnings(read(write(tmp_path / "b.jsonl", liked), "unpaired").report)[0]


def test_shared_rows_are_those_of_equal_tokens(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(97, 100, size=int(n)))) for n in rng.integers(1, 6, size=300)]
    pairs = [{"prompt": t[:1], "chosen": t, "rejected": t[1:] + "z"} for t in texts]
    first = read(write(tmp_path / "first.jsonl", pairs[:200]), "preference")
    second = read(write(tmp_path / "second.jsonl", pairs[200:]), "preference")
    assert 0 < shared_rows(first, second) == sum(t in texts[:200] for t in texts[200:]) < 100
    moved = read(write(tmp_path / "m.jsonl", [{"prompt": "ab", "chosen": "c", "rejected": "d"}]), "preference")
    other = read(write(tmp_path / "o.jsonl", [{"prompt": "a", "chosen": "bc", "rejected": "d"}]), "preference")
    assert shared_rows(moved, other) == 0 and shared_rows(moved, moved) == 1


def test_rows_that_share_a_run_of_tokens_are_counted_wherever_the_run_is(tmp_path: Path) -> None:
    """One token a byte: a run of five is five letters, inside one row and one column, at any place of either."""
    texts = ["abcdefgh", "zzdefghz", "abcd", "defg", "hijklabc"]
    training = read(write(tmp_path / "t.jsonl", [{"text": text} for text in texts[:1]]), "text")
    other = read(write(tmp_path / "o.jsonl", [{"text": text} for text in texts[1:]]), "text")
    assert [rows_with_shared_runs(training, other, n) for n in (3, 4, 5, 6)] == [4, 3, 1, 0]
    # The run "defgh" is nowhere within the prompts or the answers of pairs, however they are laid end to end.
    pairs = [{"prompt": "abcdef", "chosen": "ghxxx", "rejected": "gxxcd"}, {"prompt": "defgh", "chosen": "a", "rejected": "b"}]
    first = read(write(tmp_path / "p.jsonl", pairs[:1]), "preference")
    both = read(write(tmp_path / "q.jsonl", pairs), "preference")
    assert rows_with_shared_runs(first, other, 5) == 0 and rows_with_shared_runs(both, other, 5) == 1
    rng = np.random.default_rng(1)
    many = ["".join(map(chr, rng.integers(97, 101, size=int(n)))) for n in rng.integers(1, 30, size=400)]
    left, right = many[:200], many[200:]
    framed = [[f"{text}$" for text in part] for part in (left, right)]  # the end token belongs to the row
    runs = {text[i : i + 7] for text in framed[0] for i in range(len(text) - 6)}
    wanted = sum(any(text[i : i + 7] in runs for i in range(len(text) - 6)) for text in framed[1])
    one = read(write(tmp_path / "l.jsonl", [{"text": text} for text in left]), "text")
    two = read(write(tmp_path / "r.jsonl", [{"text": text} for text in right]), "text")
    assert 0 < rows_with_shared_runs(one, two, 7) == wanted < 200


def test_overlap_of_training_and_validation_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [{"text": f"Row {i}."} for i in range(8)])
    other = write(tmp_path / "other.jsonl", [{"text": f"Row {i}."} for i in range(6, 10)])
    found = check("clm", [f"data.path={path}", f"data.validation={other}"])
    assert (found.data["overlap"], found.data["compared"]) == (2, 4)


def test_test_rows_that_were_trained_on_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [{"prompt": f"Say {i}.", "completion": "Yes."} for i in range(4)])
    other = write(tmp_path / "test.jsonl", [{"prompt": f"Say {i}.", "completion": "Yes."} for i in range(3, 6)])
    words = [
        f"data.path={path}",
        f"data.test={other}",
        "batch.size=2",
        "steps=1",
        "epochs=null",
        "eval.bootstrap=0",
        "eval.test=true",
    ]
    train_recipe(tmp_path / "run", "sft_lora", *words)
    found = [event["message"] for event in read_events(tmp_path / "run" / "events.jsonl", "warning")]
    assert "1 of 3 test rows are also training rows, so they measure what was memorised" in found


def labelled(classes: int) -> list[dict[str, Any]]:
    return [{"text": "a", "label": n % classes} for n in range(6)]


@pytest.mark.parametrize(("recipe", "rows", "words", "message"), [
    ("classify", labelled(3), ["model.config.num_labels=2"], r"num_labels: 2 .* has 3 \(0, 1, 2"),
    ("classify", labelled(2), ["+model.config.id2label={0: yes, 1: no}"], r"id2label: yes, no .* 0, 1"),
    ("clm", [{"input_ids": [5, 6]}, {"input_ids": [5, 931]}], [], r"rows.jsonl:2: token id 931, .* has rows for 0 to 930"),
    ("clm", [{"text": "Snow."}], ["model.init=random", "model.config.vocab_size=100"], r"has rows for 0 to 99"),
])  # fmt: skip
def test_what_is_declared_and_contradicted_stops(
    tmp_path: Path, recipe: str, rows: list[dict[str, Any]], words: list[str], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        check(recipe, [f"data.path={write(tmp_path / 'rows.jsonl', rows)}", *words])


def test_tokens_added_on_purpose_are_not_beyond_the_vocabulary(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": "Snow <new>."}])
    assert check("clm", [f"data.path={path}", "tokenizer.add_tokens=['<new>']"]).data["highest"] == 931


@pytest.mark.parametrize(("name", "value"), [
    ("photo", "a.png"), ("image_path", "a.png"), ("Screenshots", ["a.png"]), ("audio_file", "a.wav"),
    ("pic", {"bytes": b"\x89PNG", "path": None}), ("pages", [{"bytes": b"\x89PNG", "path": None}]), ("raw", b"\x89PNG"),
])  # fmt: skip
def test_what_is_no_text_is_told_by_other_names_and_by_its_content(tmp_path: Path, name: str, value: Any) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist([{"text": "a", name: None}, {"text": "b", name: value}]), path)
    with pytest.raises(DataError, match=rf"row 2: 1 of 2 rows have something under '{name}', and this objective reads text"):
        read(path, "text")
    assert len(read(path, "text", drop_fields=[name])) == 2


def test_a_column_that_comes_late_is_named_too(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "completion": "c"} for i in range(40)]
    path = write(tmp_path / "a.jsonl", [*rows, {**rows[0], "system_prompt": "Be brief."}, {**rows[1], "tools": None}])
    assert read(path, "dialogue").report.unused == ["system_prompt"]


def test_fields_of_messages_that_nothing_reads_are_named(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "a", "id": 1}, {"role": "assistant", "content": "b", "train": True, "weight": 1}]
    path = write(tmp_path / "a.jsonl", [{"messages": talk}, {"messages": talk[:0] + [{**t, "id": None} for t in talk]}])
    report = read(path, "dialogue").report
    assert "columns not used: messages[].id, messages[].train" in report.lines()
    pairs = [{"prompt": talk[:1], "chosen": talk[1:], "rejected": [{"role": "assistant", "content": "c"}]}]
    named = ["messages[].id", "messages[].train", "messages[].weight"]
    assert read(write(tmp_path / "b.jsonl", pairs), "preference").report.unused == named
    assert read(path, "dialogue", drop_fields=["id", "train"]).report.unused == []


@pytest.mark.parametrize("mark", [{"train": False}, {"training": 0}, {"loss": False}, {"trainable": None, "loss": 0.0}])
def test_an_answer_that_is_marked_as_not_to_be_trained_is_not_trained_in_silence(tmp_path: Path, mark: dict[str, Any]) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **mark}]
    path = write(tmp_path / "a.jsonl", [{"messages": talk}])
    with pytest.raises(DataError, match=r"a.jsonl:1: \w+: (False|0|0.0): write weight: 0 .* data.drop_fields=\[NAME\]"):
        read(path, "dialogue")
    assert len(read(path, "dialogue", drop_fields=list(mark))) == 1
    two = [*talk[:1], {**talk[1], "weight": 0}, talk[0], {"role": "assistant", "content": "c"}]
    assert len(read(write(tmp_path / "b.jsonl", [{"messages": two}]), "dialogue")) == 1


HUGE = 10**400


@pytest.mark.parametrize(("kind", "row", "message"), [
    ("pairs", {"text_a": "a", "text_b": "b", "score": HUGE}, "'score' is not a finite number"),
    ("preference", {"prompt": "p", "chosen": "c", "rejected": "r", "margin": HUGE}, "'margin' is not a finite number"),
    ("preference", {"prompt": "p", "chosen": "c", "rejected": "r", "p": HUGE}, "'p' is not a finite number"),
    ("scored", {"text": "a", "label": HUGE}, "'label' is not a number"),
    ("dialogue", {"input_ids": [5, 6], "weights": [1, HUGE]}, r"weights\[1\] is 1000.*a weight is a finite number"),
    ("dialogue", {"input_ids": [5, HUGE]}, "token id 1000.* is beyond any vocabulary"),
    ("text", {"input_ids": [5, 3_000_000_000]}, "token id 3000000000 is beyond any vocabulary"),
    ("dialogue", {"input_ids": [5, 6], "labels": [-100, 7]}, "'labels' are neither -100 nor the token ids themselves"),
    ("dialogue", {"input_ids": [5, 6], "labels": [-100, float("nan")]}, "'labels' are neither -100 nor the token ids"),
])  # fmt: skip
def test_numbers_that_fit_into_nothing_are_named_with_their_row(
    tmp_path: Path, kind: str, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=rf"a.jsonl:1|{message}") as error:
        read(write(tmp_path / "a.jsonl", [row]), kind)
    assert re.search(message, str(error.value)) and "a.jsonl:1" in str(error.value)
