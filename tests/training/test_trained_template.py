"""A run is prompted as it was trained: raw text raw, Alpaca's form in that form, conversations by their template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmrecipe import load
from llmrecipe.core.errors import DataError
from llmrecipe.data import TokenData, prepare
from llmrecipe.data.token_report import TEXT_RULE
from llmrecipe.data.tokenize.chat_templates import (
    ALPACA_PROMPT,
    is_prompted_raw,
    keep_trained_template,
    prompt_ids,
    set_template,
    template_of,
)
from llmrecipe.engine import generation
from llmrecipe.engine.generation import generate
from llmrecipe.engine.sampling import Sampling
from llmrecipe.evaluation.chat import Chat
from llmrecipe.evaluation.evaluate_model import evaluate_path
from llmrecipe.feedback import generated_answers
from llmrecipe.feedback.judges.labeller import Ask
from llmrecipe.feedback.judges.local import Local
from llmrecipe.interop.merged import export_merged
from llmrecipe.interop.peft.exporter import export_peft
from llmrecipe.recipe.data_section import DataSection
from tests.data.toys import byte_tokenizer, turn
from tests.trainings import train_recipe

TEXT = "Name a colour."
ROWS: dict[str, dict[str, Any]] = {
    "strings": {"prompt": TEXT, "completion": " Blue."},
    "alpaca": {"instruction": TEXT, "output": "Blue."},
    "unpaired_alpaca": {"instruction": TEXT, "output": "Blue.", "label": True},
    "preference_alpaca": {"instruction": TEXT, "chosen": "Blue.", "rejected": "Seven."},
    "messages": {"messages": [turn("user", TEXT), turn("assistant", "Blue.")]},
}
ROW_TYPES = {"unpaired_alpaca": "unpaired", "preference_alpaca": "preference"}
"""Row types of those that are no dialogues."""


def write(folder: Path, row: dict[str, Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text((json.dumps(row) + "\n") * 4)
    return path


def prepared(path: Path, tokenizer: Any, rows: str = "dialogue") -> TokenData:
    found = prepare(DataSection(path=str(path), cache=False), tokenizer, rows, seed=0)
    assert isinstance(found, TokenData)
    return found


def prompt_of(row: dict[str, Any]) -> list[int]:
    if "prompt_ids" in row:
        return [*row["prompt_ids"]]
    return [i for i, trained in zip(row["ids"], row["trained"]) if not trained]


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("bare", [False, True])
def test_the_tokens_of_a_prompt_in_training_are_those_of_the_saved_tokenizer(
    tmp_path: Path, kind: str, adds_bos: bool, bare: bool
) -> None:
    from transformers import AutoTokenizer

    if bare and "alpaca" not in kind:
        pytest.skip("a tokenizer without a template renders no conversation, and text is the same with one")
    tokenizer = byte_tokenizer(adds_bos=adds_bos, **({"template": None} if bare else {}))
    own = template_of(tokenizer)
    data = prepared(write(tmp_path, ROWS[kind]), tokenizer, ROW_TYPES.get(kind, "dialogue"))
    keep_trained_template(tokenizer, data.report.template, data.report.format)
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    served = saved.apply_chat_template([turn("user", TEXT)], add_generation_prompt=True)["input_ids"]
    assert served == prompt_ids(saved, [turn("user", TEXT)]) == prompt_of(data[0])[: len(served)]
    assert len(prompt_of(data[0])) - len(served) in (0, 1)  # a template may write a line break after the last turn
    assert is_prompted_raw(saved) is (kind == "strings")
    if own is not None:
        again = set_template(saved, "own")
        assert again is not None and again.text == own.text


def test_conversations_after_raw_text_are_rendered_by_the_model_s_own_template(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    own, before = template_of(tokenizer), list(prepared(write(tmp_path, ROWS["messages"]), tokenizer))
    raw = prepared(write(tmp_path, ROWS["strings"]), tokenizer).report
    keep_trained_template(tokenizer, raw.template, raw.format)
    again = prepared(write(tmp_path, ROWS["messages"]), tokenizer)
    assert list(again) == before and template_of(tokenizer) == own
    path = write(tmp_path, ROWS["strings"])
    assert prepared(path, tokenizer)[0] == prepared(path, byte_tokenizer())[0]
    keep_trained_template(tokenizer, again.report.template, again.report.format)
    assert not is_prompted_raw(tokenizer) and template_of(tokenizer) == own


@pytest.mark.parametrize("named", [None, "own", "chatml", "alpaca"])
@pytest.mark.parametrize("bare", [False, True])
def test_alpaca_and_prompt_completion_follow_one_rule_that_is_printed(tmp_path: Path, named: str | None, bare: bool) -> None:
    """Both rendered by the template that is named, both raw text where none is, whatever the tokenizer has of its own."""
    if bare and named is not None:
        pytest.skip("a named template does not depend on the tokenizer's own")
    tokenizer = byte_tokenizer(**({"template": None} if bare else {}))
    set_template(tokenizer, named)
    said = TEXT if named is not None else ALPACA_PROMPT.format(instruction=TEXT)
    rows = (ROWS["alpaca"], {"prompt": said, "completion": "Blue."})
    first, second = (prepared(write(tmp_path, row), tokenizer) for row in rows)
    assert first[0]["ids"] == second[0]["ids"] and first[0]["trained"] == second[0]["trained"]
    for report in (first.report, second.report):
        assert report.lines().count(TEXT_RULE) == 1 and "tokenizer.chat_template names a template" in TEXT_RULE
        assert report.template.split(" (")[0] == (named or "none")
    talk = prepared(write(tmp_path, ROWS["messages"]), byte_tokenizer()).report
    assert TEXT_RULE not in talk.lines()


def test_chat_load_and_export_of_a_run_on_raw_text(tmp_path: Path) -> None:
    path = write(tmp_path, ROWS["strings"])
    run = train_recipe(
        tmp_path / "run", "sft_lora", f"data.path={path}", "steps=1", "batch.size=2", "eval.at_start=false", "save.every=null"
    )
    _, tokenizer = load(run.dir.path)
    expected = prompt_of(run.data[0])
    assert prompt_ids(tokenizer, [turn("user", TEXT)]) == expected and tokenizer.decode(expected[1:]) == TEXT
    chat = Chat.open([str(run.dir.path)], [], Sampling(4, 0.0))
    assert chat.prompt_ids([turn("user", TEXT)]) == expected
    from transformers import AutoTokenizer

    export_merged(run.dir.path, tmp_path / "merged")
    exported = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert exported.apply_chat_template([turn("user", TEXT)], add_generation_prompt=True)["input_ids"] == expected


def test_metrics_eval_judges_and_adapters_of_a_run_on_raw_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gives the model the raw prompt, although the model that was trained has a template of its own."""
    path = write(tmp_path, ROWS["strings"])
    given: list[list[int]] = []

    def recorded(model: Any, tokenizer: Any, prompts: list[list[int]], *more: Any, **named: Any) -> list[list[int]]:
        given.extend(prompts)
        return generate(model, tokenizer, prompts, *more, **named)

    monkeypatch.setattr(generated_answers, "generate", recorded)
    words = [f"data.path={path}", f"data.validation={path}", "eval.metrics=[exact_match]", "eval.max_new_tokens=2"]
    run = train_recipe(
        tmp_path / "run", "sft_lora", *words, "steps=1", "batch.size=2", "eval.at_start=false", "save.every=null"
    )
    expected = prompt_of(run.data[0])
    assert run.tokenizer.decode(expected[1:]) == TEXT and len(given) == 4 and all(ids == expected for ids in given)
    given.clear()
    assert "exact_match" in str(evaluate_path(str(run.dir.path), []))
    assert len(given) == 4 and all(ids == expected for ids in given)
    export_peft(run.dir.path, tmp_path / "adapter")
    from transformers import AutoTokenizer

    exported = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert exported.apply_chat_template([turn("user", TEXT)], add_generation_prompt=True)["input_ids"] == expected
    monkeypatch.setattr(generation, "generate", recorded)
    given.clear()
    for place in (run.dir.path, tmp_path / "adapter"):
        judge = Local(path=str(place), max_new_tokens=2)
        judge.open()
        assert len(list(judge.write([Ask((turn("user", TEXT),))]))) == 1
    assert given == [expected, expected]


def test_own_is_not_the_raw_template(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    own = template_of(tokenizer)
    assert own is not None
    keep_trained_template(tokenizer, "none (raw text)", "prompt_completion")
    named = set_template(tokenizer, "own")
    assert named is not None and named.text == own.text and named.named and not is_prompted_raw(tokenizer)
    bare = byte_tokenizer(template=None)
    keep_trained_template(bare, "none (raw text)", "prompt_completion")
    assert bare.chat_template is None
    with pytest.raises(DataError, match="has no template of its own"):
        set_template(bare, "own")
