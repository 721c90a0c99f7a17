"""What happens to rows longer than data.max_length."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from llmrecipe.core.errors import DataError
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.tokenize.encode import RowEncoder
from llmrecipe.data.tokenize.truncation import Limit, fit_answers, fit_prompt, fit_sequence, truncation
from llmrecipe.recipe.data_section import DataSection
from tests.data.toys import byte_tokenizer, trained_text, turn

LENGTHS = (1, 2, 5, 9, 16, 30)


@pytest.mark.parametrize("policy", ["drop", "keep_start", "truncate_prompt_left", "error"])
@pytest.mark.parametrize("bos", [None, 1])
def test_grid_of_pairs(policy: str, bos: int | None) -> None:
    """One prompt for both answers, nothing longer than the limit, no empty answer, untouched where it fits."""
    for prompt_length, chosen_length, rejected_length, budget in itertools.product(LENGTHS, LENGTHS, LENGTHS, (6, 12, 40)):
        prompt = [1, *range(100, 99 + prompt_length)]
        chosen, rejected = list(range(200, 200 + chosen_length)), list(range(300, 300 + rejected_length))
        limit = Limit(budget, header=3, bos=bos)
        fits = prompt_length + max(chosen_length, rejected_length) <= budget
        try:
            kept, answers = fit_answers(prompt, [chosen, rejected], truncation(policy), limit, "here")
        except BadRow:
            assert not fits and (policy == "drop" or (policy == "keep_start" and prompt_length >= budget))
            continue
        except DataError as error:
            assert policy == "error" and not fits and "here" in str(error)
            continue
        assert policy in ("keep_start", "truncate_prompt_left") or fits
        assert all(answers) and kept
        assert len(kept) + max(map(len, answers)) <= budget
        assert answers[0] == chosen[: len(answers[0])] and answers[1] == rejected[: len(answers[1])]
        if fits:
            assert (kept, answers) == (prompt, [chosen, rejected])
        elif policy == "keep_start":
            assert kept == prompt
        else:
            header = prompt[-min(3, prompt_length) :]
            assert kept[-len(header) :] == header
            assert kept[0] == prompt[0] if bos == 1 else True
            room = budget - len(kept)
            assert [len(a) for a in answers] == [min(chosen_length, room), min(rejected_length, room)]


def test_one_answers_length_does_not_cut_the_other() -> None:
    kept, (chosen, rejected) = fit_answers([1, 2, 3], [[4] * 20, [5, 6]], truncation("keep_start"), Limit(10), "here")
    assert kept == [1, 2, 3] and rejected == [5, 6] and len(chosen) == 7


def test_left_truncation_keeps_the_assistant_header_and_the_answer() -> None:
    tokenizer = byte_tokenizer(adds_bos=True)
    data = DataSection(max_length=40, truncation="truncate_prompt_left")
    encoder = RowEncoder(tokenizer, "dialogue", "completion", data, "prompt_completion")
    row = {"prompt": [turn("user", "q" * 60)], "completion": [turn("assistant", "answer")]}
    columns, report = encoder.encode([(0, row, "row 1")])
    ids, trained = columns["ids"][0], columns["trained"][0]
    assert len(ids) == 40 and ids[0] == tokenizer.bos_token_id
    assert trained_text(tokenizer, ids, trained) == "answer<|im_end|>\n"
    masked = tokenizer.decode([i for i, t in zip(ids, trained) if not t])
    assert masked.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert (report.truncated, report.ended) == (1, 1)
    assert report.tokens_lost == len(tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]) - 40


def test_left_truncation_of_an_answer_that_is_too_long_keeps_header_and_beginning() -> None:
    tokenizer = byte_tokenizer()
    data = DataSection(max_length=20, truncation="truncate_prompt_left")
    encoder = RowEncoder(tokenizer, "dialogue", "completion", data, "prompt_completion")
    row = {"prompt": [turn("user", "q")], "completion": [turn("assistant", "0123456789" * 5)]}
    columns, report = encoder.encode([(0, row, "row 1")])
    ids, trained = columns["ids"][0], columns["trained"][0]
    assert len(ids) == 20 and tokenizer.decode(ids).startswith("<|im_start|>assistant\n0123")
    assert trained_text(tokenizer, ids, trained) == "012345678"
    assert (report.ended, report.endable) == (0, 1)


def test_keep_start_drops_rows_left_without_a_target() -> None:
    data = DataSection(max_length=8, truncation="keep_start")
    encoder = RowEncoder(byte_tokenizer(), "dialogue", "completion", data, "prompt_completion")
    rows = [{"prompt": "p" * 8, "completion": "c"}, {"prompt": "p" * 6, "completion": "ccc"}]
    columns, report = encoder.encode([(i, r, f"row {i + 1}") for i, r in enumerate(rows)])
    assert columns["source_row"] == [1] and report.dropped == {"no trained token": 1}
    assert "the part data.max_length leaves has none" in report.first["no trained token"]
    assert (report.ended, report.endable) == (0, 1)


def test_split_keeps_every_token_of_plain_text() -> None:
    ids = list(range(25))
    pieces = fit_sequence(ids, [0] + [1] * 24, truncation("split"), Limit(10), "here", plain=True)
    assert [piece[0] for piece in pieces] == [ids[:10], ids[10:20], ids[20:]]
    assert [sum(piece[1]) for piece in pieces] == [9, 9, 4]
    with pytest.raises(DataError, match="plain text only"):
        fit_sequence(ids, [1] * 25, truncation("split"), Limit(10), "here")


@pytest.mark.parametrize("policy", ["keep_start", "split"])
def test_prompts_never_lose_their_end(policy: str) -> None:
    with pytest.raises(DataError, match="would cut the end of a prompt"):
        fit_prompt(list(range(20)), truncation(policy), Limit(10), "here")
    assert fit_prompt(list(range(20)), truncation("truncate_prompt_left"), Limit(10, bos=0), "here") == [0, *range(11, 20)]


def test_error_policy_names_the_row() -> None:
    encoder = RowEncoder(byte_tokenizer(), "text", "all", DataSection(max_length=4, truncation="error"), "text")
    with pytest.raises(DataError, match=r"rows.jsonl:7: the row has 9 tokens, data.max_length is 4"):
        encoder.encode([(0, {"text": "12345678"}, "rows.jsonl:7")])


def test_pairs_of_texts_shorten_the_longer() -> None:
    data = DataSection(max_length=10, truncation="keep_start")
    encoder = RowEncoder(byte_tokenizer(adds_bos=True), "labelled", "all", data, "labelled_pair")
    columns, report = encoder.encode([(0, {"text_a": "aaa", "text_b": "b" * 30, "label": 1}, "row 1")])
    text: Any = encoder.tokens.tokenizer.decode(columns["ids"][0])
    assert text.count("a") == 3 and text.count("b") == 6 and len(columns["ids"][0]) == 10
    assert report.truncated == 1
