"""Data validation: data that cannot be trained on stops the run before a weight is read, with the shortest fix."""

from __future__ import annotations

from llmrecipe.core.errors import DataError
from llmrecipe.data.formats.conversations import UNTRAINED
from llmrecipe.data.formats.messages import MEDIA
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.encoder import TWO_BOS
from llmrecipe.data.tokenize.passage_rows import NO_PASSAGE
from llmrecipe.data.tokenize.sequences import NO_TARGET
from llmrecipe.data.tokenize.truncation import CUT, NO_ROOM, TOO_LONG
from llmrecipe.recipe.data_section import DataSection

FIXES = {
    CUT: "raise data.max_length, or set data.truncation=truncate_prompt_left",
    TOO_LONG: "raise data.max_length, or set data.truncation (split for plain text, keep_start, truncate_prompt_left)",
    NO_ROOM: "raise data.max_length, or set data.truncation=truncate_prompt_left",
    NO_PASSAGE: "raise data.max_length, or shorten the questions",
    UNTRAINED: "write weight: 0 in such a turn, or leave the mark out with data.drop_fields=[NAME]",
    NO_TARGET: "check objective.mask and the roles of the rows, or raise data.max_length",
    "the chat template refuses the conversation": "fix the rows, or set tokenizer.chat_template to one that accepts them",
}
DEFAULT_FIX = "fix or remove these rows"


def check_report(report: Report, data: DataSection, split: str = "train") -> None:
    """Stop on impossible data.

    Args:
        split: the split of these rows; one that is a share of the training rows may have got none of them.

    Raises:
        DataError: no rows, two leading BOS tokens, too many rows dropped, or too many moved prompt boundaries.
    """
    if not report.read:
        share = getattr(data, split, None)
        if isinstance(share, float):
            raise DataError(
                f"data.{split}={share:g}: none of the rows of {report.source} falls into this share; "
                "make it larger, name a file of rows, or leave it out"
            )
        raise DataError(f"{report.source}: there are no rows")
    twice = sum(count for leading, count in report.bos.items() if leading > 1) if TWO_BOS in report.first else 0
    if twice:
        raise DataError(
            f"{report.first[TWO_BOS]}: the row starts with two BOS tokens (as do {twice} rows in all): "
            "one comes from the text or template, one from the tokenizer; remove it from the text, "
            "or name a template with tokenizer.chat_template"
        )
    _check_fields(report)
    if not report.kept:
        raise DataError(f"{report.source}: none of the {report.read} rows can be used.\n{_reasons(report, data)}")
    if report.dropped_share > data.max_dropped:
        raise DataError(
            f"{report.source}: {report.lost} of {report.read} rows ({report.dropped_share:.1%}) would be dropped, more than "
            f"data.max_dropped={data.max_dropped:g}.\n{_reasons(report, data)}\n"
            f"To go on with the remaining {report.read - report.lost} rows, set data.max_dropped higher."
        )
    share = report.moved / report.prompts if report.prompts else 0.0
    if share > data.max_moved:
        raise DataError(
            f"{report.source}: in {report.moved} of {report.prompts} rows ({share:.1%}) the prompt's last tokens "
            f"merge with the answer's first, so the model would be trained on prompts it never sees "
            f"(more than data.max_moved={data.max_moved:g}). End prompts on a token boundary "
            "(no trailing space), use a chat template, or set data.max_moved=1 if it is intended"
        )


def _check_fields(report: Report) -> None:
    """Stop where rows hold what no token of theirs says.

    Raises:
        DataError: a template does not render a field, or an answer is nothing but its end token for want of one.
    """
    if report.unrendered:
        name, count = report.unrendered.most_common(1)[0]
        where = report.first.get(f"unrendered {name}", report.source)
        fields, template = ", ".join(report.unrendered), report.template.split(" (")[0]
        who = "plain text, which no template renders," if template == "none" else f"the chat template '{template}'"
        if name in report.media or name in MEDIA:
            raise DataError(
                f"{where}: {count} of {report.read} rows have something under '{name}', and this objective reads text alone, "
                "so it would be lost. Use an objective that reads it (`llmrecipe list objective`), or leave it out on purpose: "
                f"data.drop_fields=[{fields}]"
            )
        more = f" (with others, {fields})" if len(report.unrendered) > 1 else ""
        raise DataError(
            f"{where}: {who} has no place for '{name}', so {count} of {report.read} rows would lose it{more}. Name a template "
            "that renders it (tokenizer.chat_template=own, chatml, plain, a file or Jinja text), or leave it out on purpose: "
            f"data.drop_fields=[{fields}]"
        )
    if report.silent:
        raise DataError(
            f"{report.first.get('silent', report.source)}: in {report.silent} of {report.read} rows an answer would be trained "
            "that is nothing but its end token, because the chat template leaves out what else the turn says; name a template "
            "that renders it (tokenizer.chat_template), or take these rows out"
        )


def warnings(report: Report) -> list[str]:
    """Return warnings about the data that do not stop the run."""
    found = []
    if report.ended_share is not None and report.ended_share < 0.5:
        found.append(
            f"only {report.ended_share:.0%} of the answers end with an end token, so the model may not learn to stop "
            "(cut by data.max_length, or a template without an end-of-turn token)"
        )
    if report.equal:
        found.append(f"{report.equal} pairs have the same tokens as chosen and rejected; they teach nothing")
    if len(report.labels) == 1:
        found.append(f"all rows have the label '{next(iter(report.labels))}': there is nothing to tell apart")
    if report.overlap:
        found.append(
            f"{report.overlap} of {report.compared} validation rows are also training rows, so they measure what was memorised"
        )
    if report.unlisted:
        found.append(
            f"the chat template renders the tool calls of {report.unlisted} rows but not their list of tools, so the model "
            "sees none when it answers"
        )
    return found


def _reasons(report: Report, data: DataSection) -> str:
    lines = []
    for reason, count in report.dropped.most_common(5):
        lines.append(f"  {count} x {reason}, first at {report.first.get(reason, '?')}: {FIXES.get(reason, DEFAULT_FIX)}")
    return "\n".join([*lines, *_lengths(report, data)])


def _lengths(report: Report, data: DataSection) -> list[str]:
    """Propose the smallest length that keeps the share of dropped rows, and the one that drops none."""
    if not report.too_long:
        return []
    longest, others = max(report.too_long), report.lost - sum(report.too_long.values())
    allowed = int(data.max_dropped * report.read) - others
    proposed = []
    for length in sorted(report.too_long):
        left = sum(count for found, count in report.too_long.items() if found > length)
        if 0 < left <= allowed:
            proposed.append(f"data.max_length={length} would drop {left} of {report.read} rows for their length")
            break
    return [f"  {'; '.join([*proposed, f'data.max_length={longest} none'])}"]
