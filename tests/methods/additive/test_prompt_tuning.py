"""Prompt tuning against peft, against the base model fed the same tokens, packed, padded, cached and paired."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.forward_context import Context, Layout, Segment, activate
from llmrecipe.data.collate import Sequence
from llmrecipe.methods._base.method import Probe
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.additive._engines.virtual_tokens import longer_layout, opening, virtual_rows
from llmrecipe.methods.additive.prompt_tuning import PromptTuning
from tests.methods.additive.prefix_support import (
    IDS,
    adapted,
    bert_classifier,
    gradients,
    greedy_cached,
    greedy_whole,
    pair_model,
    trained,
)
from tests.tiny import roles_for, tiny_model

P = 4
TEXT = [11, 12, 13, 11]


class Letters:
    """A tokenizer of fixed ids."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) - 86 for c in text]}


def prompt(**options: Any) -> PromptTuning:
    return PromptTuning(name="prompt", **{"num_virtual_tokens": P, **options})


def from_text(family: str = "llama", **options: Any) -> nn.Module:
    """A model whose virtual tokens hold the embeddings of TEXT."""
    wrapper = prompt(init="text", init_text="abc", **options)
    model = adapted(wrapper, family)
    wrapper.calibrate(model, Probe(None, None, tokenizer=Letters()))
    return model


@pytest.mark.parity("prompt_tuning", "the base fed the text")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_a_prompt_from_text_is_the_base_fed_that_text(family: str) -> None:
    more = {"ffn_dim": 48, "word_embed_proj_dim": 16} if family == "opt" else {}
    model = tiny_model(family, **more)
    wanted = model(input_ids=torch.tensor([[*TEXT, *IDS[0].tolist()]])).logits[:, P:]
    Stack([prompt(init="text", init_text="abc")]).attach(model)
    prompt(init="text", init_text="abc").calibrate(model, Probe(None, None, tokenizer=Letters()))
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted, atol=1e-5, rtol=1e-5)


def test_behind_the_first_token() -> None:
    model = from_text(position="after_bos")
    first, *rest = IDS[0].tolist()
    wanted = tiny_model()(input_ids=torch.tensor([[first, *TEXT, *rest]])).logits[0, [0, *range(P + 1, P + 7)]]
    torch.testing.assert_close(model(input_ids=IDS).logits[0], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("position", ["prefix", "after_bos"])
@pytest.mark.parametrize("packing", [True, False])
def test_each_document_of_a_batch_has_its_own_slots(packing: bool, position: str) -> None:
    """Log-probabilities of a mixed batch, with a shared prompt and a one-token document, equal those of documents fed whole."""
    model = from_text(position=position)
    sequences = [
        Sequence([5, 9, 3], [0, 1, 1], prompt=1),
        Sequence([60, 7], [1, 1], parent=0),
        Sequence([4], [0]),
        Sequence([4, 4, 8, 2], [0, 1, 1, 1]),
    ]
    roles = roles_for(model, packing=packing)
    batch = roles.layout(sequences)
    ours = batch.sum_by_sequence(roles.engine(batch)["logprobs"])
    base = tiny_model()
    at = 0 if position == "prefix" else 1

    def alone(ids: list[int], last: int) -> Tensor:
        """Summed log-probabilities of the last tokens of a document with TEXT written out."""
        full = [*ids[:at], *TEXT, *ids[at:]]
        table = base(input_ids=torch.tensor([full])).logits[0].log_softmax(-1)
        return sum((table[i - 1, full[i]] for i in range(len(full) - last, len(full))), torch.zeros(()))

    wanted = torch.stack([alone([5, 9, 3], 2), alone([5, 9, 3, 60, 7], 2), torch.zeros(()), alone([4, 4, 8, 2], 3)])
    if at:
        # The virtual tokens follow the first token: what it predicts comes before them.
        table = [base(input_ids=torch.tensor([[t]])).logits[0, -1].log_softmax(-1) for t in (5, 4)]
        moved = [alone([5, 9, 3], 1), alone([4, 4, 8, 2], 2)]
        wanted[0], wanted[3] = moved[0] + table[0][9], moved[1] + table[1][4]
    torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)


