"""ESFT: scores, the choice, gradients of the chosen experts alone, bytes, what never moves, the picture in the report."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from llmrecipe.core import registry
from llmrecipe.core.errors import UserError
from llmrecipe.core.forward_context import Context, Layout, Segment, activate
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.additive.ia3 import Ia3
from llmrecipe.methods.memory._engines.expert_copies import (
    ChosenExperts,
    RoutingScores,
    add_chosen,
    mixtures,
    smallest_set,
)
from llmrecipe.methods.memory.esft import Esft
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.models.attention import install_attention
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.optim.optimizer import build_optimizer, parameter_groups
from llmrecipe.training.memory_estimate import optimizer_bytes, retained_bytes, saved_bytes
from tests.methods.additive.harness import model_of
from tests.methods.probe import language_probe
from tests.tiny import tiny_model
from tests.trainings import resumes_to_the_bit

IDS = torch.arange(3, 43).view(2, 20)
MIXED = {
    "mixtral": {},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "native-mixture": {},
}


def mixture(family: str, kernel: str = "eager") -> nn.Module:
    model = model_of(family) if family.startswith("native") else tiny_model(family, scale=1.5, **MIXED[family])
    if family == "gpt_oss":
        install_attention(model, "eager")
    model.set_experts_implementation(kernel)
    return model


def tuned(family: str = "olmoe", kernel: str = "eager", **options: object) -> tuple[nn.Module, Stack, Esft]:
    model = mixture(family, kernel)
    wrapper = Esft(name="esft", **{"p": 0.4, "n_tokens": 100, **options})
    stack = Stack([wrapper])
    stack.attach(model)
    stack.calibrate(model, language_probe(model, stack=stack))
    return model, stack, wrapper


def hooks(model: nn.Module) -> dict[str, ChosenExperts]:
    return {path: hook for path, _, _, hook in all_hooks(model) if isinstance(hook, ChosenExperts)}


def loss_of(model: nn.Module) -> torch.Tensor:
    return nn.functional.cross_entropy(model(input_ids=IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


@pytest.mark.parity("esft", "the original model's rows")
@pytest.mark.parametrize(
    ("family", "kernel"),
    [*((f, "eager") for f in MIXED), ("olmoe", "grouped_mm"), ("olmoe", "batched_mm"), ("gpt_oss", "grouped_mm")],
)
def test_loss_and_gradients_are_the_rows_of_the_original_model(family: str, kernel: str) -> None:
    """Gated and plain experts, transposed ones with biases, every kernel; the gradient has the size of the chosen ones."""
    model, _, _ = tuned(family, kernel)
    whole = mixture(family, kernel)
    losses = [loss_of(m) for m in (model, whole)]
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-6)
    for loss in losses:
        loss.backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{path}.esft.{t}" for path, hook in hooks(model).items() for t in hook.tensors}
    for path, hook in hooks(model).items():
        for name in hook.tensors:
            dense = getattr(whole.get_submodule(path), name).grad[hook.chosen]
            ours = getattr(hook, name).grad
            assert bool(ours.any()) and ours.shape[0] == len(hook.chosen) < hook.count
            torch.testing.assert_close(ours, dense, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("score", ["token", "gate"])
@pytest.mark.parametrize("packing", [True, False])
def test_scores_are_means_over_samples_of_what_was_applied(score: str, packing: bool) -> None:
    """Against loops over the rows, one at a time, without any padding."""
    from tests.tiny import roles_for

    model = mixture("olmoe")
    paths = list(mixtures(model))
    rows = [[5, 9, 3, 60, 7], [8, 1, 44, 12, 30, 6, 21, 9], [7, 7]]
    wanted = {path: torch.zeros(8) for path in paths}
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    handles = [
        model.get_submodule(p).register_forward_pre_hook(lambda _, a, p=p: seen.__setitem__(p, (a[1], a[2]))) for p in paths
    ]
    for row in rows:
        model(input_ids=torch.tensor([row]))
        for path, (index, weight) in seen.items():
            for token in range(len(row)):
                for place in range(2):
                    value = float(weight[token, place]) if score == "gate" else 1 / 2
                    wanted[path][index[token, place]] += value / len(row) / len(rows)
    for handle in handles:
        handle.remove()
    engine = roles_for(model).engine
    sums = RoutingScores(paths, 8)
    for path in paths:
        model.get_submodule(path).register_forward_pre_hook(lambda _, a, p=path: sums.see(p, a[1], a[2]))
    from llmrecipe.data.collate import Sequence, pack, pad

    sequences = [Sequence(row, [1] * len(row)) for row in rows]
    engine(pack(sequences) if packing else pad(sequences, 0))
    assert (sums.samples, sums.tokens) == (3, 15)
    for path in paths:
        got = (sums.gate if score == "gate" else sums.selected)[path] / 3
        torch.testing.assert_close(got.float(), wanted[path], atol=1e-5, rtol=1e-5)
        assert score == "gate" or float(got.sum()) == pytest.approx(1.0)


def test_segments_of_a_packed_row_are_samples_and_padding_is_none() -> None:
    sums = RoutingScores(["m"], 3)
    layout = Layout((Segment(0, 0, 1), Segment(0, 1, 3)), 1, 4)
    with activate(Context(layout=layout)):
        sums.see("m", torch.tensor([[0], [1], [1], [2]]), torch.tensor([[0.5], [1.0], [1.0], [0.4]]))
    assert sums.selected["m"].tolist() == pytest.approx([1, 2 / 3, 1 / 3])
    assert sums.gate["m"].tolist() == pytest.approx([0.5, 2 / 3, 0.4 / 3])
    with activate(Context(attention_mask=torch.tensor([[0, 1], [1, 0]]))):
        sums.see("m", torch.tensor([[0], [1], [1], [0]]), torch.ones(4, 1))
    assert sums.selected["m"].tolist() == pytest.approx([1, 2 / 3 + 2, 1 / 3]) and (sums.samples, sums.tokens) == (4, 6)


@pytest.mark.parametrize(
    ("p", "least", "chosen"),
    [(0.2, 1, [2]), (0.35, 1, [2]), (0.36, 1, [0, 2]), (0.65, 1, [0, 2]), (0.1, 3, [0, 1, 2]), (1.0, 1, [0, 1, 2, 3])],
)
def test_the_smallest_set_includes_the_expert_that_crosses_p(p: float, least: int, chosen: list[int]) -> None:
    assert smallest_set(torch.tensor([0.30, 0.25, 0.35, 0.10], dtype=torch.float64), p, least) == chosen


def test_nothing_but_the_chosen_experts_moves_and_state_has_their_size() -> None:
    """50 steps of AdamW with decay; 3 D I numbers an expert, two moments each."""
    model, stack, wrapper = tuned()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    config = registry.load_class("optim", "adamw")(lr=1e-2, weight_decay=0.1, decay_adapters=True)
    optimizer = build_optimizer(config, parameter_groups(model, config, stack.groups(model)))
    for _ in range(50):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    n = sum(len(h.chosen) for h in hooks(model).values())
    count = n * 3 * 32 * 48
    assert 0 < n < 16 and wrapper.memory(model)["trainable"] == count
    assert optimizer_bytes(optimizer) == 8 * count + 4 * 4
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    delta = stack.delta(model)
    assert sum(v.numel() for k, v in delta.items() if k.endswith("proj")) == count
    assert stack.structures(model)["esft"]["experts"] == {path: h.chosen.tolist() for path, h in hooks(model).items()}
    wanted = model(input_ids=IDS).logits
    wrapper.merge(model)
    assert not hooks(model)
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted, atol=1e-5, rtol=1e-5)
    chosen = stack.structures(model)["esft"]["experts"]
    assert chosen == {}


def test_the_backward_pass_keeps_inputs_of_the_chosen_experts_only() -> None:
    """D for the input of gate and up, I for that of down, for each pair of a token and a chosen expert of the last layer."""
    path = list(mixtures(mixture("olmoe")))[-1]
    sizes, pairs = [], []
    for chosen in ([0], [0, 1, 2], [1, 4, 5, 6, 7]):
        model = mixture("olmoe").requires_grad_(False)
        add_chosen(model, "esft", {path: chosen})
        for hook in hooks(model).values():
            hook.requires_grad_(True)
        index: list[torch.Tensor] = []
        router: nn.Module = model.get_submodule(path.removesuffix(".experts")).gate
        router.register_forward_hook(lambda _, __, out, i=index: i.append(out[2]))
        there = [*model.parameters(), *model.buffers()]
        loss, saved = saved_bytes(lambda m=model: loss_of(m), there)
        sizes.append(max(saved, retained_bytes(loss, there)))
        pairs.append(int(torch.isin(index[0], torch.tensor(chosen)).sum()))
    D, wide = 32, 48
    each = [(sizes[i + 1] - sizes[i]) / (pairs[i + 1] - pairs[i]) for i in (0, 1)]
    assert each[0] == pytest.approx(each[1], rel=0.05), (each, sizes, pairs)
    assert 4 * (D + wide) < each[0] < 4 * (2 * D + 5 * wide) + 64


def test_files_checkpointing_and_an_empty_expert() -> None:
    model = mixture("mixtral")
    add_chosen(model, "esft", {path: [3] for path in mixtures(model)})
    for hook in hooks(model).values():
        hook.requires_grad_(True)
    x = torch.randn(3, 32, requires_grad=True)
    host, _ = next((m, h) for _, m, _, h in all_hooks(model))
    out = host(x, torch.tensor([[0, 1]] * 3), torch.full((3, 2), 0.5))
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in host.esft.parameters())
    model, stack, _ = tuned()
    loss_of(model).backward()
    delta, structure = {k: v.clone() for k, v in stack.delta(model).items()}, stack.structures(model)
    for name, value in delta.items():
        if name.endswith("proj"):
            value.add_(0.1)
    again = mixture("olmoe")
    other = Stack([Esft(name="esft", p=0.4)])
    other.attach(again, structure)
    other.restore(again, delta)
    stack.restore(model, delta)
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"stack\.esft: this model has no mixture of experts"):
        Stack([Esft(name="esft")]).attach(tiny_model())
    with pytest.raises(UserError, match=r"stack\.esft\.min_per_layer: must be <= \d+, the experts of a layer; got 99"):
        Stack([Esft(name="esft", min_per_layer=99)]).attach(mixture("olmoe"))
    esft = Esft(name="esft")
    for other in (Lora(name="other", target="experts"), Ia3(name="other")):
        for stack in ([other, esft], [esft, other]):
            with pytest.raises(UserError, match=r"stack\.esft: other changes the experts of .*other\.scaled=\[key,value\]"):
                Stack(stack).attach(mixture("olmoe"))
    Stack([Ia3(name="other", scaled=["key", "value"]), esft]).attach(mixture("olmoe"))


def test_the_picture_shows_every_expert_and_frames_the_chosen_ones() -> None:
    from llmrecipe.runs.report.maps import grid_map

    model, _, wrapper = tuned(score="gate")
    (title, made), *_ = wrapper.grids(model).items()
    assert title == "gate score" and [len(row) for row in made["values"]] == [8, 8]
    assert made["marked"] == [hook.chosen.tolist() for hook in hooks(model).values()]
    drawn = grid_map("esft: gate score", made)
    assert [[j for j, cell in enumerate(row.cells) if cell.chosen] for row in drawn.rows] == made["marked"]
    assert drawn.rows[1].cells[7].where.startswith("layer 1, expert 7: ")
    assert next(d for d, _ in wrapper.describe(model)).startswith("model.layers.0.mlp.experts: experts ")


@pytest.mark.slow
def test_a_resumed_run_is_the_whole_run_and_its_report_has_the_picture(tmp_path: Path) -> None:
    from llmrecipe.runs.report.page import run_page

    words = ["steps=6", "epochs=null", "batch.size=4", "stack.esft.n_tokens=500", "eval.at_start=false", "save.every=3"]
    resumes_to_the_bit(tmp_path, "esft", words, 4)
    assert "layer 3, expert 7" in run_page(tmp_path / "whole")
