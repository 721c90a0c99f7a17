"""AdaLoRA against peft: ten steps with masks, the budget, the penalty by hand, reload, export as LoRA, resume."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmrecipe.core.errors import RecipeError
from llmrecipe.methods._base.method import Probe
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.reparameterized.adalora import Adalora, SvdLowRank, budget, keep_best
from llmrecipe.models.checkpoint_path import DELTA_FILE
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.optim.optimizers.adamw import AdamW
from llmrecipe.optim.optimizers.adamw_8bit import AdamW8bit
from llmrecipe.runs.delta import rename_tensor
from llmrecipe.training.build_run import optimizer_for
from llmrecipe.training.recipe_checks import check_cuts
from tests.interop.saved_runs import VOCABULARY, base_folder
from tests.tiny import tiny_model

IDS = torch.tensor([[5, 9, 3, 60, 7, 7, 2]])
SCHEDULE: dict[str, Any] = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": 10}


def adapted(family: str = "llama", model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, Stack, Adalora]:
    model = model or tiny_model(family)
    wrapper = Adalora(name="adalora", **{"target": "attn.q|v", "alpha": 6.0, **SCHEDULE, **options})
    stack = Stack([wrapper])
    torch.manual_seed(0)
    stack.attach(model)
    stack.calibrate(model, Probe(None, None, steps=10))
    return model, stack, wrapper


def hooks(model: nn.Module) -> dict[str, SvdLowRank]:
    return {path: hook for path, _, _, hook in all_hooks(model)}


def loss_of(model: nn.Module) -> torch.Tensor:
    return nn.functional.cross_entropy(model(input_ids=IDS).logits[0, :-1], IDS[0, 1:])


def train(model: nn.Module, stack: Stack, first: int = 0, last: int = 10, optimizer: Any = None) -> Any:
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for step in range(first, last):
        stack.before_step(model, step)
        (loss_of(model) + stack.penalty(model)).backward()
        optimizer.step()
        stack.after_step(model, step)
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parity("adalora", "PEFT AdaLoraConfig")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ten_steps_with_masks_equal_peft(family: str) -> None:
    from peft import AdaLoraConfig, get_peft_model

    target = "attn.q|v" if family == "llama" else "attn.qkv"
    model, stack, _ = adapted(family, target=target)
    names = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}[family]
    # Without a task type peft calls the base model past the forward that adds the penalty.
    config = AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=names, lora_alpha=6, fan_in_fan_out=family == "gpt2", **SCHEDULE
    )
    twin = get_peft_model(tiny_model(family), config)
    ours = hooks(model)
    theirs = {n: m for n, m in twin.base_model.model.named_modules() if hasattr(m, "lora_E") and n in ours}
    assert len(theirs) == len(ours)
    for path, module in theirs.items():
        for name in ("A", "B", "E"):
            getattr(module, f"lora_{name}")["default"].data.copy_(getattr(ours[path], name).data)
    own = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    other = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for step in range(10):
        train(model, stack, step, step + 1, own)
        out = twin(input_ids=IDS, labels=IDS)
        out.loss.backward()
        other.step()
        twin.base_model.update_and_allocate(step + 1)
        other.zero_grad()
        for path, module in theirs.items():
            for name in ("A", "B", "E"):
                torch.testing.assert_close(
                    getattr(ours[path], name),
                    getattr(module, f"lora_{name}")["default"],
                    atol=2e-6,
                    rtol=1e-4,
                    check_dtype=False,
                )
    pattern = twin.peft_config["default"].rank_pattern
    for path in theirs:
        key = next(k for k in pattern if path in k)
        assert pattern[key] == ours[path].kept.tolist()
    assert sum(int(p.kept.sum()) for p in ours.values()) == 2 * len(ours)


def test_the_budget_is_the_cubic_at_every_step_and_masks_keep_exactly_it() -> None:
    assert [budget(t, 2, 3, 10, 16, 8) for t in range(1, 11)] == [16, 16, 12, 9, 8, 8, 8, 8, 8, 8]
    model, stack, _ = adapted(deltaT=1)
    found = hooks(model)
    seen = []
    optimizer = None
    for step in range(10):
        optimizer = train(model, stack, step, step + 1, optimizer)
        seen.append(sum(int((p.E != 0).sum()) for p in found.values()))
        assert stack.metrics(model)["adalora/rank_mean"] * len(found) == sum(int(p.kept.sum()) for p in found.values())
    assert seen == [16, 16, 12, 9, 8, 8, 8, 8, 8, 8]


def test_ties_keep_exactly_the_budget() -> None:
    assert keep_best(torch.tensor([1.0, 2.0, 1.0, 1.0]), 2).tolist() == [True, True, False, False]
    assert keep_best(torch.zeros(3), 3).all()


def test_scores_follow_the_smoothing_by_hand() -> None:
    """One entry a factor: I = |w g|; mean 0.85 * 0 + 0.15 I; spread 0.15 |I - mean|; the score is their product, summed."""
    hook = SvdLowRank(1, 1, 1, 1.0, 0.0, None, True)
    for name, value in (("A", 2.0), ("E", 3.0), ("B", 5.0)):
        parameter = getattr(hook, name)
        parameter.data.fill_(value)
        parameter.grad = torch.full_like(parameter, 0.1)
    hook.observe(0.85, 0.85)
    wanted = sum((0.15 * i) * (0.15 * abs(i - 0.15 * i)) for i in (0.2, 0.3, 0.5))
    assert float(hook.scores()) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("orth", ["fro_mean", "fro_sq_sum"])
def test_the_penalty_equals_a_loop_over_matrices(orth: str) -> None:
    model, _, wrapper = adapted(target="all-linear", orth=orth)
    norms = []
    for hook in hooks(model).values():
        for gram in (hook.A @ hook.A.t(), hook.B.t() @ hook.B):
            norms.append(torch.linalg.norm(gram.double() - torch.eye(4)))
    wanted = sum(norms) / len(norms) if orth == "fro_mean" else sum(n * n for n in norms)
    assert float(wrapper.penalty(model)) == pytest.approx(0.5 * float(wanted), rel=1e-5)


def test_starts_at_the_base_and_merges_to_the_same_logits() -> None:
    base = tiny_model()(input_ids=IDS).logits
    model, stack, wrapper = adapted()
    assert torch.equal(model(input_ids=IDS).logits, base)
    train(model, stack)
    wanted = model(input_ids=IDS).logits
    wrapper.merge(model)
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("stop", [4, 8])
def test_a_resumed_run_makes_the_same_masks(stop: int) -> None:
    model, stack, _ = adapted()
    optimizer = train(model, stack, 0, stop)
    twin = tiny_model()
    other = Stack([Adalora(name="adalora", target="attn.q|v", alpha=6.0, **SCHEDULE)])
    other.attach(twin, json.loads(json.dumps(stack.structures(model))))
    other.restore(twin, {k: v.clone() for k, v in stack.delta(model).items()})
    second = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, stack, stop, 10, optimizer)
    train(twin, other, stop, 10, second)
    for path, hook in hooks(model).items():
        assert torch.equal(hook.E, hooks(twin)[path].E)
        assert torch.equal(hook.kept, hooks(twin)[path].kept)


def test_importances_are_gone_when_the_pattern_is_final() -> None:
    model, stack, _ = adapted()
    train(model, stack)
    assert not [name for name in stack.delta(model) if "mean" in name or "spread" in name]
    assert stack.structures(model)["adalora"]["scored"] is False


def trained_to_the_end(prune: str, orth: float = 0.0) -> tuple[nn.Module, Stack, torch.optim.Optimizer]:
    """Ten steps of AdamW at one seed; the optimizer is built anew after a pruning, as a run does."""
    optim = AdamW(lr=1e-2, weight_decay=0.0)
    model, stack, _ = adapted(prune=prune, orth_reg_weight=orth, target="attn.q|v|o + mlp.down")
    optimizer = optimizer_for(model, optim, stack)
    for step in range(10):
        if stack.before_step(model, step):
            optimizer = optimizer_for(model, optim, stack, keep=optimizer)
        (loss_of(model) + stack.penalty(model)).backward()
        optimizer.step()
        stack.after_step(model, step)
        optimizer.zero_grad()
    return model, stack, optimizer


def test_pruned_tensors_hold_the_values_of_masked_ones_and_so_does_the_optimizer() -> None:
    masked, _, slow = trained_to_the_end("off")
    pruned, stack, fast = trained_to_the_end("at_final")
    shorter = 0
    for path, hook in hooks(masked).items():
        short = hooks(pruned)[path]
        kept = hook.kept
        shorter += not bool(kept.all())
        assert short.A.shape[0] == int(kept.sum()) == len(short.kept)
        for name, axis in (("A", 0), ("E", 0), ("B", 1)):
            whole, left = getattr(hook, name), getattr(short, name)
            index = kept.nonzero()[:, 0]
            torch.testing.assert_close(left, whole.index_select(axis, index), atol=1e-6, rtol=1e-5)
            for key in ("exp_avg", "exp_avg_sq"):
                wanted = slow.state[whole][key].index_select(axis, index)
                torch.testing.assert_close(fast.state[left][key], wanted, atol=1e-9, rtol=1e-5)
            assert fast.state[left]["step"] == slow.state[whole]["step"] == 10
    assert shorter >= 2
    torch.testing.assert_close(pruned(input_ids=IDS).logits, masked(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)
    assert set(stack.metrics(pruned)) and stack.metrics(pruned)["adalora/rank_mean"] == 2.0


def test_masked_triplets_have_gradients_that_pruned_ones_lack_so_clipping_divides_by_more() -> None:
    norms, kept = [], []
    for prune in ("off", "at_final"):
        model, _, _ = trained_to_the_end(prune)
        model.zero_grad()
        model(input_ids=IDS).logits.square().mean().backward()
        found = hooks(model).values()
        kept.append(torch.cat([p.E.grad[p.kept].flatten() for p in found]))
        norms.append(torch.cat([p.grad.flatten() for hook in found for p in (hook.A, hook.B, hook.E)]).norm())
    torch.testing.assert_close(*kept, atol=1e-6, rtol=1e-4)
    assert norms[0] > 1.01 * norms[1] > 0


def test_a_pruned_delta_is_attached_at_its_own_ranks_and_merges() -> None:
    pruned, stack, _ = trained_to_the_end("at_final", orth=0.5)
    wanted = pruned(input_ids=IDS).logits
    again = tiny_model("llama")
    wrapper = Adalora(name="other", target="attn.q|v|o + mlp.down", alpha=6.0, prune="at_final", **SCHEDULE)
    other = Stack([wrapper])
    names = {"adalora": "other"}
    other.attach(again, {"other": stack.structures(pruned)["adalora"]})
    other.restore(again, {rename_tensor(name, names): value for name, value in stack.delta(pruned).items()})
    torch.testing.assert_close(again(input_ids=IDS).logits, wanted, atol=1e-6, rtol=1e-6)
    wrapper.merge(again)
    torch.testing.assert_close(again(input_ids=IDS).logits, wanted, atol=1e-4, rtol=1e-4)


def test_pruning_needs_a_final_phase_and_state_that_can_be_cut() -> None:
    with pytest.raises(RecipeError, match=r"stack\.adalora\.prune: at_final .* tfinal is 0"):
        adapted(prune="at_final", tfinal=0)
    wrapper = Adalora(name="adalora", prune="at_final")
    check_cuts(AdamW(), [wrapper])
    with pytest.raises(RecipeError, match="the state of adamw_8bit is not kept entry by entry"):
        check_cuts(AdamW8bit(), [wrapper])
    check_cuts(AdamW8bit(), [Adalora(name="adalora")])


def test_an_impossible_schedule_is_refused() -> None:
    with pytest.raises(RecipeError, match="leave no step of 10"):
        adapted(tinit=8, tfinal=0.3)
    with pytest.raises(RecipeError, match="ranks only fall"):
        adapted(target_r=5)


def test_without_its_hook_nothing_is_ever_masked() -> None:
    """The mutant: a loop that forgets `after_step` is what the declared hooks are for."""
    model, stack, _ = adapted()
    loss_of(model).backward()
    stack.penalty(model)
    assert stack.unfired() == ["adalora.after_step"]


@pytest.mark.parity("adalora", "PEFT AdaLoraConfig, reloaded")
@pytest.mark.parametrize(("as_lora", "prune"), [(False, "off"), (True, "off"), (False, "at_final"), (True, "at_final")])
def test_peft_loads_the_pattern_and_gives_the_same_logits(tmp_path: Path, as_lora: bool, prune: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from llmrecipe.interop.peft.exporter import export_peft
    from llmrecipe.recipe.schema import ModelSection, TokenizerSection
    from llmrecipe.runs import delta
    from llmrecipe.runs.open_model import open_model

    base = base_folder(tmp_path)
    loaded = open_model(ModelSection(path=str(base)), TokenizerSection())
    model, stack, wrapper = adapted(model=loaded.model, prune=prune)
    optimizer = train(model, stack, 0, 7)
    if prune == "off":
        train(model, stack, 7, 10, optimizer)
    else:
        assert stack.before_step(model, 7)
    for hook in hooks(model).values():
        hook.E.data *= 30
    layer = delta.Layer({"adalora": delta.wrapper_mapping(wrapper)}, stack.structures(model), DELTA_FILE, stack.delta(model))
    facts = {"path": str(base), "fingerprint": loaded.base_fingerprint, "section": {}}
    delta.write_stack(tmp_path / "run" / "final", delta.SavedStack(facts, [layer]))
    wanted = model(input_ids=IDS).logits
    assert (wanted - tiny_model(vocab_size=VOCABULARY)(input_ids=IDS).logits).abs().max() > 0.05
    folder = export_peft(tmp_path / "run", as_lora=as_lora).path
    twin = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    torch.testing.assert_close(twin(input_ids=IDS).logits, wanted, atol=1e-4, rtol=1e-4)
    ranks = {int(p.kept.sum()) for p in hooks(model).values()}
    config = twin.peft_config["default"]
    assert config.peft_type.value == ("LORA" if as_lora else "ADALORA")
    assert as_lora or {sum(v) for v in config.rank_pattern.values()} == ranks


@pytest.mark.slow
@pytest.mark.parametrize(("prune", "stop"), [("off", 4), ("at_final", 4), ("at_final", 6), ("at_final", 7)])
def test_a_stopped_run_continues_bit_for_bit_and_shows_its_ranks(tmp_path: Path, prune: str, stop: int) -> None:
    from tests.trainings import events, learned, resume, stop_after, train_recipe

    words = ["steps=8", "batch.size=2", "stack.adalora.deltaT=2", "stack.adalora.tinit=1", "stack.adalora.tfinal=2"]
    words.append(f"stack.adalora.prune={prune}")
    train_recipe(tmp_path / "whole", "adalora", *words)
    stop_after(stop, tmp_path / "parts", "adalora", *words)
    resume(tmp_path / "parts")
    whole, parts = learned(tmp_path / "whole"), learned(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    A = [value for name, value in whole.items() if name.endswith("adalora.A")]
    assert sum(len(a) for a in A) == (4 if prune == "at_final" else 6) * len(A)
    ranks = [e["adalora/rank_mean"] for e in events(tmp_path / "whole")]
    assert ranks[0] == 6.0
    assert ranks[-1] == 4.0
    assert ranks == sorted(ranks, reverse=True)
