"""Entities of tagged words, and how many of them two taggings share."""

from __future__ import annotations

from collections.abc import Sequence

PREFIXES = frozenset("BIES")
Entity = tuple[str, int, int]
"""(kind, first word, last word), the last one included."""


def has_prefixes(tags: Sequence[str]) -> bool:
    """Return whether tags are `O` and kinds behind B-, I-, E- or S-, so that they stand for entities."""
    others = [tag for tag in tags if tag != "O"]
    return bool(others) and all(tag[:1] in PREFIXES and tag[1:2] == "-" and len(tag) > 2 for tag in others)


def entities_of(tags: Sequence[str], strict: bool = False) -> list[Entity]:
    """Return the entities of a sentence.

    As CoNLL's evaluation reads them, an I- that follows no word of its kind begins an entity. Read strictly as IOB2, it is
    outside: entities begin with B- alone.

    Examples:
        >>> entities_of(["I-PER", "I-PER", "O", "B-LOC"]), entities_of(["I-PER", "I-PER", "O", "B-LOC"], strict=True)
        ([('PER', 0, 1), ('LOC', 3, 3)], [('LOC', 3, 3)])
    """
    found: list[Entity] = []
    before, opened = ("O", ""), False
    for place, tag in enumerate(tags):
        prefix, kind = (tag[:1], tag[2:]) if tag != "O" else ("O", "")
        inside = prefix == "I" or (prefix == "E" and not strict)
        if opened and inside and kind == before[1] and before[0] in ("B", "I"):
            found[-1] = (kind, found[-1][1], place)
        else:
            opened = prefix == "B" if strict else prefix != "O"
            if opened:
                found.append((kind, place, place))
        before = (prefix, kind)
    return found


def shared(gold: Sequence[Entity], predicted: Sequence[Entity]) -> int:
    """Return the number of entities that are in both: the same words, the same kind."""
    return len({*gold} & {*predicted})
