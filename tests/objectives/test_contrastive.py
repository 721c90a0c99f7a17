"""Contrastive learning: losses against torch and the formulas of SimCSE, pooling, chunks, processes, metrics by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import astuple, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from llmrecipe.core.errors import RecipeError
from llmrecipe.data import prepare
from llmrecipe.data.batch_parts import part_of_batch
from llmrecipe.data.collate import FeatureVectors, Sequence, pack, pad
from llmrecipe.engine import trunk
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.pooling import LAYERS, Pool, chunk_cuts
from llmrecipe.engine.role_models import Roles
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models import stored_heads
from llmrecipe.objectives.correlations import rank_correlation
from llmrecipe.objectives.pretraining._engines import contrast, embedding_metrics
from llmrecipe.objectives.pretraining._engines.comparison import Candidates, Comparison, Vectors, compare
from llmrecipe.objectives.pretraining.contrastive import Contrastive
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.data_section import DataSection
from llmrecipe.recipe.schema import BatchSection, ModelSection, TokenizerSection
from llmrecipe.runs.open_model import tokenizer_of
from llmrecipe.training.dry_run import examine
from tests.objectives.harness import triple
from tests.objectives.rollouts import Numbers
from tests.tiny import tiny_masked_model, tiny_model

ROWS = [triple(row, length) for row, length in enumerate((4, 9, 3, 7, 5, 6))]
PAIRS = [{**row, "ids_c": None} for row in ROWS]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def roles_for(model: nn.Module, packing: bool = True, micro: int | None = None) -> Roles:
    roles = Roles(Engine(model), Stack([]), Numbers(), torch.device("cpu"), packing, micro)  # type: ignore[arg-type]
    roles.data = ROWS
    return roles


def encoder(objective: Contrastive, **options: Any) -> nn.Module:
    model = tiny_masked_model("bert", **options).double()
    objective.prepare_model(model, 0)
    return model.double().train()


def vectors(a: Tensor, b: Tensor, c: Tensor, hard: list[int], keys: list[int] | None = None) -> Vectors:
    total = 2 * len(a) + len(c)
    return Vectors(a, b, c, torch.tensor(keys or list(range(total))), torch.tensor(hard, dtype=torch.long),
                   torch.ones(len(a), dtype=torch.bool))  # fmt: skip


def infonce(v: Vectors, temperature: float = 0.05, weight: float = 0.0, symmetric: bool = False) -> Tensor:
    how = Comparison("infonce", 1.0, "euclidean", "all", temperature, weight)
    return compare(v, v.joined(None, symmetric), torch.arange(len(v.a)), how).losses


def same_gradients(found: Tensor, wanted: Tensor, *leaves: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(value, leaves, retain_graph=True) for value in (found, wanted))
    for one, other in zip(ours, theirs, strict=True):
        assert float(other.abs().max()) > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [1.0, 5.0])
def test_triplet_is_that_of_torch(margin: float) -> None:
    a, b, c = (numbers(6, 8, seed=s) for s in (1, 2, 3))
    found = contrast.triplet(contrast.distances(a, b, "euclidean"), contrast.distances(a, c, "euclidean"), margin).sum()
    same_gradients(found, nn.TripletMarginLoss(margin=margin, reduction="sum")(a, b, c), a, b, c)


def test_distances_by_hand() -> None:
    x, y = torch.tensor([[3.0, 4.0]], dtype=torch.float64), torch.tensor([[0.0, 4.0]], dtype=torch.float64)
    for kind, value in (("euclidean", 3.0), ("squared", 9.0), ("cosine", 0.2)):
        assert float(contrast.distances(x, y, kind)) == pytest.approx(value, abs=1e-5)
        assert float(contrast.distance_table(x, y, kind)) == pytest.approx(value, abs=1e-12)
    z = numbers(3, 4)
    for table in (contrast.distances(z, z, "euclidean"), contrast.distance_table(z, z, "euclidean")):
        assert bool(torch.isfinite(torch.autograd.grad(table.sum(), z)[0]).all()), "equal rows have a gradient"


def test_infonce_is_a_cross_entropy_over_the_step() -> None:
    a, b = numbers(5, 8, seed=1), numbers(5, 8, seed=2)
    x, y = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    table = F.cosine_similarity(a.unsqueeze(1), b.unsqueeze(0), dim=-1) / 0.05
    right = torch.arange(5)
    none = vectors(x, y, x[:0], [])
    same_gradients(infonce(none).sum(), F.cross_entropy(table, right, reduction="sum"), a, b)
    both = (F.cross_entropy(table, right, reduction="sum") + F.cross_entropy(table.T, right, reduction="sum")) / 2
    same_gradients(infonce(none, symmetric=True).sum(), both, a, b)


@pytest.mark.parametrize("weight", [0.0, 1.5])
def test_hard_negatives_are_those_of_simcse(weight: float) -> None:
    """cat(cos(z1, z2), cos(z1, z3)) / 0.05, with the weight added to each row's own hard negative."""
    a, b, c = (numbers(5, 8, seed=s) for s in (1, 2, 3))
    cosines = [F.cosine_similarity(a.unsqueeze(1), other.unsqueeze(0), dim=-1) / 0.05 for other in (b, c)]
    wanted = F.cross_entropy(torch.cat((cosines[0], cosines[1] + weight * torch.eye(5)), 1), torch.arange(5), reduction="sum")
    x, y, z = (F.normalize(v, dim=-1) for v in (a, b, c))
    same_gradients(infonce(vectors(x, y, z, list(range(5))), weight=weight).sum(), wanted, a, b, c)


