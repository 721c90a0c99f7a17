"""Blocks under torch.compile: the numbers of the model as it is, one graph a kind of block, and what is said where it fails."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from llmrecipe.core.errors import ModelError
from llmrecipe.core.forward_context import Context, activate
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.additive.adapter import Adapter
from llmrecipe.methods.additive.ia3 import Ia3
from llmrecipe.methods.additive.prefix_tuning import PrefixTuning
from llmrecipe.methods.reparameterized.dora import Dora
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.models import compiled_blocks as module
from llmrecipe.models import recompiled
from llmrecipe.models.checkpointing import enable_checkpointing
from llmrecipe.models.compiled_blocks import SETTLED, CompiledBlocks, compiled_blocks
from llmrecipe.models.hooks import between_graphs
from llmrecipe.models.hooks.hook import Hook, all_hooks, recorded_calls
from llmrecipe.models.hooks.host import add_hook
from tests.tiny import tiny_model

LENGTHS = ((2, 7), (3, 5), (2, 9))
"""Rows and tokens of the batches of a test."""
IDS = torch.tensor([[3, 4, 5], [6, 7, 8]])


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    yield
    torch._dynamo.reset()
    between_graphs.apart = None


def adapted(wrappers: list[Any], form: Any = False) -> Any:
    torch.manual_seed(0)
    model: Any = tiny_model()
    Stack(wrappers).attach(model)
    for hook in [hook for _, _, _, hook in all_hooks(model)]:
        for parameter in hook.parameters():
            nn.init.normal_(parameter, std=0.1)
    if form:
        enable_checkpointing(model, form)
    return model.train()


def numbers(model: Any, shape: tuple[int, int]) -> list[Tensor]:
    """Logits and gradients of one batch."""
    ids = torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(sum(shape)))
    logits = model(input_ids=ids, use_cache=False).logits
    found = torch.autograd.grad(logits.square().mean(), [p for p in model.parameters() if p.requires_grad])
    return [logits.detach(), *found]


def compare(model: Any, selective: bool = False, backend: str = "aot_eager") -> CompiledBlocks:
    """Compare batches of several shapes with and without compiled blocks; only the first one may make graphs."""
    plain = copy.deepcopy(model)
    compiled = compiled_blocks(model, True, selective, backend)
    assert compiled is not None
    known: list[int] = []
    for shape in LENGTHS:
        for own, wanted in zip(numbers(model, shape), numbers(plain, shape), strict=True):
            torch.testing.assert_close(own, wanted, atol=1e-5, rtol=1e-4)
        known.append(compiled.graphs)
    assert len(set(known)) == 1, f"new lengths were compiled again: {known}"
    return compiled


WHOLE: dict[str, Callable[[], list[Any]]] = {
    "nothing": list,
    "lora": lambda: [Lora(name="lora", r=2, target="attn.q|v + mlp.down")],
    "ia3": lambda: [Ia3(name="ia3")],
    "adapter": lambda: [Adapter(name="adapter", r=2)],
}
"""Wrappers whose hooks are traced: a block is one graph."""
APART: dict[str, Callable[[], list[Any]]] = {
    "dora": lambda: [Dora(name="dora", r=2, target="attn.q")],
    "prefix_tuning": lambda: [PrefixTuning(name="prefix_tuning", num_virtual_tokens=2)],
}
"""Wrappers that stand between graphs."""


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_a_block_with_its_hooks_is_one_graph_and_gives_the_numbers_of_the_model(name: str) -> None:
    model = adapted(WHOLE[name]())
    plain = copy.deepcopy(model)
    # The input of the first block may need no gradient, as that of the others does.
    assert 1 <= compare(model).graphs <= 2
    if name == "lora":
        # The context, too, decides which graph it is.
        with activate(Context(off=frozenset({name}))):
            found, wanted = (model(input_ids=IDS, use_cache=False).logits for model in (model, plain))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(found, model(input_ids=IDS, use_cache=False).logits, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", APART)
def test_what_cannot_be_traced_divides_a_block_and_gives_the_numbers_of_the_model(name: str) -> None:
    assert compare(adapted(APART[name]())).graphs > 2


@pytest.mark.slow
@pytest.mark.parametrize("form", [True, "selective", "offload"])
def test_a_block_that_is_computed_again_is_compiled(form: Any) -> None:
    compiled = compare(adapted(WHOLE["lora"](), form), form == "selective")
    assert 1 <= compiled.graphs <= 2


@pytest.mark.slow
def test_a_selective_graph_keeps_less_for_the_backward_pass() -> None:
    def kept(selective: bool) -> int:
        sizes: list[int] = []
        model = adapted([], "selective" if selective else False)
        compiled = compiled_blocks(model, True, selective, "aot_eager")
        assert compiled is not None
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model.model(input_ids=torch.arange(3, 43).view(2, 20), use_cache=False)
        torch._dynamo.reset()
        return sum(sizes)

    assert kept(True) < 0.9 * kept(False)


@pytest.mark.slow
def test_inductor_gives_the_numbers_of_the_model() -> None:
    compare(adapted(WHOLE["lora"]()), backend="inductor")


class Counting(Hook):
    """y -> y + n w, n the calls so far: what tracing would keep as it was when it was traced."""

    def __init__(self, width: int):
        super().__init__()
        self.w, self.n = nn.Parameter(torch.ones(width)), 0

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        self.n += 1
        return y + self.n * self.w


@pytest.mark.slow
def test_a_hook_that_does_not_say_so_is_never_traced() -> None:
    model = adapted([])
    layer = model.model.layers[0].mlp.down_proj
    hook = add_hook(layer, "counting", Counting(layer.out_features), "counting")
    compare(model)
    assert hook.n == len(LENGTHS)


def test_a_subclass_says_for_itself_that_it_can_be_traced() -> None:
    traced = type("Traced", (Counting,), {"traceable": True})
    assert traced.traceable and not Counting.traceable
    assert not type("Below", (traced,), {}).traceable


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A torch.compile that compiles nothing; calls of what it returned."""
    calls: list[int] = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda *a, **k: calls.append(1) or function(*a, **k))
    return calls


