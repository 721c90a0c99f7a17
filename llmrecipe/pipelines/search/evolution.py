"""Evolution of sub-networks under a limit: what is tried next follows from what was tried before and from a seed.

A candidate gives each kind of part its sizes in the first layers, as many as its depth:

    {"lora": (5, 1), "adapter": (10, 10, 1), "prompt": (1,)}

A generation is scored, the best `parents` of everything scored so far are kept, and the next generation has

    mutants     a parent with another depth of a kind (probability s_prob), each size drawn again (m_prob)
    crossed     each kind's depth and sizes from one of two parents
    newcomers   by chance, where mutation and crossing found too few that were new and within the limit

No candidate is scored twice, and none above the limit is scored at all. Paper: Neural Prompt Search (arXiv 2206.04673);
mutation of sizes as AutoFormer (arXiv 2107.00651), since the code of the former redraws depths alone (`mutate: reference`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from llmrecipe.core.errors import RecipeError

Candidate = Mapping[str, tuple[int, ...]]
"""Kind of part -> sizes in the first layers."""

TRIES = 10
"""Draws for each wanted candidate; the rest of a generation comes by chance."""

NEWCOMER_TRIES = 1000
"""Draws for each candidate by chance, after which the space is taken to be exhausted."""


@dataclass(frozen=True)
class Space:
    """What may be drawn, and what it may cost."""

    sizes: Mapping[str, Sequence[int]]
    """Sizes of each kind."""
    depths: Sequence[int]
    cost: Callable[[Candidate], int]
    """Numbers that a candidate leaves."""
    limit: int
    """Largest cost."""

    def check(self, where: str) -> None:
        """Refuse a limit below the smallest candidate.

        Raises:
            RecipeError: naming both.
        """
        least = self.cost({kind: (min(sizes),) * min(self.depths) for kind, sizes in self.sizes.items()})
        if least > self.limit:
            raise RecipeError(f"{where}: {self.limit} parameters are fewer than the {least} of the smallest sub-network")

    def drawn(self, chance: random.Random) -> Candidate:
        """Return a candidate by chance."""
        return {kind: self.row(kind, chance.choice(self.depths), chance) for kind in self.sizes}

    def row(self, kind: str, depth: int, chance: random.Random) -> tuple[int, ...]:
        """Return sizes of a kind by chance."""
        return tuple(chance.choice(self.sizes[kind]) for _ in range(depth))


@dataclass(frozen=True)
class Settings:
    """How a generation is made."""

    population: int = 50
    parents: int = 10
    crossover: int = 25
    mutation: int = 25
    m_prob: float = 0.2
    """Probability that a size is drawn again."""
    s_prob: float = 0.4
    """Probability that a depth is drawn again."""
    mutate: str = "gene"
    """gene: depths and sizes; reference: depths alone, with sizes for the layers that come new."""


def key_of(candidate: Candidate) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return what two equal candidates share."""
    return tuple(sorted((kind, tuple(row)) for kind, row in candidate.items()))


def mutant(parent: Candidate, space: Space, settings: Settings, chance: random.Random) -> Candidate:
    """Return a parent with some depths, and some sizes, drawn again."""
    found = {}
    for kind, row in parent.items():
        if chance.random() < settings.s_prob:
            depth = chance.choice(space.depths)
            row = (*row[:depth], *space.row(kind, max(0, depth - len(row)), chance))
        if settings.mutate == "gene":
            row = tuple(chance.choice(space.sizes[kind]) if chance.random() < settings.m_prob else size for size in row)
        found[kind] = row
    return found


def crossed(one: Candidate, other: Candidate, chance: random.Random) -> Candidate:
    """Return each kind's row of one of two parents."""
    return {kind: chance.choice((one, other))[kind] for kind in one}


@dataclass
class Evolution:
    """Generations of candidates; `next` makes one, `scored` takes its losses."""

    space: Space
    settings: Settings
    seed: int = 0
    number: int = 0
    """Number of the next generation."""
    seen: set[tuple[tuple[str, tuple[int, ...]], ...]] = field(default_factory=set)
    """Everything drawn so far, also what was above the limit."""
    ranked: list[tuple[float, int, Candidate]] = field(default_factory=list)
    """(loss, order of scoring, candidate), the best first."""

    def next(self) -> list[Candidate]:
        """Return the candidates of the next generation; fewer than the population where the space has no more."""
        chance = random.Random(f"evolution {self.seed} {self.number}")
        self.number += 1
        made: list[Candidate] = []
        if self.ranked:
            best = [candidate for _, _, candidate in self.ranked[: self.settings.parents]]
            wanted, room = self.settings, self.settings.population
            mutants, crossings = min(room, wanted.mutation), wanted.crossover
            made += self._take(mutants, TRIES, lambda: mutant(chance.choice(best), self.space, wanted, chance))
            left = min(room - len(made), crossings)
            made += self._take(left, TRIES, lambda: crossed(chance.choice(best), chance.choice(best), chance))
        missing = self.settings.population - len(made)
        return made + self._take(missing, NEWCOMER_TRIES, lambda: self.space.drawn(chance))

    def scored(self, candidates: Sequence[Candidate], losses: Sequence[float]) -> None:
        """Record what a generation scored; a small loss is good."""
        first = len(self.ranked)
        self.ranked += [(loss, first + i, c) for i, (c, loss) in enumerate(zip(candidates, losses, strict=True))]
        self.ranked.sort(key=lambda entry: entry[:2])

    def _take(self, count: int, tries: int, draw: Callable[[], Candidate]) -> list[Candidate]:
        """Return up to `count` candidates that are new and within the limit, in at most `tries` draws for each."""
        found: list[Candidate] = []
        for _ in range(tries * count):
            if len(found) == count:
                break
            candidate = draw()
            key = key_of(candidate)
            if key in self.seen:
                continue
            self.seen.add(key)
            if self.space.cost(candidate) <= self.space.limit:
                found.append(candidate)
        return found
