"""HyperTuning: every row has the adapter of its own examples, equal to that adapter alone; what `adapt` writes is the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.core.forward_context import Context, activate
from llmrecipe.data.collate import Batch, Sequence, pack, pad
from llmrecipe.engine.forward import Engine
from llmrecipe.evaluation.adapt import fill_adapter, gates_of
from llmrecipe.methods._base.method import Probe
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.additive.prefix_tuning import PrefixTuning
from llmrecipe.methods.memory.hypertuning import Hypertuning
from llmrecipe.methods.reparameterized.lora import Lora
from tests.methods.kinds import model_of
from tests.tiny import tiny_model

TEXTS = [[1, 5, 6, 7, 8, 2], [1, 12, 13, 2], [1, 20, 21, 22, 23, 2]]
SHOTS = ([[9, 4, 11, 0], [30, 31, 2, 0], [15, 16, 17, 18]], [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
SMALL: dict[str, Any] = {"depth": 1, "width": 16, "r": 2, "num_virtual_tokens": 3, "target": None}


def examples() -> dict[str, torch.Tensor]:
    return {"example_ids": torch.tensor(SHOTS[0]), "example_mask": torch.tensor(SHOTS[1])}


def batch_of(tasks: list[int], packed: bool, model: nn.Module) -> Batch:
    """The texts, each with the adapter of its task; an encoder-decoder reads the same texts on both sides."""
    rows = [Sequence(t, [0, *([1] * (len(t) - 1))], task=k) for t, k in zip(TEXTS, tasks, strict=True)]
    if not model.config.is_encoder_decoder:  # type: ignore[union-attr]
        return pack(rows) if packed else pad(rows, 0)
    own = pad(rows, 0)
    return own.with_extra(encoder_ids=own.input_ids, encoder_mask=own.attention_mask)


def hyper(family: str = "llama", **options: Any) -> tuple[nn.Module, Hypertuning]:
    """A model in float64 under a hypermodel whose every number is away from its start."""
    torch.manual_seed(0)
    model = model_of(family) if family == "t5" else tiny_model(family)
    wrapper = Hypertuning(name="hypertuning", **{**SMALL, **options})
    stack = Stack([wrapper])
    stack.attach(model)
    stack.set_trainable(model)
    model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hypertuning" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, wrapper


def alone(family: str, wrapper: Hypertuning, written: list[torch.Tensor], gates: list[torch.Tensor]) -> nn.Module:
    """The same base under an ordinary LoRA or prefix that holds what was written for one task."""
    torch.manual_seed(0)
    model = model_of(family) if family == "t5" else tiny_model(family)
    own: Any = (
        Lora(name="own", target=wrapper.target or "attn.q|v", r=wrapper.r, alpha=wrapper.alpha)
        if wrapper.emit == "lora"
        else PrefixTuning(
            name="own",
            target=wrapper.target or "attn",
            num_virtual_tokens=wrapper.num_virtual_tokens,
            reparam="flat",
            gate_init="closed" if wrapper.prefix_gate else "open",
        )
    )
    Stack([own]).attach(model)
    model.double().eval()
    fill_adapter(model, wrapper, "own", written, gates)
    return model


CASES = [
    ("llama", {"emit": "lora"}),
    ("llama", {"emit": "lora", "target": "attn.q|v|o + mlp.down", "query_layout": "per_matrix", "head_init": "bias"}),
    ("gpt2", {"emit": "lora"}),
    ("llama", {"emit": "prefix", "phi_norm": True}),
    ("llama", {"emit": "prefix", "prefix_gate": True, "query_layout": "per_matrix"}),
    ("t5", {"emit": "lora"}),
    ("t5", {"emit": "prefix"}),
]


@pytest.mark.parametrize(("family", "options"), CASES)
@pytest.mark.parametrize("packed", [True, False])
def test_each_row_has_the_adapter_of_its_examples_as_if_alone(family: str, options: dict[str, Any], packed: bool) -> None:
    """Batched per-example adapters equal a loop over models with one ordinary adapter each; tasks and rows differ in order."""
    model, wrapper = hyper(family, **options)
    tasks = [2, 0, 1]
    batch = batch_of(tasks, packed, model).with_extra(**examples())
    with torch.no_grad():
        mixed = Engine(model)(batch)["logprobs"]
        written = wrapper.hypermodel(model)((batch.extra["example_ids"], batch.extra["example_mask"]))
        spread = max(float((w[0] - w[1]).abs().max()) for w in written)
        assert spread > 1e-3, "tasks must differ for this test to say anything"
        for row, task in enumerate(tasks):
            own = alone(family, wrapper, [w[task : task + 1] for w in written], gates_of(model, "hypertuning"))
            wanted = Engine(own)(batch_of([0, 0, 0], packed, own))["logprobs"]
            mine = batch.sequence == row
            torch.testing.assert_close(mixed[mine], wanted[mine], atol=1e-9, rtol=1e-7)


def test_the_lora_it_writes_is_pefts(tmp_path: Path) -> None:
    """Loss and the gradient of the input embedding under PEFT's LoRA with the written factors."""
    from peft import LoraConfig, get_peft_model

    model, wrapper = hyper("llama", emit="lora")
    ids = torch.tensor([TEXTS[0]])
    one = {name: value[:1] for name, value in examples().items()}
    written = wrapper.hypermodel(model)((one["example_ids"], one["example_mask"]))
    torch.manual_seed(0)
    base = tiny_model("llama").double().eval()
    config = LoraConfig(r=wrapper.r, lora_alpha=int(wrapper.alpha), target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    theirs: Any = get_peft_model(base, config)
    layers = [m for m in theirs.modules() if hasattr(m, "lora_A")]
    with torch.no_grad():
        for index, layer in enumerate(layers):
            layer.lora_A["default"].weight.data = written[2 * index][0].clone()
            layer.lora_B["default"].weight.data = written[2 * index + 1][0].T.clone()
    context = Context(examples=(one["example_ids"], one["example_mask"]), computed={})
    found = []
    for module, ours in ((model, True), (theirs, False)):
        embedded = module.get_input_embeddings()(ids).detach().requires_grad_()
        with activate(context if ours else Context()):
            logits = module(inputs_embeds=embedded).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
        (gradient,) = torch.autograd.grad(loss, embedded)
        found.append((loss.detach(), gradient))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-10, rtol=1e-8)


