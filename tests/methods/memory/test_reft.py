"""ReFT: formulas in float64, which tokens are edited, orthonormality, one result however rows are laid out, memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError, UserError
from llmrecipe.core.forward_context import Context, Layout, Segment, activate
from llmrecipe.methods._base.method import Wrapper
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.memory._engines.prompt_ends import ends_of
from llmrecipe.methods.memory._engines.representation_edit import Edit, EditHook, orthonormal
from llmrecipe.methods.memory.direft import Direft
from llmrecipe.methods.memory.loreft import Loreft
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.optim.optimizer import build_optimizer, parameter_groups
from llmrecipe.training.memory_estimate import retained_bytes, saved_bytes
from tests.methods.additive.harness import attached, fill, model_of, survives_a_round_trip
from tests.tiny import tiny_model
from tests.trainings import resumes_to_the_bit

VARIANTS: dict[str, tuple[type, dict[str, Any]]] = {
    **{v: (Loreft, {"variant": v}) for v in ("loreft", "noreft", "consreft", "lobireft", "linear")},
    **{v: (Direft, {"variant": v}) for v in ("direft", "direft_orth", "offset")},
}
IDS = torch.tensor([[5, 9, 3, 60, 7, 7, 2, 11, 4], [8, 1, 44, 12, 30, 6, 21, 9, 9]])


def wrapper(variant: str, **options: Any) -> Wrapper:
    kind, own = VARIANTS[variant]
    return kind(name="reft", **{"r": 3, "positions": "f2+l1", **own, **options})


def edits(model: nn.Module) -> list[EditHook]:
    return [hook for _, _, _, hook in all_hooks(model) if isinstance(hook, EditHook)]


def reference(edit: Edit, h: Tensor, slot: int) -> Tensor:
    """Phi(h) of one state (d,), written from the papers' formulas, R (r, d) as the paper has it."""
    p = dict(edit.named_parameters())
    kind = edit.plan.formula
    if kind == "offset":
        return h + p["O"][slot]
    if kind in ("loreft", "consreft", "lobireft", "direft_orth"):
        # Gram-Schmidt, column by column: what QR with a positive diagonal is.
        columns: list[Tensor] = []
        for column in p["R"].t():
            for other in columns:
                column = column - other * (other @ column)
            columns.append(column / column.norm())
        R = torch.stack(columns)
    else:
        R = p["R"].t()
    if kind == "lobireft":
        return h + R.t() @ p["b"]
    if kind == "consreft":
        return h + R.t() @ (p["b"] - R @ h)
    if kind == "linear":
        return h + R.t() @ (p["W"] @ h)
    inner = torch.tanh(p["W"] @ h + p["b"])
    return h + R.t() @ (inner - R @ h if kind in ("loreft", "noreft") else inner)


