"""What a step keeps while it works: journals that survive a kill, answers that do not depend on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from llmrecipe.core.errors import LlmRecipeError, RunError
from llmrecipe.core.journal import Journal, json_hash
from llmrecipe.pipelines.steps.workspace import Work
from llmrecipe.runs.events import read_events, truncate
from llmrecipe.runs.run_dir import RunDir


def work(folder: Path, seed: int = 0) -> Work:
    folder.mkdir(parents=True, exist_ok=True)
    return Work(RunDir(folder), seed, live="off")


class Asker:
    """Answers with the item and the seed of its batch; may break down at one batch."""

    def __init__(self, fail_at: int | None = None):
        self.requested: list[list[int]] = []
        self.fail_at = fail_at

    def __call__(self, part: list[int], seed: int) -> list[list[int]]:
        if len(self.requested) == self.fail_at:
            raise KeyboardInterrupt
        self.requested.append(part)
        return [[item, seed] for item in part]


def test_a_line_cut_short_by_a_kill_is_asked_again_and_the_rest_is_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j" / "answers.jsonl")
    journal.add("a", {"text": "one\ntwo"})
    journal.add("b", [1, 2.5, None])
    journal.close()
    whole = journal.path.read_bytes()
    for cut in range(1, len(whole.splitlines(keepends=True)[1]) + 1):
        journal.path.write_bytes(whole[:-cut])
        again = Journal(journal.path)
        assert len(again) == 1 and again["a"] == {"text": "one\ntwo"} and "b" not in again
        again.add("b", [1, 2.5, None])
        again.close()
        assert journal.path.read_bytes() == whole


def test_a_damaged_line_in_the_middle_is_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"key": "a", "val\n{"key": "b", "value": 1}\n', encoding="utf-8")
    with pytest.raises(RunError, match="damaged"):
        Journal(path)


def test_a_stopped_step_asks_only_what_is_missing_and_ends_alike(tmp_path: Path) -> None:
    items = list(range(7))
    whole = work(tmp_path / "whole").each(items, asker := Asker(), batch=3)
    assert asker.requested == [[0, 1, 2], [3, 4, 5], [6]]
    assert [item for item, _ in whole] == items and len({seed for _, seed in whole}) == 3

    stopped = work(tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        stopped.each(items, Asker(fail_at=1), batch=3)
    stopped.close()
    truncate(tmp_path / "stopped" / "events.jsonl", -1)
    again = work(tmp_path / "stopped")
    assert again.each(items, asker := Asker(), batch=3) == whole
    assert asker.requested == [[3, 4, 5], [6]]
    assert [e["step"] for e in read_events(tmp_path / "stopped", "step")] == [3, 6, 7]
    assert work(tmp_path / "stopped").each(items, asker := Asker(), batch=3) == whole and asker.requested == []


def test_a_step_that_begins_anew_repeats_no_warning(tmp_path: Path) -> None:
    """Each is kept and stands once; one more of the same text, or another, is news."""
    first = work(tmp_path)
    for text in ("two prompts are too long", "the judge was slow", "two prompts are too long"):
        first.events.warning(text)
    first.events.step(3, asked=1)
    first.close()
    truncate(tmp_path / "events.jsonl", -1, always=("warning",))
    again = work(tmp_path)
    for text in ("two prompts are too long", "two prompts are too long", "the judge is gone", "two prompts are too long"):
        again.events.warning(text)
    again.close()
    found = [event["message"] for event in read_events(tmp_path)]
    assert found == [
        "two prompts are too long", "the judge was slow", "two prompts are too long", "the judge is gone",
        "two prompts are too long",
    ]  # fmt: skip


def test_answers_that_were_kept_are_reported_again_in_the_order_they_came(tmp_path: Path) -> None:
    def ask(items: list[int], keys: list[str]) -> Iterator[tuple[int, int]]:
        for place in reversed(range(len(items))):
            if items[place] == stop:
                raise KeyboardInterrupt
            yield place, 10 * items[place]

    def count(values: Sequence[int]) -> dict[str, int]:
        return {"sum": sum(values)}

    reported = {}
    for name, stop in (("whole", None), ("stopped", 1)):
        folder = tmp_path / name
        if stop is not None:
            with pytest.raises(KeyboardInterrupt):
                work(folder).streamed([0, 1, 2, 3], ask, batch=2, count=count)
            truncate(folder / "events.jsonl", -1)
            stop = None
        assert work(folder).streamed([0, 1, 2, 3], ask, batch=2, count=count) == [0, 10, 20, 30]
        reported[name] = [(e["step"], e["sum"]) for e in read_events(folder, "step")]
    assert reported["stopped"] == reported["whole"] == [(2, 50), (4, 10)]


def test_equal_items_at_other_places_and_other_seeds_draw_anew(tmp_path: Path) -> None:
    same = work(tmp_path / "a").each([1, 1, 1, 1], Asker(), batch=2)
    assert same[0] == same[1] and same[2] == same[3] and same[0] != same[2]
    assert work(tmp_path / "b", seed=1).each([1, 1], Asker(), batch=2)[0] != same[0]


def test_streamed_values_are_kept_one_by_one_in_any_order(tmp_path: Path) -> None:
    items, asked = list("aabcdef"), []

    def backwards(part: list[str], keys: list[str], stop: int = 99) -> Iterator[tuple[int, list[str]]]:
        asked.append(list(part))
        for count, place in enumerate(reversed(range(len(part)))):
            if count == stop:
                raise KeyboardInterrupt
            yield place, [part[place], keys[place]]

    whole = work(tmp_path / "whole").streamed(items, backwards, batch=3)
    assert [item for item, _ in whole] == items and len({key for _, key in whole}) == 7
    events = [json.loads(line) for line in (tmp_path / "whole" / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "step"] == [3, 6, 7]

    stopped = work(tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        stopped.streamed(items, lambda part, keys: backwards(part, keys, 3))
    stopped.close()
    assert work(tmp_path / "stopped").streamed(items, backwards) == whole
    assert asked == [items, items, list("aabc")]
    assert work(tmp_path / "stopped").streamed(items, backwards) == whole and len(asked) == 3
    assert work(tmp_path / "other", seed=1).streamed(items, backwards) != whole
    with pytest.raises(LlmRecipeError, match="no answer to item 0"):
        work(tmp_path / "few").streamed(items, lambda part, keys: [(1, "b")])


def test_an_answer_too_few_is_a_bug_and_is_not_kept(tmp_path: Path) -> None:
    step = work(tmp_path)
    with pytest.raises(LlmRecipeError, match="1 answers to 2 items"):
        step.each([1, 2], lambda part, seed: [0], batch=2)
    assert len(step.journal()) == 0


def test_rows_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    step = work(tmp_path)

    def rows(last: bool) -> object:
        yield {"prompt": "ä"}
        if not last:
            raise RuntimeError
        yield {"prompt": "b"}

    with pytest.raises(RuntimeError):
        step.write(rows(False))  # type: ignore[arg-type]
    assert not (tmp_path / "train.jsonl").exists()
    assert step.write(rows(True), "validation") == 2  # type: ignore[arg-type]
    assert [json.loads(line)["prompt"] for line in (tmp_path / "valid.jsonl").read_text().splitlines()] == ["ä", "b"]


def test_a_key_stands_for_content_not_for_the_order_of_names() -> None:
    assert json_hash({"a": 1, "b": 2}) == json_hash({"b": 2, "a": 1}) != json_hash({"a": 2, "b": 1})


@pytest.mark.parametrize("way", ["each", "streamed"])
@pytest.mark.parametrize("stop", [1, 2, 5])
def test_events_of_a_step_are_there_once_wherever_it_was_stopped(way: str, stop: int, tmp_path: Path) -> None:
    """As a step that starts again does it: events begin empty, and the journal gives those of the first start once more."""

    def go(folder: Path, fail_at: int | None) -> list[str]:
        (folder / "events.jsonl").unlink(missing_ok=True)
        asked = 0

        def values(part: list[int]) -> Iterator[int]:
            nonlocal asked
            for item in part:
                if asked == fail_at:
                    raise KeyboardInterrupt
                asked += 1
                yield 10 * item

        def stream(part: list[int], keys: list[str]) -> Iterator[tuple[int, int]]:
            yield from enumerate(values(part))

        def total(found: Sequence[int]) -> dict[str, int]:
            return {"total": sum(found)}

        one = work(folder)
        try:
            if way == "each":
                one.each(list(range(6)), lambda part, seed: list(values(part)), batch=2, count=total)
            else:
                one.streamed(list(range(6)), stream, batch=2, count=total)
        except KeyboardInterrupt:
            pass
        finally:
            one.close()
        return (folder / "events.jsonl").read_text().splitlines()

    whole = go(tmp_path / "whole", None)
    assert [json.loads(line)["total"] for line in whole] == [10, 50, 90]
    assert go(tmp_path / "run", stop) != whole
    assert go(tmp_path / "run", None) == whole
