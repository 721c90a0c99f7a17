"""What preparing rows costs in calls: limits are set once for many, no text is encoded twice, formats are made once."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest

from llmrecipe.core.errors import DataError
from llmrecipe.core.time_limit import bounded
from llmrecipe.data.formats import detect, mismatch
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.formats.data_format import DataFormat, data_format
from llmrecipe.data.templates.chatml import CHATML
from llmrecipe.data.tokenize import chat_templates, special_tokens
from llmrecipe.data.tokenize.call_tokenizer import call_tokenizer
from llmrecipe.data.tokenize.chat_templates import TOGETHER, Talk, Template
from llmrecipe.data.tokenize.encode import RowEncoder
from llmrecipe.recipe.data_section import DataSection
from tests.data.toys import PREFIX_ONLY, byte_tokenizer, turn

CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
REFUSING = CHATML + "{% if messages[0].content == 'no' %}{{ raise_exception('no') }}{% endif %}"


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The limits set so far."""
    found: list[float] = []

    def counted() -> AbstractContextManager[None]:
        found.append(1.0)
        return bounded()

    monkeypatch.setattr(chat_templates, "bounded", counted)
    return found


def one_by_one(template: Template, talks: list[Talk], prompt: bool, marked: bool) -> list[object]:
    found: list[object] = []
    for messages, tools, kwargs in talks:
        try:
            text = (
                template.render_marked(messages, tools, kwargs) if marked else template.render(messages, prompt, tools, kwargs)
            )
            found.append(text if marked else (text, []))
        except BadRow as bad:
            found.append(str(bad))
    return found


@pytest.mark.parametrize(("prompt", "marked"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("text", [CHATML, REFUSING])
def test_many_conversations_render_as_each_alone(text: str, prompt: bool, marked: bool) -> None:
    template = Template("mine", text, named=True)
    talks: list[Talk] = [([turn("user", f"q{i}"), turn("assistant", f"a{i}")], None, None) for i in range(TOGETHER + 3)]
    talks[1] = ([turn("user", "no")], None, None)
    talks[3] = ([turn("user", "q"), {**turn("assistant", ""), "tool_calls": [CALL]}], [CALL], None)
    talks[4] = ([turn("user", "q")], None, {"bos_token": "<s>"})
    talks[5] = ([turn("user", "q"), {**turn("assistant", "a"), "reasoning": None}], None, None)
    found = [str(one) if isinstance(one, BadRow) else one for one in template.render_all(talks, prompt, marked)]
    assert found == one_by_one(template, talks, prompt, marked)
    assert [i for i, one in enumerate(found) if isinstance(one, str)] == ([1] if text is REFUSING else [])


def test_a_limit_holds_for_many_conversations(limits: list[float]) -> None:
    template = Template("mine", REFUSING, named=True)
    talks: list[Talk] = [([turn("user", f"q{i}")], None, None) for i in range(4 * TOGETHER)]
    template.render_all(talks)
    assert len(limits) == 4
    talks[0] = ([turn("user", "no")], None, None)
    template.render_all(talks)
    assert len(limits) == 4 + 4 + TOGETHER


def test_a_template_without_end_stops_in_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_templates, "bounded", lambda: bounded(0.05))
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    slow = "{% if messages[0].content == 'q1' %}" + endless + "{% endif %}"
    with pytest.raises(Exception, match=r"longer than 0.05 s"):
        Template("mine", slow, named=True).render_all([([turn("user", f"q{i}")], None, None) for i in range(3)])


@pytest.mark.parametrize("template", [CHATML, PREFIX_ONLY])
def test_a_prompt_is_not_encoded_besides_the_whole(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer(template=template)
    encoder = RowEncoder(tokenizer, "dialogue", "assistant", DataSection(), "prompt_completion")
    encoded: list[str] = []

    def counted(tokenizer: Any, texts: Any, *rest: Any, **options: Any) -> Any:
        encoded.extend([texts] if isinstance(texts, str) else texts)
        return call_tokenizer(tokenizer, texts, *rest, **options)

    monkeypatch.setattr(special_tokens, "call_tokenizer", counted)
    rows = [{"prompt": [turn("user", f"q{i}")], "completion": [turn("assistant", f"a{i}")]} for i in range(40)]
    columns, report = encoder.encode([(i, row, f"row {i}") for i, row in enumerate(rows)])
    assert report.kept == 40 and report.moved == 0
    assert [one for one in encoded if "q" in one] == [
        tokenizer.apply_chat_template(r["prompt"] + r["completion"], tokenize=False) for r in rows
    ]
    assert len(encoded) <= 43, "the header of an answer, and its end"
    for row, ids, trained in zip(rows, columns["ids"], columns["trained"]):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        assert ids[: len(prompt)] == prompt and trained.index(1) == len(prompt)


def test_formats_are_made_once_for_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def counted(name: str) -> DataFormat:
        made.append(name)
        return data_format(name)

    for module in (detect, mismatch):
        monkeypatch.setattr(module, "data_format", counted)
    sample: list[dict[str, Any]] = [{"prompt": f"q{i}", "completion": "a"} for i in range(20)]
    assert detect.detect(sample, "dialogue", "auto", "here").name == "prompt_completion"
    assert max(made.count(name) for name in made) <= 2, "as one that may be meant, as one that may claim a row"
    with pytest.raises(DataError, match="these are not dialogue rows"):
        detect.detect([*sample, {"prompt": "q", "completion": "a", "label": True}], "dialogue", "auto", "here")
