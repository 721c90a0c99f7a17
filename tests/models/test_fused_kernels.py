"""Fused kernels: the numbers of the stock model, by stand-ins that write where the library's kernels write, and by the library
itself where it is installed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.data.collate import pack, pad
from llmrecipe.models import fused_kernels
from llmrecipe.models.checkpointing import enable_checkpointing
from llmrecipe.models.chunked_ffn import chunk_feed_forward
from llmrecipe.models.fused_kernels import FusedParts, Kernel, check_kernels, fuse_kernels
from llmrecipe.models.hooks.hook import Hook
from llmrecipe.models.hooks.host import add_hook
from llmrecipe.models.optimizations import same, speed_up, without_speed_ups
from tests.models.configs import tiny
from tests.models.test_optimizations import BATCHES, adapted, assert_same, rows, step

FAMILIES = {
    "llama": (2, 2), "qwen3": (2, 2), "gemma2": (2, 2), "gemma3_text": (2, 2), "phi3": (2, 2), "mixtral": (2, 2),
    "qwen2_moe": (2, 2), "phi": (0, 2), "gpt_neox": (0, 2),
}  # fmt: skip
"""Family -> gated activations, at least, and layers with rotary embedding of its tiny model."""


def gated(act: Callable[[Tensor], Tensor]) -> Kernel:
    """The product in torch, with gradients over the tensors that were given."""

    def forward(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return a, b, act(a) * b

    def backward(a: Tensor, b: Tensor, pull: Tensor) -> tuple[Tensor, Tensor]:
        own, other = a.clone().requires_grad_(), b.clone().requires_grad_()
        with torch.enable_grad():
            found = torch.autograd.grad(act(own) * other, (own, other), pull)
        return a.copy_(found[0]), b.copy_(found[1])

    return Kernel(forward, backward)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (R, H, T, E) in place where its rows are contiguous, reading the left halves of cos and sin alone."""
    own = x.transpose(1, 2).contiguous()
    half = cos.shape[-1] // 2
    c, s = cos[:, :, None, :half], sin[:, :, None, :half]
    left, right = own[..., :half].clone(), own[..., half : 2 * half].clone()
    own[..., :half], own[..., half : 2 * half] = left * c - right * s, right * c + left * s
    return own.transpose(1, 2)


def stand_ins() -> dict[str, Kernel]:
    rotary = Kernel(
        lambda q, k, cos, sin: (turned(q, cos, sin), turned(k, cos, sin), cos, sin),
        lambda q, k, cos, sin: (turned(q, cos, -sin), turned(k, cos, -sin)),
    )
    return {"silu": gated(F.silu), "gelu": gated(functools.partial(F.gelu, approximate="tanh")), "rotary": rotary}


def use_stand_ins(monkeypatch: pytest.MonkeyPatch) -> dict[str, Kernel]:
    """Have every model find stand-ins in place of the library's kernels."""
    found = stand_ins()
    monkeypatch.setattr(fused_kernels, "kernels_lacking", lambda device: None)
    monkeypatch.setattr(fused_kernels, "load_kernels", lambda: found)
    return found


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, Kernel]:
    """Stand-ins that a test may replace; names of those that were called are under `called`."""
    return use_stand_ins(monkeypatch)


def count(kernels: dict[str, Kernel]) -> dict[str, int]:
    """Calls of the forward passes from here on."""
    calls = dict.fromkeys(kernels, 0)
    for name, kernel in list(kernels.items()):

        def forward(*given: Any, name: str = name, kernel: Kernel = kernel) -> Any:
            calls[name] += 1
            return kernel.forward(*given)

        kernels[name] = Kernel(forward, kernel.backward)
    return calls


@pytest.mark.parametrize("layout", list(BATCHES))
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_stock_model(family: str, layout: str, kernels: dict[str, Kernel]) -> None:
    if family in ("mixtral", "qwen2_moe") and layout != "padded":
        pytest.skip("rows of this family are not packed")
    stock = adapted(family)
    fast = copy.deepcopy(stock)
    found = fuse_kernels(fast.model, named=True)
    least, layers = FAMILIES[family]
    assert found.rotary == layers and (found.gated >= least if least else not found.gated) and not found.refused
    calls = count(kernels)
    assert_same(stock, fast, BATCHES[layout]())
    assert calls["rotary"] == layers and bool(calls["silu"] + calls["gelu"]) == bool(least)


