"""What memory-efficient methods promise against others, in the direction the papers report, at a size where it is seen."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmrecipe.methods._base.method import Probe
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods._engines.quantized import dense_weight, quantized
from llmrecipe.methods.memory.esft import Esft
from llmrecipe.methods.memory.nf4 import Nf4
from llmrecipe.models.tiny import FOLDER
from tests.benchmarks.memory_claims import CLAIMS, losses
from tests.methods.teacher import mean, token_loss, train
from tests.tiny import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

# --- experts ----------------------------------------------------------------------------------------------------------

DOMAINS = 4
WORDS = 15
"""Words of a domain; no two domains share one."""
EXPERTS = 8


def grammar(seed: int) -> Tensor:
    """(WORDS, WORDS) next-word probabilities."""
    return (torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(seed)) * 2).softmax(-1)


def text(table: Tensor, domain: int, seed: int, rows: int = 16) -> Tensor:
    """Rows of 16 words of a domain."""
    generator = torch.Generator().manual_seed(seed * DOMAINS + domain)
    ids = torch.randint(0, WORDS, (rows, 1), generator=generator)
    for _ in range(15):
        ids = torch.cat((ids, torch.multinomial(table[ids[:, -1]], 1, generator=generator)), 1)
    return ids + 4 + WORDS * domain


def pretrained(tables: list[Tensor], seed: int) -> nn.Module:
    """A mixture that has read all domains alike."""
    model: Any = tiny_model("olmoe", seed=seed, scale=1.0, num_experts=EXPERTS, num_experts_per_tok=2)
    model.set_experts_implementation("eager")

    def loss(step: int) -> Tensor:
        return token_loss(model, torch.cat([text(table, d, step, 4) for d, table in enumerate(tables)]))

    train(model, Stack([]), loss, 600, 1e-2)
    return model


def experts_for(model: nn.Module, table: Tensor, domain: int) -> dict[str, list[int]]:
    """The choice for a domain, read from 32 of its rows."""
    stack = Stack([Esft(name="esft", p=0.6, n_tokens=32 * 16)])
    own = copy.deepcopy(model)
    stack.attach(own)

    def batches(n: int, rows: int | None = None) -> Iterator[SimpleNamespace]:
        return (SimpleNamespace(ids=text(table, domain, 10**7 + i, 1), tokens=16) for i in range(n))

    stack.calibrate(own, Probe(batches, lambda batch: token_loss(own, batch.ids)))
    return dict(stack.structures(own)["esft"]["experts"])


def drawn(like: dict[str, list[int]], seed: int) -> dict[str, list[int]]:
    """As many experts of each layer, at random."""
    generator = torch.Generator().manual_seed(seed)
    return {path: sorted(torch.randperm(EXPERTS, generator=generator)[: len(own)].tolist()) for path, own in like.items()}


def ends(model: nn.Module, new: Tensor, tables: list[Tensor]) -> tuple[float, float]:
    """Nats a word of the first domain under its new grammar, and of the domains that stay as they were."""
    others = [mean(partial(loss_of, model, tables[d], d)) for d in range(1, DOMAINS)]
    return mean(partial(loss_of, model, new, 0)), statistics.fmean(others)


def loss_of(model: nn.Module, table: Tensor, domain: int, seed: int) -> Tensor:
    """Nats a word of some rows of a domain."""
    return token_loss(model, text(table, domain, seed))


def tuned(model: nn.Module, new: Tensor, experts: dict[str, list[int]] | None) -> nn.Module:
    """A copy after some steps on the new grammar: of some experts, or of everything."""
    own, stack = copy.deepcopy(model), Stack([] if experts is None else [Esft(name="esft")])
    stack.attach(own, {} if experts is None else {"esft": {"experts": experts}})
    stack.set_trainable(own)
    train(own, stack, partial(loss_of, own, new, 0), 200, 3e-3)
    return own


def test_experts_of_a_domain_learn_about_what_all_weights_do_and_forget_less_than_they_and_random_experts_do() -> None:
    """The grammar of one domain changes. Over three seeds: nats gained on it, and lost on the domains that did not change."""
    gained: dict[str, float] = dict.fromkeys(("full", "esft", "random"), 0.0)
    lost = dict(gained)
    for seed in range(3):
        tables, new = [grammar(100 * seed + d) for d in range(DOMAINS)], grammar(100 * seed + 50)
        model = pretrained(tables, seed)
        choices = [experts_for(model, table, d) for d, table in enumerate(tables)]
        assert all(one != other for i, one in enumerate(choices) for other in choices[:i]), "domains use other experts"
        start = ends(model, new, tables)
        arms = {"full": [None], "esft": [choices[0]], "random": [drawn(choices[0], s) for s in (0, 1)]}
        for name, tries in arms.items():
            for experts in tries:
                end = ends(tuned(model, new, experts), new, tables)
                gained[name] += (start[0] - end[0]) / len(tries)
                lost[name] += (end[1] - start[1]) / len(tries)
    assert gained["esft"] > 0.9 * gained["full"] and gained["esft"] > gained["random"], (gained, lost)
    assert lost["esft"] < 0.3 * lost["full"] and lost["esft"] < 0.8 * lost["random"], (gained, lost)


# --- blocks and quantized bases ---------------------------------------------------------------------------------------


def test_a_budget_for_attention_is_worth_more_than_one_for_the_feed_forward(tmp_path: Path) -> None:
    """As many blocks of SMT in either place, at the packaged recipe's rate; seed by seed."""
    found = losses(tmp_path, CLAIMS["smt"], 3, ("attention", "feed-forward"))
    pairs = list(zip(found["attention"], found["feed-forward"], strict=True))
    assert all(attention < 0.6 * other for attention, other in pairs), found


def test_lora_over_nf4_matches_lora_over_sixteen_bits(tmp_path: Path) -> None:
    """Of about five nats that training gains, the mean over three seeds is less than a hundredth behind."""
    found = losses(tmp_path, CLAIMS["qlora"], 3, ("NF4", "16 bits"))
    assert statistics.fmean(found["NF4"]) < statistics.fmean(found["16 bits"]) + 0.05, found


def test_trained_weights_are_nearer_in_nf4_than_in_fp4() -> None:
    """What the order of the two rests on: the error of every matrix of the embedded model, with double quantization."""
    from transformers import AutoModelForCausalLM

    errors = []
    for kind in ("nf4", "fp4"):
        model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        Nf4(name="q", type=kind).attach(model)
        errors.append([float((dense_weight(m) - before[f"{path}.weight"]).norm()) for path, m in quantized(model)])
    assert len(errors[0]) == 28 and all(nf4 < fp4 for nf4, fp4 in zip(*errors, strict=True)), errors
