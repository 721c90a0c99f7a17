"""A search that fixes one key after the other, each at the value that is best on average over designs drawn by chance.

    for each key, in the order of the space:
        for each of its values: `samples` trials with the keys before it as found and the keys after it drawn by chance
        keep the value whose trials have the best mean

This is the procedure of arXiv 2301.01821, whose keys are the grouping of layers, how parameters are spread over them, which
groups train, and the strategies of each group. The last key has nothing after it, and each of its values one trial. Points
follow from the trials before them and (seed, number), so a resumed search makes the same ones.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llmrecipe.pipelines.search.costs import Losses
from llmrecipe.pipelines.search.space import axes_values
from llmrecipe.pipelines.search.trial import Trial
from llmrecipe.recipe.search_section import SearchSection


@dataclass(frozen=True)
class Block:
    """The trials that decide a key."""

    key: str
    values: list[Any]
    samples: int
    """Trials of each value."""
    first: int
    """Number of its first trial."""

    @property
    def last(self) -> int:
        """Return the number after its last trial."""
        return self.first + len(self.values) * self.samples

    def trials(self, tried: Sequence[Trial], value: int) -> list[Trial]:
        """Return the completed trials of one of its values."""
        own = tried[self.first + value * self.samples : self.first + (value + 1) * self.samples]
        return [trial for trial in own if trial.state == "done" and trial.value is not None]

    def best(self, tried: Sequence[Trial], losses: Losses) -> Any:  # noqa: ANN401
        """Return the value with the best mean score; the first one where none of its trials completed."""
        means = {}
        for place in range(len(self.values)):
            scores = [losses(trial)[0] for trial in self.trials(tried, place)]
            if scores:
                means[place] = statistics.fmean(scores)
        return self.values[min(means, key=means.__getitem__) if means else 0]


def blocks(section: SearchSection) -> Iterator[Block]:
    """Yield the keys in order, with the trials that decide each."""
    axes = list(axes_values(section).items())
    first = 0
    for place, (key, values) in enumerate(axes):
        block = Block(key, values, section.samples if place + 1 < len(axes) else 1, first)
        yield block
        first = block.last


def size(section: SearchSection) -> int:
    """Return how many trials there are."""
    return max(block.last for block in blocks(section))


def point(section: SearchSection, tried: Sequence[Trial], number: int, losses: Losses) -> dict[str, Any]:
    """Return what the next trial tries."""
    fixed: dict[str, Any] = {}
    for block in blocks(section):
        if number < block.last:
            fixed[block.key] = block.values[(number - block.first) // block.samples]
            break
        fixed[block.key] = block.best(tried, losses)
    chance = random.Random(f"{section.seed} {number}")
    drawn = {key: chance.choice(values) for key, values in axes_values(section).items()}
    return {**drawn, **fixed}


def finalists(section: SearchSection, tried: Sequence[Trial]) -> list[Trial]:
    """Return the trials of the last key, in which all others are fixed."""
    last = list(blocks(section))[-1]
    return [trial for place in range(len(last.values)) for trial in last.trials(tried, place)]