def test_everything_else_that_makes_a_model_faster_goes_with_them(kernels: dict[str, Kernel]) -> None:
    stock = adapted("llama")
    for first, second in ((speed_up, fuse), (fuse, speed_up)):
        fast = copy.deepcopy(stock)
        first(fast.model)
        second(fast.model)
        chunk_feed_forward(fast.model, 3)
        assert_same(stock, fast, pack(rows()))


def fuse(model: nn.Module) -> FusedParts:
    return fuse_kernels(model, named=True)


@pytest.mark.parametrize("form", [True, "selective", "offload"])
def test_gradients_are_equal_where_blocks_are_computed_again(form: Any, kernels: dict[str, Kernel]) -> None:
    stock = adapted("llama").train()
    fast = copy.deepcopy(stock)
    fuse(fast.model)
    enable_checkpointing(fast.model, form)
    assert_same(stock, fast, pad(rows(), 0))


class Keeping(Hook):
    """y -> y, and something of y^2 beside it: what computes its gradient is y itself, which a kernel must not write over."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.1))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return _Beside.apply(y, self.w * y.square().sum())


class _Beside(torch.autograd.Function):
    """y, a view of it, with a gradient of one for what stands beside it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, beside: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, pull: Tensor) -> tuple[Tensor, Tensor]:
        return pull, pull.new_ones(())


@pytest.mark.parametrize("place", ["mlp.gate_proj", "mlp.up_proj", "self_attn.q_proj", "self_attn.k_proj"])
def test_a_tensor_that_another_operation_has_kept_is_not_written_over(place: str, kernels: dict[str, Kernel]) -> None:
    stock = adapted("llama")
    for layer in stock.model.model.layers:
        add_hook(layer.get_submodule(place), "keeping", Keeping(), "keeping")
    fast = copy.deepcopy(stock)
    fuse(fast.model)
    assert_same(stock, fast, pack(rows()))


