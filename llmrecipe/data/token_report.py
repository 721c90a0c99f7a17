"""Statistics of tokenization: shown at the start of a run and stored with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HIGHEST = "highest token id"
TEXT_RULE = (
    "prompts given as text (prompt/completion, pairs, alpaca): rendered where tokenizer.chat_template names a template (own, "
    "chatml, ...), raw text otherwise, alpaca's in Stanford's form"
)
"""How rows without messages become tokens."""


@dataclass
class Report:
    """Counts over a data set. `merge` adds up reports of chunks and of sources."""

    source: str = ""
    format: str = ""
    mapping: dict[str, str] = field(default_factory=dict)
    template: str = ""
    mask: str = ""
    read: int = 0
    """Raw rows read."""
    kept: int = 0
    """Token rows made (more than raw rows where one gives several)."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Raw rows left out, by reason."""
    first: dict[str, str] = field(default_factory=dict)
    """Reason -> where it first occurred, and what was found."""
    tokens: int = 0
    trained: int = 0
    longest: int = 0
    truncated: int = 0
    """Token rows that lost tokens to `max_length`."""
    tokens_lost: int = 0
    """Tokens of truncated and dropped rows that are not trained on."""
    moved: int = 0
    """Rows whose prompt ids are not a prefix of the whole: the boundary moved."""
    prompts: int = 0
    """Rows that have such a boundary."""
    ended: int = 0
    """Sequences whose last trained token (white space aside) is an end token."""
    endable: int = 0
    """Sequences that train on an answer."""
    bos: Counter[int] = field(default_factory=Counter)
    """Leading BOS tokens -> sequences."""
    eos: Counter[int] = field(default_factory=Counter)
    """End tokens in a sequence -> sequences."""
    equal: int = 0
    """Preference rows whose two answers are the same tokens."""
    labels: Counter[str] = field(default_factory=Counter)
    unused: list[str] = field(default_factory=list)
    """Columns of the source that nothing reads."""
    media: list[str] = field(default_factory=list)
    """Those of `unrendered` that are columns of pictures, sound or video."""
    ignored: list[str] = field(default_factory=list)
    """Files in the folder of the source that were not read."""
    blocks: int = 0
    """Rows cut from documents laid end to end; 0 where rows are documents or parts of them."""
    too_long: Counter[int] = field(default_factory=Counter)
    """Length in tokens -> raw rows left out because of it."""
    highest: int = -1
    """Largest token id; `first` has its place."""
    overlap: int = 0
    """Rows of the validation split whose tokens are those of a training row."""
    compared: int = 0
    """Rows of the validation split that were compared for that."""
    unrendered: Counter[str] = field(default_factory=Counter)
    """Field of conversations that the template does not render -> rows that have it."""
    unlisted: int = 0
    """Rows whose tool calls the template renders, but not their list of tools."""
    silent: int = 0
    """Rows with such fields that train an answer of nothing but its end token."""
    repeated: int = 0
    """Rows whose answers began with their prompt, which was removed from them."""
    given_as_text: int = 0
    """Rows that give prompt and answers as text, which only a named template renders."""

    def drop(self, reason: str, where: str, detail: str = "", tokens: int = 0) -> None:
        """Count a dropped row."""
        self.dropped[reason] += 1
        self.first.setdefault(reason, f"{where}: {detail}" if detail else where)
        self.tokens_lost += tokens

    def merge(self, other: Report) -> Report:
        """Add another report to this one."""
        for name in (
            "read",
            "kept",
            "tokens",
            "trained",
            "truncated",
            "tokens_lost",
            "moved",
            "prompts",
            "ended",
            "endable",
            "equal",
            "silent",
            "unlisted",
            "repeated",
            "given_as_text",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("dropped", "bos", "eos", "labels", "unrendered", "too_long"):
            getattr(self, name).update(getattr(other, name))
        for reason, where in other.first.items():
            self.first.setdefault(reason, where)
        if other.highest > self.highest:
            self.highest, self.first[HIGHEST] = other.highest, other.first.get(HIGHEST, other.source)
        self.ignored += [name for name in other.ignored if name not in self.ignored]
        self.unused += [name for name in other.unused if name not in self.unused]
        self.media += [name for name in other.media if name not in self.media]
        self.longest = max(self.longest, other.longest)
        for name in ("source", "format", "template", "mask"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if theirs and theirs not in mine.split(" + "):
                setattr(self, name, f"{mine} + {theirs}" if mine else theirs)
        self.mapping = {**self.mapping, **other.mapping}
        return self

    @property
    def lost(self) -> int:
        """Return the number of raw rows dropped, for any reason."""
        return sum(self.dropped.values())

    @property
    def dropped_share(self) -> float:
        """Return the share of raw rows dropped."""
        return self.lost / self.read if self.read else 0.0

    @property
    def ended_share(self) -> float | None:
        """Return the share of answers that end with an end token, or None where no answer is trained."""
        return self.ended / self.endable if self.endable else None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values; empty values are left out."""
        # Keys of JSON are texts, which sort otherwise than numbers: a checksum has to be that of what is read back.
        values = {k: {str(key): n for key, n in v.items()} if isinstance(v, Counter) else v for k, v in vars(self).items()}
        values = {k: v for k, v in values.items() if v not in ({}, "")}
        return {**values, "ended_share": self.ended_share, "dropped_share": self.dropped_share}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """Return the report that `to_dict` wrote."""
        names = cls.__dataclass_fields__
        report = cls(**{k: v for k, v in values.items() if k in names})
        report.dropped, report.labels, report.unrendered = map(Counter, (report.dropped, report.labels, report.unrendered))
        report.bos = Counter({int(k): v for k, v in report.bos.items()})
        report.too_long = Counter({int(k): v for k, v in report.too_long.items()})
        report.eos = Counter({int(k): v for k, v in report.eos.items()})
        return report

    def lines(self) -> list[str]:
        """Return the report as lines of text, one fact each."""
        mapping = ", ".join(f"{w} <- {c}" for w, c in self.mapping.items())
        share = f"{self.trained / self.tokens:.0%}" if self.tokens else "none"
        out = [
            f"source: {self.source}" + (f" (not read: {', '.join(self.ignored[:8])})" if self.ignored else ""),
            f"format: {self.format}" + (f" (columns: {mapping})" if mapping else ""),
            *([f"columns not used: {', '.join(name or '(no name)' for name in self.unused)}"] if self.unused else []),
            f"template: {self.template}",
            *([TEXT_RULE] if self.given_as_text else []),
            *(
                [f"answers that began with their prompt: it was removed from those of {self.repeated} rows"]
                if self.repeated
                else []
            ),
            f"rows: {self.read} read, {self.kept} kept, {self.lost} dropped ({self.dropped_share:.1%})",
            *(f"  {count} x {reason}, first at {self.first.get(reason, '?')}" for reason, count in self.dropped.most_common()),
            f"tokens: {self.tokens}, longest row {self.longest}, trained {self.trained} ({share}), lost {self.tokens_lost}",
        ]
        if self.blocks:
            out.append(f"blocks: {self.blocks} rows of {self.longest} tokens, cut from the documents laid end to end")
        if self.truncated:
            out.append(f"truncated: {self.truncated} rows")
        if self.ended_share is not None:
            out.append(f"answers that end with an end token: {self.ended_share:.1%}")
        if self.prompts:
            out.append(f"prompt boundaries moved by merged tokens: {self.moved} of {self.prompts}")
        if self.bos:
            out.append("leading BOS tokens: " + _histogram(self.bos) + "; end tokens a row: " + _histogram(self.eos))
        if self.equal:
            out.append(f"pairs with equal answers: {self.equal}")
        if self.compared:
            out.append(f"validation rows that are also training rows: {self.overlap} of {self.compared}")
        if self.labels:
            out.append("labels: " + ", ".join(f"{k} x {v}" for k, v in self.labels.most_common(12)))
        return out


def _histogram(counts: Counter[int]) -> str:
    common = sorted(counts.items())
    if len(common) > 4:
        rows = sum(counts.values())
        return f"{common[0][0]} to {common[-1][0]} (mean {sum(k * v for k, v in common) / rows:.1f})"
    return ", ".join(f"{k} in {v}" for k, v in common)