def test_columns_open_where_documents_start() -> None:
    loaded = opening(torch.tensor([[0, 3]]), 5, 2, 0)
    # documents a b c | d e -> virtual tokens 0 1 a b c | virtual tokens 0 1 d e
    assert loaded.order.tolist() == [[5, 6, 0, 1, 2, 5, 6, 3, 4]]
    assert loaded.new.tolist() == [[2, 3, 4, 7, 8]]
    assert loaded.close(loaded.fill(torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[8, 9]]))).tolist() == [[1, 2, 3, 4, 5]]
    behind = opening(torch.tensor([[0, 3]]), 5, 2, 1)
    assert behind.order.tolist() == [[0, 5, 6, 1, 2, 3, 5, 6, 4]]
    assert behind.moved.tolist() == [[False, True, True, False, True]]
    layout = longer_layout(Layout((Segment(0, 0, 3, None, 2), Segment(0, 3, 2, 0, 0), Segment(0, 5, 1, None, 1)), 1, 6), 2)
    assert [(s.start, s.length, s.parent, s.prompt) for s in layout.segments] == [
        (0, 5, None, 4),
        (5, 2, 0, 0),
        (7, 3, None, 3),
    ]
    assert layout.columns == 10


@pytest.mark.parity("prompt_tuning", "PEFT PromptTuningConfig")
@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logits_and_gradients_equal_peft(family: str) -> None:
    from peft import PromptTuningConfig, get_peft_model

    model = adapted(prompt(init="normal"), family)
    twin = get_peft_model(tiny_model(family), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)).eval()
    _, rows = virtual_rows(model, "prompt")
    with torch.no_grad():
        rows.embeddings.copy_(twin.prompt_encoder["default"].embedding.weight)
    ours, theirs = model(input_ids=IDS).logits, twin(input_ids=IDS).logits[:, P:]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(rows.embeddings.grad, twin.prompt_encoder["default"].embedding.weight.grad, atol=1e-3, rtol=1e-4)


@pytest.mark.parity("prompt_tuning", "PEFT PromptTuningConfig")
@pytest.mark.slow
def test_a_classifier_equals_peft() -> None:
    from peft import PromptTuningConfig, get_peft_model

    model = bert_classifier()
    Stack([prompt()]).attach(model)
    twin = get_peft_model(bert_classifier(), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P)).eval()
    _, rows = virtual_rows(model, "prompt")
    with torch.no_grad():
        rows.embeddings.copy_(twin.prompt_encoder["default"].embedding.weight)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    ids = IDS.repeat(2, 1) * mask
    torch.testing.assert_close(
        model(input_ids=ids, attention_mask=mask).logits, twin(input_ids=ids, attention_mask=mask).logits, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("position", ["prefix", "after_bos"])
def test_generation_from_a_cache_and_left_padding_change_nothing(family: str, position: str) -> None:
    model = adapted(prompt(init="normal", position=position), family)
    prompts = [[5, 9, 3, 60, 7], [4, 8], [7, 7, 21]]
    wanted = [greedy_whole(model, p, 8) for p in prompts]
    assert greedy_cached(model, prompts, 8) == wanted
    bare = tiny_model(family)
    assert greedy_cached(bare, prompts, 8) != wanted


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_pair_reads_the_prompt_in_its_encoder_and_in_cross_attention(family: str) -> None:
    base = pair_model(family)
    full, mask = torch.tensor([[*TEXT, *IDS[0].tolist()]]), torch.ones(1, 7, dtype=torch.long)
    wanted = base(input_ids=full, decoder_input_ids=IDS[:, :4]).logits
    model = from_text(family)
    torch.testing.assert_close(model(input_ids=IDS, decoder_input_ids=IDS[:, :4]).logits, wanted, atol=1e-5, rtol=1e-5)
    masked = model(input_ids=IDS, attention_mask=mask, decoder_input_ids=IDS[:, :4]).logits
    torch.testing.assert_close(masked, wanted, atol=1e-5, rtol=1e-5)
    new = [
        m.generate(input_ids=i, max_new_tokens=5, min_new_tokens=5, do_sample=False) for m, i in ((model, IDS), (base, full))
    ]
    assert torch.equal(*new)


def test_two_prompts_stand_in_front_of_each_other_and_a_mounted_one_next_to_the_text() -> None:
    model = tiny_model()
    for name in ("inner", "outer"):
        Stack([PromptTuning(name=name, num_virtual_tokens=2)]).attach(model)
    for name, ids in (("inner", [21, 22]), ("outer", [31, 32])):
        _, rows = virtual_rows(model, name)
        rows.embeddings.data.copy_(tiny_model().get_input_embeddings().weight[ids])
    wanted = tiny_model()(input_ids=torch.tensor([[31, 32, 21, 22, *IDS[0].tolist()]])).logits[:, 4:]
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted, atol=1e-5, rtol=1e-5)
    prompts = [[5, 9, 3], [4, 8, 6, 7, 9]]
    assert greedy_cached(model, prompts, 5) == [greedy_whole(model, p, 5) for p in prompts]


