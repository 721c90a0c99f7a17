"""Every route of packed attention gives what the loop over documents gives."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmrecipe.core.errors import ModelError
from llmrecipe.models import packed_attention as routes
from llmrecipe.models import packed_flex, recompiled
from llmrecipe.models.attention_calls import Prefix
from llmrecipe.models.packed_call import Call
from tests.models.packed_calls import CASES, call_of, flash, flash_3, layout_of, leaves, loop, varlen
from tests.waiting import PLACE, device


def tolerance(case: str) -> dict[str, float]:
    """The loop takes the softmax of soft caps and sinks in float32."""
    rounded = CASES[case].get("softcap") or CASES[case].get("sinks")
    return {"rtol": 1e-5, "atol": 5e-6} if rounded else {"rtol": 1e-8, "atol": 1e-10}


def gradients(call: Call, out: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1.0, 1.0, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    return list(torch.autograd.grad((out * weights).sum(), leaves(call)))


@pytest.mark.parametrize("case", list(CASES))
def test_flex_attention_gives_what_the_loop_gives(case: str) -> None:
    call = call_of(**CASES[case])
    torch.testing.assert_close(routes.COMPUTE["flex"](call), loop(call), **tolerance(case))


@pytest.mark.parametrize("case", list(CASES))
def test_a_block_mask_opens_the_places_that_the_loop_opens(case: str) -> None:
    """Queries of zero give every column that is seen the same share, and values that are the columns' names read it off."""
    call = call_of(**CASES[case])
    before = sum(p.k.shape[0] * p.k.shape[2] for p in call.prefixes)
    names = torch.eye(before + call.q.shape[2], dtype=torch.float64)
    prefixes, first = [], 0
    for p in call.prefixes:
        count, size = p.k.shape[0], p.k.shape[2]
        values = names[first : first + count * size].view(count, 1, size, -1).expand(-1, p.k.shape[1], -1, -1)
        prefixes.append(Prefix(p.k, values))
        first += count * size
    values = names[before:][None, None].expand(1, call.k.shape[1], -1, -1)
    plain = dataclasses.replace(call, q=call.q * 0, v=values, prefixes=tuple(prefixes), sinks=None)
    seen = loop(plain)[0, 0] > 0
    queries, columns = torch.arange(seen.shape[0])[:, None], torch.arange(seen.shape[1])[None]
    rule = packed_flex.segment_rule(call.layout, call.prefixes, call.causal, call.window, torch.device("cpu"))
    zero = torch.tensor(0)
    assert torch.equal(rule(zero, zero, queries, columns), seen)


def test_blocks_without_an_open_place_are_not_visited() -> None:
    call = call_of([(200, None), (130, None), (60, 1)], window=100)
    mask = packed_flex.block_mask(call)
    rule = packed_flex.segment_rule(call.layout, (), True, 100, torch.device("cpu"))
    places, zero = torch.arange(512).clamp_max(389), torch.tensor(0)
    seen = rule(zero, zero, places[:, None], places[None]).view(4, 128, 4, 128).any(3).any(1)
    assert torch.equal(mask.to_dense()[0, 0].bool(), seen)
    assert not seen.all()
    assert packed_flex.block_mask(call) is mask, "it is made once for all layers of a pass"


