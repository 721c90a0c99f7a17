"""Tasks by name: rows name theirs, and what does not fit is told before a weight is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmrecipe.core.errors import DataError
from llmrecipe.core.tasks import Tasks, common
from llmrecipe.data import prepare
from llmrecipe.recipe.data_section import DataSection
from llmrecipe.runs import open_model
from tests.data.toys import byte_tokenizer
from tests.trainings import train_recipe

NAMES = ["copy", "task 10", "task 2"]


def write(path: Path, tasks: list[object], field: str = "task") -> str:
    rows = [{"prompt": f"p{i}", "completion": f"c{i}", field: task} for i, task in enumerate(tasks)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def numbers(path: str, tasks: Tasks | None, **data: object) -> list[int | None]:
    section = DataSection(path=path, cache=False, **data)
    found = prepare(section, byte_tokenizer(), "dialogue", seed=0, tasks=tasks)
    return [found[i].get("task") for i in range(3)]


def test_names_are_numbered_by_the_stack_or_in_natural_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", NAMES)
    assert numbers(path, Tasks(("task 2", "copy", "task 10"))) == [1, 2, 0]
    assert numbers(path, Tasks()) == [0, 2, 1]
    assert numbers(path, None) == [None, None, None]
    assert numbers(path, Tasks(("task 2", "copy", "task 10")), streaming=True).count(None) == 0


def test_a_row_may_give_the_number_and_another_column_may_name_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [2, "0", "b"], "kind")
    assert numbers(path, Tasks(("a", "b", "c"), "kind")) == [2, 0, 1]


def test_every_split_is_numbered_like_the_training_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", NAMES)
    held = write(tmp_path / "b.jsonl", ["task 2", "task 2", "copy"])
    section = DataSection(path=path, validation=held, cache=False)
    train = prepare(section, byte_tokenizer(), "dialogue", seed=0, tasks=Tasks())
    other = prepare(section, byte_tokenizer(), "dialogue", split="validation", seed=0, tasks=train.tasks)
    assert [other[i]["task"] for i in range(3)] == [1, 1, 0]


@pytest.mark.parametrize(
    ("tasks", "wanted", "message"),
    [
        (["summary", "translatoin"], ("summary", "translation"), "'translatoin'.*did you mean 'translation'"),
        (["summary", None], ("summary", "translation"), "names no task in some rows"),
        ([None, None], None, "no row names its task.*task_field"),
        (["summary", 7], ("summary", "translation"), "names task '7'"),
    ],
)
def test_what_does_not_fit_is_explained(tmp_path: Path, tasks: list, wanted: tuple | None, message: str) -> None:
    path = write(tmp_path / "a.jsonl", tasks)
    with pytest.raises(DataError, match=message):
        numbers(path, Tasks(wanted))


def test_rows_without_a_place_for_a_task_and_streams_without_names_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", NAMES)
    with pytest.raises(DataError, match="text rows have no task"):
        prepare(DataSection(path=path), byte_tokenizer(), "text", seed=0, tasks=Tasks())
    with pytest.raises(DataError, match=r"data\.streaming.*must be listed"):
        numbers(path, Tasks(), streaming=True)


def test_methods_of_one_stack_share_one_list() -> None:
    named = Tasks(("a", "b"))
    assert common([]) is None
    assert common([("x", Tasks()), ("y", named)]) == named
    for other in (Tasks(("b", "a")), Tasks(("a", "b"), "kind"), Tasks(None, "kind")):
        with pytest.raises(DataError, match=r"have different tasks"):
            common([("x", named), ("y", other)])


def test_an_unknown_task_stops_the_run_before_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(open_model, "load_model", unreachable)
    path = write(tmp_path / "train.jsonl", ["yes", "noo"] * 8)
    with pytest.raises(DataError, match=r"'noo'.*did you mean 'no'"):
        train_recipe(tmp_path / "run", "ia3", f"data.path={path}", "stack.ia3.tasks=[no,yes]")
    assert not (tmp_path / "run").exists()