def test_a_graph_that_is_kept_gives_the_same_gradients_twice(kernels: dict[str, Kernel]) -> None:
    engine = adapted("llama")
    fuse(engine.model)
    loss = engine(pack(rows()))["logprobs"].sum()
    trained = [p for p in engine.parameters() if p.requires_grad]
    first, second = (torch.autograd.grad(loss, trained, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    gate, up = (torch.ones(2, 3, requires_grad=True) for _ in range(2))
    product = fused_kernels._Gated.apply(kernels["silu"], gate, up)
    (slope,) = torch.autograd.grad(product.square().sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_precisions_that_meet_give_the_precision_of_the_stock_model(kernels: dict[str, Kernel]) -> None:
    """Under autocast projections are bfloat16 and the angles float32; the stock rotation is then float32."""
    stock = adapted("llama")
    fast = copy.deepcopy(stock)
    with torch.autocast("cpu", torch.bfloat16):
        fuse(fast.model)
        calls = count(kernels)
        wanted, found = step(stock, pack(rows())), step(fast, pack(rows()))
    assert calls["rotary"] == calls["silu"] == 2
    assert found[0] == pytest.approx(wanted[0], rel=1e-3)
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0.05, atol=0.02 * float(gradient.abs().max()), msg=name)


def test_the_stock_model_is_behind_them(kernels: dict[str, Kernel]) -> None:
    engine = adapted("llama")
    wanted = engine(pack(rows()))["logprobs"]
    fuse(engine.model)
    calls = count(kernels)
    with without_speed_ups(engine.model):
        assert torch.equal(engine(pack(rows()))["logprobs"], wanted)
    assert not any(calls.values())
    engine(pack(rows()))
    assert calls == {"silu": 2, "gelu": 0, "rotary": 2}


def test_a_copy_computes_with_its_own_weights(kernels: dict[str, Kernel]) -> None:
    engine = adapted("llama")
    fuse(engine.model)
    twin = copy.deepcopy(engine)
    wanted = twin(pack(rows()))["logprobs"]
    with torch.no_grad():
        for parameter in engine.model.model.layers[-1].parameters():
            parameter.zero_()
    assert torch.equal(twin(pack(rows()))["logprobs"], wanted)
    assert type(engine.model.model.layers[0].self_attn).forward is type(tiny("llama").model.layers[0].self_attn).forward


def test_calling_it_twice_changes_nothing_more(kernels: dict[str, Kernel]) -> None:
    engine = adapted("llama")
    fuse(engine.model)
    before = engine(pack(rows()))["logprobs"]
    assert fuse_kernels(engine.model, named=False) == FusedParts()
    calls = count(kernels)
    assert torch.equal(engine(pack(rows()))["logprobs"], before) and calls["rotary"] == 2


# --- what is refused -------------------------------------------------------------------------------------------------


def wrong(kernel: Kernel, backward: bool, factor: float = 1.001) -> Kernel:
    """The kernel with one pass that is off by a factor."""

    def off(*given: Any) -> Any:
        out = (kernel.backward if backward else kernel.forward)(*given)
        return tuple(value * factor for value in out)

    return Kernel(kernel.forward, off) if backward else Kernel(off, kernel.backward)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("name", "part"), [("silu", "gated activation"), ("rotary", "rotary embedding")])
def test_a_kernel_with_other_numbers_is_left_out_and_an_error_by_key(
    name: str, part: str, backward: bool, kernels: dict[str, Kernel]
) -> None:
    kernels[name] = wrong(kernels[name], backward)
    stock = adapted("llama")
    fast = copy.deepcopy(stock)
    found = fuse_kernels(fast.model, named=False)
    assert found.refused == f"gives other numbers than this model's {part}"
    assert (found.gated, found.rotary) == ((0, 2) if name == "silu" else (2, 0))
    calls = count(kernels)
    assert_same(stock, fast, pack(rows()))
    assert not calls[name]
    with pytest.raises(
        ModelError, match=rf"^model\.kernels: liger gives other numbers than this model's {part}; use auto or off"
    ):
        fuse(adapted("llama").model)


def test_a_kernel_that_fails_leaves_the_model_as_it_was(kernels: dict[str, Kernel]) -> None:
    def fail(*given: Any) -> Any:
        raise RuntimeError("no such instruction\nin line 3")

    kernels["rotary"] = Kernel(fail, fail)
    model = adapted("llama").model
    found = fuse_kernels(model, named=False)
    assert found == FusedParts(refused="failed in a short pass (RuntimeError: no such instruction)") and not found.line()
    assert not any("forward" in m.__dict__ for m in model.modules() if type(m).__name__ in ("SiLUActivation", "LlamaAttention"))


def test_a_model_without_such_parts_is_an_error_by_key_alone(kernels: dict[str, Kernel]) -> None:
    model = tiny("gpt2")
    wanted = model(input_ids=torch.tensor([[3, 4, 5]])).logits
    assert fuse_kernels(model, named=False) == FusedParts()
    assert torch.equal(model(input_ids=torch.tensor([[3, 4, 5]])).logits, wanted)
    with pytest.raises(ModelError, match=r"model\.kernels: liger has nothing to compute in GPT2LMHeadModel"):
        fuse(model)
    with torch.device("meta"):
        assert fuse_kernels(tiny("llama"), named=True) == FusedParts()


def test_rows_in_halves_that_differ_are_not_rotated_by_a_kernel_that_reads_one(
    kernels: dict[str, Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted("llama").model
    angles = type(model.model.rotary_emb).forward

    def uneven(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = angles(self, x, position_ids)
        return cos, torch.cat((sin[..., : sin.shape[-1] // 2], -sin[..., : sin.shape[-1] // 2]), -1)

    monkeypatch.setattr(type(model.model.rotary_emb), "forward", uneven)
    assert fuse_kernels(model, named=False).refused == "gives other numbers than this model's rotary embedding"


def test_what_a_machine_lacks_is_said_before_any_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ModelError, match=r"^model\.kernels: liger needs a CUDA GPU, and the device is cpu; use auto or off$"):
        check_kernels("liger", "cpu")
    monkeypatch.setattr(fused_kernels, "is_installed", lambda name: name == "triton")
    with pytest.raises(ModelError, match=r"liger needs liger_kernel: pip install 'llmrecipe\[kernels\]'; use auto or off$"):
        check_kernels("liger", "cuda")
    check_kernels("off", "cpu")
    check_kernels("auto", "cpu")


# --- an activation that waits ----------------------------------------------------------------------------------------


def test_an_activation_is_the_tensor_wherever_it_is_not_multiplied(kernels: dict[str, Kernel]) -> None:
    act = nn.SiLU()
    x, other = torch.randn(3, 4), torch.randn(3, 4)
    value = F.silu(x)
    fused_kernels._install_gated(act)
    calls = count(kernels)
    assert torch.equal(act(x) + other, value + other) and torch.equal(other - act(x), other - value)
    assert torch.equal(F.dropout(act(x), 0.0), value) and act(x).shape == value.shape
    assert torch.equal(torch.cat((other, act(x))), torch.cat((other, value)))
    assert torch.equal(act(x) * 2.0, value * 2.0) and torch.equal(act(x) * other[:1], value * other[:1])
    assert torch.equal(act(x) * other.double(), value * other.double())
    assert not calls["silu"]
    for product in (act(x) * other, other * act(x), torch.mul(other, act(x)), torch.mul(act(x), other)):
        assert torch.equal(product, value * other)
    assert calls["silu"] == 4


# --- the library -----------------------------------------------------------------------------------------------------


class Scalar(float):
    """A number as a compiled kernel sees it; the interpreter hands on Python's own."""

    def to(self, dtype: object) -> Scalar:
        return self


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Kernel]]:
    """The library's kernels, interpreted."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    pytest.importorskip("liger_kernel")
    from liger_kernel.ops import geglu, swiglu
    from triton import language as tl

    monkeypatch.setattr(swiglu, "float", Scalar, raising=False)
    if type(swiglu._swiglu_forward_kernel).__name__ != "InterpretedFunction":
        pytest.skip("these were imported before, to be compiled")
    # The interpreter has no library of device functions.
    monkeypatch.setattr(geglu, "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)
    fused_kernels.load_kernels.cache_clear()
    yield fused_kernels.load_kernels()
    fused_kernels.load_kernels.cache_clear()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3", "phi"])
def test_kernels_of_the_library_give_the_numbers_of_the_stock_model(family: str, library: dict[str, Kernel]) -> None:
    stock = adapted(family)
    fast = copy.deepcopy(stock)
    found = fuse(fast.model)
    assert found.rotary == 2 and found.line().endswith("by liger-kernel")
    for batch in (pack(rows()), pad(rows(), 0)):
        assert_same(stock, fast, batch)


def test_stand_ins_write_where_the_kernels_of_the_library_write(library: dict[str, Kernel]) -> None:
    for name, own in stand_ins().items():
        seeded = torch.Generator().manual_seed(0)
        if name == "rotary":
            angles = torch.randn(1, 5, 4, generator=seeded)
            cos, sin = (torch.cat((f, f), -1) for f in (angles.cos(), angles.sin()))
            given = [torch.randn(1, 5, heads, 8, generator=seeded).transpose(1, 2) for heads in (4, 2)] + [cos, sin]
            passes = [("forward", given), ("backward", given)]
        else:
            a, b, pull = (torch.randn(3, 16, generator=seeded) for _ in range(3))
            passes = [("forward", [a, b]), ("backward", [a, b, pull])]
        for which, tensors in passes:
            ours, theirs = ([t.clone() for t in tensors] for _ in range(2))
            out = [getattr(kernel, which)(*mine) for kernel, mine in ((own, ours), (library[name], theirs))]
            assert all(same(x, y) for x, y in zip([*out[0], *ours], [*out[1], *theirs], strict=True)), (name, which)