@pytest.mark.parametrize("kernel", ["varlen", "flash", "flash 3"])
@pytest.mark.parametrize("case", list(CASES))
def test_kernels_of_variable_lengths_are_asked_for_what_the_loop_computes(
    case: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    route = kernel.removesuffix(" 3")
    monkeypatch.setattr(routes, "_varlen", lambda: varlen)
    monkeypatch.setattr(routes, "_flash", lambda: None if kernel == "flash 3" else flash)
    monkeypatch.setattr(routes, "_flash_3", lambda device: flash_3 if kernel == "flash 3" else None)
    monkeypatch.setattr(routes, "lacking", lambda route, device: None)
    half = dataclasses.replace(call := call_of(**CASES[case]), q=call.q.bfloat16())
    refused = routes.route_refusal(route, half)
    impossible = {
        "sinks",
        "sinks, windows and groups",
        "a biased prefix",
        "a prefix beyond the window",
        "values of another size",
    }
    if route == "varlen":
        impossible |= {"soft cap", "soft cap, windows and shared prompts"}
    assert (refused is not None) == (case in impossible)
    if refused is None:
        for leaf in leaves(call):
            leaf.requires_grad_()
        out, wanted = routes.COMPUTE[route](call), loop(call)
        torch.testing.assert_close(out, wanted, **tolerance(case))
        torch.testing.assert_close(gradients(call, out), gradients(call, wanted), **tolerance(case))


def test_flash_attention_is_deterministic_where_torch_is_told_to_be() -> None:
    """`flash` checks what it is given."""
    at = routes.ragged((call := call_of()).layout, (), torch.device("cpu"))
    q, k, v = (x[0].transpose(0, 1) for x in (call.q, call.k, call.v))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routes, "_flash", lambda: flash)
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        routes._flash_kernel(call, q, k, v, at, (-1, 0))


@pytest.mark.parametrize("both", [True, False])
def test_dropout_of_attention_is_left_to_flash_attention_2(both: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "_flash", lambda: flash if both else None)
    monkeypatch.setattr(routes, "_flash_3", lambda device: pytest.fail("it has no dropout"))
    monkeypatch.setattr(routes, "lacking", lambda route, device: None)
    call = dataclasses.replace(own := call_of([(4, None)]), q=own.q.bfloat16(), dropout=0.5)
    assert (routes.route_refusal("flash", call) is None) == both
    if both:
        routes.COMPUTE["flash"](dataclasses.replace(call, q=own.q))


def test_an_encoders_window_reaches_both_ways() -> None:
    """Values 0, 1, 2, ... under equal shares: each token's output is the mean of those fewer than two places away."""
    call = call_of([(4, None)], causal=False, window=2)
    values = torch.arange(4, dtype=torch.float64)[None, None, :, None].expand(1, 4, -1, 1)
    out = loop(dataclasses.replace(call, q=call.q * 0, v=values))
    torch.testing.assert_close(out[0, 0, :, 0], torch.tensor([0.5, 1.0, 2.0, 2.5], dtype=torch.float64))


def test_a_sink_takes_its_share_and_gives_nothing() -> None:
    """Equal logits of 0 and a sink of log 2: a document's first token keeps 1/3, its second 2/4."""
    call = call_of([(2, None)])
    ones = torch.ones_like(call.v)
    sinks = torch.full((4,), 2.0, dtype=torch.float64).log()
    out = loop(dataclasses.replace(call, q=call.q * 0, v=ones, sinks=sinks))
    torch.testing.assert_close(out[0, 0, :, 0], torch.tensor([1 / 3, 1 / 2], dtype=torch.float64))


@pytest.mark.parametrize(
    ("route", "reason"),
    [
        ("varlen", "varlen needs a CUDA GPU, and the device is cpu; use auto or loop"),
        ("flash", "flash needs a CUDA GPU, and the device is cpu; use auto or loop"),
        ("flex", "flex has no backward pass on a CPU; use auto or loop"),
    ],
)
def test_a_named_route_that_the_machine_lacks_is_refused(route: str, reason: str) -> None:
    with pytest.raises(ModelError) as error:
        routes.check_route(route, "cpu")
    assert str(error.value) == f"model.packed_attention: {reason}"
    routes.check_route("auto", "cpu")
    routes.check_route("loop", "cpu")