def test_equal_texts_are_no_negatives() -> None:
    """Rows 0 and 1 have the same positive, row 2 is its own hard negative's text: softmax over what is left, by hand."""
    s = torch.tensor([[0.9, 0.9, 0.1, 0.3], [0.5, 0.5, 0.2, 0.1], [0.4, 0.4, 0.8, 0.7]], dtype=torch.float64)
    own = torch.arange(3)
    barred = contrast.barred_candidates(torch.tensor([1, 2, 3]), torch.tensor([7, 7, 8]), torch.tensor([7, 7, 8, 3]), own)
    assert barred.tolist() == [[False, True, False, False], [True, False, False, False], [False, False, False, True]]
    left = [(0.9, 0.1, 0.3), (0.5, 0.2, 0.1), (0.8, 0.4, 0.4)]
    wanted = [-(row[0] - math.log(sum(map(math.exp, row)))) for row in left]
    assert contrast.infonce(s, own, barred).tolist() == pytest.approx(wanted)


def test_mined_negatives_by_hand() -> None:
    """Positive at distance 1, margin 1, negatives at 0.5, 1.5, 3 and a barred one at 0.1."""
    table = torch.tensor([[1.0, 0.5, 1.5, 3.0, 0.1]], dtype=torch.float64)
    barred = torch.tensor([[False, False, False, False, True]])
    own = torch.tensor([0])

    def loss(mining: str, rows: Tensor = table, off: Tensor = barred) -> float:
        return float(contrast.mined_triplet(rows, own, off, 1.0, mining))

    assert loss("hard") == pytest.approx(1.0 - 0.5 + 1.0)
    assert loss("semi_hard") == pytest.approx(1.0 - 1.5 + 1.0)
    assert loss("all") == pytest.approx((1.5 + 0.5 + 0.0) / 3)
    assert loss("semi_hard", torch.tensor([[4.0, 0.5, 1.5, 3.0, 0.1]])) == pytest.approx(4.0 - 3.0 + 1.0), "none is farther"
    alone = torch.tensor([[False, True, True, True, True]])
    assert [loss(m, table, alone) for m in ("all", "hard", "semi_hard")] == [0.0, 0.0, 0.0]


# --- pooling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
def test_pooling_is_that_of_the_layers_of_transformers(kind: str) -> None:
    """From `hidden_states` of every text alone; in one packed row and in padded rows."""
    model = tiny_masked_model("bert").double()
    texts = [row["ids_a"] for row in ROWS]
    wanted = []
    for ids in texts:
        states = model.base_model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        h = {"avg_top2": (states[-1] + states[-2]) / 2, "avg_first_last": (states[1] + states[-1]) / 2}.get(kind, states[-1])[0]
        wanted.append({"cls": h[0], "last": h[-1]}.get(kind, h.mean(0)))
    sequences = [Sequence(ids, [0] * len(ids)) for ids in texts]
    for batch in (pack(sequences), pad(sequences, 0), pad(sequences, 0, "left")):
        for cuts in ((), (1, 4)):
            found = Engine(model)(batch, want="pooled", pool=Pool(kind, cuts=cuts))["pooled"]
            torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-9, atol=1e-10)


