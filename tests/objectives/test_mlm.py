"""Masked language modelling: which tokens are hidden and how often, parity with the heads of Transformers, masks by address."""

from __future__ import annotations

import statistics
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.role_models import Roles
from llmrecipe.methods._base.stack import Stack
from llmrecipe.objectives.pretraining._engines.masking import KEEP, MASK, RANDOM, MaskPlan, hide
from llmrecipe.objectives.pretraining.mlm import Mlm
from llmrecipe.objectives.row_draws import generator
from tests.tiny import tiny_masked_model

MASK_ID = 60
POOL = np.arange(5, 60)
SPECIALS = {0, 1, 2, 3, 4, MASK_ID}


class Tokenizer:
    """Sixty-one tokens, of which 0 to 4 and the mask are special."""

    pad_token_id = 0
    mask_token_id: int | None = MASK_ID
    all_special_ids = sorted(SPECIALS)

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(61)}


def row(number: int, length: int, epoch: int | None = None) -> dict[str, Any]:
    """A document of words of one to three tokens between two special tokens."""
    draws = np.random.default_rng(number)
    words: list[int] = []
    while len(words) < length - 2:
        words += [words[-1] + 1 if words else 0] * int(draws.integers(1, 4))
    ids = [1, *(int(i) for i in draws.integers(5, 60, size=length - 2)), 2]
    found = {"row": number, "ids": ids, "words": [-1, *words[: length - 2], -1]}
    return found if epoch is None else {**found, "epoch": epoch}


def plan(**options: Any) -> MaskPlan:
    return MaskPlan(**{"prob": 0.15, "mask": 0.8, "random": 0.1, "exact": True, "unit": "token", "most": None, **options})


def hidden(number: int, length: int, **options: Any) -> Any:
    one = row(number, length)
    return one, hide(plan(**options), one["words"], one["ids"], generator(0, 0, number), MASK_ID, POOL)


@pytest.mark.parametrize(
    "options", [{}, {"exact": False}, {"unit": "word"}, {"unit": "word", "exact": False}, {"unit": "span"}]
)
def test_rates(options: dict[str, Any]) -> None:
    """15 % of the tokens, of which 80 % are masks, 10 % random and 10 % kept; special tokens are neither hidden nor drawn."""
    total, kinds = 0, Counter[int]()
    for number in range(400):
        one, found = hidden(number, 256, **options)
        total += len(one["ids"])
        kinds.update(found.kinds)
        assert found.places == sorted(set(found.places)) and len(found.kinds) == len(found.shown) == len(found.places)
        for place, kind, shown in zip(found.places, found.kinds, found.shown, strict=True):
            assert one["words"][place] >= 0
            assert {MASK: shown == MASK_ID, RANDOM: shown not in SPECIALS, KEEP: shown == one["ids"][place]}[kind]
    count = sum(kinds.values())
    assert count / total == pytest.approx(0.15, abs=0.003)
    spread = 0.02 if options.get("unit") == "span" else 0.01  # a span is one draw
    for kind, share in ((MASK, 0.8), (RANDOM, 0.1), (KEEP, 0.1)):
        assert kinds[kind] / count == pytest.approx(share, abs=spread)


def test_an_exact_share_is_exact() -> None:
    for length in (4, 7, 20, 100):
        assert len(hidden(length, length)[1].places) == max(1, round(0.15 * length))
    assert len(hidden(1, 100, most=3)[1].places) == 3
    assert len(hidden(1, 200, most=3, exact=False, prob=0.5)[1].places) == 3


@pytest.mark.parametrize("options", [{}, {"exact": False}, {"unit": "word"}, {"unit": "span"}])
def test_a_short_row_has_a_hidden_token(options: dict[str, Any]) -> None:
    assert all(hidden(number, 4, prob=0.01, **options)[1].places for number in range(50))