def test_the_hypermodel_runs_once_for_encoder_and_decoder() -> None:
    model, wrapper = hyper("t5")
    calls = []
    wrapper.hypermodel(model).register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        Engine(model)(batch_of([0, 1, 2], False, model).with_extra(**examples()))
    assert calls == [1]


def test_fresh_rows_have_the_size_of_an_ordinary_start() -> None:
    """A as Kaiming-uniform(sqrt 5) gives it, 1 / sqrt(3 n); B zero; prefixes standard normal; either way of starting."""
    for start in ("normal", "bias"):
        torch.manual_seed(3)
        model = tiny_model("llama")
        wrapper = Hypertuning(name="hypertuning", r=16, depth=1, width=64, head_init=start)
        wrapper.attach(model)
        with torch.no_grad():
            A, B = wrapper.hypermodel(model)(None)[:2]
        assert float(A.std()) == pytest.approx(1 / math.sqrt(3 * A.shape[-1]), rel=0.15)
        assert not B.any()
        model = tiny_model("llama")
        wrapper = Hypertuning(name="hypertuning", emit="prefix", num_virtual_tokens=16, depth=1, width=64, head_init=start)
        wrapper.attach(model)
        with torch.no_grad():
            assert float(wrapper.hypermodel(model)(None)[0].std()) == pytest.approx(1.0, rel=0.15)


def test_queries_see_one_another_unless_they_are_causal() -> None:
    """A change of the last query moves what the first writes, and with `decoder_causal` it does not."""
    for causal in (False, True):
        model, wrapper = hyper(decoder_causal=causal)
        made = wrapper.hypermodel(model)
        with torch.no_grad():
            before = [w.clone() for w in made(None)]
            made.queries[-1] += 1.0
            first = float((made(None)[0][0, 0] - before[0][0, 0]).abs().max())
        assert (first < 1e-12) == causal


def test_padding_of_examples_changes_nothing() -> None:
    model, wrapper = hyper()
    ids, mask = torch.tensor([[9, 4, 11]]), torch.ones(1, 3, dtype=torch.long)
    wide = torch.tensor([[9, 4, 11, 7, 7]]), torch.tensor([[1, 1, 1, 0, 0]])
    with torch.no_grad():
        for narrow, padded in zip(wrapper.hypermodel(model)((ids, mask)), wrapper.hypermodel(model)(wide), strict=True):
            torch.testing.assert_close(narrow, padded, atol=1e-12, rtol=1e-9)


def test_what_cannot_be_is_refused() -> None:
    two = [Hypertuning(name="hypertuning"), Lora(name="lora")]
    with pytest.raises(RecipeError, match="a second method would train too"):
        Stack(two)
    with pytest.raises(RecipeError, match="only a prefix has a gate"):
        Hypertuning(name="h", prefix_gate=True).check_stack([])
    with pytest.raises(ModelError, match="is not a linear layer of a block"):
        Hypertuning(name="h", target="norm").attach(tiny_model("llama"))


def test_a_hypermodel_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    """Its token ids would be other words; equal sizes do not help."""
    from tokenizers import Tokenizer as Fast
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    t5 = model_of("t5")
    t5.save_pretrained(tmp_path)
    names = {f"w{i}": i for i in range(64)}
    PreTrainedTokenizerFast(tokenizer_object=Fast(WordLevel(names, "w0"))).save_pretrained(tmp_path)
    wrapper = Hypertuning(name="h", path=str(tmp_path))
    model = tiny_model("llama")
    wrapper.attach(model)
    assert wrapper.hypermodel(model).trunk.config.model_type == "t5"
    same = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    wrapper.calibrate(model, Probe(None, None, tokenizer=same))
    other = PreTrainedTokenizerFast(tokenizer_object=Fast(WordLevel({f"w{63 - i}": i for i in range(64)}, "w0")))
    with pytest.raises(ModelError, match="another vocabulary"):
        wrapper.calibrate(model, Probe(None, None, tokenizer=other))
