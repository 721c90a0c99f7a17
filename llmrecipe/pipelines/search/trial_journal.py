"""The journal of a search: one line a finished trial, below a line that says which search they belong to."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmrecipe.core.errors import RunError
from llmrecipe.core.foreign import parse_json, reading
from llmrecipe.pipelines.search.trial import Trial
from llmrecipe.recipe.compose import Composition
from llmrecipe.recipe.content_key import content_key
from llmrecipe.recipe.renames import first_words, new_path
from llmrecipe.recipe.search_section import SearchSection
from llmrecipe.recipe.yaml_file import dotted
from llmrecipe.runs.durable import write_text


class TrialJournal:
    """The trials of one search in a file."""

    def __init__(self, path: Path, composition: Composition, section: SearchSection, trial_recipe: Callable[[], Composition]):
        """Bind the file to a search.

        Args:
            composition: the recipe of the search.
            section: its `search` section, with the sampler resolved.
            trial_recipe: composes the recipe of its trials, without a point.
        """
        self.path, self.composition, self.section, self.trial_recipe = path, composition, section, trial_recipe

    def read(self) -> list[Trial]:
        """Read the trials of earlier starts; a line cut short by a kill is skipped.

        Raises:
            RunError: the file is damaged, or of another search.
        """
        path = self.path
        if not path.is_file():
            return []
        remedy = "choose another run.dir, or delete the folder"
        with reading(str(path), remedy):
            text = path.read_text(encoding="utf-8")
        lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        if "".join(lines) != text:
            write_text(path, "".join(lines))
        trials = []
        for number, line in enumerate(lines, 1):
            with reading(f"{path}:{number}: this trial of the search is damaged", remedy):
                entry = parse_json(line)
                if number > 1:
                    trials.append(Trial(**{**entry, **self._current(entry)}))
            if number == 1 and entry != self._head():
                raise RunError(f"{path.parent} holds a search of another space, recipe, data or plugin; {remedy}")
        return trials

    def write(self, trial: Trial) -> None:
        """Add a finished trial."""
        path = self.path
        if not path.is_file() or not path.stat().st_size:
            write_text(path, json.dumps(self._head()) + "\n")
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(trial)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _current(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Return the point of an earlier trial in the words of the space, and its reports by step."""
        mapping = self.composition.mapping
        point = {dotted(new_path(tuple(key.split(".")), mapping)): value for key, value in entry["point"].items()}
        return {"point": point, "reports": {int(step): value for step, value in entry["reports"].items()}}

    def _head(self) -> dict[str, Any]:
        """Return what the trials of a journal have in common; the number of trials may grow."""
        section = self.section.model_dump(mode="json", exclude={"trials", "pick", "limits", "final"})
        section = {key: value for key, value in section.items() if value or key not in ("against", "start")}
        if section["parallel"] == 1:
            del section["parallel"]
        if section["lr_scaling"] == "off":
            del section["lr_scaling"]
        if self.section.sampler != "stepwise":
            del section["samples"]
        first = first_words({**self.composition.mapping, "search": section})["search"]
        return {"search": first, "recipe": content_key(self.trial_recipe().mapping, {})}
