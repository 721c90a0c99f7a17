"""CoDA: the conditional block against its formula, real gathering, padding, packing, prompts of decoders."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from llmrecipe.core.errors import ModelError
from llmrecipe.core.forward_context import Context, activate
from llmrecipe.data.collate import Sequence, pack, pad
from llmrecipe.methods.additive._engines.soft_topk import soft_top_k
from llmrecipe.methods.additive.adapter import Adapter
from llmrecipe.methods.additive.coda import Coda, Router
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.models.module_map import anatomy
from tests.methods.additive.harness import (
    attached,
    base_logits,
    checkpointing_changes_no_gradient,
    fill,
    logits,
    only_listed_parameters_move,
    survives_a_round_trip,
    trained,
)
from tests.tiny import roles_for

ENCODERS = ["bert", "distilbert", "t5", "bart", "native-encoder", "native-encoder_decoder"]


def network(hook: Router, z: Tensor) -> Tensor:
    return (z @ hook.down.T + hook.down_bias).clamp_min(0) @ hook.up.T + hook.up_bias


def routed(hook: Router, normed: Tensor, k: int, eps: float = 0.03) -> tuple[Tensor, Tensor]:
    """(R, T) weights m and the (R, k) chosen columns, written out."""
    scores = normed @ hook.router
    soft = soft_top_k(scores, torch.full((len(scores),), k), torch.ones_like(scores, dtype=torch.bool), eps)
    chosen = scores.topk(k, dim=1).indices.sort(1).values
    return torch.zeros_like(soft).scatter(1, chosen, soft.gather(1, chosen)), chosen


@pytest.mark.parity("coda", "formula, float64")
@pytest.mark.parametrize("kv", ["all", "selected"])
def test_the_block_is_the_formula_in_float64(kv: str) -> None:
    """y = x + A(n) + m * Z: attention of k queries over n or k keys, feed-forward on N2(x + Z_att), zero elsewhere."""
    model, _ = attached("native-encoder", Coda(name="coda", r=5, reduction=3.0, kv=kv))
    fill(model)
    model.double()
    block = anatomy(model).at("layers.0.block")[0].module
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    stack = next(m for m in model.modules() if type(m).__name__ == "NativeStack")
    angles = stack.rotary(torch.arange(11)[None].expand(2, -1))
    got = block(x, None, angles)
    normed = block.norm_attn(x)
    m, chosen = routed(block.coda, normed, 4)
    wanted = x + network(block.coda, normed)
    for row in range(2):
        columns = chosen[row]
        with activate(Context(off=frozenset({"coda"}))):
            if kv == "selected":
                part = tuple(a[row : row + 1, :, columns] for a in angles)
                attention = block.self_attn(normed[row : row + 1, columns], None, part)[0]
            else:
                part = tuple(a[row : row + 1] for a in angles)
                attention = block.self_attn(normed[row : row + 1], None, part)[0][:, columns]
            feed = block.mlp(block.norm_mlp(x[row : row + 1, columns] + attention))
        wanted[row, columns] += m[row, columns, None] * (attention + feed)[0]
    torch.testing.assert_close(got, wanted, atol=1e-11, rtol=0)
    # Unrouted rows are x + A(n) bit for bit.
    rest = m == 0
    hook = block.coda
    assert torch.equal(got[rest], (x + hook.network(normed))[rest])


@pytest.mark.parity("coda", "dense block with a parallel adapter")
@pytest.mark.parametrize("kv", ["all", "selected"])
@pytest.mark.parametrize("family", ENCODERS)
def test_with_every_token_chosen_the_block_is_dense_with_a_parallel_adapter(family: str, kv: str) -> None:
    wanted = base_logits(family)
    model, _ = attached(family, Coda(name="coda", r=4, reduction=1.0, kv=kv))
    torch.testing.assert_close(logits(model), wanted, atol=2e-5, rtol=1e-5)
    fill(model)
    block = anatomy(model).at("encoder.layers.0.block")[0].module
    x = torch.randn(2, 6, 32)
    if family in ("bert", "native-encoder"):
        stack = next((m for m in model.modules() if hasattr(m, "rotary")), None)
        extra = {} if stack is None else {"angles": stack.rotary(torch.arange(6)[None])}
        with activate(Context(role="reference")):
            dense = block(x, **extra)
            n = x if stack is None else block.norm_attn(x)
        torch.testing.assert_close(block(x, **extra), dense + network(block.coda, n), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kv", ["all", "selected"])
@pytest.mark.parametrize("family", ENCODERS)
def test_every_tensor_learns_and_padding_changes_nothing(family: str, kv: str) -> None:
    model, _ = attached(family, Coda(name="coda", r=4, reduction=2.0, kv=kv, activation="gelu"))
    fill(model)
    ids = torch.tensor([[5, 9, 3, 60, 7, 8, 4, 33]])
    wide = torch.cat((ids, torch.zeros(1, 5, dtype=torch.long)), 1)
    mask = (wide != 0).long()
    short = logits(model, ids, attention_mask=torch.ones_like(ids))
    if model.config.is_encoder_decoder:
        long = model(input_ids=wide, attention_mask=mask, decoder_input_ids=ids.flip(1), use_cache=False).logits
    else:
        long = logits(model, wide, attention_mask=mask)[:, :8]
    torch.testing.assert_close(long, short, atol=5e-5, rtol=1e-4)
    long.log_softmax(-1)[..., 3].sum().backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not missing


@pytest.mark.parametrize("family", ["bert", "native-encoder", "t5"])
@pytest.mark.parametrize("kv", ["all", "selected"])
def test_the_cost_of_the_frozen_block_falls_with_the_reduction(family: str, kv: str) -> None:
    """Floating-point operations, counted: the feed-forward's are exactly 1 / reduction, attention's products fall too."""
    ids = torch.randint(3, 60, (2, 64))
    cost = {}
    for reduction in (1.0, 4.0):
        model, _ = attached(family, Coda(name="coda", r=1, reduction=reduction, kv=kv))
        with FlopCounterMode(display=False, depth=12) as counter, torch.no_grad():
            logits(model, ids)
        totals = {path: sum(ops.values()) for path, ops in counter.get_flop_counts().items()}

        def of(role: str, model: nn.Module = model, totals: dict = totals) -> int:
            wanted = {s.path for s in anatomy(model).at(f"encoder.layers.0.{role}")}
            return sum(n for path, n in totals.items() if path.split(".", 1)[-1] in wanted)

        feed = ("mlp.up", "mlp.down") if family == "bert" else ("mlp",)
        cost[reduction] = {
            "ffn": sum(of(r) for r in feed),
            "q": of("attn.q"),
            "k": of("attn.k"),
            "o": of("attn.o"),
        }
    assert cost[1.0]["ffn"] > 0
    for part in ("ffn", "q", "o"):
        assert cost[4.0][part] * 4 == cost[1.0][part], part
    assert cost[4.0]["k"] * (4 if kv == "selected" else 1) == cost[1.0]["k"]


def test_counts_follow_the_formula() -> None:
    each = 2 * 32 * 4 + 4 + 2 * 32
    for family, norms, blocks in (("t5", 2 * 32, 2), ("bert", 4 * 32, 2), ("native-encoder", 2 * 32, 2)):
        model, stack = attached(family, Coda(name="coda", r=4))
        assert trained(model) == blocks * (each + norms)
        assert next(iter(stack)).memory(model)["trainable"] == trained(model)
        assert trained(attached(family, Coda(name="coda", r=4, train_norms=False))[0]) == blocks * each
    model, _ = attached("t5", Coda(name="coda", r=4))
    assert not any("decoder" in n for n, p in model.named_parameters() if p.requires_grad)
    assert trained(attached("t5", Coda(name="coda", r=4, layers="-1", train_norms=False))[0]) == each


@pytest.mark.parametrize(("k", "reduction", "wanted"), [(None, 4.0, [3, 1, 1]), (None, 2.5, [4, 2, 1]), (5, 4.0, [5, 4, 1])])
def test_how_many_tokens_are_chosen(k: int | None, reduction: float, wanted: list[int]) -> None:
    assert Coda(name="coda", k=k, reduction=reduction).k_of(torch.tensor([10, 4, 1])).tolist() == wanted


def test_solvers_rank_alike_and_weigh_differently() -> None:
    outs = []
    for solver in ("exact", "iterative"):
        model, _ = attached("bert", Coda(name="coda", r=4, reduction=2.0, solver=solver, eps=0.3))
        for _, _, _, hook in all_hooks(model):
            if isinstance(hook, Router):
                hook.router.data = torch.linspace(-1, 1, 32)
        outs.append(logits(model))
    assert not torch.equal(*outs)
    torch.testing.assert_close(*outs, atol=0.2, rtol=0.5)


# --- decoders ----------------------------------------------------------------------------------------------------------


def test_decoders_are_refused_unless_routing_stays_in_the_prompt() -> None:
    with pytest.raises(ModelError, match="later ones decide"):
        attached("llama", Coda(name="coda"))
    with pytest.raises(ModelError, match="needs kv: all"):
        attached("llama", Coda(name="coda", causal="prompt_only", kv="selected"))


def prompted(family: str) -> tuple[nn.Module, object]:
    model, stack = attached(family, Coda(name="coda", r=4, reduction=2.0, causal="prompt_only", activation="gelu"))
    fill(model)
    return model, stack


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "native"])
def test_packed_and_padded_rows_are_routed_alike(family: str) -> None:
    model, stack = prompted(family)
    rows = [
        Sequence([5, 9, 3, 60, 7, 11], [0, 0, 0, 0, 1, 1], prompt=4),
        Sequence([8, 1, 44], [0, 1, 1], prompt=1),
        Sequence([12, 30, 6, 21], [0] * 4, prompt=4),
        Sequence([3, 3, 9], [1] * 3, parent=2),
        Sequence([40, 41], [1] * 2, parent=2),
    ]
    outs = [roles_for(model, stack, packed) for packed in (True, False)]
    values = [r.policy(r.layout(rows))["logprobs"] for r in outs]
    torch.testing.assert_close(values[0], values[1], atol=3e-5, rtol=1e-4)
    left = outs[1].policy(pad(rows, 0, "left"))["logprobs"]
    torch.testing.assert_close(values[0], left, atol=3e-5, rtol=1e-4)
    alone = [outs[0].policy(pack([row]))["logprobs"] for row in rows[:2]]
    torch.testing.assert_close(values[0][:4], torch.cat(alone), atol=3e-5, rtol=1e-4)


def test_an_answer_never_changes_what_came_before() -> None:
    model, stack = prompted("llama")
    roles = roles_for(model, stack)
    ids = [5, 9, 3, 60, 7, 11, 2, 33]
    outs = []
    for last in (33, 44):
        row = Sequence([*ids[:-1], last], [0] * 4 + [1] * 4, prompt=4)
        outs.append(roles.engine.hidden_of(roles.layout([row]))[0, :-1])
    assert torch.equal(*outs)


def test_packed_encoders_route_every_document_alone() -> None:
    model, stack = attached("native-encoder", Coda(name="coda", r=4, reduction=2.0, kv="selected"))
    fill(model)
    rows = [Sequence([5, 9, 3, 60, 7, 11], [0] * 6), Sequence([8, 1, 44], [0] * 3)]
    engine = roles_for(model, stack).engine
    both = engine.hidden_of(pack(rows))[0]
    alone = torch.cat([engine.hidden_of(pack([row]))[0] for row in rows])
    torch.testing.assert_close(both, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_cached_generation_equals_uncached(family: str) -> None:
    model, _ = prompted(family)
    ids = torch.tensor([[0, 0, 0, 5, 9, 3], [8, 1, 44, 12, 30, 6]])
    mask = (ids != 0).long()
    kwargs = {"attention_mask": mask, "max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    with torch.no_grad(), activate(Context(prompt_lengths=mask.sum(1))):
        outs = [model.generate(input_ids=ids, use_cache=cache, **kwargs) for cache in (True, False)]
    assert torch.equal(*outs)
    with torch.no_grad():
        assert torch.equal(model.generate(input_ids=ids, use_cache=True, **kwargs), outs[0])


@pytest.mark.parametrize("family", ["t5", "native-encoder_decoder"])
def test_encoder_decoders_generate_with_and_without_a_cache(family: str) -> None:
    from tests.methods.additive.harness import cached_generation_equals_uncached

    model, _ = attached(family, Coda(name="coda", r=4, reduction=2.0))
    fill(model)
    cached_generation_equals_uncached(model)


# --- promises ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options"), [("native-encoder", {"kv": "selected"}), ("t5", {}), ("llama", {"causal": "prompt_only"})]
)
def test_checkpointing_and_files(family: str, options: dict) -> None:
    wrapper = Coda(name="coda", r=4, reduction=2.0, activation="gelu", **options)

    def make() -> nn.Module:
        model, _ = attached(family, wrapper)
        fill(model)
        return model

    # A decoder routes inside a prompt; elsewhere nobody looks at it.
    with activate(Context(prompt_lengths=torch.tensor([4]))):
        checkpointing_changes_no_gradient(make)
        only_listed_parameters_move(family, wrapper)
    survives_a_round_trip(family, wrapper)


def test_it_is_not_the_base_at_step_zero_and_the_reference_is_remembered() -> None:
    model, stack = attached("bert", Coda(name="coda", r=4))
    assert not stack.reference_is_off()
    start = logits(model)
    assert not torch.equal(start, base_logits("bert"))
    stack.snapshot_reference(model)
    fill(model)
    with stack.reference(model):
        assert torch.equal(logits(model), start)


def test_lora_learns_inside_the_routed_path_and_adapters_behind_it() -> None:
    wrappers = [
        Lora(name="lora", target="attn.q|v + mlp.down"),
        Coda(name="coda", r=4, reduction=2.0),
        Adapter(name="adapter", r=4),
    ]
    for order in (wrappers, wrappers[::-1]):
        model, _ = attached("native-encoder", *order)
        fill(model)
        logits(model).square().mean().backward()
        missing = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
        assert not missing


def test_learned_scores_move_the_choice() -> None:
    """The router's gradient says which tokens to send: training it alone lowers the loss of a frozen everything else."""
    model, _ = attached("bert", Coda(name="coda", r=1, reduction=2.0, train_norms=False, eps=1.0))
    routers = [hook.router for _, _, _, hook in all_hooks(model) if isinstance(hook, Router)]
    target = base_logits("bert").detach()
    optimizer = torch.optim.Adam(routers, lr=0.05)
    losses = []
    for _ in range(40):
        loss = (logits(model) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert max(losses[-5:]) < 0.92 * losses[0]


def test_the_mask_travels_with_the_call_not_with_the_module() -> None:
    model, _ = attached("bert", Coda(name="coda", r=4))
    batch = pad([Sequence([5, 9, 3], [0] * 3), Sequence([8, 1, 4, 5, 6], [0] * 5)], 0)
    with activate(dataclasses.replace(batch.context())):
        inside = logits(model, batch.input_ids, attention_mask=batch.attention_mask)
    assert torch.equal(inside, logits(model, batch.input_ids, attention_mask=batch.attention_mask))


def test_of_two_on_one_block_the_outer_one_asks_the_inner_one_for_its_tokens() -> None:
    """y = x + A2 + m2 * (inner(x) - x): only tokens both chose go through the frozen part."""
    pair = [Coda(name=name, r=4, reduction=2.0, eps=1.0, train_norms=False) for name in ("inner", "outer")]
    model, _ = attached("bert", *pair)
    fill(model)
    block, x = anatomy(model).at("layers.0.block")[0].module, torch.randn(2, 8, 32)
    with activate(Context(off=frozenset({"outer"}))):
        inner = block(x)
    m, _ = routed(block.outer, x, 4, eps=1.0)
    torch.testing.assert_close(block(x), x + network(block.outer, x) + m[..., None] * (inner - x), atol=1e-5, rtol=1e-5)