@pytest.mark.parity("loreft", "pyreft's formulas, float64")
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_states_and_gradients_follow_the_formula_at_the_ends_of_each_prompt(variant: str, shared: bool) -> None:
    """Prompts of 6, 3, 2 and 1 tokens, f2+l1: first 2 and last 1; first 1 and last 1; the same; none."""
    model, _ = attached("llama", wrapper(variant, share_weights=shared, activation="tanh"))
    fill(model, scale=0.5)
    model.double()
    hook = edits(model)[0]
    torch.manual_seed(2)
    x = torch.randn(4, 7, 32, dtype=torch.float64)
    prompts = torch.tensor([6, 3, 2, 1])
    edited = [[(0, "first", 0), (1, "first", 1), (5, "last", 0)], [(0, "first", 0), (2, "last", 0)]]
    edited += [[(0, "first", 0), (1, "last", 0)], []]
    place = torch.arange(7).expand(4, 7)
    ends = ends_of(place, prompts[:, None].expand(4, 7), 2, 1)
    with activate(Context(shared={"reft": ends})):
        got = hook.after(x, x)
    wanted = x.clone()
    for row, tokens in enumerate(edited):
        for column, side, slot in tokens:
            edit = getattr(hook, hook.plan.sides()[0] if len(hook.plan.sides()) == 1 else side)
            wanted[row, column] = reference(edit, x[row, column], slot + (2 if side == "last" else 0))
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)
    parameters = [p for p in hook.parameters() if p.requires_grad]
    weights = torch.randn_like(x)
    grads = [torch.autograd.grad((y * weights).sum(), parameters) for y in (got, wanted)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
        assert bool(ours.any())


def logits(model: nn.Module, ids: Tensor, mask: Tensor, prompts: list[int]) -> Tensor:
    with activate(Context(prompt_lengths=torch.tensor(prompts), attention_mask=mask)):
        return model(input_ids=ids, attention_mask=mask).logits


@torch.no_grad()
@pytest.mark.parametrize("variant", ["loreft", "direft"])
def test_left_padded_right_padded_packed_and_single_rows_have_the_same_logits(variant: str) -> None:
    model, _ = attached("llama", wrapper(variant, positions="f2+l2"))
    fill(model)
    lengths, prompts = [9, 6], [5, 4]
    alone = [logits(model, IDS[i : i + 1, :n], torch.ones(1, n), prompts[i : i + 1])[0] for i, n in enumerate(lengths)]
    for left in (False, True):
        ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
        spots = [slice(9 - n, 9) if left else slice(0, n) for n in lengths]
        for i, spot in enumerate(spots):
            ids[i, spot], mask[i, spot] = IDS[i, : lengths[i]], 1
        got = logits(model, ids, mask, prompts)
        for i, spot in enumerate(spots):
            torch.testing.assert_close(got[i, spot], alone[i], atol=2e-5, rtol=1e-5)
    segments = (Segment(0, 0, 9, prompt=5), Segment(0, 9, 6, prompt=4))
    flat = torch.cat([IDS[0, :9], IDS[1, :6]])[None]
    places = torch.cat([torch.arange(9), torch.arange(6)])[None]
    with activate(Context(layout=Layout(segments, 1, 15), positions=places)):
        got = model(input_ids=flat, position_ids=places, use_cache=False).logits[0]
    torch.testing.assert_close(got, torch.cat(alone), atol=2e-5, rtol=1e-5)
    plain = model_of("llama")(input_ids=IDS[:1]).logits[0]
    assert not torch.allclose(alone[0], plain, atol=1e-2)


@torch.no_grad()
def test_a_shared_prompt_is_edited_once_and_one_shared_in_part_is_refused() -> None:
    model, _ = attached("llama", wrapper("loreft", positions="f2+l2"))
    fill(model)
    parent, answers = IDS[0, :5], [IDS[1, :3], IDS[1, 3:7]]
    whole = [logits(model, torch.cat([parent, a])[None], torch.ones(1, 5 + len(a)), [5])[0] for a in answers]
    flat, places = (
        torch.cat([parent, *answers])[None],
        torch.cat([torch.arange(5), torch.arange(5, 8), torch.arange(5, 9)])[None],
    )

    def packed(prompt: int) -> Tensor:
        segments = (Segment(0, 0, 5), Segment(0, 5, 3, parent=0, prompt=prompt), Segment(0, 8, 4, parent=0))
        with activate(Context(layout=Layout(segments, 1, 12), positions=places)):
            return model(input_ids=flat, position_ids=places, use_cache=False).logits[0]

    got = packed(0)
    torch.testing.assert_close(got[5:8], whole[0][5:], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(got[8:], whole[1][5:], atol=2e-5, rtol=1e-5)
    with pytest.raises(ModelError, match=r"data\.packing=off"):
        packed(1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_identity_starts_are_the_base_model_and_the_default_is_not(variant: str) -> None:
    base = logits(model_of("llama"), IDS, torch.ones_like(IDS), [6, 4])
    model, _ = attached("llama", wrapper(variant))
    same = torch.allclose(logits(model, IDS, torch.ones_like(IDS), [6, 4]), base, atol=2e-4)
    assert same == (variant == "offset") == wrapper(variant).starts_at_base()
    if variant == "consreft":
        with pytest.raises(UserError, match="variant: lobireft"):
            attached("llama", wrapper(variant, init="identity"))
        return
    own = wrapper(variant, init="identity")
    model, _ = attached("llama", own)
    torch.testing.assert_close(logits(model, IDS, torch.ones_like(IDS), [6, 4]), base, atol=2e-4, rtol=0)
    assert own.starts_at_base()


def test_the_default_start_moves_a_state_by_about_the_root_of_r_over_d() -> None:
    """Measured for the papers' own start: 0.144 for LoReFT and 0.042 for DiReFT at d 512, r 8."""
    torch.manual_seed(0)
    h, slot = torch.randn(200, 512), torch.zeros(200, dtype=torch.long)
    for variant, low, high in (("loreft", 0.11, 0.17), ("direft", 0.03, 0.055)):
        edit = Edit(wrapper(variant, r=8).plan(), 512)  # type: ignore[attr-defined]
        assert low < float((edit(h, slot).norm(dim=1) / h.norm(dim=1)).mean().detach()) < high


def test_r_stays_orthonormal_through_a_thousand_steps_with_decay() -> None:
    torch.manual_seed(0)
    M = nn.Parameter(torch.empty(64, 8))
    nn.init.orthogonal_(M)
    torch.testing.assert_close(orthonormal(M), M, atol=2e-6, rtol=0)
    target, optimizer = torch.randn(64, 8), torch.optim.AdamW([M], lr=1e-2, weight_decay=0.1)
    for _ in range(1000):
        (orthonormal(M) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    R = orthonormal(M.detach())
    assert float((R.t() @ R - torch.eye(8)).abs().max()) < 1e-5
    assert orthonormal(M.to(torch.bfloat16)).dtype == torch.float32


def test_r_does_not_decay_and_all_else_does() -> None:
    from llmrecipe.core import registry

    model, stack = attached("llama", wrapper("loreft"))
    config = registry.load_class("optim", "adamw")(lr=1e-2, weight_decay=0.1, decay_adapters=True)
    optimizer = build_optimizer(config, parameter_groups(model, config, stack.groups(model)))
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for hook in edits(model):
        assert decays[id(hook.both.R)] == 0.0 and decays[id(hook.both.W)] == 0.1  # type: ignore[union-attr]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shared", [True, False])
def test_the_number_that_trains_is_the_closed_form(variant: str, shared: bool) -> None:
    model, stack = attached("llama", wrapper(variant, share_weights=shared))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    r, d = 3, 32
    each = {"consreft": r * d + r, "lobireft": r * d + r, "linear": 2 * r * d}.get(variant, 2 * r * d + r)
    wanted = 2 * 3 * d if variant == "offset" else 2 * each * (1 if shared else 2)
    assert trained == wanted == next(iter(stack)).memory(model)["trainable"]


def test_llama_7b_has_the_published_number() -> None:
    """0.031 % of 6.7 billion: 32 blocks of width 4096, rank 8, shared."""
    plan = Loreft(name="reft").plan()
    assert (plan.r, plan.first, plan.last, plan.share_weights) == (8, 7, 7, True)
    assert 32 * plan.count(4096) == 2_097_408


def test_the_backward_pass_keeps_edited_states_and_what_is_above_the_lowest_edited_block() -> None:
    """An edit keeps its M states, M r, their places, and the decomposition of R; blocks below the lowest one keep nothing."""
    kept = {}
    for target in ("block", "layers.-1.block"):
        model, _ = attached("llama", wrapper("loreft", target=target))
        there = [*model.parameters(), *model.buffers()]
        mask = torch.ones_like(IDS)
        loss, saved = saved_bytes(lambda m=model, k=mask: logits(m, IDS, k, [6, 4]).square().mean(), there)
        kept[target] = max(saved, retained_bytes(loss, there))
    assert kept["layers.-1.block"] < 0.6 * kept["block"]
    hook, h = edits(model)[0], torch.randn(2, 9, 32, requires_grad=True)
    ends = ends_of(torch.arange(9).expand(2, 9), torch.full((2, 9), 8), 2, 1)
    there = [*hook.parameters(), h]

    def edited() -> Tensor:
        with activate(Context(shared={"reft": ends})):
            return hook.after(h, h)

    _, saved = saved_bytes(edited, there)
    M, d, r = 6, 32, 3
    assert saved == 4 * (M * d + M * r) + 8 * M + 4 * (2 * d * r + r * r + r)


def test_files_hold_what_was_learned_and_merging_is_refused() -> None:
    for variant in ("loreft", "direft", "offset"):
        survives_a_round_trip("llama", wrapper(variant))
    model, stack = attached("llama", wrapper("loreft"))
    with pytest.raises(ModelError, match="cannot be merged"):
        next(iter(stack)).merge(model)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"target": "attn.q"}, r"not of 'attn\.q'"),
        ("t5", {"target": "decoder.layers.*.block"}, "name blocks of its encoder"),
        ("llama", {"positions": "f0"}, "names no position"),
        ("llama", {"r": 33}, "more than the 32 numbers"),
    ],
)
def test_what_cannot_be_is_refused(family: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        attached(family, wrapper("loreft", **options))


def test_an_encoder_decoder_is_edited_where_it_reads() -> None:
    model, _ = attached("t5", wrapper("loreft"))
    assert {path.split(".")[0] for path, _, _, _ in all_hooks(model)} == {"encoder"}


def test_virtual_tokens_of_another_method_are_not_counted() -> None:
    """With prompt tuning in the stack the first token of the prompt is still the first real one."""
    from llmrecipe.methods.additive.prompt_tuning import PromptTuning

    model = tiny_model()
    stack = Stack([PromptTuning(name="prompt", num_virtual_tokens=3), wrapper("offset", positions="f1+l1")])
    stack.attach(model)
    seen: list[Tensor] = []
    hook = edits(model)[0]
    plain = hook.after

    def watch(x: Tensor, y: Tensor) -> Tensor:
        out = plain(x, y)
        seen.append((out != y).any(-1).nonzero())
        return out

    hook.both.O.data.fill_(1.0)  # type: ignore[union-attr]
    hook.after = watch  # type: ignore[method-assign]
    logits(model, IDS, torch.ones_like(IDS), [6, 4])
    assert seen[0].tolist() == [[0, 3], [0, 8], [1, 3], [1, 6]]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["loreft", "direft"])
def test_a_resumed_run_with_dropout_is_the_whole_run(tmp_path: Path, recipe: str) -> None:
    words = ["steps=6", "epochs=null", "batch.size=4", f"stack.{recipe}.dropout=0.2", "eval.at_start=false", "save.every=3"]
    resumes_to_the_bit(tmp_path, recipe, words, 4)
