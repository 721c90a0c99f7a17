"""Sparse matrix tuning: gradients of blocks, scores, the choice, bytes, and what does not move."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmrecipe.core import registry
from llmrecipe.core.errors import UserError
from llmrecipe.core.forward_context import Context, activate
from llmrecipe.methods._base.method import Probe
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.memory._engines.matrix_units import ActivationSums, Unit, chosen_units
from llmrecipe.methods.memory.smt import Smt
from llmrecipe.methods.selective._engines.base_weight import Selected
from llmrecipe.methods.selective._engines.blocks import block_totals, gather_blocks, put_blocks
from llmrecipe.methods.selective._engines.sparse_method import attach_chosen, candidates, sparse_hooks
from llmrecipe.optim.optimizer import build_optimizer, parameter_groups
from llmrecipe.training.memory_estimate import optimizer_bytes, retained_bytes, saved_bytes
from tests.methods.probe import language_probe
from tests.tiny import tiny_model
from tests.trainings import resumes_to_the_bit

IDS = torch.tensor([[5, 9, 3, 60, 7, 7, 2]])


class Layers(nn.Module):
    """A linear layer with a bias, or GPT-2's transposed one, behind another layer."""

    def __init__(self, rows: int, columns: int, conv: bool):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        self.first = nn.Linear(5, columns)
        self.second = Conv1D(rows, columns) if conv else nn.Linear(columns, rows)
        self.double().requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(input)))


