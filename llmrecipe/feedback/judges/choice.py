"""Probabilities of options, computed from token probabilities, for any judge.

Options are followed along their whole token paths. With P(u) the probability that a reply begins with the tokens u,

    P(option) = sum over its spellings u of P(u) - sum over the spellings of longer options that continue u

so `1` is not `10`, however many tokens `10` has. Where only the likeliest tokens of a place are listed, two things stay open:

- An option that no listed token begins has a probability in [0, b], b = P(place) min(least listed, unlisted / K) with K such
  options. It is taken to be b / 2, which is at most b / 2 wrong, and counts for nothing in the mass.
- A listed beginning of several options, behind which no reply has gone on, counts for those that replies which pass there say,
  in their proportion, and for all of them alike where none passes.

The mass is the probability that lies on what is listed of the options; a reply with too little of it says nothing of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmrecipe.core.errors import RunError
from llmrecipe.feedback.judges.chosen import LEAST, Choice

if TYPE_CHECKING:
    from llmrecipe.feedback.judges.labeller import Ask, Judge


Path = tuple[Any, ...]
"""Tokens from the start of a reply."""
Leads = Callable[[Path], tuple[int | None, frozenset[int]]]
"""Path -> (the option it spells, options whose spellings continue it)."""


@dataclass(frozen=True)
class Open:
    """A listed prefix of several options (or of a longer one), after which no probabilities are known."""

    path: Path
    probability: float
    options: frozenset[int]


@dataclass
class Reading:
    """Probabilities of each option, as tables of token probabilities give them."""

    known: list[list[float]]
    unlisted: list[float]
    """Estimates for options that no listed token begins."""
    open: list[Open] = field(default_factory=list)

    def choice(self, passing: Callable[[Open], Sequence[int]] = lambda _: (), said: str = "") -> Choice:
        """Distribute the probability of open prefixes and return the choice.

        Args:
            passing: the option of each reply that passes an open place.
        """
        found = [list(own) for own in self.known]
        for place in self.open:
            votes = list(passing(place)) or sorted(place.options)
            for option in votes:
                found[option].append(place.probability / len(votes))
        sums = [math.fsum(own) for own in found]
        values = [total + more for total, more in zip(sums, self.unlisted, strict=True)]
        logprobs = [max(math.log(v), LEAST) if v > 0 else LEAST for v in values]
        return Choice(logprobs, min(math.fsum(sums), 1.0), said=said)


def read_paths(tables: Mapping[Path, Mapping[Any, float]], leads: Leads, count: int) -> Reading:
    """Compute the probability of each of `count` options.

    Args:
        tables: path -> token -> probability of that token behind the path; () is the start of the reply.
        leads: what a path spells, and what continues it.
    """
    found = Reading([[] for _ in range(count)], [0.0] * count)

    def walk(path: Path, probability: float) -> None:
        said, longer = leads(path)
        if longer and path not in tables:
            found.open.append(Open(path, probability, longer if said is None else longer | {said}))
            return
        spent = [0.0]
        covered: set[int] = set()
        for token, share in tables[path].items() if longer else ():
            own, further = leads((*path, token))
            if own is not None or further:
                covered |= further if own is None else further | {own}
                spent.append(probability * share)
                walk((*path, token), probability * share)
        missing = sorted(longer - covered)
        if missing:
            bound = probability * _bound(tables[path], len(missing))
            for option in missing:
                found.unlisted[option] += bound / 2
                spent.append(bound / 2)
        if said is not None:
            found.known[said].append(max(probability - math.fsum(spent), 0.0))

    walk((), 1.0)
    return found


def _bound(listed: Mapping[Any, float], missing: int) -> float:
    """Bound the probability that each of the missing options can have at a position."""
    rest = max(1.0 - math.fsum(listed.values()), 0.0)
    return min(min(listed.values(), default=1.0), rest / missing)


def holds(choice: Choice, least: float) -> bool:
    """Return whether enough of the probability lies on the options; none at all is never enough."""
    return choice.mass > 0.0 and choice.mass >= least


def thin(where: str, judge: Judge, ask: Ask, choice: Choice, key: str, least: float) -> RunError:
    """Build the error for a reply with too little probability on the options, quoting the reply."""
    said = choice.said or judge.generate([ask])[0] or ""
    share = "votes name" if choice.how == "votes" else "probability lies on"
    return RunError(
        f"{where}: the reply of the judge {judge.identity} has too little on what it may choose: {choice.mass:.3g} of its "
        f"{share} the options and {least:g} is required; it says {said[:200]!r}. Request the bare option (templates of the "
        f"constitution), take another judge, or lower {key}"
    )
