"""Next sentence prediction: pairs as BERT makes them, labels, parity with Transformers, two terms by their own counts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from llmrecipe.core.errors import RecipeError
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.role_models import Roles
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models.attention import install_attention
from llmrecipe.objectives.pretraining._engines.sentence_pairs import Document, Pair, PairPlan, make_pairs
from llmrecipe.objectives.pretraining.nsp import Nsp
from tests.tiny import Tokenizer, tiny_config, tiny_masked_model

CLS, SEP = 1, 2
WIDE = 1000


def corpus(count: int, seed: int = 0) -> list[Document]:
    """Documents whose tokens say where they are from: 1000 x document + place."""
    draws = np.random.default_rng(seed)
    found = []
    for number in range(count):
        lengths = [int(n) for n in draws.integers(3, 12, size=int(draws.integers(1, 20)))]
        total = sum(lengths)
        found.append(Document([WIDE * number + i for i in range(total)], list(range(total)), lengths))
    return found


def plan(**options: Any) -> PairPlan:
    return PairPlan(**{"room": 61, "p_random": 0.5, "short_prob": 0.1, "exact": False, "negatives": "other_doc", **options})


def made(documents: list[Document], epochs: int = 1, **options: Any) -> list[tuple[int, Pair]]:
    return [
        (n, pair)
        for epoch in range(epochs)
        for n, one in enumerate(documents)
        for pair in make_pairs(one, plan(**options), np.random.default_rng([epoch, n]), lambda k: documents[k % len(documents)])
    ]


def ids(segment: list[tuple[int, int]]) -> list[int]:
    return [token for token, _ in segment]


DOCUMENTS = corpus(300)


def test_positives_follow_and_negatives_come_from_elsewhere() -> None:
    pairs = made(DOCUMENTS, epochs=14)
    assert len(pairs) > 10_000
    for number, pair in pairs:
        first, second = ids(pair.first), ids(pair.second)
        assert first and second and len(first) + len(second) <= 61
        assert {i // WIDE for i in first} == {number} and len({i // WIDE for i in second}) == 1
        assert (second[0] // WIDE == number) == pair.is_next
        if pair.is_next and len(first) + len(second) < 61:
            assert second[0] == first[-1] + 1, "nothing is left out between them"
        assert first == list(range(first[0], first[-1] + 1)) and second == list(range(second[0], second[-1] + 1))


def test_labels_are_those_of_the_procedure() -> None:
    share = np.mean([pair.is_next for _, pair in made(DOCUMENTS, epochs=6)])
    exact = np.mean([pair.is_next for _, pair in made(DOCUMENTS, epochs=6, exact=True)])
    assert exact == pytest.approx(0.5, abs=0.02) and share < exact  # chunks of one sentence are always negative
    assert all(not pair.is_next for _, pair in made(DOCUMENTS, p_random=1.0))
    assert all(pair.is_next for _, pair in made(DOCUMENTS, p_random=0.0, exact=True))


def test_unused_sentences_are_used_by_the_next_pair() -> None:
    """With every B from elsewhere, the first segments run through the document without a gap."""
    (one,) = corpus(1, seed=3)
    documents = [one, *corpus(5, seed=4)]
    seen = [i for n, pair in made(documents, p_random=1.0, short_prob=0.0, room=10_000) if n == 0 for i in ids(pair.first)]
    assert seen == list(one.ids)


def test_lengths_do_not_tell_the_label() -> None:
    """A logistic classifier on the two lengths is at chance where the labels are balanced."""
    pairs = [pair for _, pair in made(DOCUMENTS, epochs=24, exact=True)]
    sizes = np.array([[len(p.first), len(p.second), len(p.first) + len(p.second)] for p in pairs])
    labels = np.array([p.is_next for p in pairs])
    half = len(labels) // 2
    assert LogisticRegression().fit(sizes[:half], labels[:half]).score(sizes[half:], labels[half:]) < 0.52


@pytest.mark.parametrize("negatives", ["same_doc", "swap"])
def test_other_negatives(negatives: str) -> None:
    pairs = made(DOCUMENTS, negatives=negatives)
    assert {pair.is_next for _, pair in pairs} == {True, False}
    for number, pair in pairs:
        first, second = ids(pair.first), ids(pair.second)
        assert {i // WIDE for i in first + second} == {number}
        if not pair.is_next:
            assert second[0] < first[0] if negatives == "swap" else second[0] != first[-1] + 1


def row(number: int, lengths: tuple[int, ...], epoch: int | None = None) -> dict[str, Any]:
    total = sum(lengths)
    found = {"row": number, "ids": [5 + (7 * number + 3 * i) % 50 for i in range(total)], "words": list(range(total))}
    found["sentences"] = list(lengths)
    return found if epoch is None else {**found, "epoch": epoch}


ROWS = [row(0, (3, 4, 2, 5)), row(1, (2, 2, 6)), row(2, (4, 3))]


def setting(objective: Nsp, packing: bool, **more: Any) -> Roles:
    model = tiny_masked_model("bert", **more)
    objective.prepare_model(model, 0)
    roles = Roles(Engine(model.double()), Stack([]), Tokenizer(), torch.device("cpu"), packing)
    roles.max_length, roles.data = 16, ROWS
    return roles


@pytest.mark.parametrize("packing", [False, True])
def test_pairs_are_laid_out_with_segments_and_labels(packing: bool) -> None:
    objective = Nsp()
    batch = objective.collate(ROWS, setting(objective, packing))
    flat, types = batch.input_ids.flatten(), batch.extra["token_type_ids"].flatten()
    assert (flat[batch.extra["pool"]] == CLS).all() and (flat[batch.last] == SEP).all()
    assert batch.extra["is_next"].tolist() == [int(i in batch.extra["next"].tolist()) for i in range(batch.sequences)]
    for start, last in zip(batch.extra["pool"].tolist(), batch.last.tolist(), strict=True):
        own, kinds = flat[start : last + 1].tolist(), types[start : last + 1].tolist()
        assert own.count(SEP) == 2 and kinds == [0] * (own.index(SEP) + 1) + [1] * (len(own) - own.index(SEP) - 1)


@pytest.mark.parametrize("packing", [False, True])
def test_both_terms_equal_those_of_bert_for_pretraining(packing: bool) -> None:
    """On copied weights, with the outputs of the head exchanged: in BERT and Transformers 0 means that B follows."""
    from transformers import BertForPreTraining

    objective = Nsp(with_mlm=True, weight_nsp=0.7)
    roles = setting(objective, packing)
    (micros,) = list(objective.batches(iter([ROWS]), roles))
    plain = Nsp(with_mlm=True).collate(ROWS, setting(Nsp(), packing=False))
    stock = BertForPreTraining(tiny_config("bert")).double().eval()
    install_attention(stock, "sdpa")
    missing, extra = stock.load_state_dict(roles.model.state_dict(), strict=False)
    assert set(missing) == {f"{n}.{p}" for n in ("bert.pooler.dense", "cls.seq_relationship") for p in ("weight", "bias")}
    head: Any = roles.model.task_head["nsp"]
    with torch.no_grad():
        stock.bert.pooler.dense.load_state_dict(head.dense.state_dict())
        stock.cls.seq_relationship.weight.copy_(head.out.weight.flip(0))
        stock.cls.seq_relationship.bias.copy_(head.out.bias.flip(0))
    out = stock(plain.input_ids, attention_mask=plain.attention_mask, token_type_ids=plain.extra["token_type_ids"])
    labels = torch.full_like(plain.input_ids, -100).flatten().index_copy(0, plain.source, plain.target)
    mlm = nn.functional.cross_entropy(out.prediction_logits.flatten(0, 1), labels)
    nsp = nn.functional.cross_entropy(out.seq_relationship_logits, 1 - plain.extra["is_next"])
    loss = objective.loss(micros[0], roles)
    torch.testing.assert_close(loss.total / objective.weight(micros[0]), mlm + 0.7 * nsp, rtol=1e-9, atol=1e-9)
    (mlm + 0.7 * nsp).backward()
    (loss.total / objective.weight(micros[0])).backward()
    for name, parameter in roles.model.named_parameters():
        if name.startswith("bert."):
            torch.testing.assert_close(parameter.grad, stock.get_parameter(name).grad, rtol=1e-6, atol=1e-10)
    assert extra == [n for n in roles.model.state_dict() if n.startswith("task_head.")]


def test_each_term_is_divided_by_its_own_count_however_a_step_is_cut() -> None:
    objective = Nsp(with_mlm=True)
    means = []
    for micro in (None, 1, 2):
        roles = setting(objective, packing=True)
        roles.micro_rows = micro
        (micros,) = list(objective.batches(iter([ROWS]), roles))
        assert len(micros) == {None: 1, 1: 3, 2: 2}[micro]
        means.append(float(sum(objective.loss(m, roles).total.detach() for m in micros) / sum(map(objective.weight, micros))))
    assert means == pytest.approx([means[0]] * 3, rel=1e-9)


def test_pairs_are_new_in_each_epoch_and_the_same_again() -> None:
    objective = Nsp()
    roles = setting(objective, packing=True)

    def layout(epoch: int | None) -> list[int]:
        rows = ROWS if epoch is None else [{**one, "epoch": epoch} for one in ROWS]
        return objective.collate(rows, roles).input_ids.tolist()

    assert layout(0) == layout(0) and layout(None) == layout(None)
    assert len({str(layout(epoch)) for epoch in (0, 1, 2, 3)}) > 2


def test_evaluation_draws_partners_from_its_own_rows() -> None:
    objective = Nsp(p_random=1.0)
    roles = setting(objective, packing=True)
    own = [row(0, (3, 3)), {**row(1, (2, 2)), "ids": [60, 61, 62, 60]}]
    batch = objective.collate(objective.evaluation_rows(own, [0, 1]), roles)
    seen = Counter(batch.input_ids.flatten().tolist())
    train = {i for one in ROWS[1:] for i in one["ids"]} - set(own[0]["ids"])
    assert not train & seen.keys()


def test_one_document_has_no_other() -> None:
    with pytest.raises(RecipeError, match=r"objective\.negatives: other_doc draws B from another document.*same_doc or swap"):
        Nsp().check(None, ROWS[:1])
    Nsp(negatives="swap").check(None, ROWS[:1])
