"""MeZO: the estimate, the update, exactness, memory, processes, history and replay."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from llmrecipe.core import registry
from llmrecipe.core.errors import ModelError, RecipeError, RunError
from llmrecipe.methods._base.method import Wrapper
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.memory._engines import perturbation
from llmrecipe.methods.memory._engines import zeroth_order as zo
from llmrecipe.methods.memory._engines.replay import entries, read_history_header, replay
from llmrecipe.methods.memory.mezo import HISTORY_FILE, Mezo
from tests.methods.memory.mezo_support import Accuracy, FakeRun, Next, Squares, make_run


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).to(dtype)


def data(rows: int = 8, dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, generator=g).to(dtype), torch.randn(rows, 3, generator=g).to(dtype)


def llama(dtype: torch.dtype = torch.bfloat16, tie: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=tie, **sizes)).to(dtype)


IDS = [torch.arange(1, 17)[None]]


def values(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(model: nn.Module, other: dict[str, Tensor]) -> bool:
    return all(torch.equal(p, other[n]) for n, p in model.named_parameters())


def direction(model: nn.Module, seed: int = 7, step: int = 0, sample: int = 0) -> dict[str, Tensor]:
    noise = zo.Noise(seed)
    return {n: noise.normal(n, step, sample, next(zo.chunks_of(p.data))).view(p.shape) for n, p in model.named_parameters()}


def gradient(model: nn.Module, micro: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    model.eval()
    loss = (model(micro[0]) - micro[1]).square().sum() / len(micro[0])
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


# --- the estimate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("eps", "tolerance"), [(1e-3, 1e-3), (1e-5, 1e-6)])
@pytest.mark.parametrize("perturb", ["inplace", "layerwise"])
def test_projected_gradient_is_the_slope_along_z(tmp_path, eps: float, tolerance: float, perturb: str) -> None:
    model = net()
    grads, z = gradient(model, data()), direction(model)
    slope = sum(float((grads[n] * z[n]).sum()) for n in z)
    run = make_run(model, tmp_path, eps=eps, perturb=perturb)
    assert run.step([data()]).metrics["projected_grad"] == pytest.approx(slope, abs=tolerance)


def test_sgd_step_is_worked_by_hand(tmp_path) -> None:
    model = nn.Linear(2, 1, bias=False).double()
    model.weight.data = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    z = direction(model)["weight"].double()
    x, y, eps, lr, decay = torch.tensor([[3.0, 0.5]]).double(), torch.tensor([[1.0]]).double(), 1e-2, 0.1, 0.01

    def loss(w: Tensor) -> float:
        return float(((x @ w.T - y) ** 2).sum())

    w = model.weight.data.clone()
    g = (loss(w + eps * z) - loss(w - eps * z)) / (2 * eps)
    run = make_run(model, tmp_path, eps=eps, weight_decay=decay, run={"learning_rate": lr})
    result = run.step([(x, y)])
    assert result.loss == pytest.approx((loss(w + eps * z) + loss(w - eps * z)) / 2, rel=1e-12)
    assert torch.allclose(model.weight, w - lr * (g * z + decay * w), rtol=1e-6)


def test_the_mean_estimate_points_along_the_gradient(tmp_path) -> None:
    model = net()
    grads, before = gradient(model, data()), values(model)
    run = make_run(model, tmp_path, n=1000, eps=1e-4, run={"learning_rate": 1.0})
    run.step([data()])
    moved = torch.cat([(before[n] - p.detach()).flatten() for n, p in model.named_parameters()])
    true = torch.cat([grads[n].flatten() for n in before])
    assert torch.cosine_similarity(moved, true, dim=0) > 0.95
    assert float(moved.norm() / true.norm()) == pytest.approx(1.0, abs=0.1)


def test_four_samples_are_the_mean_of_four_single_estimates(tmp_path) -> None:
    model = net()
    before = values(model)
    expected = {n: torch.zeros_like(v) for n, v in before.items()}
    single = []
    for sample in range(4):
        z = direction(model, sample=sample)
        sides = []
        for sign in (1, -1):
            for n, p in model.named_parameters():
                p.data = before[n] + sign * 1e-3 * z[n]
            model.eval()
            sides.append(float((model(data()[0]) - data()[1]).square().sum().detach()) / 8)
        single.append((sides[0] - sides[1]) / 2e-3)
        for n in expected:
            expected[n] += single[-1] * z[n] / 4
    for n, p in model.named_parameters():
        p.data = before[n].clone()
    result = make_run(model, tmp_path, n=4, run={"learning_rate": 0.5}).step([data()])
    assert result.metrics["projected_grad"] == pytest.approx(sum(single) / 4, rel=1e-5)
    for n, p in model.named_parameters():
        assert torch.allclose(p, before[n] - 0.5 * expected[n], atol=1e-6)


def test_micro_batches_of_unequal_size_are_one_batch(tmp_path) -> None:
    x, y = data(9)
    whole, parts = net(), net()
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    a = make_run(whole, tmp_path / "a").step([(x, y)])
    b = make_run(parts, tmp_path / "b").step([(x[:2], y[:2]), (x[2:], y[2:])])
    assert a.loss == pytest.approx(b.loss, rel=1e-12) and a.metrics["error"] == pytest.approx(b.metrics["error"])
    assert all(torch.allclose(p, q, rtol=1e-6) for p, q in zip(whole.parameters(), parts.parameters(), strict=True))


class Pair:
    """Two processes as threads."""

    world = 2

    def __init__(self, rank: int, board: list[Tensor | None], meet: threading.Barrier):
        self.rank, self.board, self.meet = rank, board, meet

    def sum(self, value: Tensor) -> Tensor:
        return self._joined(value, torch.add)

    def maximum(self, value: Tensor) -> Tensor:
        return self._joined(value, torch.maximum)

    def passes(self, own: int) -> int:
        return own

    def _joined(self, value: Tensor, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        self.board[self.rank] = value.clone()
        self.meet.wait()
        joined = join(self.board[0], self.board[1])
        self.meet.wait()
        return joined


def test_two_processes_draw_the_same_noise_and_stay_bit_equal(tmp_path) -> None:
    x, y = data(8)
    board: list[Tensor | None] = [None, None]
    meet = threading.Barrier(2, timeout=20)
    runs: list[FakeRun] = []
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        runs.append(make_run(net(), tmp_path / str(rank), run={"runtime": Pair(rank, board, meet)}))
    threads = [threading.Thread(target=lambda r=r: [runs[r].step([(x[r::2], y[r::2])]) for _ in range(3)]) for r in (0, 1)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    (tmp_path / "alone").mkdir()
    alone = make_run(net(), tmp_path / "alone")
    for _ in range(3):
        alone.step([(x[0::2], y[0::2]), (x[1::2], y[1::2])])
    assert same(runs[0].model, values(runs[1].model))
    assert same(runs[0].model, values(alone.model))
    assert not (tmp_path / "1" / HISTORY_FILE).exists()


# --- noise ------------------------------------------------------------------------------------------------------------


def test_noise_depends_on_its_address_alone(monkeypatch) -> None:
    def normal(noise: zo.Noise, name: str, step: int, sample: int, index: int) -> Tensor:
        return noise.normal(name, step, sample, zo.Chunk(index, 1000, 0, 0, torch.zeros(1000)))

    noise = zo.Noise(3)
    first = normal(noise, "a", 5, 0, 0)
    normal(noise, "b", 5, 0, 0)
    assert torch.equal(first, normal(zo.Noise(3), "a", 5, 0, 0))
    others = [("b", 5, 0, 0), ("a", 6, 0, 0), ("a", 5, 1, 0), ("a", 5, 0, 1)]
    assert all(not torch.equal(first, normal(noise, *address)) for address in others)
    assert not torch.equal(first, normal(zo.Noise(4), "a", 5, 0, 0))
    assert abs(float(first.mean())) < 0.1 and float(first.std()) == pytest.approx(1.0, abs=0.1)


def test_chunks_cover_a_tensor_once(monkeypatch) -> None:
    monkeypatch.setattr(zo, "CHUNK", 7)
    tensor = torch.zeros(5, 6)
    zo.shift(tensor, "w", zo.Noise(0), 0, 0, 2.0)
    sizes = (7, 7, 7, 7, 2)
    expected = [zo.Noise(0).normal("w", 0, 0, zo.Chunk(i, s, 0, 0, torch.zeros(s))) for i, s in enumerate(sizes)]
    assert torch.equal(tensor.flatten(), 2.0 * torch.cat(expected))


@pytest.mark.parametrize("rows", [(0, 2), (2, 4), (4, 5), (1, 1)])
def test_the_chunks_of_a_part_are_those_of_the_whole(rows: tuple[int, int], monkeypatch) -> None:
    """Entries 6 a .. 6 b - 1 of a 5 x 6 tensor in chunks of 7: their noise is what they have in the whole."""
    monkeypatch.setattr(zo, "CHUNK", 7)
    whole = torch.zeros(5, 6)
    zo.shift(whole, "w", zo.Noise(0), 3, 1, 1.0)

    class Part(Tensor):
        def to_local(self) -> Tensor:
            return self.as_subclass(Tensor)[slice(*rows)]

    divided = torch.zeros(5, 6).as_subclass(Part)
    monkeypatch.setattr(zo, "first_entry", lambda tensor: 6 * rows[0])
    zo.shift(divided, "w", zo.Noise(0), 3, 1, 1.0)
    held = torch.zeros(5, 6)
    held[slice(*rows)] = whole[slice(*rows)]
    assert torch.equal(divided.as_subclass(Tensor), held)
    assert [chunk.at for chunk in zo.chunks_of(divided)][:1] == ([0] if rows[0] < rows[1] else [])


def test_the_global_generator_is_not_reseeded_and_both_sides_see_the_same(tmp_path) -> None:
    class Noisy(Squares):
        def loss(self, micro, roles):
            self.modes.append(float(torch.rand(())))
            return super().loss(micro, roles)

    torch.manual_seed(5)
    expected = [float(torch.rand(())) for _ in range(2)]
    run = make_run(net(), tmp_path, run={"objective": Noisy()})
    torch.manual_seed(5)
    run.step([data()])
    run.step([data()])
    drawn = [m for m in run.objective.modes if isinstance(m, float)]
    assert drawn == [expected[0], expected[0], expected[1], expected[1]]


# --- exactness --------------------------------------------------------------------------------------------------------


def test_layerwise_restores_bit_for_bit_in_16_bit_with_tied_weights(tmp_path) -> None:
    model = llama()
    before = values(model)
    run = make_run(model, tmp_path, run={"objective": Next(), "learning_rate": 0.0})
    for _ in range(5):
        run.step(IDS)
    assert type(run.stack.rule().mode) is perturbation.Layerwise
    assert same(model, before) and model.lm_head.weight is model.model.embed_tokens.weight


def test_inplace_restores_to_rounding_in_32_bit_and_drifts_in_16(tmp_path) -> None:
    drift = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = llama(dtype)
        before = values(model)
        run = make_run(model, tmp_path, perturb="inplace", run={"objective": Next(), "learning_rate": 0.0})
        for _ in range(5):
            run.step(IDS)
        drift[dtype] = max(float((p.detach() - before[n]).float().abs().max()) for n, p in model.named_parameters())
    assert 0 < drift[torch.float32] < 1e-6 < drift[torch.bfloat16]


@pytest.mark.parametrize("tie", [True, False])
def test_layerwise_and_inplace_estimate_the_same(tmp_path, tie: bool) -> None:
    found = []
    for perturb in ("inplace", "layerwise"):
        run = make_run(llama(torch.float32, tie), tmp_path, perturb=perturb, run={"objective": Next()})
        found.append(run.step(IDS).metrics["projected_grad"])
    assert found[0] == pytest.approx(found[1], abs=1e-3)


@pytest.mark.parametrize("perturb", ["inplace", "layerwise"])
def test_adapters_are_perturbed_and_the_base_is_untouched(tmp_path, perturb: str) -> None:
    model = llama(torch.float32)
    lora = registry.load_class("stack", "lora")(name="lora", target="all-linear")
    run = make_run(model, tmp_path, (lora,), perturb=perturb, run={"objective": Next(), "learning_rate": 1e-3})
    before = values(model)
    model.eval()
    loss = Next().loss(IDS[0], run.roles).total / 15
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    z = direction(model)
    slope = sum(float((g * z[n]).sum()) for n, g in zip(names, grads, strict=True))
    assert run.step(IDS).metrics["projected_grad"] == pytest.approx(slope, rel=0.02, abs=2e-3)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(names) and all(".lora." in n for n in names)


class Direct(nn.Module):
    """Reads the weight of a module it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + x @ self.b.weight.T


