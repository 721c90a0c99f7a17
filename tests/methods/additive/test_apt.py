"""Adaptive prefix tuning: its limits, its scores in float64, and that a document's scores stay its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmrecipe.core.forward_context import Context, Layout, Segment, activate
from llmrecipe.data.collate import Sequence
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods._engines.document_tokens import summarised
from llmrecipe.methods.additive._engines.apt_gates import BlockScores
from llmrecipe.methods.additive._engines.prefix_kv import tables_of
from llmrecipe.methods.additive.apt import Apt
from llmrecipe.methods.additive.p_tuning_v2 import PTuningV2
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.models.kv_cache import carried
from tests.methods.additive.prefix_support import IDS, adapted, bert_classifier, gradients, greedy_cached, greedy_whole, trained
from tests.tiny import roles_for, tiny_model

P = 4


def apt(**options: Any) -> Apt:
    return Apt(name="prefix", **{"num_virtual_tokens": P, "dropout": 0.0, **options})


def scores_of(model: nn.Module) -> list[BlockScores]:
    return [p for _, _, _, p in all_hooks(model) if isinstance(p, BlockScores)]


def loud(model: nn.Module, size: float = 1.0) -> nn.Module:
    """Scores large enough for differences between documents to show."""
    for hook in scores_of(model):
        if hasattr(hook, "gate"):
            hook.gate.data.normal_(std=size)
    return model


@pytest.mark.parity("apt", "P-tuning v2, bit for bit")
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_open_gates_are_p_tuning_v2_bit_for_bit(family: str) -> None:
    def outputs(wrapper: Any) -> Tensor:
        model = bert_classifier() if family == "bert" else tiny_model(family)
        torch.manual_seed(1)
        Stack([wrapper]).attach(model)
        return model.eval()(input_ids=IDS).logits

    plain = outputs(PTuningV2(name="prefix", num_virtual_tokens=P))
    for gates in ({"layer_gate": False}, {"layer_gate": True}):
        torch.testing.assert_close(outputs(apt(token_gate="off", **gates)), plain, atol=0.0, rtol=0.0)
    assert not torch.equal(outputs(apt()), plain)


def test_static_scores_fold_into_a_plain_table() -> None:
    model = adapted(apt(token_gate="static"))
    plain = adapted(PTuningV2(name="prefix", num_virtual_tokens=P))
    (ours,), (table,) = tables_of(model, "prefix"), tables_of(plain, "prefix")
    columns = []
    with torch.no_grad():
        for hook, (keys, values) in zip(scores_of(model), ours.tables["attn"](), strict=True):
            hook.bias.normal_()
            hook.scale.fill_(1.7)
            factor = (1.7 * hook.bias.sigmoid())[None, None, :, None]
            columns.append((keys * factor, values * factor))
        table.tables["attn"].flat.copy_(table.tables["attn"].join(columns))
    torch.testing.assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parity("apt", "formula, float64")
def test_a_score_is_the_formula_in_float64() -> None:
    model = loud(adapted(apt(gate_bias=True))).double()
    seen: list[tuple[Tensor, Tensor]] = []
    original = BlockScores.token_scores
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockScores, "token_scores", lambda self, f, x: seen.append((x, original(self, f, x))) or seen[-1][1])
        with activate(Context(prompt_lengths=torch.tensor([3, 5]))):
            model(input_ids=IDS.repeat(2, 1))
    assert len(seen) == 2
    for hook, (x, alpha) in zip(scores_of(model), seen, strict=True):
        for row, length in ((0, 3), (1, 5)):
            wanted = 1 / (1 + torch.exp(-(x[row, :length].mean(0) @ hook.gate + hook.bias)))
            torch.testing.assert_close(alpha[row], wanted, atol=1e-12, rtol=1e-10)


def test_summaries_of_packed_and_padded_documents() -> None:
    layout = Layout((Segment(0, 0, 3, None, 2), Segment(0, 3, 2, 0, 0), Segment(0, 5, 2, None, 0)), 1, 7)
    inputs = {"input_ids": torch.zeros(1, 7, dtype=torch.long)}
    packed = summarised("prompt_mean", Context(layout=layout), inputs)
    # A continuation has the summary of its prompt; without a prompt the first token counts.
    assert packed.tolist() == [[1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0]]
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    inputs = {"input_ids": torch.zeros(2, 5, dtype=torch.long), "attention_mask": mask}
    padded = summarised("prompt_mean", Context(prompt_lengths=torch.tensor([2, 4])), inputs)
    assert padded.tolist() == [[0, 0, 1, 1, 0], [1, 1, 1, 1, 0]]
    assert summarised("first", Context(), inputs).tolist() == [[0, 0, 1, 0, 0], [1, 0, 0, 0, 0]]
    beams = summarised("prompt_mean", Context(prompt_lengths=torch.tensor([2])), inputs)
    assert beams.tolist() == [[0, 0, 1, 1, 0], [1, 1, 0, 0, 0]]


def test_packed_documents_are_scored_apart() -> None:
    model = loud(adapted(apt()))
    sequences = [
        Sequence([5, 9, 3], [0, 0, 0], prompt=3),
        Sequence([60, 7], [1, 1], parent=0),
        Sequence([8, 2], [1, 1], parent=0),
        Sequence([4, 4, 8, 2], [0, 0, 1, 1], prompt=2),
    ]
    values = []
    for packing in (True, False):
        roles = roles_for(model, packing=packing)
        batch = roles.layout(sequences)
        values.append(batch.sum_by_sequence(roles.engine(batch)["logprobs"]))
    torch.testing.assert_close(values[0], values[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("first", ["apt", "prompt"])
def test_a_prompt_in_the_same_stack_is_part_of_the_rows_that_are_scored(first: str) -> None:
    from llmrecipe.methods.additive.prompt_tuning import PromptTuning

    wrappers = [apt(), PromptTuning(name="prompt", num_virtual_tokens=3)]
    model = tiny_model()
    torch.manual_seed(1)
    Stack(wrappers if first == "apt" else wrappers[::-1]).attach(model)
    loud(model.eval())
    sequences = [Sequence([5, 9, 3], [0, 0, 1], prompt=2), Sequence([4, 4, 8, 2], [0, 1, 1, 1], prompt=1)]
    values = []
    for packing in (True, False):
        roles = roles_for(model, packing=packing)
        roles.engine.eval()
        batch = roles.layout(sequences)
        values.append(batch.sum_by_sequence(roles.engine(batch)["logprobs"]))
    torch.testing.assert_close(values[0], values[1], atol=1e-4, rtol=1e-4)


def test_no_target_reaches_into_the_scores() -> None:
    """Changing a later token leaves every earlier prediction as it was."""
    model = loud(adapted(apt()))
    other = IDS.clone()
    other[0, 5] = 33
    with activate(Context(prompt_lengths=torch.tensor([3]))):
        a, b = model(input_ids=IDS).logits, model(input_ids=other).logits
    torch.testing.assert_close(a[:, :5], b[:, :5], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(a[:, 5:], b[:, 5:], atol=1e-3)


def test_scores_stay_with_the_cache() -> None:
    model = loud(adapted(apt()), 2.0)
    prompts = [[5, 9, 3, 60, 7], [4, 8], [7, 7, 21]]
    context = Context(prompt_lengths=torch.tensor([5, 2, 3]))
    wanted = [greedy_whole(model, p, 8) for p in prompts]
    assert greedy_cached(model, prompts, 8, context) == wanted
    assert greedy_cached(model, prompts, 8) == wanted


def test_beams_reorder_the_scores_with_the_cache() -> None:
    model = loud(adapted(apt()), 2.0)
    prompts = [[5, 9, 3, 60, 7], [4, 8, 1]]
    together = greedy_cached(model, prompts, 6, num_beams=3)
    assert together == [greedy_cached(model, [p], 6, num_beams=3)[0] for p in prompts]
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=IDS.repeat(2, 1) * torch.tensor([[1], [0]]), past_key_values=cache, use_cache=True)
    kept = carried(cache)["prefix"]
    before = {layer: alpha.clone() for layer, alpha in kept.items()}
    cache.reorder_cache(torch.tensor([1, 0]))
    assert sorted(before) == [0, 1]
    for layer, alpha in before.items():
        assert not torch.equal(alpha[0], alpha[1])
        assert torch.equal(kept[layer], alpha[[1, 0]])


def test_counts_and_gradients() -> None:
    model = loud(adapted(apt()))
    layers, kv, width = 2, 16, 32
    assert sum(p.numel() for p in trained(model).values()) == 2 * layers * P * kv + layers * width * P + layers
    grads = gradients(model, checkpointing=False)
    assert grads.keys() == trained(model).keys()
    assert all(bool((g != 0).all()) for g in grads.values())


def test_checkpointing_changes_no_gradient() -> None:
    plain, replayed = (gradients(loud(adapted(apt(dropout=0.2)), 0.0), c) for c in (False, True))
    assert plain.keys() == replayed.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(grad, replayed[name])


def test_an_encoder_is_summarised_by_its_first_token() -> None:
    model = bert_classifier()
    Stack([apt()]).attach(model)
    loud(model)
    ids = IDS.repeat(2, 1)
    ids[1, 0] = 40
    alphas: list[Tensor] = []
    original = BlockScores.token_scores
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockScores, "token_scores", lambda self, f, x: alphas.append(original(self, f, x)) or alphas[-1])
        model(input_ids=ids)
        same = ids.clone()
        same[:, 4] = 50
        model(input_ids=same)
    assert not torch.allclose(alphas[0][0], alphas[0][1])
    # The first block reads embeddings: tokens behind the first cannot have moved its scores.
    assert torch.equal(alphas[0], alphas[2])


@pytest.mark.slow
def test_its_recipe_learns_and_its_run_is_mounted_exactly(tmp_path: Any) -> None:
    from llmrecipe.recipe.schema import ModelSection, TokenizerSection
    from llmrecipe.runs.open_model import open_model
    from tests.trainings import events, train_recipe

    run = train_recipe(tmp_path / "run", "apt", "steps=60")
    scores = [e["eval/loss"] for e in events(tmp_path / "run", "evaluation")]
    assert scores[-1] < scores[0] - 0.2
    section = ModelSection(path=str(tmp_path / "run"))
    mounted = open_model(section, TokenizerSection(), head="classification").model.eval()
    hidden = [m.base_model(input_ids=IDS).last_hidden_state for m in (mounted, run.model.eval())]
    torch.testing.assert_close(*hidden)