def test_the_layer_behind_cls_is_in_training_only() -> None:
    objective = Contrastive()
    model = encoder(objective)
    roles = roles_for(model)
    batch = objective.collate(ROWS, roles)
    bare = Engine(model)(batch, want="pooled", pool=Pool("cls"))["pooled"]
    head: Any = model.task_head["pool"]  # type: ignore[union-attr, index]
    torch.testing.assert_close(objective._embed(batch, roles), torch.tanh(bare @ head.weight.T + head.bias))
    roles.engine.eval()
    torch.testing.assert_close(objective._embed(batch, roles), bare)
    objective = Contrastive(mlp_only_train=False)
    torch.testing.assert_close(objective._embed(batch, roles), torch.tanh(bare @ head.weight.T + head.bias))
    other = tiny_masked_model("bert").double()
    stored_heads.mount_heads(other, {k: v for k, v in model.state_dict().items() if k.startswith("task_head.")})
    assert all(not p.requires_grad for p in other.task_head.parameters())  # type: ignore[union-attr]
    assert torch.equal(other.task_head["pool"].weight.double(), head.weight.float().double())  # type: ignore[union-attr, index]


def test_a_part_of_a_batch_is_the_batch_of_its_sequences() -> None:
    sequences = [Sequence(row["ids_a"], [0, *[1] * (len(row["ids_a"]) - 1)], prompt=1) for row in ROWS]
    pictured = [replace(s, features=FeatureVectors(numbers(i, 5).detach(), torch.full((i, 2), i)) if i % 2 else None)
                for i, s in enumerate(sequences)]  # fmt: skip
    ways = (pack, lambda s: pad(s, 0), lambda s: pad(s, 0, "left"))
    for lay, held, first in itertools.product(ways, (sequences, pictured), (1, 2)):
        found, wanted = part_of_batch(lay(held), first, 4), lay(held[first:4])
        assert (found.slots is None) == (wanted.slots is None) == (held is sequences)
        for one, other in zip(*(astuple(b.slots) if b.slots else () for b in (found, wanted)), strict=True):
            assert torch.equal(one, other)
        for name in ("input_ids", "position_ids", "attention_mask", "source", "target", "sequence", "last", "prompt_lengths"):
            one, other = getattr(found, name), getattr(wanted, name)
            assert (one is None and other is None) or torch.equal(one, other), name
        assert (found.layout, found.sequences, found.tokens) == (wanted.layout, wanted.sequences, wanted.tokens)


# --- a step -----------------------------------------------------------------------------------------------------------