def test_a_weight_read_behind_its_modules_back_is_perturbed_too(tmp_path) -> None:
    found = []
    for perturb in ("inplace", "layerwise"):
        torch.manual_seed(0)
        run = make_run(Direct(), tmp_path, perturb=perturb)
        found.append(run.step([data()]).metrics["projected_grad"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_layerwise_leaves_other_weights_alone_while_they_are_swapped_in(tmp_path) -> None:
    """The policy of step 0, swapped in by `stack.reference`, must not be perturbed."""
    model = net()
    x, _ = data()
    seen = []

    class WithReference(Squares):
        def loss(self, micro, roles):
            with run.stack.reference(model):
                seen.append(model(x).clone())
            return super().loss(micro, roles)

    model.eval()
    frozen = model(x).detach().clone()
    run = make_run(model, tmp_path, perturb="layerwise", run={"objective": WithReference()})
    run.stack.snapshot_reference(model)
    for _ in range(2):
        run.step([data()])
    assert len(seen) == 4 and all(torch.equal(s, frozen) for s in seen)


def test_a_pass_that_raises_leaves_the_weights_as_they_were(tmp_path) -> None:
    class Broken(Squares):
        def loss(self, micro, roles):
            super().loss(micro, roles)
            raise RuntimeError("broken")

    for perturb in ("inplace", "layerwise"):
        model = net()
        before = values(model)
        run = make_run(model, tmp_path, perturb=perturb, run={"objective": Broken()})
        with pytest.raises(RuntimeError, match="broken"):
            run.step([data()])
        assert all(torch.allclose(p, before[n], atol=1e-15) for n, p in model.named_parameters())
        assert model.training and run.roles.prepared is model and not model[0]._forward_pre_hooks


def test_stochastic_rounding_is_unbiased_and_keeps_what_is_representable() -> None:
    g = torch.Generator().manual_seed(0)
    for dtype, spacing in ((torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)):
        for sign in (1.0, -1.0):
            value = torch.full((40_000,), sign * (1.0 + 0.25 * spacing))
            rounded = zo.round_at_random(value, dtype, torch.rand(value.shape, generator=g)).float()
            assert set(rounded.tolist()) == {sign, sign * (1.0 + spacing)}
            assert float((rounded.abs() - 1.0).mean() / spacing) == pytest.approx(0.25, abs=0.02)
        exact = torch.tensor([0.0, 1.0, -2.5, 2.0**-20, -(2.0**-9)]).to(dtype).float()
        assert torch.equal(zo.round_at_random(exact, dtype, torch.rand(5, generator=g)).float(), exact)


def test_tiny_updates_survive_in_bfloat16_on_average(tmp_path) -> None:
    model = nn.Linear(400, 50, bias=False).to(torch.bfloat16)
    model.weight.data.fill_(1.0)
    moments = zo.UpdateMoments()
    trained = [zo.Trained("weight", model.weight)]
    for step in range(20):
        zo.update(trained, zo.Noise(step), moments, [zo.StepEstimate(step, 1e-4, (1.0,))])
    expected = -1e-4 * sum(direction(model, seed=s, step=s)["weight"] for s in range(20))
    moved = model.weight.detach().float() - 1.0
    slope = float((moved * expected).sum() / expected.square().sum())
    assert slope == pytest.approx(1.0, abs=0.25)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_nothing_is_saved_for_a_backward_pass(tmp_path) -> None:
    saved = []
    run = make_run(llama(torch.float32), tmp_path, run={"objective": Next()})
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run.step(IDS)
    assert not saved
    squares = make_run(net(), tmp_path)
    squares.step([data()])
    assert squares.objective.with_graph == 0
    assert all(p.grad is None for p in run.model.parameters())
    assert run.stack.wrappers[-1].memory(run.model) == {"optimizer_bytes": 0, "gradient_bytes": 0, "saved_bytes": 0}


def test_dropout_is_off_and_the_mode_comes_back(tmp_path) -> None:
    run = make_run(net().train(), tmp_path)
    run.step([data()])
    assert run.objective.modes == [False, False] and run.model.training


# --- moments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_recomputed_moments_equal_stored_ones(tmp_path, optimizer: str) -> None:
    models = []
    for moments in ("recompute", "store"):
        model = net(torch.float32)
        run = make_run(model, tmp_path, optimizer=optimizer, moments=moments, run={"learning_rate": 0.01})
        for _ in range(6):
            run.step([data(dtype=torch.float32)])
        models.append(model)
    assert same(models[0], values(models[1]))


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_moments_follow_torch_given_the_same_estimates(tmp_path, optimizer: str) -> None:
    model, twin = net(), net()
    if optimizer == "adam":
        reference = torch.optim.AdamW(twin.parameters(), lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    else:
        reference = torch.optim.SGD(twin.parameters(), lr=0.01, momentum=0.9, dampening=0.9)
    run = make_run(model, tmp_path, optimizer=optimizer, run={"learning_rate": zo.float32(0.01)})
    total = dict.fromkeys(values(model), 0.0)
    for step in range(5):
        g = run.step([data()]).metrics["projected_grad"]
        for n, p in twin.named_parameters():
            p.grad = g * direction(twin, step=step)[n].double()
            total[n] = 0.9 * total[n] + 0.1 * p.grad
        if optimizer == "momentum":  # torch starts its buffer at the first gradient, not at zero
            with torch.no_grad():
                for n, p in twin.named_parameters():
                    p.sub_(0.01 * total[n])
        else:
            reference.step()
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_window_is_where_weights_fall_below_a_thousandth() -> None:
    assert Mezo(name="m").window() == 1
    assert Mezo(name="m", optimizer="momentum").window() == 66
    assert Mezo(name="m", optimizer="momentum", history=5).window() == 5
    assert Mezo(name="m", optimizer="adam", moments="store").window() is None
    assert 0.9**66 < 1e-3 < 0.9**65


def test_a_short_window_forgets(tmp_path) -> None:
    run = make_run(net(), tmp_path, optimizer="momentum", history=3)
    for _ in range(5):
        run.step([data()])
    assert [e.step for e in run.stack.rule().past] == [3, 4]


def test_samples_grow_linearly() -> None:
    mezo = Mezo(name="m", n=4, n_schedule="linear")
    assert [mezo.samples(s, 8) for s in range(8)] == [1, 1, 2, 2, 3, 3, 4, 4]


def test_decay_leaves_biases_and_norms(tmp_path) -> None:
    class Zero(Squares):
        def loss(self, micro, roles):
            found = super().loss(micro, roles)
            return type(found)(found.total * 0.0)

    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    before = values(model)
    make_run(model, tmp_path, weight_decay=0.5, perturb="layerwise", run={"objective": Zero()}).step([data()])
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"0.weight", "2.weight"}
    assert torch.allclose(model[0].weight, before["0.weight"] * 0.95, rtol=1e-6)


def test_learning_rate_scales_of_the_stack_are_kept(tmp_path) -> None:
    model = llama(torch.float32)
    lora = registry.load_class("stack", "lora")(name="lora", lr_ratio=16.0)
    run = make_run(model, tmp_path, (lora,), run={"objective": Next(), "learning_rate": 1e-3})
    run.step(IDS)
    scales = {t.name.rpartition(".")[2]: t.lr_scale for t in run.stack.rule().trained}
    assert scales == {"A": 1.0, "B": 16.0}


def test_clipping_bounds_the_projected_gradient(tmp_path) -> None:
    assert zo.projected_gradient(9.0, 1.0, 0.5) == 8.0
    assert zo.projected_gradient(9.0, 1.0, 0.5, clip=3.0) == 3.0
    assert zo.projected_gradient(1.0, 9.0, 0.5, clip=3.0) == -3.0


# --- objectives without a gradient ------------------------------------------------------------------------------------


def test_accuracy_itself_can_be_trained(tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 4)
    label = (x @ torch.randn(4, 3)).argmax(-1)
    model = nn.Linear(4, 3)
    run = make_run(model, tmp_path, eps=0.3, n=4, run={"objective": Accuracy(), "learning_rate": 1.0})

    def accuracy() -> float:
        return float((model(x).argmax(-1) == label).float().mean())

    before = accuracy()
    for _ in range(60):
        run.step([(x, label)])
    assert before < 0.6 and accuracy() > 0.85


def test_it_learns(tmp_path) -> None:
    model = net()
    run = make_run(model, tmp_path, n=2, run={"learning_rate": 0.02})
    losses = [run.step([data()]).loss for _ in range(80)]
    assert losses[-1] < 0.8 * losses[0]


# --- history ----------------------------------------------------------------------------------------------------------

SETTINGS = [
    {"optimizer": "sgd"},
    {"optimizer": "sgd", "n": 3, "n_schedule": "linear", "weight_decay": 0.1},
    {"optimizer": "momentum", "history": 2},
    {"optimizer": "adam"},
    {"optimizer": "adam", "moments": "store"},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS)
def test_replaying_the_history_gives_the_same_bits(tmp_path, settings: dict, dtype: torch.dtype) -> None:
    model = llama(dtype)
    run = make_run(
        model, tmp_path, perturb="layerwise", **settings, run={"objective": Next(), "learning_rate": 1e-4, "steps": 4}
    )
    for _ in range(4):
        run.step(IDS)
    fresh = llama(dtype)
    assert replay(fresh, tmp_path / HISTORY_FILE) == 4
    assert same(fresh, values(model)) and not same(llama(dtype), values(model))
    assert type(run.stack.rule()) is type(run.stack.rule())


def test_the_history_is_ten_bytes_a_step(tmp_path) -> None:
    run = make_run(net(), tmp_path)
    run.step([data()])
    path = tmp_path / HISTORY_FILE
    size = path.stat().st_size
    for _ in range(7):
        run.step([data()])
    assert path.stat().st_size == size + 70
    assert [e.step for e in entries(path)] == list(range(8))
    header = read_history_header(path)
    assert header["seed"] == 7 and header["eps"] == 1e-3 and header["rng"] == "cpu"


def test_replay_refuses_other_weights_and_other_noise(tmp_path) -> None:
    run = make_run(net(), tmp_path)
    run.step([data()])
    path = tmp_path / HISTORY_FILE
    other = net()
    other[0].weight.data[0, 0] += 1
    with pytest.raises(ModelError, match="not the weights the run started from"):
        replay(other, path)
    with pytest.raises(ModelError, match="does not train the tensors"):
        replay(nn.Linear(2, 2), path)
    body = path.read_bytes().replace(
        torch.__version__.split("+")[0].encode(), b"1.13.1"[: len(torch.__version__.split("+")[0])]
    )
    path.write_bytes(body)
    with pytest.raises(RunError, match="torch"):
        replay(net(), path)


@pytest.mark.parametrize("settings", SETTINGS[1:])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, settings: dict) -> None:
    (tmp_path / "whole").mkdir(), (tmp_path / "cut").mkdir()
    batches = [[data(seed=s, dtype=torch.float32)] for s in range(6)]
    whole = make_run(net(torch.float32), tmp_path / "whole", **settings)
    for micros in batches:
        whole.step(micros)
    cut = make_run(net(torch.float32), tmp_path / "cut", **settings)
    for micros in batches[:3]:
        cut.step(micros)
    weights, state = copy.deepcopy(cut.model), {w.name: w.state() for w in cut.stack}
    cut.step(batches[3])  # made after the checkpoint, lost with the crash
    again = make_run(weights, tmp_path / "cut", **settings)
    again.progress.step = 3
    for wrapper in again.stack:
        wrapper.load_state(state[wrapper.name])
    for micros in batches[3:]:
        again.step(micros)
    assert same(again.model, values(whole.model))
    assert (tmp_path / "whole" / HISTORY_FILE).read_bytes() == (tmp_path / "cut" / HISTORY_FILE).read_bytes()


def test_a_history_of_other_settings_is_not_continued(tmp_path) -> None:
    make_run(net(), tmp_path).step([data()])
    other = make_run(net(), tmp_path, eps=0.5)
    other.progress.step = 1
    with pytest.raises(RunError, match="other settings: eps"):
        other.step([data()])
    longer = make_run(net(), tmp_path)
    longer.progress.step = 5
    with pytest.raises(RunError, match="holds 1 steps"):
        longer.step([data()])


def test_a_step_that_is_not_finite_changes_nothing_and_replays_as_nothing(tmp_path) -> None:
    model = net()
    run = make_run(model, tmp_path, perturb="layerwise")
    run.step([data()])
    before = values(model)
    x, y = data()
    assert run.step([(x, y * math.inf)]).finite is False
    assert same(model, before)
    run.step([data()])
    fresh = net()
    assert replay(fresh, tmp_path / HISTORY_FILE) == 3
    assert same(fresh, values(model))


@pytest.mark.slow
def test_replay_in_a_fresh_process(tmp_path) -> None:
    model = net(torch.float32)
    torch.save(model.state_dict(), tmp_path / "start.pt")
    run = make_run(model, tmp_path, perturb="layerwise")
    for _ in range(5):
        run.step([data(dtype=torch.float32)])
    torch.save(model.state_dict(), tmp_path / "end.pt")
    code = (
        "import torch, sys; from torch import nn; from llmrecipe.methods.memory._engines.replay import replay\n"
        "m = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))\n"
        f"m.load_state_dict(torch.load('{tmp_path}/start.pt')); replay(m, '{tmp_path}/{HISTORY_FILE}')\n"
        f"e = torch.load('{tmp_path}/end.pt'); sys.exit(not all(torch.equal(v, e[k]) for k, v in m.state_dict().items()))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_needs_gradients_is_refused(tmp_path) -> None:
    class Greedy(Wrapper):
        def after_backward(self, model, step):
            pass

    class Penalised(Wrapper):
        def penalty(self, model):
            return 0.0

    run = make_run(net(), tmp_path)
    run.model.gradient_checkpointing = True
    with pytest.raises(RecipeError, match="gradient_checkpointing"):
        run.step([data()])
    model = llama(torch.float32)
    model.activation_checkpointing_enable()
    with pytest.raises(RecipeError, match="gradient_checkpointing"):
        make_run(model, tmp_path)
    lora = registry.load_class("stack", "lora")(name="lora")
    with pytest.raises(RecipeError, match="works on gradients, and mezo makes none"):
        make_run(llama(torch.float32), tmp_path, (lora, Greedy(name="greedy")), run={"objective": Next()}).step(IDS)
    with pytest.raises(RecipeError, match="use inplace"):
        make_run(llama(), tmp_path, (lora, Penalised(name="p")), perturb="layerwise", run={"objective": Next()}).step(IDS)
    with pytest.raises(RecipeError, match="store_history"):
        make_run(net(), tmp_path, optimizer="adam", moments="store", store_history=False).step([data()])
    with pytest.raises(RecipeError, match="both replace"):
        Stack([Mezo(name="a"), Mezo(name="b")])


def test_a_penalty_is_part_of_the_loss_that_is_differentiated(tmp_path) -> None:
    class Pull(Wrapper):
        def penalty(self, model):
            return 100.0 * model.state_dict(keep_vars=True)["0.weight"].square().sum()

        def opened(self, model):
            return {n for n, _ in model.named_parameters()}

    model = net()
    grads, z, w = gradient(model, data()), direction(model), values(model)["0.weight"]
    slope = sum(float((grads[n] * z[n]).sum()) for n in z) + float((200.0 * w * z["0.weight"]).sum())
    run = make_run(model, tmp_path, (Pull(name="pull"),), eps=1e-5)
    result = run.step([data()])
    assert result.metrics["projected_grad"] == pytest.approx(slope, rel=1e-5)
    assert result.loss < 10  # reported without the penalty
