"""Which tokens are trained, decided on ids."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrecipe.core.errors import DataError
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.templates.chatml import CHATML
from llmrecipe.data.tokenize import assistant_turns
from llmrecipe.data.tokenize.assistant_turns import common_prefix
from llmrecipe.data.tokenize.encode import RowEncoder
from llmrecipe.data.tokenize.special_tokens import Tokens
from llmrecipe.recipe.data_section import DataSection
from tests.data.toys import PREFIX_ONLY, byte_tokenizer, trained_text, turn
from tests.support import shared

BYTES = {name: byte_tokenizer(template=text) for name, text in {"marks": CHATML, "prefixes": PREFIX_ONLY}.items()}
WORDS = [
    "user",
    "assistant",
    "hi",
    " hi ",
    "\n",
    "a\n",
    "\n\nx",
    "",
    " ",
    "né",
    "你好",
    "🙂",
    "hello hello",
    "<",
    "im_end",
    "hi",
]
content = st.lists(st.sampled_from(WORDS), min_size=0, max_size=3).map("".join)
answer = st.builds(lambda a, b: a + "y" + b, content, content)


@st.composite
def conversations(draw: Any) -> list[dict[str, str]]:
    """System or not, one to three rounds; contents repeat, are empty, and name roles."""
    messages = [turn("system", draw(content))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        asked = draw(content)
        messages += [turn("user", asked), turn("assistant", asked + "y" if draw(st.booleans()) else draw(answer))]
    return messages + ([turn("user", draw(content))] if draw(st.booleans()) else [])


def encode(
    tokenizer: Any, row: dict[str, Any], mask: str = "completion", rows: str = "dialogue", name: str = "messages", **data: Any
):
    encoder = RowEncoder(tokenizer, rows, mask, DataSection(max_length=data.pop("max_length", 4096), **data), name)
    columns, report = encoder.encode([(0, row, "row 1")])
    return {k: v[0] for k, v in columns.items() if v}, report


@pytest.mark.parametrize("way", list(BYTES))
@settings(max_examples=60, deadline=None)
@given(messages=conversations())
def test_trained_text_is_the_assistant_turns_with_their_ends(way: str, messages: list[dict[str, str]]) -> None:
    tokenizer = BYTES[way]
    row, report = encode(tokenizer, {"messages": messages}, "assistant")
    expected = "".join(m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant")
    assert trained_text(tokenizer, row["ids"], row["trained"]) == expected
    assert tokenizer.decode(row["ids"]) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert report.moved == 0 and report.ended_share == 1.0


@settings(max_examples=40, deadline=None)
@given(messages=conversations(), chosen=answer, rejected=answer)
def test_pairs_share_their_prompt_ids_and_keep_their_answers(
    messages: list[dict[str, str]], chosen: str, rejected: str
) -> None:
    tokenizer = BYTES["prefixes"]
    prompt = messages if messages[-1]["role"] == "user" else messages[:-1]
    pair = {"prompt": prompt, "chosen": [turn("assistant", chosen)], "rejected": [turn("assistant", rejected)]}
    row, _ = encode(tokenizer, pair, rows="preference", name="preference")
    assert tokenizer.decode(row["prompt_ids"]) == tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(row["chosen_ids"]) == chosen + "<|im_end|>\n"
    assert tokenizer.decode(row["rejected_ids"]) == rejected + "<|im_end|>\n"


TALK = [turn("system", "S"), turn("user", "u1"), turn("assistant", "a1"), turn("user", "u2"), turn("assistant", "a2")]
SPLIT = {"prompt": TALK[:4], "completion": TALK[4:]}
STRINGS = {"prompt": "p", "completion": "c"}
RENDERED = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in TALK)
TABLE = [
    ("messages", {"messages": TALK}, "completion", "a1<|im_end|>a2<|im_end|>"),
    ("messages", {"messages": TALK}, "assistant", "a1<|im_end|>a2<|im_end|>"),
    ("messages", {"messages": TALK}, "last", "a2<|im_end|>"),
    ("messages", {"messages": TALK}, "all", RENDERED.removeprefix("<|im_start|>")),
    ("prompt_completion", SPLIT, "completion", "a2<|im_end|>\n"),
    ("prompt_completion", SPLIT, "assistant", "a2<|im_end|>"),
    ("prompt_completion", SPLIT, "last", "a2<|im_end|>"),
    ("prompt_completion", SPLIT, "all", RENDERED.removeprefix("<|im_start|>")),
    ("prompt_completion", STRINGS, "completion", "c</s>"),
    ("prompt_completion", STRINGS, "last", "c</s>"),
    ("prompt_completion", {"prompt": "pq", "completion": "c"}, "all", "qc</s>"),
    ("text", {"text": "xyz"}, "completion", "yz</s>"),
    ("tokens", {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, "completion", None),
]


@pytest.mark.parametrize("way", list(BYTES))
@pytest.mark.parametrize(("name", "row", "mask", "expected"), TABLE)
def test_masks_by_format(way: str, name: str, row: dict[str, Any], mask: str, expected: str | None) -> None:
    found, _ = encode(BYTES[way], row, mask, name=name)
    if expected is None:
        assert found["trained"] == [0, 0, 1]
    else:
        assert trained_text(BYTES[way], found["ids"], found["trained"]) == expected
    assert found["trained"][0] == 0


def test_end_token_is_trained_where_padding_is_the_same_token() -> None:
    tokenizer = byte_tokenizer(pad_is_eos=True)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    row, report = encode(tokenizer, {"prompt": "p", "completion": "c"}, name="prompt_completion")
    assert row["ids"][-1] == tokenizer.eos_token_id and row["trained"][-1] == 1
    assert report.ended == report.endable == 1


def test_boundary_moves_into_the_prompt_when_tokens_merge_across_it() -> None:
    tokenizer = byte_tokenizer([("a", "b")])
    row, report = encode(tokenizer, {"prompt": "xa", "completion": "bc"}, name="prompt_completion")
    assert tokenizer.convert_ids_to_tokens(row["ids"]) == ["x", "ab", "c", "</s>"]
    assert row["trained"] == [0, 1, 1, 1]
    assert (report.moved, report.prompts) == (1, 1)


def test_shorter_common_prefix_of_a_pair_is_the_prompt() -> None:
    tokenizer = byte_tokenizer([("a", "b")])
    row, report = encode(tokenizer, {"prompt": "xa", "chosen": "bc", "rejected": "cc"}, rows="preference", name="preference")
    tokens = {k: tokenizer.convert_ids_to_tokens(v) for k, v in row.items() if k.endswith("ids")}
    assert tokens == {"prompt_ids": ["x"], "chosen_ids": ["ab", "c", "</s>"], "rejected_ids": ["a", "c", "c", "</s>"]}
    assert report.moved == 1


def test_template_that_rewrites_earlier_turns_stops_and_names_the_turn() -> None:
    forgetful = PREFIX_ONLY.replace(
        "message['content']", "(message['content'] if loop.last else message['content'] | trim('!'))"
    )
    tokenizer = byte_tokenizer(template=forgetful)
    talk = [turn("user", "u"), turn("assistant", "a!"), turn("user", "v"), turn("assistant", "b!")]
    with pytest.raises(DataError, match=r"row 1: .* turn 2 of 4 .*objective.mask=last"):
        encode(tokenizer, {"messages": talk}, "assistant")
    row, _ = encode(tokenizer, {"messages": talk}, "last")
    assert trained_text(tokenizer, row["ids"], row["trained"]) == "b!<|im_end|>"


def test_answer_that_a_template_trims_keeps_its_text() -> None:
    """Cutting rendered strings left one character of such an answer."""
    tokenizer = byte_tokenizer(template=PREFIX_ONLY.replace("message['content']", "message['content'] | trim"))
    pair = {"prompt": [turn("user", "no")], "chosen": [turn("assistant", "no\n")], "rejected": [turn("assistant", "yes \n")]}
    row, _ = encode(tokenizer, pair, rows="preference", name="preference")
    assert tokenizer.decode(row["chosen_ids"]) == "no<|im_end|>\n"
    assert tokenizer.decode(row["rejected_ids"]) == "yes<|im_end|>\n"


def test_white_space_behind_the_end_token_is_not_trained_as_a_turn() -> None:
    row, _ = encode(BYTES["prefixes"], {"messages": TALK[:3]}, "assistant")
    assert trained_text(BYTES["prefixes"], row["ids"], row["trained"]) == "a1<|im_end|>"


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), max_size=12))
def test_common_prefix_against_a_plain_loop(first: list[int], second: list[int]) -> None:
    count = 0
    for a, b in zip(first, second):
        if a != b:
            break
        count += 1
    assert common_prefix(first, second) == count


MERGES = [("\u010a", "\u010a"), ("h", "i"), ("\u0120", "hi"), ("y", "\u0120"), ("a", "\u010a")]


def quick_boundaries(tokens: Tokens, plans: list[assistant_turns.PrefixTexts]) -> list[assistant_turns.Boundaries]:
    """Boundaries from one encoding of each whole text."""
    wholes = [whole for whole, _ in assistant_turns._wholes(tokens, [full for full, _ in plans])]
    return assistant_turns._boundaries(tokens, plans, wholes)


@settings(max_examples=60, deadline=None)
@given(messages=conversations(), trims=st.booleans())
def test_boundaries_from_one_encoding_are_those_of_whole_prefixes(messages: list[dict[str, str]], trims: bool) -> None:
    """The quick way must equal encoding every prefix, also where tokens merge across the end of a header."""
    text = PREFIX_ONLY.replace("message['content']", "message['content'] | trim") if trims else PREFIX_ONLY
    tokens = Tokens(byte_tokenizer(MERGES, template=text))
    assert tokens.template is not None
    (plan,) = assistant_turns._prefix_texts(tokens.template, [assistant_turns.Conversation(0, messages)], False)
    assert not isinstance(plan, BadRow)
    assert quick_boundaries(tokens, [plan]) == assistant_turns._boundaries_slow(tokens, [plan])


def test_rows_whose_roles_or_answers_are_unusable_are_dropped_by_reason() -> None:
    encoder = RowEncoder(BYTES["marks"], "dialogue", "assistant", DataSection(), "messages")
    rows = [
        {"messages": [turn("user", "u"), turn("assistant", "")]},
        {"messages": [turn("user", "u"), turn("narrator", "x")]},
        {"messages": [turn("user", "u")]},
        {"messages": []},
        {"messages": [turn("user", "u"), turn("assistant", "a")]},
    ]
    columns, report = encoder.encode([(i, row, f"row {i + 1}") for i, row in enumerate(rows)])
    assert columns["source_row"] == [4]
    assert report.dropped == {
        "an assistant turn is empty": 1, "unknown role 'narrator'": 1, "no trained token": 1, "'messages' holds no messages": 1,
    }  # fmt: skip


def test_marks_and_prefixes_agree_on_real_conversations() -> None:
    import json

    from transformers import AutoTokenizer

    from llmrecipe.data.tokenize.chat_templates import set_template

    tokenizer = AutoTokenizer.from_pretrained(shared("models", "stories260k"))
    set_template(tokenizer, "plain")
    lines = shared("data", "chat_multiturn", "valid.jsonl").read_text().splitlines()
    raw = [(i, json.loads(line), f"row {i}") for i, line in enumerate(lines)]
    marked, _ = RowEncoder(tokenizer, "dialogue", "assistant", DataSection(max_length=10_000), "messages").encode(raw)
    plain = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer.chat_template = plain
    by_prefix, report = RowEncoder(tokenizer, "dialogue", "assistant", DataSection(max_length=10_000), "messages").encode(raw)
    assert marked == by_prefix and report.kept == len(lines) and report.ended_share == 1.0
    tokens = Tokens(tokenizer)
    assert tokens.template is not None
    talks = [assistant_turns.Conversation(0, row["messages"]) for _, row, _ in raw]
    plans = [plan for plan in assistant_turns._prefix_texts(tokens.template, talks, False) if not isinstance(plan, BadRow)]
    assert quick_boundaries(tokens, plans) == assistant_turns._boundaries_slow(tokens, plans)