def step(
    objective: Contrastive, model: nn.Module, rows: list[dict[str, Any]], **layout: Any
) -> tuple[float, dict[str, Tensor]]:
    roles = roles_for(model, **layout)
    model.zero_grad()
    torch.manual_seed(5)
    (batch,) = next(objective.batches(iter([rows]), roles))
    assert objective.weight(batch) == len(rows)
    loss = objective.loss(batch, roles)
    loss.total.backward()
    return float(loss.total.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


OPTIONS: dict[str, dict[str, Any]] = {
    "infonce": {"loss_type": "infonce"},
    "symmetric": {"loss_type": "infonce", "symmetric": True, "pool": "avg_first_last"},
    "mined": {"mining": "semi_hard", "pool": "avg"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_chunks_and_layouts_have_the_gradient_of_one_batch(name: str) -> None:
    objective = Contrastive(**OPTIONS[name])
    model = encoder(objective)
    total, wanted = step(objective, model, ROWS, packing=False)
    assert max(float(g.abs().max()) for g in wanted.values()) > 1e-2
    for layout in ({"packing": True}, {"packing": False, "micro": 2}, {"packing": True, "micro": 4}):
        found, gradients = step(objective, model, ROWS, **layout)
        assert found == pytest.approx(total, rel=1e-9)
        assert gradients.keys() == wanted.keys()
        for key, value in gradients.items():
            torch.testing.assert_close(value, wanted[key], rtol=1e-7, atol=1e-9)


def test_chunks_replay_their_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed again in the backward pass = with every activation kept, to the bit, under dropout."""
    objective = Contrastive(loss_type="infonce", positives="dropout", chunk=4)
    model = encoder(objective, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.1)
    total, again = step(objective, model, ROWS)
    monkeypatch.setattr(trunk, "checkpoint", lambda call, *inputs, **_: call(*inputs))
    kept, gradients = step(objective, model, ROWS)
    assert total == kept and again.keys() == gradients.keys()
    assert all(torch.equal(again[k], gradients[k]) for k in again)
    assert step(objective, model.eval(), ROWS)[0] != pytest.approx(total, rel=1e-3), "there was dropout"


def test_processes_share_their_texts() -> None:
    """Anchors of two processes among the candidates of both: the sum and its gradients are those of one process."""
    a, b, c = (numbers(5, 8, seed=s) for s in (1, 2, 3))
    whole = vectors(a, b, c, list(range(5)))
    how = Comparison("infonce", 1.0, "euclidean", "all", 0.5, 1.5)
    total = torch.zeros((), dtype=torch.float64)
    for own in (slice(0, 2), slice(2, 5)):
        keys = torch.cat([part[own] for part in whole.keys.split(5)]).tolist()
        half = vectors(a[own], b[own], c[own], list(range(len(a[own]))), keys)
        everyone = Candidates(torch.cat((b, c)), whole.keys[5:], own.start, 5 + own.start, a, whole.keys[:5])
        total = total + compare(half, everyone, torch.arange(len(half.a)), how).losses.sum()
    same_gradients(total, infonce(whole, 0.5, 1.5, symmetric=True).sum(), a, b, c)


def test_pairs_below_the_score_are_candidates_only() -> None:
    """Their anchors have no loss, their texts stay negatives: a cross-entropy over all columns, of the rows that count."""
    objective = Contrastive(loss_type="infonce", min_score=0.75, pool="avg")
    model = encoder(objective)
    rows = [{**row, "score": score} for row, score in zip(PAIRS, (1.0, 0.0, 0.75, 0.5, 0.25, 1.0), strict=True)]
    roles = roles_for(model)
    batch = objective.collate(rows, roles)
    z = F.normalize(objective._embed(batch, roles), dim=-1)
    wanted = F.cross_entropy((z[:6] @ z[6:].T / 0.05)[[0, 2, 5]], torch.tensor([0, 2, 5]), reduction="sum")
    assert float(objective.loss(batch, roles).total.detach()) == pytest.approx(float(wanted.detach()), rel=1e-9)
    assert objective.weight(batch) == 3


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_by_hand() -> None:
    nearness = torch.tensor([[0.9, 0.1, 0.2], [0.3, 0.2, 0.1], [0.5, 0.5, 0.5]])
    off = torch.zeros(3, 3, dtype=torch.bool)
    places = embedding_metrics.ranks(nearness, torch.arange(3), off)
    assert places.tolist() == [1, 2, 3], "equal vectors find nothing"
    off[1, 0] = True
    assert embedding_metrics.ranks(nearness, torch.arange(3), off).tolist() == [1, 1, 3]
    found = embedding_metrics.retrieval(places)
    assert found == {
        "recall@1": pytest.approx(1 / 3),
        "recall@5": 1.0,
        "recall@10": 1.0,
        "mrr": pytest.approx((1 + 0.5 + 1 / 3) / 3),
    }
    square = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    assert embedding_metrics.effective_rank(square) == pytest.approx(2.0)
    assert embedding_metrics.effective_rank(square[:2]) == pytest.approx(1.0)
    assert embedding_metrics.effective_rank(torch.ones(4, 2)) == 0.0
    assert embedding_metrics.uniformity(square) == pytest.approx(math.log((4 * math.exp(-8) + 8 * math.exp(-4)) / 12))
    assert embedding_metrics.uniformity(torch.ones(4, 2)) == pytest.approx(0.0)
    assert embedding_metrics.alignment(square[:1] * 3, square[2:3]).tolist() == pytest.approx([2.0])
    x, y = torch.tensor([0.1, 0.4, 0.3]), torch.tensor([1.0, 2.0, 2.0])
    assert rank_correlation(x, y) == pytest.approx(spearmanr([0.1, 0.4, 0.3], [1, 2, 2]).statistic)
    assert rank_correlation(torch.ones(3), y) == 0.0


@pytest.mark.parametrize("positives", ["pairs", "dropout"])
def test_evaluation_ranks_among_the_whole_split(positives: str) -> None:
    """Whatever the batches: every text of the split is a candidate; scores are compared by rank."""
    options = {"positives": positives} if positives == "dropout" else {"min_score": 0.0}
    objective = Contrastive(loss_type="infonce", pool="avg", **options)  # type: ignore[arg-type]
    model = encoder(objective, hidden_dropout_prob=0.1).eval()
    rows = objective.evaluation_rows([{**row, "score": row["row"] / 10} for row in ROWS], list(range(6)))
    results = []
    for sizes in ((6,), (1, 3, 2)):
        roles, parts, at = roles_for(model), [], 0
        for size in sizes:
            parts.append(objective.collect(objective.collate(rows[at : at + size], roles), roles))
            at += size
        results.append(objective.finish_evaluation({}, {k: torch.cat([p[k] for p in parts]) for k in parts[0]}))
    assert results[0] == pytest.approx(results[1], rel=1e-9)
    assert set(results[0]) - {"loss"} <= set(objective.measures())
    z = {n: torch.stack([model.base_model(torch.tensor([r[n]])).last_hidden_state[0].mean(0) for r in ROWS]) for n in
         ("ids_a", "ids_b", "ids_c")}  # fmt: skip
    a, b, c = (F.normalize(z[n], dim=-1) for n in z)
    other = a if positives == "dropout" else torch.cat((b, c))
    assert results[0]["loss"] == pytest.approx(F.cross_entropy(a @ other.T / 0.05, torch.arange(6)).item(), rel=1e-6)
    cosines = F.cosine_similarity(a, b).tolist()
    assert results[0]["spearman"] == pytest.approx(spearmanr(cosines, range(6)).statistic)
    if positives == "pairs":
        places = ((a @ torch.cat((b, c)).T) >= (a * b).sum(-1, keepdim=True)).sum(1)
        assert results[0]["recall@1"] == pytest.approx(float((places == 1).double().mean()))
        assert results[0]["accuracy"] == pytest.approx(float(((a * b).sum(-1) > (a * c).sum(-1)).double().mean()))
    else:
        assert "recall@1" not in results[0], "low scores are no positives"


def test_v_measure_by_hand() -> None:
    """Two tight clusters: the labels that are theirs, labels across them, and one label in both (h = 1, c as sums of logs)."""
    z = torch.tensor([[0.0, 1.0], [0.1, 1.0], [5.0, 0.0], [5.1, 0.0]], dtype=torch.float64)
    assert embedding_metrics.v_measure(z, torch.tensor([3.0, 3.0, 0.0, 0.0])) == pytest.approx(1.0)
    assert embedding_metrics.v_measure(z, torch.tensor([0.0, 1.0, 0.0, 1.0])) == pytest.approx(0.0, abs=1e-12)
    # Clusters 3 and 1, labels 2 and 2: H(C) = log 2, H(K) = 0.562, I = log 2 - 0.75 H(1/3), H(1/3) = 0.637.
    skewed = torch.tensor([[0.0, 1.0], [0.1, 1.0], [0.2, 1.0], [5.0, 0.0]], dtype=torch.float64)
    shared = math.log(2) - 0.75 * -(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3)
    h, c = shared / math.log(2), shared / -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert embedding_metrics.v_measure(skewed, torch.tensor([0.0, 0.0, 1.0, 1.0])) == pytest.approx(2 * h * c / (h + c))


def test_labels_of_single_texts_are_classes_to_be_found() -> None:
    section = DataSection(path="builtin:classify", max_length=64, truncation="keep_start", limit=12)
    data = prepare(section, tokenizer_of(ModelSection(path="tiny"), TokenizerSection()), "pairs", mask="completion",
                   split="train", seed=0)  # fmt: skip
    rows = [data[i] for i in range(12)]
    assert data.labels is not None and len(data.labels) > 1 and all(isinstance(row["label"], int) for row in rows)
    objective = Contrastive(loss_type="infonce", positives="dropout", pool="avg")
    objective.check(None, data)
    model = encoder(objective, vocab_size=2000).eval()
    found = objective.collect(
        objective.collate(objective.evaluation_rows(rows, list(range(12))), roles_for(model)), roles_for(model)
    )
    assert found["label"].tolist() == [row["label"] for row in rows]
    # Whatever the model says, vectors that are their labels are found.
    found["a"] = found["b"] = F.one_hot(found["label"].long(), found["a"].shape[1]).double() + 0.01 * found["a"]
    assert objective.finish_evaluation({}, found)["v_measure"] == pytest.approx(1.0)
    paired = [{**row, "label": 1} for row in PAIRS]
    assert objective.collect(objective.collate(paired, roles_for(model)), roles_for(model))["label"].isnan().all()


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_cannot_be_compared_is_refused() -> None:
    for options, words in (
        ({"positives": "dropout"}, r"objective\.positives: dropout.*objective\.loss_type=infonce"),
        ({"symmetric": True}, r"objective\.symmetric"),
        ({"loss_type": "infonce", "mining": "hard"}, r"objective\.mining"),
    ):
        with pytest.raises(RecipeError, match=words):
            Contrastive(**options).check(None, None)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"batch\.size: 1"):
        Contrastive(loss_type="infonce").check(SimpleNamespace(batch=BatchSection(size=1)), None)
    with pytest.raises(RecipeError, match=r"objective\.pool: cls.*decoder"):
        Contrastive(pool="cls").prepare_model(tiny_model(), 0)
    roles = roles_for(tiny_model())
    with pytest.raises(RecipeError, match="row 0 has fewer than the 3 texts"):
        Contrastive().collate(PAIRS, roles)
    unsupervised = Contrastive(loss_type="infonce", positives="dropout", pool="avg")
    with pytest.raises(RecipeError, match=r"no dropout.*model\.config"):
        unsupervised.start(roles_for(encoder(unsupervised)))
    unsupervised.start(roles_for(encoder(unsupervised, hidden_dropout_prob=0.1)))


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        ("builtin:stories", {"loss_type": "infonce"}, r"rows of 2 texts, and row 0 has 1; .*positives=dropout"),
        ("builtin:pairs", {}, r"rows of 3 texts, and row 0 has 2; objective\.mining=semi_hard"),
        ("builtin:pairs", {"loss_type": "infonce"}, r"objective\.min_score: rows have scores"),
    ],
)
def test_rows_without_what_is_compared_are_refused_before_weights_load(data: str, options: dict[str, Any], words: str) -> None:
    """Texts become pairs of one text, a row for each."""
    section = DataSection(path=data, max_length=64, truncation="keep_start", limit=8)
    tokenizer = tokenizer_of(ModelSection(path="tiny"), TokenizerSection())
    rows = prepare(section, tokenizer, "pairs", mask="completion", split="train", seed=0)
    assert len(rows) == 8 and bool(rows[0].get("ids_b")) is (data == "builtin:pairs")
    with pytest.raises(RecipeError, match=words):
        Contrastive(**options).check(None, rows)
    Contrastive(loss_type="infonce", positives="dropout").check(None, rows)


def test_chunks_hold_so_many_texts_and_tokens() -> None:
    assert chunk_cuts([4, 4, 4, 9, 2], 2, 10) == (2, 3, 4)
    assert chunk_cuts([4, 4, 4], None, None) == () == chunk_cuts([], 2, 2)
    assert chunk_cuts([50, 50], None, 10) == (1,), "a text that is longer than a chunk has one of its own"


@pytest.mark.slow
def test_a_metric_of_second_texts_is_not_watched_where_rows_have_one(tmp_path: Path) -> None:
    """Texts alone are learned from under dropout, and nothing is there to be found again; it is said before training."""
    rows = tmp_path / "texts.jsonl"
    rows.write_text("".join(f'{{"text": "The cat sits on mat {i}."}}\n' for i in range(40)), encoding="utf-8")
    words = [f"data.path={rows}", "data.validation=0.2", "objective.positives=dropout", "model.config.dropout=0.1"]
    with pytest.raises(RecipeError, match=r"eval\.monitor: eval/recall@1 is computed from a second text, which no row of"):
        examine(compose("contrastive", words))
    examine(compose("contrastive", [*words, "eval.monitor=eval/loss", "eval.mode=min"]))