def test_only_passes_that_train_run_compiled(called: list[int]) -> None:
    model = adapted(WHOLE["lora"]())
    compiled = compiled_blocks(model, named=True)
    assert compiled is not None
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model(input_ids=IDS)
    with compiled.off():
        model(input_ids=IDS)
    with recorded_calls() as seen:
        model(input_ids=IDS)
    twin(input_ids=IDS)
    assert not called
    assert seen == {id(hook) for _, _, _, hook in all_hooks(model)}
    model(input_ids=IDS)
    assert len(called) == len(compiled.blocks) == model.config.num_hidden_layers
    compiled.remove()
    model(input_ids=IDS)
    assert len(called) == len(compiled.blocks)


@pytest.mark.parametrize(("form", "times"), [(True, 2), ("offload", 2), ("selective", 1)])
def test_a_checkpointed_block_is_compiled_in_both_of_its_passes(called: list[int], form: Any, times: int) -> None:
    model = adapted([], form)
    compiled = compiled_blocks(model, True, form == "selective")
    assert compiled is not None
    model(input_ids=IDS, use_cache=False).logits.sum().backward()
    assert len(called) == times * len(compiled.blocks)


@pytest.mark.parametrize("named", [True, False])
def test_a_block_that_cannot_be_compiled_is_an_error_by_key_and_a_warning_else(
    named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise torch._dynamo.exc.Unsupported("no graph\nfor this")

    monkeypatch.setattr(torch, "compile", lambda function, **options: refuse)
    model = adapted(WHOLE["lora"]())
    wanted = model(input_ids=IDS).logits
    compiled = compiled_blocks(model, named)
    assert compiled is not None
    said: list[str] = []
    compiled.report = said.append
    if named:
        with pytest.raises(ModelError, match=r"model\.compile=blocks: a block cannot be compiled \(Unsupported: no graph"):
            model(input_ids=IDS)
        return
    for _ in range(2):
        assert torch.equal(model(input_ids=IDS).logits, wanted)
    assert len(said) == 1 and said[0].endswith("the run goes on without")


class NoBackward(torch.autograd.Function):
    """A block whose backward pass cannot be compiled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise torch._dynamo.exc.BackendCompilerFailed(len, RuntimeError("no kernel"), None)


def test_a_backward_pass_that_cannot_be_compiled_is_found_before_a_step_depends_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Callable[..., Any], **options: object) -> Callable[..., Any]:
        return lambda *args, **kwargs: NoBackward.apply(function(*args, **kwargs))

    monkeypatch.setattr(torch, "compile", broken)
    model = adapted(WHOLE["lora"]())
    wanted = numbers(model, (2, 3))
    compiled = compiled_blocks(model, named=False)
    assert compiled is not None
    said: list[str] = []
    compiled.report = said.append
    assert all(torch.equal(a, b) for a, b in zip(numbers(model, (2, 3)), wanted, strict=True))
    assert len(said) == 1 and "no kernel" in said[0]

    named = compiled_blocks(model, named=True)
    assert named is not None
    said_by_key = pytest.raises(ModelError, match=r"model\.compile: a block cannot be compiled .*set model\.compile=off")
    with said_by_key, named.explained():
        numbers(model, (2, 3))


@pytest.mark.slow
def test_a_later_backward_pass_that_cannot_be_compiled_leaves_the_numbers_of_the_model() -> None:
    """Like the first one: the step in which it is met is computed without it, and so is the rest of the run."""
    failing: list[bool] = []

    def forward(graph: Any, inputs: Any) -> Any:
        return make_boxed_func(graph.forward)

    def backward(graph: Any, inputs: Any) -> Any:
        if failing:
            raise RuntimeError("no kernel")
        return forward(graph, inputs)

    backend: Any = aot_autograd(fw_compiler=forward, bw_compiler=backward)
    model = adapted(WHOLE["lora"]()).requires_grad_(True)
    plain = copy.deepcopy(model)
    compiled = compiled_blocks(model, named=False, backend=backend)
    assert compiled is not None
    said: list[str] = []
    compiled.report = said.append
    for off in (frozenset(), frozenset({"lora"})):
        with activate(Context(off=off)):
            found, wanted = (
                torch.autograd.grad(
                    one(input_ids=IDS, use_cache=False).logits.square().mean(), list(one.parameters()), allow_unused=True
                )
                for one in (model, plain)
            )
        for own, other in zip(found, wanted, strict=True):
            assert (own is None) == (other is None)
            if own is not None and other is not None:
                torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-4)
        if not off:
            assert not said and compiled.on and compiled.graphs
            failing.append(True)
    assert len(said) == 1 and "no kernel" in said[0] and not compiled.on


@pytest.mark.slow
def test_code_with_more_kinds_than_graphs_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (module, recompiled):
        monkeypatch.setattr(place, "KINDS", 2)
    torch._logging.set_logs(dynamo=logging.ERROR)
    model = adapted(WHOLE["lora"]())
    plain = copy.deepcopy(model)
    compiled = compiled_blocks(model, named=True, backend="aot_eager")
    assert compiled is not None
    said: list[str] = []
    compiled.report = said.append
    for step, off in enumerate((frozenset(), frozenset({"lora"}), frozenset({"else"})), 1):
        with activate(Context(off=off)):
            found, wanted = (one(input_ids=IDS, use_cache=False).logits for one in (model, plain))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
        compiled.after_step(step)
    assert len(said) == 1 and said[0].startswith("model.compile: at step 2 a piece of code had 2 graphs, and runs uncompiled")
    assert compiled.full >= 1 and compiled.summary().endswith("pieces of code with more kinds than graphs")


def test_a_model_without_blocks_is_an_error_by_key_alone() -> None:
    assert compiled_blocks(nn.Linear(2, 2), named=False) is None
    with pytest.raises(ModelError, match=r"model\.compile=blocks: this model's blocks are not known"):
        compiled_blocks(nn.Linear(2, 2), named=True)


def test_graphs_after_the_first_steps_are_reported_once() -> None:
    compiled, said = CompiledBlocks([], named=True), []
    compiled.report = said.append
    for step, graphs in enumerate((0, 2, 2, 3, 5, 5, 7), 11):
        compiled.graphs = graphs
        compiled.after_step(step)
    assert SETTLED == 4
    assert len(said) == 1
    assert said[0].startswith("model.compile: step 15 compiled 2 more graphs after the first 4 steps")
    assert compiled.summary() == "blocks compiled: 7 graphs, 4 of them after the first 4 steps"