def test_only_the_rows_train_and_each_of_them_does() -> None:
    model = adapted(prompt())
    assert {n: tuple(p.shape) for n, p in trained(model).items()} == {"model.embed_tokens.prompt.embeddings": (P, 32)}
    grads = gradients(model, checkpointing=False)
    assert all(bool((g != 0).all()) for g in grads.values())
    replayed = gradients(adapted(prompt()), checkpointing=True)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, replayed[name])


@pytest.mark.parametrize("init", ["vocab", "uniform", "normal"])
def test_starts(init: str) -> None:
    model = adapted(prompt(init=init, num_virtual_tokens=50))
    embedding, rows = virtual_rows(model, "prompt")
    table, own = embedding.weight.detach(), rows.embeddings.detach()
    if init == "vocab":
        assert all(bool((table == row).all(1).any()) for row in own)
    elif init == "uniform":
        assert -0.5 <= float(own.min()) < -0.4
        assert 0.4 < float(own.max()) <= 0.5
    else:
        assert float(own.std()) == pytest.approx(1.0, abs=0.1)


def test_the_reference_reads_no_prompt_and_embeddings_get_one_as_ids_do() -> None:
    model = adapted(prompt())
    base = tiny_model()(input_ids=IDS).logits
    with activate(Context(role="reference")):
        assert torch.equal(model(input_ids=IDS).logits, base)
    assert not torch.allclose(model(input_ids=IDS).logits, base, atol=1e-2)
    embedded = cast(Any, model).get_input_embeddings()(IDS)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(input_ids=IDS).logits)
    with pytest.raises(RecipeError, match="at least one token"):
        prompt(init="text").calibrate(model, Probe(None, None, tokenizer=Letters()))


@pytest.mark.slow
def test_its_recipe_learns_and_its_run_is_mounted_exactly(tmp_path: Any) -> None:
    from llmrecipe.recipe.schema import ModelSection, TokenizerSection
    from llmrecipe.runs.open_model import open_model
    from tests.trainings import events, learned, train_recipe

    run = train_recipe(tmp_path / "run", "prompt_tuning", "steps=40")
    scores = [e["eval/loss"] for e in events(tmp_path / "run", "evaluation")]
    assert scores[-1] < scores[0] - 0.2
    assert [t.shape[0] for t in learned(tmp_path / "run").values()] == [20]
    mounted = open_model(ModelSection(path=str(tmp_path / "run")), TokenizerSection()).model.eval()
    torch.testing.assert_close(mounted(input_ids=IDS).logits, run.model.eval()(input_ids=IDS).logits)
