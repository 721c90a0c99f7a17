"""Workspace of a running step: its folder, its seed, its events, and journals that make a restart cheap.

    <folder>/
        step.yaml  command.txt  environment.json  events.jsonl  status.json     as in the directory of a training
        journal/NAME.jsonl                                                      answers already paid for
        train.jsonl  valid.jsonl  test.jsonl                                    rows, written whole at the end
        final/metrics.json

Rows are written once, in the order of what they were made from, so they do not depend on where a step was stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

from llmrecipe.core.errors import LlmRecipeError, RunError
from llmrecipe.core.journal import Journal, json_hash
from llmrecipe.core.redact import redact_text
from llmrecipe.recipe.renames import old_names
from llmrecipe.runs.durable import sync, unfinished_path
from llmrecipe.runs.events import Events, plain
from llmrecipe.runs.run_dir import RunDir

SPLITS = {"train": "train.jsonl", "validation": "valid.jsonl", "test": "test.jsonl"}
"""Split -> file, under the names the data layer finds in a folder."""

T = TypeVar("T")


class Work:
    """Workspace of one running step.

    Args:
        dir: its locked directory.
        seed: of everything it draws.
        live: `log.live` of a recipe.
    """

    def __init__(self, dir: RunDir, seed: int, live: str = "auto"):
        self.dir, self.seed = dir, seed
        self.path = dir.path
        self.events = Events(dir.path, live)
        self.events.keep_warnings()
        self._journals: dict[str, Journal] = {}

    def journal(self, name: str = "answers") -> Journal:
        """Open the journal of that name, with everything an earlier start recorded, also under an earlier name."""
        if name not in self._journals:
            path = self.path / "journal" / f"{name}.jsonl"
            earlier = [path.with_stem(old) for old in old_names(name) if path.with_stem(old).is_file()]
            if earlier and not path.exists():
                earlier[0].rename(path)
            self._journals[name] = Journal(path)
        return self._journals[name]

    def each(
        self,
        items: Sequence[T],
        ask: Callable[[list[T], int], Sequence[Any]],
        *,
        batch: int = 1,
        name: str = "answers",
        count: Callable[[Sequence[Any]], dict[str, Any]] | None = None,
    ) -> list[Any]:
        """Compute one JSON value for each item, in batches; values in the journal are not computed again.

        Batches are split by position and each has its own seed, so a value does not depend on where a step was stopped.
        A batch is recorded whole: a kill costs the one being computed.

        Args:
            items: JSON values; their content is the key.
            ask: (items of a batch, its seed) -> a value for each.
            name: journal; a step with several passes names one for each.
            count: metrics of a batch's values for the progress events.

        Returns:
            Values in the order of the items.
        """
        journal = self.journal(name)
        self.events.expect(len(items))
        values: list[Any] = []
        for start in range(0, len(items), batch):
            part = list(items[start : start + batch])
            key = json_hash([self.seed, start, part])
            if key not in journal:
                answers = list(ask(part, int(key, 16) % (1 << 31)))
                if len(answers) != len(part):
                    raise LlmRecipeError(f"{name}: {len(answers)} answers to {len(part)} items")
                journal.add(key, answers)
            # Also where the journal had them: the events of an earlier start were dropped, see `run_step.run`.
            kept = cast(list[Any], journal[key])
            self.events.step(start + len(part), **(count(kept) if count else {}))
            values += kept
        return values

    def streamed(
        self,
        items: Sequence[T],
        ask: Callable[[list[T], list[str]], Iterable[tuple[int, Any]]],
        *,
        batch: int = 1,
        name: str = "answers",
        count: Callable[[Sequence[Any]], dict[str, Any]] | None = None,
    ) -> list[Any]:
        """Compute one JSON value for each item, recorded as soon as it exists; a kill costs those in progress.

        Args:
            items: JSON values; their content and place are the key.
            ask: (items that are not kept yet, their keys) -> (place among them, value) in any order. What it draws must follow
                from an item's key alone: then a value does not depend on where a step was stopped.
            batch: values between two progress events.
            name: journal; a step with several passes names one for each.
            count: metrics of the values since the last progress event.

        Returns:
            Values in the order of the items.
        """
        journal = self.journal(name)
        self.events.expect(len(items))
        keys = [json_hash([self.seed, i, item]) for i, item in enumerate(items)]
        left = [i for i, key in enumerate(keys) if key not in journal]
        since: list[Any] = []
        done = 0

        def report(value: object) -> None:
            nonlocal done
            since.append(value)
            done += 1
            if len(since) == batch or done == len(items):
                self.events.step(done, **(count(since) if count else {}))
                since.clear()

        known = set(keys)
        for key in journal:
            if key in known:
                report(journal[key])
        for place, value in ask([items[i] for i in left], [keys[i] for i in left]) if left else ():
            journal.add(keys[left[place]], value)
            report(value)
        missing = [i for i, key in enumerate(keys) if key not in journal]
        if missing:
            raise LlmRecipeError(f"{name}: no answer to item {missing[0]}")
        return [journal[key] for key in keys]

    def write(self, rows: Iterable[dict[str, Any]], split: str = "train") -> int:
        """Write the rows of a split (train, validation or test), whole or not at all; return how many.

        Raises:
            RunError: the disk refuses them.
        """
        path = self.path / SPLITS[split]
        aside = unfinished_path(path)
        count = 0
        try:
            with open(aside, "w", encoding="utf-8") as file:
                for count, row in enumerate(rows, 1):  # noqa: B007 (the count is what is wanted)
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
            sync(path.parent)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror or error}") from error
        return count

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write `final/metrics.json`."""
        (self.path / "final").mkdir(exist_ok=True)
        text = json.dumps(plain(metrics), indent=1, ensure_ascii=False, allow_nan=False)
        self.dir.write("final/metrics.json", redact_text(text) + "\n")

    def close(self) -> None:
        """Close files and displays."""
        self.events.close()
        for journal in self._journals.values():
            journal.close()
        self._journals = {}
