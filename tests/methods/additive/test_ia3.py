"""(IA)^3 against peft and einsum; mixed-task batches; fused rows; merging; keys behind a norm."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llmrecipe.core.errors import DataError, ModelError, RecipeError
from llmrecipe.core.forward_context import Context, activate
from llmrecipe.data.collate import Sequence, pack, pad
from llmrecipe.engine.generation import generate
from llmrecipe.engine.sampling import Sampling
from llmrecipe.evaluation.evaluate_model import evaluate_path
from llmrecipe.feedback import generated_answers
from llmrecipe.methods.additive.ia3 import Ia3, ScaleKeys, ScaleOutput
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.models.module_map import anatomy
from llmrecipe.objectives.token_math import collate_tokens
from llmrecipe.runs import delta
from tests.methods.additive.harness import (
    IDS,
    attached,
    base_logits,
    cached_generation_equals_uncached,
    checkpointing_changes_no_gradient,
    fill,
    logits,
    model_of,
    only_listed_parameters_move,
    survives_a_round_trip,
    trained,
)
from tests.methods.twins import side_by_side
from tests.tiny import roles_for
from tests.trainings import curve, events, train_recipe


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "bert", "t5", "bart", "mixtral", "phi3", "deepseek_v2", "native"])
def test_starts_at_the_base_and_every_vector_learns(family: str) -> None:
    wanted = base_logits(family)
    # The embedded shape's first layer is dense and its others are mixtures; keys and values come from one latent projection.
    terms = ["key", "value"] if family == "deepseek_v2" else ["key", "value", "ffn"]
    model, _ = attached(family, Ia3(name="ia3", scaled=terms))
    assert torch.equal(logits(model), wanted)
    logits(model).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, name


def test_counts_follow_the_formula() -> None:
    model, stack = attached("llama", Ia3(name="ia3"))
    assert trained(model) == 2 * (2 * 16 + 48)  # L (2 d_kv + f)
    assert next(iter(stack)).memory(model)["trainable"] == trained(model)
    model, _ = attached("t5", Ia3(name="ia3", tasks=["a", "b", "c"]))
    assert trained(model) == 3 * (2 * (2 * 32 + 48) + 2 * (4 * 32 + 48))
    model, _ = attached("mixtral", Ia3(name="ia3"))
    assert trained(model) == 2 * (2 * 16 + 4 * 48)
    model, _ = attached("llama", Ia3(name="ia3", layers="-1", scaled=["ffn"]))
    assert trained(model) == 48


@pytest.mark.parity("ia3", "formula, float64")
def test_attention_and_feed_forward_equal_the_formula_in_float64() -> None:
    model, _ = attached("llama", Ia3(name="ia3"))
    fill(model)
    model.double()
    block = model.model.layers[0]
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    W = {n: getattr(block.self_attn, f"{n}_proj") for n in "kv"}
    torch.testing.assert_close(W["k"](x), torch.einsum("btd,od,o->bto", x, W["k"].weight, W["k"].ia3.l[0]), atol=1e-12, rtol=0)
    torch.testing.assert_close(W["v"](x), torch.einsum("btd,od,o->bto", x, W["v"].weight, W["v"].ia3.l[0]), atol=1e-12, rtol=0)
    mlp = block.mlp
    inner = nn.functional.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)
    wanted = torch.einsum("btf,f,df->btd", inner, mlp.down_proj.ia3.l[0], mlp.down_proj.weight)
    torch.testing.assert_close(mlp(x), wanted, atol=1e-12, rtol=0)


@pytest.mark.parity("ia3", "PEFT IA3Config")
@pytest.mark.parametrize(
    ("family", "targets", "feedforward"),
    [
        ("llama", ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
        ("bart", ["k_proj", "v_proj", "fc2"], ["fc2"]),
        ("t5", ["k", "v", "wo"], ["wo"]),
    ],
)
def test_outputs_gradients_and_five_steps_equal_peft(family: str, targets: list[str], feedforward: list[str]) -> None:
    peft = pytest.importorskip("peft")
    model, _ = attached(family, Ia3(name="ia3"))
    fill(model)
    ours = {path: hook for path, _, _, hook in all_hooks(model)}
    config = peft.IA3Config(target_modules=targets, feedforward_modules=feedforward)
    twin = peft.get_peft_model(model_of(family), config)
    theirs = {n: m for n, m in twin.base_model.model.named_modules() if hasattr(m, "ia3_l")}
    assert set(theirs) == set(ours)
    for path, module in theirs.items():
        module.ia3_l["default"].data = ours[path].l.data.reshape(module.ia3_l["default"].shape).clone()
    pair = (model, twin.base_model.model)
    for losses in side_by_side(pair, loss=lambda m: logits(m).log_softmax(-1).square().mean()):
        torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-6)
        for path, module in theirs.items():
            grad = module.ia3_l["default"].grad
            torch.testing.assert_close(ours[path].l.grad.flatten(), grad.flatten(), atol=1e-6, rtol=1e-4)


# --- several tasks in one batch ----------------------------------------------------------------------------------------


def sequences() -> list[Sequence]:
    ids = [[5, 9, 3, 60, 7], [8, 1, 44], [12, 30, 6, 21, 40, 41], [3, 3, 9, 2]]
    return [Sequence(row, [1] * len(row), task=task) for row, task in zip(ids, (2, 0, 1, 2), strict=True)]


@pytest.mark.parity("ia3", "each task alone")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "native"])
def test_a_mixed_batch_equals_each_task_alone_forward_and_backward(packed: bool, family: str) -> None:
    model, stack = attached(family, Ia3(name="ia3", tasks=["a", "b", "c"]))
    fill(model)
    roles = roles_for(model, stack, packed)
    rows = sequences()
    mixed = roles.policy(roles.layout(rows))["logprobs"]
    mixed.sum().backward()
    tables = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    sums = {n: torch.zeros_like(g) for n, g in tables.items()}
    alone = []
    for row in rows:
        # The same vectors as a one-task adapter: no task ids take part.
        single, one = attached(family, Ia3(name="ia3"))
        with torch.no_grad():
            for name, parameter in single.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(dict(model.named_parameters())[name][row.task : row.task + 1])
        part = roles_for(single, one, packed)
        out = part.policy(part.layout([dataclasses.replace(row, task=0)]))["logprobs"]
        out.sum().backward()
        for name, parameter in single.named_parameters():
            if parameter.requires_grad:
                sums[name][row.task] += parameter.grad[0]
        alone.append(out)
    torch.testing.assert_close(mixed, torch.cat(alone), atol=2e-5, rtol=1e-5)
    for name, grad in tables.items():
        torch.testing.assert_close(grad, sums[name], atol=1e-4, rtol=1e-4)


def test_a_task_without_rows_gets_exactly_no_gradient() -> None:
    model, stack = attached("llama", Ia3(name="ia3", tasks=["a", "b", "c"]))
    roles = roles_for(model, stack)
    rows = [dataclasses.replace(s, task=2 if s.task else 0) for s in sequences()]
    roles.policy(roles.layout(rows))["logprobs"].sum().backward()
    for _, _, _, hook in all_hooks(model):
        assert not hook.l.grad[1].any()
        assert hook.l.grad[0].any() and hook.l.grad[2].any()


def test_an_encoder_of_another_length_takes_the_task_of_its_row() -> None:
    model, _ = attached("t5", Ia3(name="ia3", tasks=["a", "b"]))
    fill(model)
    decoder = IDS[:, :3]
    with activate(Context(task_ids=torch.tensor([[1] * 3, [0] * 3]))):
        mixed = model(input_ids=IDS, decoder_input_ids=decoder, use_cache=False).logits
    for row, task in ((0, 1), (1, 0)):
        with activate(Context(task_ids=torch.full((1, 3), task))):
            alone = model(input_ids=IDS[row : row + 1], decoder_input_ids=decoder[row : row + 1], use_cache=False).logits
        torch.testing.assert_close(mixed[row : row + 1], alone, atol=1e-4, rtol=1e-5)


def test_encoder_decoder_rows_keep_their_task() -> None:
    model, stack = attached("t5", Ia3(name="ia3", tasks=["a", "b"]))
    rows = [{"ids": [5, 6, 7], "trained": [0, 0, 1], "task": t, "row": t} for t in (1, 0)]
    assert collate_tokens(rows, roles_for(model, stack)).task_ids[:, 0].tolist() == [1, 0]


def test_a_mixed_batch_generates_what_each_task_generates() -> None:
    model, _ = attached("llama", Ia3(name="ia3", tasks=["a", "b"]))
    fill(model, scale=0.6)
    ids = torch.tensor([[0, 0, 5, 9, 3], [8, 1, 44, 12, 30]])
    kwargs = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with activate(Context(task_ids=torch.tensor([[1], [0]]))):
        mixed = model.generate(input_ids=ids, attention_mask=(ids != 0).long(), **kwargs)
    for row, task in ((0, 1), (1, 0)):
        with activate(Context(task_ids=torch.tensor([[task]]))):
            one = ids[row : row + 1]
            alone = model.generate(input_ids=one, attention_mask=(one != 0).long(), **kwargs)
        assert torch.equal(mixed[row], alone[0])
    with activate(Context(task_ids=torch.tensor([[0], [0]]))):
        assert not torch.equal(model.generate(input_ids=ids, attention_mask=(ids != 0).long(), **kwargs), mixed)


def test_generation_takes_the_task_of_each_prompt_in_any_order() -> None:
    model, _ = attached("llama", Ia3(name="ia3", tasks=["a", "b", "c"]))
    fill(model, scale=0.6)
    model.generation_config.eos_token_id = None
    prompts, tasks = [[5, 9, 3], [8, 1, 44, 12, 30], [7, 7], [7, 7]], [1, 0, 2, 1]
    tokenizer, sampling = SimpleNamespace(pad_token_id=0, eos_token_id=None, bos_token_id=1), Sampling(8, batch=3)
    mixed = generate(model, tokenizer, prompts, sampling, tasks=tasks)
    for prompt, task, got in zip(prompts, tasks, mixed, strict=True):
        with activate(Context(task_ids=torch.tensor([[task]]))):
            assert generate(model, tokenizer, [prompt], sampling)[0] == got
    assert mixed[2] != mixed[3]


def test_task_ids_that_fit_nothing_are_refused_and_mixtures_of_experts_take_one_task() -> None:
    model, _ = attached("llama", Ia3(name="ia3", tasks=["a", "b"]))
    with activate(Context(task_ids=torch.zeros(3, 1, dtype=torch.long))), pytest.raises(ModelError, match="3 rows"):
        logits(model)
    batch = pack([Sequence([1, 2, 3], [0, 1, 1], task=1)])
    with (
        activate(dataclasses.replace(batch.context(), task_ids=batch.task_ids[:, :2])),
        pytest.raises(ModelError, match="packed"),
    ):
        logits(model, batch.input_ids)
    with pytest.raises(ModelError, match="cannot mix tasks"):
        attached("mixtral", Ia3(name="ia3", tasks=["a", "b"]))
    with pytest.raises(RecipeError, match="'a' is given twice"):
        Ia3(name="ia3", tasks=["a", "b", "a"]).mixes()
    with pytest.raises(RecipeError, match="auto takes the names from training rows"):
        attached("llama", Ia3(name="ia3", tasks="auto"))


# --- places ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gpt_neox"])
def test_only_keys_and_values_of_a_fused_projection_are_scaled(family: str) -> None:
    model, _ = attached(family, Ia3(name="ia3", scaled=["key", "value"]))
    fill(model)
    parts = {s.role: s for s in anatomy(model).at("layers.0.attn.q|k|v")}
    module = parts["attn.q"].module
    x = torch.randn(3, 4, 32)
    with activate(Context(role="reference")):
        plain = module(x)
    changed = module(x)
    q, k, v = (list(parts[r].indices()) for r in ("attn.q", "attn.k", "attn.v"))
    assert torch.equal(changed[..., q], plain[..., q])
    scales = {name: hook.l[0] for _, host, name, hook in all_hooks(model) if host is module}
    torch.testing.assert_close(changed[..., k], plain[..., k] * scales["ia3__k"])
    torch.testing.assert_close(changed[..., v], plain[..., v] * scales["ia3__v"])


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "olmo2"])
def test_keys_behind_their_norm_are_scaled_per_head_and_channel(family: str) -> None:
    model, stack = attached(family, Ia3(name="ia3", key_site="post_norm", scaled=["key"]))
    base = logits(model)
    fill(model)
    assert sum(isinstance(hook, ScaleKeys) for _, _, _, hook in all_hooks(model)) == 2
    heads, size = anatomy(model).kv_heads, anatomy(model).head_dim
    seen = {}

    def keep(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        seen["after"] = output

    host = next(module for _, module, _, hook in all_hooks(model))
    host.register_forward_hook(keep)
    logits(model)
    with activate(Context(role="reference")):
        scaled = seen["after"]
        assert torch.equal(logits(model), base)
    factor = host.ia3.l[0]
    plain = seen["after"]
    if plain.dim() == 3:
        wanted = plain * factor
    else:
        by_head = factor.view(heads, size)
        wanted = plain * (by_head if plain.shape[2] == heads and plain.shape[1] != heads else by_head[:, None])
    torch.testing.assert_close(scaled, wanted)
    with pytest.raises(ModelError, match="after their norm"):
        next(iter(stack)).merge(model)


@pytest.mark.parametrize("transposed", [False, True])
def test_heads_are_told_from_tokens_even_where_there_are_equally_many(transposed: bool) -> None:
    hook = ScaleKeys(2, 4, 1)
    hook.l.data.uniform_()
    y = torch.randn(3, 2, 8).unflatten(-1, (2, 4))
    wanted = y * hook.l[0].view(2, 4)
    got = hook.after(y.transpose(1, 2), y.transpose(1, 2)).transpose(1, 2) if transposed else hook.after(y, y)
    torch.testing.assert_close(got, wanted)


def test_a_uniform_key_scale_is_undone_by_a_key_norm_and_kept_behind_it() -> None:
    for site, changes in (("pre_norm", False), ("post_norm", True)):
        model, _ = attached("qwen3", Ia3(name="ia3", key_site=site, scaled=["key"]))
        base = logits(model)
        for _, _, _, hook in all_hooks(model):
            hook.l.data.fill_(1.7)
        assert bool((logits(model) - base).abs().max() > 1e-3) == changes


def test_what_matches_nothing_is_explained() -> None:
    with pytest.raises(ModelError, match="key_site: pre_norm"):
        attached("llama", Ia3(name="ia3", key_site="post_norm"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox", "bert", "t5", "bart", "mixtral", "qwen2"])
def test_merging_gives_the_same_logits(family: str) -> None:
    model, stack = attached(family, Ia3(name="ia3"))
    fill(model)
    unmerged = logits(model)
    next(iter(stack)).merge(model)
    assert not list(all_hooks(model))
    torch.testing.assert_close(logits(model), unmerged, atol=3e-5, rtol=1e-4)


def test_several_tasks_are_not_merged() -> None:
    model, stack = attached("llama", Ia3(name="ia3", tasks=["a", "b"]))
    with pytest.raises(ModelError, match="2 tasks"):
        next(iter(stack)).merge(model)


@pytest.mark.parametrize("lora_first", [True, False])
def test_the_scale_acts_on_the_lora_branch_too_whatever_the_order(lora_first: bool) -> None:
    wrappers = [Lora(name="lora", target="attn.k"), Ia3(name="ia3", scaled=["key"])]
    model, _ = attached("llama", *(wrappers if lora_first else wrappers[::-1]))
    fill(model)
    layer = model.model.layers[0].self_attn.k_proj
    x = torch.randn(2, 3, 32)
    wanted = layer.ia3.l[0] * (x @ layer.weight.T + layer.lora.scale * x @ layer.lora.A.T @ layer.lora.B.T)
    torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-5)


# --- promises ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_checkpointing_generation_and_files(family: str) -> None:
    def make() -> nn.Module:
        model, _ = attached(family, Ia3(name="ia3"))
        fill(model)
        return model

    checkpointing_changes_no_gradient(make)
    cached_generation_equals_uncached(make())
    survives_a_round_trip(family, Ia3(name="ia3"))
    survives_a_round_trip(family, Ia3(name="ia3", tasks=["a", "b"]))
    only_listed_parameters_move(family, Ia3(name="ia3"))


def test_padding_side_and_packing_do_not_change_a_result() -> None:
    model, stack = attached("llama", Ia3(name="ia3", tasks=["a", "b", "c"]))
    fill(model)
    roles = roles_for(model, stack)
    results = [roles.policy(b)["logprobs"] for b in (pack(sequences()), pad(sequences(), 0), pad(sequences(), 0, "left"))]
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, atol=2e-5, rtol=1e-5)


def test_vectors_have_no_weight_decay() -> None:
    model, stack = attached("llama", Ia3(name="ia3"))
    (group,) = stack.groups(model)
    assert group.weight_decay == 0.0
    assert group.names == {n for n, p in model.named_parameters() if p.requires_grad}


def test_one_task_works_row_by_row_and_several_do_not() -> None:
    model, _ = attached("llama", Ia3(name="ia3"))
    assert all(hook.rowwise for _, _, _, hook in all_hooks(model))
    model, _ = attached("llama", Ia3(name="ia3", tasks=["a", "b"]))
    assert not any(hook.rowwise for _, _, _, hook in all_hooks(model) if isinstance(hook, ScaleOutput))


def test_the_task_of_a_row_travels_from_the_file_to_the_vectors(tmp_path, monkeypatch) -> None:
    """Two tasks that ask for opposite answers to the same prompts: only separate vectors can serve both."""
    rows = [{"prompt": f"w{i % 4}?", "completion": answer, "kind": answer} for i in range(16) for answer in ("no", "yes")]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    run = train_recipe(
        tmp_path / "run",
        "ia3",
        f"data.path={tmp_path}",
        "stack.ia3.tasks=auto",
        "stack.ia3.task_field=kind",
        "data.validation=0.25",
        "steps=12",
        "batch.size=32",
        "optim.lr=0.1",
    )
    first, last = (curve(tmp_path / "run")[i][1] for i in (0, -1))
    assert last < 0.5 * first
    assert run.data.tasks.names == ("no", "yes")
    texts = [run.tokenizer.decode(run.data[i]["ids"]) for i in range(4)]
    assert [run.data[i]["task"] for i in range(4)] == [int("yes" in text) for text in texts]
    trained, alone = events(tmp_path / "run", "evaluation")[-1], evaluate_path(str(tmp_path / "run"), [], "validation")
    assert alone["nll"] == pytest.approx(trained["eval/nll"], rel=1e-5)
    assert delta.read_stack(tmp_path / "run" / "final").layers[-1].wrappers["ia3"]["tasks"] == ["no", "yes"]
    with pytest.raises(DataError, match=r"'ia3 of model\.path' and 'ia3' have different tasks"):
        train_recipe(
            tmp_path / "more", f"{tmp_path}/run/recipe.yaml", f"model.path={tmp_path}/run", "model.continue=true",
            "stack.ia3.tasks=[yes,no]", "steps=1",
        )  # fmt: skip
    seen: list[list[int]] = []
    monkeypatch.setattr(generated_answers, "generate", lambda *a: seen.append(a[5]) or [[5]] * len(a[5]))
    generated_answers.answer_rows(run.data, run.roles, [0, 1, 2, 3], Sampling(6))
    assert seen == [[run.data[i]["task"] for i in range(4)]]
    gaps = [(hook.l[0] - hook.l[1]).detach().abs().max() for _, _, _, hook in all_hooks(run.model)]
    assert all(float(gap) > 0 for gap in gaps)
