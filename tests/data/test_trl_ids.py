"""The same rows give the same ids and labels as TRL 1.16's own preparation code."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from llmrecipe.data.templates.chatml import CHATML
from llmrecipe.data.tokenize.chat_templates import set_template
from llmrecipe.data.tokenize.encode import RowEncoder
from llmrecipe.recipe.data_section import DataSection
from tests.data.toys import PREFIX_ONLY, byte_tokenizer, turn
from tests.support import shared

pytestmark = pytest.mark.slow


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["user", "assistant", "system", ":", "a", "b", "c", "?", "the", "cat", "sat", ".", "Paris", "is", "it"]
    vocabulary = {w: i for i, w in enumerate(["<unk>", "</s>", "<|im_start|>", "<|im_end|>", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    found = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
    found.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    found.chat_template = CHATML.replace("{{ bos_token }}", "")
    return found


def stories_tokenizer() -> Any:
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(shared("models", "stories260k"))
    set_template(found, "plain")
    found.init_kwargs.pop("llmrecipe_template")  # strings stay raw, as TRL leaves them
    return found


TOKENIZERS = {
    "stories260k": stories_tokenizer,
    "words": word_tokenizer,
    "merging": lambda: byte_tokenizer([("t", "h"), ("th", "e"), (":", "Ġ"), ("?", "Ġ")]),
    "prefixes": lambda: byte_tokenizer(template=PREFIX_ONLY),
    "bos": lambda: byte_tokenizer(adds_bos=True),
}
TALK = [turn("user", "the cat sat ?"), turn("assistant", "it is the cat ."), turn("user", "Paris"), turn("assistant", "a b c")]
SFT: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": "the cat sat ."}, {"text": "Paris is it"}],
    "prompt_completion": [
        {"prompt": "Paris is : ", "completion": "the cat"}, {"prompt": "it ?", "completion": " the cat sat ."},
        {"prompt": TALK[:1], "completion": TALK[1:2]}, {"prompt": TALK[:3], "completion": TALK[3:]},
    ],
    "messages": [{"messages": TALK}, {"messages": TALK[:2]}],
}  # fmt: skip


def trl_sft(tokenizer: Any, rows: list[dict[str, Any]], completion_only: bool, assistant_only: bool) -> list[dict[str, Any]]:
    """Rows through `SFTTrainer._prepare_dataset`, one data set a row since TRL looks at the first row only."""
    from datasets import Dataset
    from trl.trainer.sft_trainer import SFTTrainer

    trainer = SimpleNamespace(
        _tokenizer=tokenizer, chat_template=tokenizer.chat_template, completion_only_loss=completion_only, _is_vlm=False
    )
    args = SimpleNamespace(
        dataset_num_proc=None, dataset_text_field="text", assistant_only_loss=assistant_only, max_length=None, shuffle_dataset=False,  # noqa: E501
        eos_token=None, packing=False, seed=0, truncation_mode="keep_start", packing_strategy="bfd", use_liger_kernel=False,
    )  # fmt: skip
    out = []
    for row in rows:
        out += list(SFTTrainer._prepare_dataset(trainer, Dataset.from_list([row]), tokenizer, args, False, None, "train"))
    return out


def ours(tokenizer: Any, rows: list[dict[str, Any]], name: str, kind: str, mask: str) -> list[dict[str, Any]]:
    columns, report = RowEncoder(tokenizer, kind, mask, DataSection(max_length=100_000), name).encode(
        [(i, r, f"row {i}") for i, r in enumerate(rows)]
    )
    assert report.kept == len(rows), report.lines()
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def labels(row: dict[str, Any]) -> list[int]:
    return [i if t else -100 for i, t in zip(row["ids"], row["trained"])]


@pytest.mark.parametrize("which", list(TOKENIZERS))
@pytest.mark.parametrize("name", list(SFT))
def test_sft_ids_and_labels(which: str, name: str) -> None:
    tokenizer = TOKENIZERS[which]()
    mask = "all" if name == "messages" else "completion"
    theirs = trl_sft(tokenizer, SFT[name], completion_only=name == "prompt_completion", assistant_only=False)
    for mine, other in zip(ours(tokenizer, SFT[name], name, "dialogue", mask), theirs, strict=True):
        assert mine["ids"] == other["input_ids"]
        assert labels(mine)[1:] == other["labels"][1:]


@pytest.mark.parametrize("which", ["stories260k", "words", "merging", "bos"])
def test_assistant_masks(which: str) -> None:
    tokenizer = TOKENIZERS[which]()
    theirs = trl_sft(tokenizer, SFT["messages"], completion_only=False, assistant_only=True)
    for mine, other in zip(ours(tokenizer, SFT["messages"], "messages", "dialogue", "assistant"), theirs, strict=True):
        assert mine["ids"] == other["input_ids"]
        assert labels(mine)[1:] == other["labels"][1:]
        assert 1 in mine["trained"]


def trl_dpo(tokenizer: Any, rows: list[dict[str, Any]], max_length: int | None = None) -> list[dict[str, Any]]:
    from datasets import Dataset
    from trl.trainer.dpo_trainer import DPOTrainer

    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start")
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    out = []
    for row in rows:
        out += list(DPOTrainer._prepare_dataset(trainer, Dataset.from_list([row]), tokenizer, args, "train"))
    return out


PAIRS: list[dict[str, Any]] = [
    {"prompt": "Paris is : ", "chosen": "the cat", "rejected": " it"},
    {"prompt": "it ?", "chosen": " a b", "rejected": "c c c"},
    {"prompt": TALK[:1], "chosen": [turn("assistant", "the cat sat .")], "rejected": [turn("assistant", "it")]},
    {"prompt": TALK[:3], "chosen": [turn("assistant", "a b c")], "rejected": [turn("assistant", "a b b")]},
    {"chosen": TALK[:2], "rejected": [TALK[0], turn("assistant", "c c")]},
    {"chosen": "the cat sat .", "rejected": "the cat is it"},
]


@pytest.mark.parametrize("which", list(TOKENIZERS))
@pytest.mark.parametrize("row", PAIRS, ids=range(len(PAIRS)))
def test_preference_ids(which: str, row: dict[str, Any]) -> None:
    tokenizer = TOKENIZERS[which]()
    (other,) = trl_dpo(tokenizer, [row])
    (mine,) = ours(tokenizer, [row], "preference" if "prompt" in row else "preference_implicit", "preference", "completion")
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert mine[column] == other[column]


@pytest.mark.parametrize("limit", [12, 20, 40])
def test_keep_start_cuts_pairs_as_trl_does(limit: int) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    tokenizer = byte_tokenizer()
    rows = [PAIRS[0], PAIRS[1]]
    theirs = trl_dpo(tokenizer, rows, limit)
    data = DataSection(max_length=limit, truncation="keep_start")
    columns, _report = RowEncoder(tokenizer, "preference", "completion", data, "preference").encode(
        [(i, r, f"row {i}") for i, r in enumerate(rows)]
    )
    mine = [dict(zip(columns, values)) for values in zip(*columns.values())]
    assert len(mine) == len(theirs)
    for own, other in zip(mine, theirs):
        batch = DataCollatorForPreference(pad_token_id=2, max_length=limit)([other])
        for side, answer in enumerate(("chosen_ids", "rejected_ids")):
            real = batch["input_ids"][side][batch["attention_mask"][side] == 1].tolist()
            assert own["prompt_ids"] + own[answer] == real
            assert batch["completion_mask"][side].sum() == len(own[answer])


def test_real_rows_on_real_tokenizer() -> None:
    tokenizer = stories_tokenizer()
    for folder, name in (("gsm8k", "prompt_completion"), ("chat_multiturn", "messages"), ("preference_hh", "preference")):
        rows = [json.loads(line) for line in shared("data", folder, "valid.jsonl").read_text().splitlines()[:10]]
        if name == "preference":
            mine = ours(tokenizer, rows, name, "preference", "completion")
            for own, other in zip(mine, trl_dpo(tokenizer, rows), strict=True):
                assert [own[c] for c in ("prompt_ids", "chosen_ids", "rejected_ids")] == [
                    other[c] for c in ("prompt_ids", "chosen_ids", "rejected_ids")
                ]
            continue
        chat = name == "messages"
        theirs = trl_sft(tokenizer, rows, completion_only=not chat, assistant_only=chat)
        encoder = RowEncoder(tokenizer, "dialogue", "completion", DataSection(max_length=100_000), name)
        columns, _ = encoder.encode([(i, r, "") for i, r in enumerate(rows)])
        for ids, trained, other in zip(columns["ids"], columns["trained"], theirs, strict=True):
            assert ids == other["input_ids"]
            assert labels({"ids": ids, "trained": trained})[1:] == other["labels"][1:]
