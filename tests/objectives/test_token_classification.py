"""Tagging of words: the stock head's loss and gradients, the alignment of words, and entities as seqeval counts them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForTokenClassification

from llmrecipe.data.tokenize.tagged_rows import words_of_tokens
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.role_models import Roles
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models.attention import install_attention
from llmrecipe.models.vocabulary import position_offset
from llmrecipe.objectives.finetuning._engines.entities import entities_of, has_prefixes, shared
from llmrecipe.objectives.finetuning.token_classification import TokenClassification
from tests.objectives.harness import rows_of
from tests.tiny import Tokenizer, tiny_config
from tests.trainings import curve, events, resumes_to_the_bit, train_recipe


@pytest.mark.parametrize("subwords", ["first", "all"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_loss_and_gradients_are_those_of_the_stock_head(family: str, subwords: str) -> None:
    torch.manual_seed(0)
    model: Any = AutoModelForTokenClassification.from_config(tiny_config(family, num_labels=3, classifier_dropout=0.0))
    install_attention(model, "sdpa")
    model.position_offset = position_offset(model)
    model.double().eval()
    objective = TokenClassification(subwords=subwords)
    roles = Roles(Engine(model), Stack([]), Tokenizer(), torch.device("cpu"), packing=True)
    rows = rows_of(objective)
    batch = objective.collate(rows, roles)
    loss = objective.loss(batch, roles).total / objective.weight(batch)
    loss.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    width = max(len(r["ids"]) for r in rows)
    ids = torch.tensor([r["ids"] + [0] * (width - len(r["ids"])) for r in rows])
    mask = torch.tensor([[1] * len(r["ids"]) + [0] * (width - len(r["ids"])) for r in rows])
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        for j, word in enumerate(row["words"]):
            if word >= 0 and (subwords == "all" or word not in row["words"][:j]):
                labels[i, j] = row["label"][word]
    theirs = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    theirs.backward()
    assert float(loss.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)  # the engine's scores are float64
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, atol=1e-8, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_tokens_belong_to_the_word_of_their_first_character() -> None:
    """`[CLS] red hen|s , [SEP]` cut as WordPiece does, and as byte-level tokenizers do, with the space in the token."""
    words = ["red", "hens", ","]
    assert words_of_tokens(words, [(0, 0), (0, 3), (4, 7), (7, 8), (9, 10), (0, 0)]) == [-1, 0, 1, 1, 2, -1]
    assert words_of_tokens(words, [(0, 3), (3, 7), (7, 8), (8, 10)]) == [0, 1, 1, 2]
    assert words_of_tokens(words, [(3, 4), (4, 8)]) == [-1, 1], "a space alone is no part of a word"


def test_entities_by_hand() -> None:
    tags = ["B-PER", "I-PER", "I-LOC", "O", "I-PER", "B-PER", "B-LOC", "I-PER"]
    conll = [("PER", 0, 1), ("LOC", 2, 2), ("PER", 4, 4), ("PER", 5, 5), ("LOC", 6, 6), ("PER", 7, 7)]
    strict = [("PER", 0, 1), ("PER", 5, 5), ("LOC", 6, 6)]
    assert entities_of(tags) == conll and entities_of(tags, strict=True) == strict
    assert shared(conll, strict) == 3
    assert has_prefixes(["O", "B-PER", "I-PER"]) and not has_prefixes(["NOUN", "VERB"]) and not has_prefixes(["O"])


def test_entities_are_seqevals_on_any_tags() -> None:
    metrics = pytest.importorskip("seqeval.metrics")
    from seqeval.scheme import IOB2

    chance = random.Random(0)
    for seed in range(20):
        pool = ["O", "B-A", "I-A", "B-B", "I-B"] if seed % 2 else ["O", "B-A", "I-A", "E-A", "S-A", "I-B", "E-B"]
        gold, found = ([[chance.choice(pool) for _ in range(9)] for _ in range(6)] for _ in range(2))
        for strict in (False, True) if seed % 2 else (False,):
            ours = [(entities_of(g, strict), entities_of(f, strict)) for g, f in zip(gold, found, strict=True)]
            hits, there = sum(shared(g, f) for g, f in ours), sum(len(g) + len(f) for g, f in ours)
            options = {"mode": "strict", "scheme": IOB2} if strict else {}
            theirs = metrics.f1_score(gold, found, zero_division=0, **options)
            assert 2 * hits / max(there, 1) == pytest.approx(theirs, abs=1e-12)


def test_evaluation_counts_whole_entities_over_the_set() -> None:
    """Two sentences by hand: gold has three entities, two are found, one of them with the wrong end."""
    objective = TokenClassification()
    model = torch.nn.Module()
    model.config = type("C", (), {"id2label": {0: "O", 1: "B-X", 2: "I-X"}})()
    gold, found = torch.tensor([1, 2, 0, 1, 1, 0]), torch.tensor([1, 0, 0, 1, 0, 0])
    extra = {"tag": gold, "first": torch.ones(6, dtype=torch.bool), "owner": torch.tensor([0, 0, 0, 1, 1, 1])}
    batch: Any = type("B", (), {"extra": extra})()
    tags = ["O", "B-X", "I-X"]
    assert objective.finish_evaluation({"precision": float("nan"), "recall": 0.0, "f1": 0.0}, {}) == {"precision": 0.0}
    counts = objective._entities(batch, torch.nn.functional.one_hot(found, 3).float(), tags)
    assert counts == {"precision": (1.0, 2.0), "recall": (1.0, 3.0), "f1": (2.0, 5.0)}


def test_a_run_learns_and_resumes_to_the_bit(tmp_path: Path) -> None:
    words = ["steps=4", "batch.size=8", "data.limit=64", "eval.batches=1", "stack=[lora]"]
    resumes_to_the_bit(tmp_path, "token_classification", words, 2)
    first, last = events(tmp_path / "whole", "evaluation")[0], events(tmp_path / "whole", "evaluation")[-1]
    assert last["eval/loss"] < first["eval/loss"] and {"eval/f1", "eval/precision", "eval/recall"} <= last.keys()


def test_files_of_conll_and_numbered_tags_are_the_same_rows(tmp_path: Path) -> None:
    """Columns between word and tag, a document line and a comment are left out; numbers stand for the names of the option."""
    from llmrecipe.evaluation.evaluate_model import evaluate_path

    lines = ["-DOCSTART- -X- O O", "", "# one", "Ann NNP B-P", "Lee NNP I-P", "sings VBZ O", "", "Bo NNP B-P", "", ""]
    (tmp_path / "rows.conll").write_text("\n".join(lines), encoding="utf-8")
    rows = '{"tokens":["Ann","Lee","sings"],"ner_tags":[1,2,0]}\n{"tokens":["Bo"],"ner_tags":[1]}\n'
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    runs = {}
    for name in ("conll", "jsonl"):
        path = tmp_path / f"rows.{name}"
        words = [f"data.path={path}", f"data.validation={path}", "steps=2", "batch.size=2", "objective.tags=[O,B-P,I-P]"]
        words += ["eval.load_best=false"]
        train_recipe(tmp_path / name, "token_classification", "stack=[lora]", *words)
        runs[name] = curve(tmp_path / name)
    assert runs["conll"] == runs["jsonl"]
    found = evaluate_path(str(tmp_path / "jsonl"), ["data.cache=false", "eval.bootstrap=20"])
    last = events(tmp_path / "jsonl", "evaluation")[-1]
    assert found["loss"] == pytest.approx(last["eval/loss"], rel=1e-5) and found["accuracy"] == last["eval/accuracy"]
    assert found["accuracy/low"] <= found["accuracy"] <= found["accuracy/high"]


def test_what_is_no_tagging_is_refused_by_name(tmp_path: Path) -> None:
    from llmrecipe.core.errors import DataError
    from llmrecipe.data.formats.bad_row import BadRow
    from llmrecipe.data.formats.data_format import Conversion, data_format
    from llmrecipe.data.formats.readers import open_file

    convert = data_format("tagged").convert
    for row, wanted in (
        ({"tokens": ["a", "b"], "tags": ["O"]}, "differ in length"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, "empty word"),
        ({"tokens": ["a"], "tags": [True]}, "another kind"),
        ({"tokens": "a b", "tags": ["O"]}, "not a list"),
        ({"tokens": [], "tags": []}, "'tokens' is empty"),
    ):
        with pytest.raises(BadRow, match=wanted):
            convert(row, Conversion("tagged"))
    (tmp_path / "bad.conll").write_text("Ann B-P\nLee\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"bad.conll:1: 'Lee' has no tag"):
        open_file(tmp_path / "bad.conll")


def test_names_of_tags_that_do_not_fit_the_rows_are_refused(tmp_path: Path) -> None:
    from llmrecipe.core.errors import UserError
    from llmrecipe.training.dry_run import check

    (tmp_path / "rows.jsonl").write_text('{"tokens": ["a", "b"], "ner_tags": [0, 1]}\n' * 4, encoding="utf-8")
    with pytest.raises(UserError, match=r"not among those of the objective: 1 \(named: O\); add them to objective\.tags"):
        check("token_classification", [f"data.path={tmp_path / 'rows.jsonl'}", "objective.tags=[O]"])
    with pytest.raises(UserError, match=r"objective\.tags: 'O' is named more than once"):
        check("token_classification", ["objective.tags=[O,O]"])