def test_a_named_route_that_cannot_compute_a_call_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "lacking", lambda route, device: None)
    call = call_of()
    q, k, v = (x.bfloat16() for x in (call.q, call.k, call.v))
    with pytest.raises(ModelError, match="varlen has no attention sinks; use auto or loop"):
        routes.attend_packed("varlen", torch.nn.Module(), call.layout, q, k, v, (), {"s_aux": torch.zeros(4)})
    with pytest.raises(ModelError, match="flash computes in float16 or bfloat16, and this model in float64"):
        routes.attend_packed("flash", torch.nn.Module(), call.layout, call.q, k, v, (), {})


def test_a_cpu_takes_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "lacking", lambda route, device: None)
    monkeypatch.setattr(routes, "COMPUTE", {})
    call = call_of()
    assert torch.equal(routes.attend_packed("auto", torch.nn.Module(), call.layout, call.q, call.k, call.v, (), {}), loop(call))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels of a GPU")
@pytest.mark.parametrize("route", routes.ONE_CALL)
@pytest.mark.parametrize("case", list(CASES))
def test_gradients_on_a_gpu_equal_those_of_the_loop(case: str, route: str) -> None:
    dtype = torch.float32 if route == "flex" else torch.bfloat16
    call = call_of(**CASES[case], device="cuda", dtype=dtype, size=32)
    if (why := routes.route_refusal(route, call)) is not None:
        pytest.skip(why)
    for leaf in leaves(call):
        leaf.requires_grad_()
    out, wanted = routes.COMPUTE[route](call), loop(call)
    close = {"rtol": 2e-3, "atol": 2e-3} if route == "flex" else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(out, wanted, **close)
    torch.testing.assert_close(gradients(call, out), gradients(call, wanted), **close)


def test_the_host_does_not_wait_for_the_places_of_documents() -> None:
    """Copies from pageable memory would hold it up in the first layer of every micro-batch."""
    call = call_of(**CASES["a prefix for each segment"])
    with device() as own:
        routes.ragged(call.layout, call.prefixes, PLACE)
        packed_flex.segment_rule(call.layout, call.prefixes, True, 3, PLACE)
    assert not own.waits


@pytest.mark.parametrize(("size", "value"), [(8, 8), (16, 4)])
def test_kernels_of_flex_attention_take_no_narrow_heads(size: int, value: int) -> None:
    """torch says so only while it compiles one."""
    call = dataclasses.replace(call_of(size=size, value=value), q=SimpleNamespace(
        device=torch.device("cuda"), dtype=torch.float32, shape=(1, 4, 13, size)
    ))  # fmt: skip
    assert packed_flex.flex_refusal(call) == "takes heads of 16 or more (here 8)"
    wide = dataclasses.replace(call_of(size=16), q=SimpleNamespace(
        device=torch.device("cuda"), dtype=torch.float32, shape=(1, 4, 13, 16)
    ))  # fmt: skip
    assert packed_flex.flex_refusal(wide) is None


def test_flex_attention_may_be_compiled_for_many_kinds_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, gradients, one block and several: behind torch's own limit it would write out all scores without a word."""
    given: list[dict[str, Any]] = []

    def compile_(function: Any, *, recompile_limit: int | None = None) -> Any:
        given.append({"recompile_limit": recompile_limit})
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    packed_flex._flex_function.cache_clear()
    packed_flex._flex_function("cuda")
    packed_flex._flex_function.cache_clear()
    assert given == [{"recompile_limit": recompiled.KINDS}] and recompiled.KINDS > 8


def test_an_older_torch_is_given_its_one_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    # Its own patch: what another one puts back counts as deleted.
    with torch._dynamo.config.patch(recompile_limit=8):
        assert recompiled.recompiled(len) is len
        assert torch._dynamo.config.recompile_limit == recompiled.KINDS
    assert torch._dynamo.config.recompile_limit is not None


def test_a_layout_of_one_document_needs_no_index() -> None:
    at = routes.ragged(layout_of([(3, None), (2, None)]), (), torch.device("cpu"))
    assert at.index is None
    assert at.q_starts.tolist() == at.k_starts.tolist() == [0, 3, 5]
