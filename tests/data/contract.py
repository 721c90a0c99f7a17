"""Every registered data format, loss mask, truncation and chat template through the promises of its kind.

The example of a format is a row of it, converts, and is found again.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
from pathlib import Path

import pytest

from llmrecipe.core import registry
from llmrecipe.core.errors import DataError
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.formats.data_format import Conversion, data_format, formats_of
from llmrecipe.data.formats.detect import detect
from llmrecipe.data.tokenize.chat_templates import set_template, turn_end_tokens
from llmrecipe.data.tokenize.loss_mask import Encoded, loss_mask
from llmrecipe.data.tokenize.truncation import Limit, truncation
from tests.data.toys import byte_tokenizer, turn

CASES = [(name, rows) for rows in registry.names("row_type") for name in formats_of(rows)]


@pytest.mark.parametrize("name", registry.names("format"))
def test_the_example_has_the_columns_and_the_format_becomes_something(name: str) -> None:
    found = data_format(name)
    row = json.loads(found.example)
    assert found.matches(row) is not None and found.fits(row)
    assert name in {known for known, _ in CASES}


@pytest.mark.parametrize(("name", "rows"), CASES)
def test_the_example_converts_and_survives_detection(name: str, rows: str, tmp_path: Path) -> None:
    found = data_format(name)
    row = json.loads(found.example)
    if isinstance(row.get("image"), str):  # a path beside the rows
        (tmp_path / row["image"]).parent.mkdir(parents=True)
        (tmp_path / row["image"]).touch()
    words = {str(row.get("label")): "right", "another label": "wrong"}
    conversion = Conversion(rows, template=True, base=tmp_path, label_words=words, label_prompt="Say it:")
    before = copy.deepcopy(row)
    made = found.convert(row, conversion)
    assert made and all(isinstance(one, dict) and one for one in made)
    assert row == before, "the raw row is left alone"
    assert json.loads(json.dumps(made)) == made, "canonical rows are JSON"
    layout = detect([row], rows, name, "example:1")
    assert layout.name == name and layout.convert(row, conversion) == made
    first = detect([row], rows, "auto", "example:1").name
    places = formats_of(rows)
    assert first == name or places[first] <= places[name], f"{first} is taken for it, and stands behind it"


@pytest.mark.parametrize("name", registry.names("loss_mask"))
def test_a_mask_selects_tokens_of_the_row_and_reads_only_the_turns_it_says(name: str) -> None:
    mask = loss_mask(name)
    ids = list(range(20))
    for answer, turns in ((0, [(0, 20)]), (12, [(12, 15), (16, 20)]), (None, [(4, 8), (10, 20)])):
        seen = Encoded(ids, answer, turns if mask.reads_turns and (answer is None or mask.turns_of_prompted) else [])
        if answer is not None or mask.reads_turns:
            spans = list(mask.spans(seen))
            assert spans and all(0 <= a < b <= 20 for a, b in spans)
            assert spans == sorted(spans) and all(b <= c for (_, b), (c, _) in itertools.pairwise(spans))
        if mask.last_only and turns:
            last = Encoded(ids, answer, turns[-1:])
            assert list(mask.spans(last)) == list(mask.spans(seen))


@pytest.mark.parametrize("name", registry.names("truncation"))
@pytest.mark.parametrize("length", [3, 8, 13])
def test_a_truncation_keeps_the_limit_or_leaves_the_row_out(name: str, length: int) -> None:
    """A prompt keeps its end, no answer is empty, and a piece has a target flag for each token, never for the first."""
    policy, limit = truncation(name), Limit(length, header=2, bos=1)
    prompt, answers = [1, *range(100, 109)], [list(range(200, 206)), [300, 301]]
    ids, trained = prompt + answers[0], [0] * 10 + [1] * 6
    with contextlib.suppress(BadRow, DataError):
        for plain in (False, True):
            for own, targets in policy.sequence(ids, trained, limit, "row 1", plain):
                assert len(own) == len(targets) <= length and targets[0] == 0 and set(own) <= set(ids)
    with contextlib.suppress(BadRow, DataError):
        kept, parts = policy.answers(prompt, answers, limit, "row 1")
        assert kept and all(parts) and len(kept) + max(map(len, parts)) <= length
        assert kept[-1] == prompt[-1] and all(a[: len(p)] == p for a, p in zip(answers, parts, strict=True))
    with contextlib.suppress(BadRow, DataError):
        kept = policy.prompt(prompt, limit, "row 1")
        assert len(kept) <= length and kept[-1] == prompt[-1]


@pytest.mark.parametrize("name", registry.names("chat_template"))
def test_a_template_marks_the_answer_and_ends_it_with_a_stop_token(name: str) -> None:
    tokenizer = byte_tokenizer(template=None)
    template = set_template(tokenizer, name)
    assert template is not None and template.named
    turns = [turn("user", "u"), turn("assistant", "a")]
    text, (span,) = template.render_marked(turns)
    assert text[slice(*span)].startswith("a") and len(text[slice(*span)]) > 1
    assert text.startswith(template.render(turns[:1], prompt=True)), "the prompt is the beginning of the whole"
    ids = tokenizer(text[slice(*span)], add_special_tokens=False)["input_ids"]
    assert ids[-1] in turn_end_tokens(tokenizer)