@pytest.mark.parametrize("unit", ["word", "span"])
@pytest.mark.parametrize("exact", [True, False])
def test_words_are_hidden_whole(unit: str, exact: bool) -> None:
    for number in range(100):
        one, found = hidden(number, 64, unit=unit, exact=exact)
        words = {one["words"][place] for place in found.places}
        assert [i for i, word in enumerate(one["words"]) if word in words] == found.places


def test_a_token_is_hidden_by_chance_alone() -> None:
    """Every token of a row is hidden equally often, whichever way tokens are chosen."""
    for exact in (True, False):
        counts = Counter(p for n in range(4000) for p in hide(plan(exact=exact), [-1, *range(10), -1], [1, *range(5, 15), 2],
                         generator(0, n, 0), MASK_ID, POOL).places)  # fmt: skip
        share = [counts[place] / sum(counts.values()) for place in range(1, 11)]
        assert max(abs(s - 0.1) for s in share) < 0.01


def test_masks_follow_seed_epoch_and_row() -> None:
    roles = SimpleNamespace(seed=3, tokenizer=Tokenizer())

    def places(objective: Mlm, *where: Any) -> list[int]:
        one = row(*where)
        return objective.hide_tokens(one["ids"], one["words"], one, roles).places  # type: ignore[arg-type]

    moving, fixed = Mlm(), Mlm(dynamic=False)
    first = [places(moving, n, 40, 0) for n in range(8)]
    assert first == [places(moving, n, 40, 0) for n in range(8)]
    assert first != [places(moving, n, 40, 1) for n in range(8)]
    assert first == [places(fixed, n, 40, 5) for n in range(8)]
    assert first != [places(moving, n, 40) for n in range(8)], "those of an evaluation are its own"
    roles.seed = 4
    assert first != [places(moving, n, 40, 0) for n in range(8)]


FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"type_vocab_size": 1},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "dropout": 0.0, "attention_dropout": 0.0},
    "albert": {"embedding_size": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "electra": {"embedding_size": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "modernbert": {"global_attn_every_n_layers": 1, "cls_token_id": 1, "sep_token_id": 2},
    "llmrecipe_native": {},
}


def masked_model(family: str) -> nn.Module:
    return tiny_masked_model(family, **FAMILIES[family]).double()


def roles_for(model: nn.Module, packing: bool) -> Roles:
    return Roles(Engine(model), Stack([]), Tokenizer(), torch.device("cpu"), packing)


ROWS = [row(number, length) for number, length in enumerate((12, 5, 9))]


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_those_of_transformers(family: str) -> None:
    """The head on gathered positions = the family's own forward with ignored labels, also of packed rows."""
    model, objective = masked_model(family), Mlm()
    objective.prepare_model(model, 0)
    batch = objective.collate(ROWS, roles_for(model, packing=False))
    labels = torch.full_like(batch.input_ids, -100).flatten().index_copy(0, batch.source, batch.target)
    logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum").backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    total = nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
    for packing in (False, True) if family in ("bert", "roberta", "llmrecipe_native") else (False,):
        model.zero_grad()
        roles = roles_for(model, packing)
        loss = objective.loss(objective.collate(ROWS, roles), roles)
        torch.testing.assert_close(loss.total, total, rtol=1e-9, atol=1e-9)
        loss.total.backward()
        assert max(float(g.abs().max()) for g in wanted.values()) > 0.1
        for name, parameter in model.named_parameters():
            if name in wanted:
                torch.testing.assert_close(
                    parameter.grad, wanted[name], rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
                )


def test_two_hundred_steps_are_those_of_transformers() -> None:
    """Packed rows here, and BERT's own forward and loss on padded ones: the same curve from the same weights and masks."""
    objective = Mlm()
    losses: dict[bool, list[float]] = {}
    for packing in (True, False):
        model = masked_model("bert").train()
        roles = roles_for(model, packing)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        curve = losses[packing] = []
        for step in range(200):
            batch = objective.collate([row(number, 6 + 3 * number, step) for number in range(4)], roles)
            if packing:
                loss = objective.loss(batch, roles).total / objective.weight(batch)
            else:
                labels = torch.full_like(batch.input_ids, -100).flatten().index_copy(0, batch.source, batch.target)
                logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(float(loss.detach()))
    assert losses[True] == pytest.approx(losses[False], rel=1e-7)
    assert statistics.mean(losses[True][-20:]) < 0.8 * losses[True][0]


def test_targets_are_the_hidden_tokens_and_metrics_are_by_kind() -> None:
    model, objective = masked_model("bert"), Mlm(prob=0.6, mask=0.5, random=0.3)
    for packing in (False, True):
        roles = roles_for(model, packing)
        batch = objective.collate(ROWS, roles)
        flat = batch.input_ids.flatten()
        kinds = {name: set(batch.extra[name].tolist()) for name in ("mask", "random", "keep")}
        assert sum(map(len, kinds.values())) == objective.weight(batch) and all(kinds.values())
        assert all(flat[batch.source[i]] == MASK_ID for i in kinds["mask"])
        assert all(flat[batch.source[i]] == batch.target[i] for i in kinds["keep"])
        found = objective.loss(batch, roles)
        parts = [found.metrics[f"accuracy/{kind}"] for kind in kinds]
        assert sum(float(s) for s, _ in parts) == float(found.metrics["accuracy"][0])
        assert sum(c for _, c in parts) == found.metrics["accuracy"][1] == float(batch.target.numel())


def test_hidden_tokens_of_a_noisy_grammar_are_found_at_the_bayes_rate() -> None:
    """A symbol goes with its partner in 4 of 5 rows, else with one of 7 others, and one of the two is hidden.

    No guess is right more often than 0.8, and no loss is below -0.8 log 0.8 - 0.2 log(0.2 / 7) = 0.8896 nats.
    """
    torch.manual_seed(0)
    model, objective, draws = masked_model("llmrecipe_native"), Mlm(prob=0.25, mask=1.0, random=0.0), np.random.default_rng(0)
    objective.prepare_model(model, 0)
    roles = roles_for(model, packing=False)

    def measured(first: int, count: int) -> Any:
        symbols, shifts = draws.integers(0, 8, count), draws.integers(1, 8, count) * (draws.random(count) < 0.2)
        rows = [
            {"row": first + i, "ids": [1, 5 + int(a), 20 + int((a + b) % 8), 2], "words": [-1, 0, 1, -1]}
            for i, (a, b) in enumerate(zip(symbols, shifts, strict=True))
        ]
        return objective.loss(objective.collate(rows, roles), roles)

    optimizer = torch.optim.Adam(model.parameters())
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 8e-3 * (1 - step / 200)
        optimizer.zero_grad()
        (measured(64 * step, 64).total / 64).backward()
        optimizer.step()
    with torch.no_grad():
        found = measured(100_000, 2000)
    right, count = found.metrics["accuracy"]
    assert count == 2000 and float(right) / count == pytest.approx(0.8, abs=0.03)
    assert float(found.total) / count == pytest.approx(0.8896, abs=0.1)


def test_what_cannot_be_masked_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"objective\.mask: mask 0\.8 and random 0\.5 exceed 1"):
        Mlm(random=0.5).check(None, None)
    tokenizer = Tokenizer()
    tokenizer.mask_token_id = None
    with pytest.raises(ModelError, match=r"no mask token.*tokenizer\.mask_token=<mask>"):
        Mlm().hide_tokens([1, 5, 2], [-1, 0, -1], row(0, 9), SimpleNamespace(seed=0, tokenizer=tokenizer))  # type: ignore[arg-type]
    headless = nn.Linear(2, 2)
    headless.config = SimpleNamespace(model_type="strange")  # type: ignore[assignment]
    with pytest.raises(ModelError, match=r"the head of 'strange' is not known"):
        Mlm().prepare_model(headless, 0)
