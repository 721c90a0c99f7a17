"""Data that cannot be trained on stops the run, and the report counts the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.core import registry
from llmrecipe.core.errors import DataError
from llmrecipe.data import TokenData, prepare
from llmrecipe.data.templates.chatml import CHATML
from llmrecipe.data.tokenize.chat_templates import set_template, template_of, turn_end_tokens
from llmrecipe.data.validation import warnings
from llmrecipe.recipe.data_section import DataSection
from tests.data.toys import byte_tokenizer, turn


def read(tmp_path: Path, rows: list[dict[str, Any]], tokenizer: Any = None, kind: str = "dialogue", **data: Any) -> TokenData:
    mask = data.pop("mask", "completion")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = prepare(DataSection(path=str(path), **data), tokenizer or byte_tokenizer(), kind, mask=mask, seed=0)
    assert found is not None
    return found


TALK = {"messages": [turn("user", "u"), turn("assistant", "a")]}
WITH_BOS = CHATML
WITHOUT_BOS = CHATML.replace("{{ bos_token }}", "")


@pytest.mark.parametrize(("adds", "template", "raw", "spoken"), [
    (True, WITHOUT_BOS, 1, 0), (False, WITH_BOS, 0, 1), (True, WITH_BOS, 1, 1), (False, WITHOUT_BOS, 0, 0),
])  # fmt: skip
def test_exactly_one_bos_or_none(tmp_path: Path, adds: bool, template: str, raw: int, spoken: int) -> None:
    tokenizer = byte_tokenizer(adds_bos=adds)
    tokenizer.chat_template = template
    bos = tokenizer.bos_token_id
    text = read(tmp_path, [{"prompt": "p", "completion": "c"}], tokenizer)
    assert text[0]["ids"].count(bos) == raw and text.report.bos == {raw: 1}
    talk = read(tmp_path, [TALK], tokenizer)
    assert talk[0]["ids"].count(bos) == spoken and talk.report.bos == {spoken: 1}


def test_two_leading_bos_stop(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:2: the row starts with two BOS tokens \(as do 1 rows in all\)"):
        read(tmp_path, [{"text": "x"}, {"text": "<s>x"}], byte_tokenizer(adds_bos=True), "text")


def test_a_share_that_gets_no_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "a"}) + "\n" + json.dumps({"text": "b"}) + "\n")
    section = DataSection(path=str(path), validation=1e-6)
    with pytest.raises(DataError, match=r"data.validation=1e-06: none of the rows of .*rows.jsonl falls into this share"):
        prepare(section, byte_tokenizer(), "text", mask="completion", seed=0, split="validation")


def test_rows_without_a_target_stop_and_are_named(tmp_path: Path) -> None:
    rows = [{"messages": [turn("user", "only a question")]}] * 3
    with pytest.raises(DataError, match=r"none of the 3 rows can be used.\n  3 x no trained token, first at .*rows.jsonl:1"):
        read(tmp_path, rows)


def test_one_bad_row_among_good_ones(tmp_path: Path) -> None:
    rows = [TALK] * 30 + [{"messages": [turn("user", "q")]}]
    assert len(read(tmp_path, rows)) == 30
    with pytest.raises(DataError, match=r"1 of 31 rows \(3.2%\) would be dropped.*\n  1 x no trained token, first at .*:31"):
        read(tmp_path, rows, max_dropped=0.0)


def test_fully_truncated_rows_stop(tmp_path: Path) -> None:
    rows = [{"prompt": "p" * 50, "completion": "c"}] * 4
    with pytest.raises(DataError, match=r"none of the 4 rows .*\n  4 x no trained token"):
        read(tmp_path, rows, max_length=20, truncation="keep_start")
    with pytest.raises(DataError, match=r"4 x longer than data.max_length, .*: raise data.max_length, or set data.truncation"):
        read(tmp_path, rows, max_length=20)


def test_conversations_without_a_template_stop(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:1: rows are conversations, and this tokenizer has no chat template"):
        read(tmp_path, [TALK], byte_tokenizer(template=None))


def test_many_moved_boundaries_stop(tmp_path: Path) -> None:
    rows = [{"prompt": "x ", "completion": "yes"}] * 4
    tokenizer = byte_tokenizer([("Ġ", "y")])
    with pytest.raises(DataError, match=r"in 4 of 4 rows \(100.0%\) the prompt's last tokens merge .*data.max_moved=1"):
        read(tmp_path, rows, tokenizer)
    assert read(tmp_path, rows, tokenizer, max_moved=1.0).report.moved == 4


def test_report_counts_ends_and_losses(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": "c" * n} for n in (2, 3, 20, 30)]
    data = read(tmp_path, rows, max_length=10, truncation="keep_start")
    report = data.report
    assert (report.kept, report.truncated, report.tokens_lost) == (4, 2, 12 + 22)
    assert (report.ended, report.endable, report.ended_share) == (2, 4, 0.5)
    assert (report.tokens, report.trained, report.longest) == (4 + 5 + 10 + 10, 3 + 4 + 9 + 9, 10)
    assert warnings(report) == []
    short = read(tmp_path, rows, max_length=4, truncation="keep_start")
    assert "may not learn to stop" in warnings(short.report)[0]
    assert any("answers that end with an end token: 25.0%" in line for line in short.report.lines())


def test_equal_answers_are_counted(tmp_path: Path) -> None:
    data = read(tmp_path, [{"prompt": "p", "chosen": "c", "rejected": "c"}], kind="preference")
    assert data.report.equal == 1 and "teach nothing" in warnings(data.report)[0]


def test_a_template_without_an_end_token_is_seen(tmp_path: Path) -> None:
    endless = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    data = read(tmp_path, [TALK], byte_tokenizer(template=endless), mask="assistant")
    assert data.report.ended_share == 0.0


@pytest.mark.parametrize("name", registry.names("chat_template"))
@pytest.mark.parametrize("adds", [True, False])
def test_built_in_templates_end_answers_and_carry_one_bos(tmp_path: Path, name: str, adds: bool) -> None:
    tokenizer = byte_tokenizer(adds_bos=adds, template=None)
    template = set_template(tokenizer, name)
    assert template is not None and template.marks and template.named
    data = read(tmp_path, [TALK, {"messages": TALK["messages"] * 2}], tokenizer, mask="assistant")
    end = "<|im_end|>" if name == "chatml" else "</s>"
    for row, times in zip(data, (1, 2)):
        trained = tokenizer.decode([i for i, t in zip(row["ids"], row["trained"]) if t])
        assert trained == f"a{end}" * times
        assert row["ids"].count(tokenizer.bos_token_id) == int(adds)
    assert data.report.ended_share == 1.0
    assert tokenizer.convert_tokens_to_ids(end) in turn_end_tokens(tokenizer)


def test_the_template_is_saved_with_the_tokenizer(tmp_path: Path) -> None:
    """Ids of a prompt in training are those of the saved folder."""
    from transformers import AutoTokenizer

    tokenizer = byte_tokenizer(template=None)
    set_template(tokenizer, "plain")
    data = read(tmp_path, [{"prompt": "p", "answer": "1"}], tokenizer, "prompt")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    served = again.apply_chat_template([turn("user", "p")], add_generation_prompt=True)["input_ids"]
    assert data[0]["prompt_ids"] == served
    assert template_of(again) == template_of(tokenizer)
    assert json.loads(data[0]["columns"]) == {"answer": "1"}


@pytest.mark.parametrize(
    ("value", "message"),
    [("chatlm", r"'chatlm' is no built-in template; did you mean 'chatml'\?"), ("own", "has no template of its own"), ("chatml", "not one token")],  # noqa: E501
)  # fmt: skip
def test_templates_that_cannot_be_used(value: str, message: str) -> None:
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(template=None).backend_tokenizer.__class__.from_str(
        '{"version":"1.0","added_tokens":[],"model":{"type":"WordLevel","vocab":{"<unk>":0,"a":1},"unk_token":"<unk>"},'
        '"pre_tokenizer":{"type":"Split","pattern":{"String":""},"behavior":"Isolated","invert":false}}'
    ), unk_token="<unk>")  # fmt: skip
    with pytest.raises(DataError, match=message):
        set_template(bare, value)


def test_templates_from_a_file_and_from_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(WITHOUT_BOS)
    for value, name in ((str(path), "mine.jinja"), (WITHOUT_BOS, "text")):
        tokenizer = byte_tokenizer(template=None)
        template = set_template(tokenizer, value)
        assert template is not None and (template.name, template.text, template.named) == (name, WITHOUT_BOS, True)


def test_a_template_that_refuses_a_conversation_drops_the_row(tmp_path: Path) -> None:
    strict = WITHOUT_BOS.replace(
        "{% for message in messages %}",
        "{% for message in messages %}{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}", 1,
    )  # fmt: skip
    bad = {"messages": [turn("user", "u"), turn("tool", "t"), turn("assistant", "a")]}
    data = read(tmp_path, [TALK, bad], byte_tokenizer(template=strict), max_dropped=0.5)
    assert data.report.dropped == {"the chat template refuses the conversation": 1}
    assert "no tools here" in data.report.first["the chat template refuses the conversation"]