@pytest.mark.parity("smt", "slices of the dense gradient, float64")
@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("shape", [(12, 8), (10, 7), (4, 16)])
@pytest.mark.parametrize("batch", [(9,), (2, 6)])
def test_gradients_of_blocks_are_slices_of_the_dense_gradient(
    conv: bool, shape: tuple[int, int], batch: tuple[int, ...]
) -> None:
    """Blocks of 4, whole and hanging over the edge; inputs of two and three dimensions; a bias."""
    model, dense = Layers(*shape, conv), Layers(*shape, conv)
    stored = tuple(dense.second.weight.shape)
    across = -(-stored[1] // 4)
    count = -(-stored[0] // 4) * across
    idx = torch.tensor(sorted({0, count - 1, count // 2, across % count}))
    attach_chosen(model, "smt", {"second.weight": Selected(idx, "blocks 4")})
    dense.second.weight.requires_grad_(True)
    x = torch.randn(*batch, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(*batch, shape[0], dtype=torch.float64)
    hook = next(h for _, _, h in sparse_hooks(model, "smt"))
    torch.nn.init.normal_(hook.values)
    with torch.no_grad():
        for n, block in enumerate(idx.tolist()):
            a, b = block // across * 4, block % across * 4
            part = dense.second.weight[a : a + 4, b : b + 4]
            part += hook.values[n, : part.shape[0], : part.shape[1]]
    got, wanted = model(x), dense(x)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)
    dx = [torch.autograd.grad((y * weights).sum(), x, retain_graph=True)[0] for y in (got, wanted)]
    torch.testing.assert_close(*dx, atol=1e-12, rtol=0)
    (got * weights).sum().backward()
    (wanted * weights).sum().backward()
    for n, block in enumerate(idx.tolist()):
        a, b = block // across * 4, block % across * 4
        part = dense.second.weight.grad[a : a + 4, b : b + 4]
        slot = torch.zeros(4, 4, dtype=torch.float64)
        slot[: part.shape[0], : part.shape[1]] = part
        torch.testing.assert_close(hook.values.grad[n], slot, atol=1e-11, rtol=0)


def test_reading_and_writing_blocks() -> None:
    """A 3 x 5 matrix in blocks of 2: blocks 0 to 5, the lower and the right ones cut."""
    W = torch.arange(15.0).view(3, 5)
    found = gather_blocks(W, torch.tensor([1, 2, 5]), 2)
    assert found.tolist() == [[[2, 3], [7, 8]], [[4, 0], [9, 0]], [[14, 0], [0, 0]]]
    put_blocks(W, torch.tensor([1, 5]), 2, torch.full((2, 2, 2), -1.0))
    assert W.tolist() == [[0, 1, -1, -1, 4], [5, 6, -1, -1, 9], [10, 11, 12, 13, -1]]
    assert block_totals(torch.ones(3, 5), 2).tolist() == [4, 4, 2, 2, 2, 1]


def tuned(**options: Any) -> tuple[nn.Module, Stack, Smt]:
    model = tiny_model()
    wrapper = Smt(name="smt", **{"block": 8, "budget": 640, "warmup_steps": 3, **options})
    stack = Stack([wrapper])
    stack.attach(model)
    stack.calibrate(model, language_probe(model, stack=stack))
    return model, stack, wrapper


def dense_gradients(batches: int = 3) -> dict[str, list[Tensor]]:
    """Of q, k and v, one of every batch of the probe."""
    model = tiny_model().requires_grad_(False)
    probe = language_probe(model)
    names = [n for n, _ in model.named_parameters() if n.split(".")[-2] in ("q_proj", "k_proj", "v_proj")]
    found: dict[str, list[Tensor]] = {n: [] for n in names}
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    for batch in probe.batches(batches):
        model.zero_grad()
        probe.loss(batch).backward()
        for name in names:
            found[name].append(model.get_parameter(name).grad.clone())
    return found


def scored(grads: list[Tensor], reduce: str) -> dict[int, float]:
    """Block of 8 -> its score, by loops."""
    S = torch.stack(grads).sum(0)
    absolute = torch.stack([g.abs() for g in grads]).sum(0)
    result, number = {}, 0
    for a in range(0, S.shape[0], 8):
        for b in range(0, S.shape[1], 8):
            U = S[a : a + 8, b : b + 8]
            result[number] = {
                "abs_mean": float(U.abs().mean()),
                "mean_abs": float(U.mean().abs()),
                "l1": float(U.abs().sum()),
                "l2": float(U.norm()),
                "stream": float(absolute[a : a + 8, b : b + 8].mean()),
            }[reduce]
            number += 1
    return result


@pytest.mark.parametrize("reduce", ["abs_mean", "mean_abs", "l1", "l2", "stream"])
@pytest.mark.parametrize("scope", ["global", "per_matrix"])
def test_the_blocks_with_the_largest_scores_of_the_summed_gradient_train(reduce: str, scope: str) -> None:
    scores = {name: scored(grads, reduce) for name, grads in dense_gradients().items()}
    model, _, _ = tuned(reduce=reduce, scope=scope, budget=768)
    chosen = {(hook.source, i) for _, _, hook in sparse_hooks(model, "smt") for i in hook.idx.tolist()}
    everything = [(value, name, i) for name, blocks in scores.items() for i, value in blocks.items()]
    if scope == "global":
        wanted = {(name, i) for _, name, i in sorted(everything, reverse=True)[:12]}
    else:
        wanted = {(n, i) for n in scores for _, m, i in sorted((e for e in everything if e[1] == n), reverse=True)[:2]}
    assert chosen == wanted and len(chosen) == 12


def test_sums_of_units_alone_rank_as_the_whole_buffer_does() -> None:
    """mean_abs is kept as one number a block; from S itself it is the same."""
    for name, grads in dense_gradients().items():
        S = torch.stack(grads).sum(0)
        unit = Unit(tuple(S.shape), 8, False)
        streamed = torch.stack([unit.sums(g.flatten()) for g in grads]).sum(0).abs() / 64
        wanted = torch.tensor(list(scored(grads, "mean_abs").values()))
        torch.testing.assert_close(streamed, wanted, atol=1e-7, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("threshold", "count"), [(0.5, 2), ("q0.5", 2), ("q0.75", 1)])
def test_a_threshold_takes_every_unit_above_it(threshold: float | str, count: int) -> None:
    unit = Unit((4, 4), 2, False)
    wrapper = Smt(name="smt", threshold=threshold)
    chosen = wrapper._chosen(tiny_model(), {"w": torch.tensor([0.9, 0.1, 0.6, 0.2])}, {"w": unit})
    assert chosen["w"].idx.tolist() == [0, 2][:count]


def test_a_budget_is_spent_in_the_order_of_the_scores_and_too_small_a_one_is_refused() -> None:
    units = {"a": Unit((4, 4), 2, False), "b": Unit((6, 2), 0, False)}
    scores = {"a": torch.tensor([4.0, 1.0, 3.0, 2.0]), "b": torch.tensor([3.5, 0.5])}
    found = chosen_units(scores, units, 14, None, False)
    assert {n: s.idx.tolist() for n, s in found.items()} == {"a": [0, 2], "b": [0]}
    assert (found["a"].layout, found["b"].layout) == ("blocks 2", "columns")
    with pytest.raises(UserError, match="a budget of 3 numbers, and the smallest unit has 4"):
        chosen_units(scores, units, 3, None, False)
    with pytest.raises(UserError, match="above the threshold 9"):
        chosen_units(scores, units, 3, 9.0, False)


def test_channels_are_scored_by_real_inputs_only_and_by_place() -> None:
    x = torch.tensor([[[1.0, -2.0], [3.0, 0.0]], [[-1.0, 1.0], [100.0, 100.0]]])
    mask = torch.tensor([[1, 1], [1, 0]])
    for by_place, wanted in ((False, [5 / 3, 1.0]), (True, [math.sqrt(4 + 9), 3.0])):
        sums = ActivationSums(by_place)
        with activate(Context(attention_mask=mask)):
            sums.see("w", x)
        torch.testing.assert_close(sums.scores(None)["w"], torch.tensor(wanted))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_channels_train_the_columns_that_the_largest_inputs_meet(family: str) -> None:
    """Grouped keys and a transposed square-less matrix: the gradient of a column of W, whatever the shape."""
    target = "attn.k|v + mlp.down" if family == "llama" else "attn.qkv"
    made = []
    for wrapped in (True, False):
        model = tiny_model(family).requires_grad_(False)
        if wrapped:
            stack = Stack([Smt(name="smt", granularity="channel", target=target, budget=400, warmup_steps=2)])
            stack.attach(model)
            stack.calibrate(model, language_probe(model, stack=stack))
        else:
            for name, p in model.named_parameters():
                p.requires_grad_(name in {h.source for _, _, h in sparse_hooks(made[0], "smt")})
        nn.functional.cross_entropy(model(input_ids=IDS).logits[0, :-1], IDS[0, 1:]).backward()
        made.append(model)
    hooks = [hook for _, _, hook in sparse_hooks(made[0], "smt")]
    assert hooks and sum(h.values.numel() for h in hooks) <= 400
    for hook in hooks:
        grad = made[1].get_parameter(hook.source).grad
        axis = 0 if family == "gpt2" else 1
        assert hook.layout == ("rows" if family == "gpt2" else "columns")
        torch.testing.assert_close(hook.values.grad, grad.index_select(axis, hook.idx.long()), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("granularity", ["block", "channel"])
def test_the_backward_pass_keeps_the_columns_that_are_read_and_no_more(granularity: str) -> None:
    """N l u numbers for u block columns, N n for n channels; the index; W by reference."""
    tokens, l = 64, 8
    host = nn.Module()
    host.layer = nn.Linear(32, 24).requires_grad_(False)
    idx, layout = (torch.tensor([0, 4, 5, 9]), "blocks 8") if granularity == "block" else (torch.tensor([3, 20]), "columns")
    attach_chosen(host, "smt", {"layer.weight": Selected(idx, layout)})
    x = torch.randn(2, tokens // 2, 32)
    there = [*host.parameters(), *host.buffers(), x]
    loss, saved = saved_bytes(lambda: host.layer(x), there)
    # Blocks 0, 4, 5, 9 of a grid 3 x 4 read the block columns 0 and 1.
    assert saved == retained_bytes(loss, there) == 4 * tokens * (2 * l if granularity == "block" else 2)


def test_nothing_else_moves_in_fifty_steps_and_state_has_the_size_of_the_blocks() -> None:
    model, stack, wrapper = tuned()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    config = registry.load_class("optim", "adamw")(lr=1e-2, weight_decay=0.1, decay_adapters=True)
    optimizer = build_optimizer(config, parameter_groups(model, config, stack.groups(model)))
    for step in range(50):
        nn.functional.cross_entropy(model(input_ids=IDS).logits[0, :-1], IDS[0, 1:]).backward()
        stack.after_backward(model, step)
        optimizer.step()
        stack.after_step(model, step)
        optimizer.zero_grad()
    model(input_ids=IDS)
    hooks = [hook for _, _, hook in sparse_hooks(model, "smt")]
    n = sum(h.idx.numel() for h in hooks)
    assert n == 10 and optimizer_bytes(optimizer) == 8 * n * 64 + 4 * len(hooks)
    facts = wrapper.memory(model)
    assert (facts["trainable"], facts["optimizer_bytes"], facts["index_bytes"]) == (640, 5120, 4 * n)
    for name, old in before.items():
        if not name.endswith("values"):
            inside = torch.zeros(old.shape, dtype=torch.bool)
            for hook in hooks:
                if hook.source == name:
                    put_blocks(inside, hook.idx, 8, torch.ones(hook.idx.numel(), 8, 8, dtype=torch.bool))
            now = model.get_parameter(name)
            assert torch.equal(now[~inside], old[~inside]) and (not inside.any() or bool((now != old)[inside].any()))


@pytest.mark.parametrize("granularity", ["block", "channel"])
def test_a_share_is_one_of_all_matrices_of_the_model(granularity: str) -> None:
    model, _, wrapper = tuned(granularity=granularity, budget=0.03)
    matrices = sum(p.numel() for n, p in tiny_model().named_parameters() if p.dim() == 2)
    assert wrapper.plan(model) == int(0.03 * matrices)
    spent = sum(h.values.numel() for _, _, h in sparse_hooks(model, "smt"))
    assert int(0.03 * matrices) - 64 < spent <= int(0.03 * matrices)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "channel", "reduce": "stream"}, r"stack\.smt\.reduce"),
        ({"target": "embed"}, "is no linear layer"),
        ({"budget": 0.0001}, "smallest unit has 64"),
        ({"budget": 1e9}, r"stack\.smt\.budget: 1e\+09 stands for 1,000,000,000 numbers, and the matrices of"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tuned(**options)


def test_chosen_blocks_come_nearer_to_a_teacher_than_random_ones_of_the_same_number() -> None:
    """A teacher with other values in layer 0: 4 of the 16 blocks of both layers, chosen, against three draws."""
    name = "model.layers.0.self_attn.v_proj.weight"
    other = tiny_model(scale=1.0)
    with torch.no_grad():
        other.get_parameter(name).add_(0.3 * torch.randn(16, 32, generator=torch.Generator().manual_seed(4)))
    ids = torch.randint(3, 60, (8, 12), generator=torch.Generator().manual_seed(1))
    wanted = other(input_ids=ids).logits.detach()

    def end(seed: int | None) -> float:
        model = tiny_model(scale=1.0)
        stack = Stack([Smt(name="smt", block=8, budget=4 * 64, warmup_steps=1, target="attn.v")])
        stack.attach(model)

        def distance(_: object) -> Tensor:
            return (model(input_ids=ids).logits - wanted).square().mean()

        if seed is None:
            stack.calibrate(model, Probe(lambda n, rows=None: iter([None] * n), distance))
        else:
            drawn = {n: torch.rand(8, generator=torch.Generator().manual_seed(seed)) for n in candidates(model, "attn.v")}
            units = {n: Unit(w.shape, 8, False) for n, w in candidates(model, "attn.v").items()}
            attach_chosen(model, "smt", chosen_units(drawn, units, 4 * 64, None, False))
            stack.set_trainable(model)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            loss = distance(None)
            loss.backward()
            optimizer.step()
            stack.after_step(model, 1)
        return float(loss.detach())

    chosen, random = end(None), [end(seed) for seed in range(3)]
    assert chosen < 0.9 * sum(random) / 3 and chosen < min(random), (chosen, random)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["block", "channel"])
def test_a_resumed_run_is_the_whole_run(tmp_path: Path, granularity: str) -> None:
    words = ["steps=6", "epochs=null", "batch.size=4", f"stack.smt.granularity={granularity}", "stack.smt.warmup_steps=3"]
    words += ["eval.at_start=false", "save.every=3"]
    resumes_to_the_bit(tmp_path, "smt", words, 4)
