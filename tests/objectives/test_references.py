"""References: another model by its folder, one that follows the policy, one that is continued; all of them resumed."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe.core.errors import ModelError, RecipeError, RunError
from llmrecipe.core.registry import PACKAGE
from llmrecipe.engine import reference_model
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.selective.bitfit import Bitfit
from llmrecipe.runs import open_model
from llmrecipe.training import build_model
from tests.tiny import tiny_model
from tests.trainings import curve, events, learned, resume, stop_after, train_recipe

TINY = PACKAGE / "assets" / "tiny"
SMALL = ["batch.size=4", "eval.batches=1", "data.max_length=64", "data.limit=16", "schedule=constant", "eval.at_start=false"]
LOG2 = math.log(2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMRECIPE_CACHE", str(tmp_path / "cache"))


# --- a reference that follows the policy ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_mixture_is_that_of_the_reference_trainer() -> None:
    """Three moves of random weights, bit for bit; entries that do not train have no copy."""
    from trl.trainer.callbacks import SyncRefModelCallback

    policy, theirs = tiny_model("gpt2", seed=1), tiny_model("gpt2", seed=1)
    stack = Stack([Bitfit(name="bitfit")])
    stack.attach(policy)
    Stack([Bitfit(name="bitfit")]).attach(theirs)
    stack.snapshot_trained(policy)
    assert stack.snapshot and all(name.endswith(".bias") for name in stack.snapshot)
    for move in range(3):
        torch.manual_seed(move)
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if name in stack.snapshot:
                    parameter.add_(torch.randn_like(parameter))
        stack.mix_reference(policy, 0.6)
        SyncRefModelCallback._sync_target_model(policy, theirs, 0.6)
    wanted = dict(theirs.named_parameters())
    for name, value in stack.snapshot.items():
        assert torch.equal(value, wanted[name]), name


def test_a_mixture_by_hand() -> None:
    """0.4 * 1 + 0.6 * 2 = 1.6, then 0.4 * 1.6 + 0.6 * 12 = 7.84."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    stack = Stack([])
    stack.snapshot_trained(model)
    for value, wanted in ((2.0, 1.6), (12.0, 7.84)):
        torch.nn.init.constant_(model.weight, value)
        stack.mix_reference(model, 0.6)
        assert stack.snapshot is not None and float(stack.snapshot["weight"]) == pytest.approx(wanted, rel=1e-6)


STARTS = {"dpo": ("loss", LOG2), "ipo": ("loss", 25.0), "kto": ("loss/unweighted", 0.5)}


@pytest.mark.parametrize(
    "recipe", ["dpo", pytest.param("ipo", marks=pytest.mark.slow), pytest.param("kto", marks=pytest.mark.slow)]
)
def test_a_reference_that_is_copied_starts_the_loss_anew(recipe: str, tmp_path: Path) -> None:
    """alpha = 1 every two updates: updates 1, 3 and 5 see policy and reference equal, 2 and 4 do not."""
    sync = "objective.ref_sync={alpha: 1.0, steps: 2}"
    train_recipe(tmp_path / "run", recipe, *SMALL, sync, "steps=5", "optim.lr=1e-3", "schedule.warmup=0")
    name, start = STARTS[recipe]
    values = [e[name] for e in events(tmp_path / "run")]
    assert values[0::2] == pytest.approx([start] * 3, rel=1e-5)
    assert all(abs(v - start) > 1e-3 for v in values[1::2])


def test_a_run_whose_reference_moved_goes_on_bit_for_bit(tmp_path: Path) -> None:
    more = [*SMALL, "objective.ref_sync={alpha: 0.6, steps: 1}", "steps=4", "optim.lr=1e-3", "schedule.warmup=0"]
    train_recipe(tmp_path / "whole", "dpo", *more)
    stop_after(2, tmp_path / "cut", "dpo", *more)
    resume(tmp_path / "cut")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    one, other = learned(tmp_path / "whole"), learned(tmp_path / "cut")
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_biases_alone_may_have_a_reference_that_follows(tmp_path: Path) -> None:
    more = ["stack=[bitfit]", "stack.bitfit.missing=add_zero", "objective.ref_sync={alpha: 1.0, steps: 1}", "optim.lr=0.05"]
    train_recipe(tmp_path / "run", "dpo", *SMALL, *more, "steps=3", "schedule.warmup=0")
    assert [e["loss"] for e in events(tmp_path / "run")] == pytest.approx([LOG2] * 3, rel=1e-5)


@pytest.mark.parametrize(
    ("recipe", "words", "message"),
    [
        ("dpo_lora", ["objective.ref_sync={alpha: 0.5}"], r"objective\.ref_sync: with 'lora' .*stack=\[\]"),
        ("dpo", ["objective.ref_sync={}", "objective.reference=none"], r"objective\.ref_sync: only reference=initial"),
        ("ipo", ["objective.ref_sync={}", f"objective.reference={TINY}"], r"objective\.ref_sync: only reference=initial"),
        ("dpo", ["objective.reference=inital"], r"objective\.reference: must be initial, base, none.*did you mean 'initial'"),
        ("kto", ["objective.reference=none"], r"objective\.reference: must be initial, base, or the folder"),
        ("ipo", ["objective.reference=tests"], r"objective\.reference: tests holds neither a model .* nor a finished run"),
    ],
)
def test_references_that_cannot_be_are_refused_before_weights_load(
    recipe: str, words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(open_model, "open_model", unreachable)
    monkeypatch.setattr(reference_model, "open_model", unreachable)
    with pytest.raises(RecipeError, match=message):
        train_recipe(tmp_path / "run", recipe, *SMALL, *words)


def test_options_of_the_following_are_checked(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"ref_sync\.alhpa: .*did you mean 'alpha'"):
        train_recipe(tmp_path / "run", "dpo", "objective.ref_sync={alhpa: 0.5}")
    with pytest.raises(RecipeError, match=r"ref_sync\.alpha: must be <= 1; got 2"):
        train_recipe(tmp_path / "run", "dpo", "objective.ref_sync={alpha: 2.0}")


# --- another model as the reference -----------------------------------------------------------------------------------


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A folder with the embedded model, its weights moved a little."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 + 0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def summed(model: Any, prompt: list[int], answer: list[int]) -> float:
    """log p(answer | prompt) from whole logits, in float64."""
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        t = model(ids).logits.double().log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])
    return float(t[-len(answer) :].sum())


def test_rewards_against_another_model_by_hand(other: Path, tmp_path: Path) -> None:
    """The first step's margin is beta times the difference of both models' log-ratios over its four pairs."""
    from transformers import AutoModelForCausalLM

    words = [*SMALL, "steps=1", f"objective.reference={other}", "objective.beta=0.3"]
    run = train_recipe(tmp_path / "run", "dpo_lora", *words)
    policy, reference = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (TINY, other))
    margins = []
    for i in run.order(0)[:4]:
        row = run.data[int(i)]
        r = [summed(policy, row["prompt_ids"], row[k]) - summed(reference, row["prompt_ids"], row[k]) for k in ANSWERS]
        margins.append(0.3 * (r[0] - r[1]))
    (first,) = events(tmp_path / "run")
    assert first["rewards/margins"] == pytest.approx(sum(margins) / 4, rel=1e-3, abs=1e-4)
    assert first["loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 4, rel=1e-4)
    assert abs(first["rewards/margins"]) > 1e-2


ANSWERS = ("chosen_ids", "rejected_ids")


def test_the_policys_own_folder_is_the_policy(tmp_path: Path) -> None:
    train_recipe(tmp_path / "run", "dpo", *SMALL, "steps=1", f"objective.reference={TINY}")
    assert events(tmp_path / "run")[0]["loss"] == pytest.approx(LOG2, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["dpo_lora", pytest.param("kto", marks=pytest.mark.slow)])
def test_the_other_model_is_gone_before_the_policy_is_opened_and_asked_once(
    recipe: str, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Any]] = []
    forwards: list[int] = []

    def opening(original: Callable[..., Any], is_reference: bool) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            if not is_reference:
                gc.collect()
                assert alive and alive[-1]() is None, "the reference is still in memory"
            found = original(*arguments, **more)
            if is_reference:
                alive.append(weakref.ref(found.model))
                found.model.register_forward_hook(lambda *_: forwards.append(1))
                found.model.base_model.register_forward_hook(lambda *_: forwards.append(1))
            return found

        return call

    monkeypatch.setattr(reference_model, "open_model", opening(reference_model.open_model, True))
    monkeypatch.setattr(build_model, "open_for", opening(build_model.open_for, False))
    words = [*SMALL, "data.validation=null", "steps=6", f"objective.reference={other}"]
    train_recipe(tmp_path / "first", recipe, *words)
    # Passes that find out how the model reads rows, and whether documents of a packed row stay apart, are not of the rows.
    first, probes = len(forwards), 5
    assert first > probes and len(alive) == 1
    train_recipe(tmp_path / "second", recipe, *words)
    assert len(forwards) - first <= probes, "the scores lie in the cache"
    assert curve(tmp_path / "first") == curve(tmp_path / "second")


@pytest.mark.slow
def test_a_finished_run_is_a_reference_and_resume_notices_another_one(tmp_path: Path) -> None:
    small = ["batch.size=4", "eval.batches=1", "data.limit=16"]
    for name, rate in (("sft", "2e-3"), ("another", "4e-3")):
        train_recipe(tmp_path / name, "sft_lora", *small, "steps=3", f"optim.lr={rate}")
    words = [*SMALL, "steps=4", "save.every=2", f"objective.reference={tmp_path / 'sft'}"]
    train_recipe(tmp_path / "whole", "dpo_lora", *words)
    assert abs(events(tmp_path / "whole")[0]["kl"]) > 1e-3
    stop_after(2, tmp_path / "cut", "dpo_lora", *words)
    resume(tmp_path / "cut")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    stop_after(2, tmp_path / "swapped", "dpo_lora", *words)
    (tmp_path / "sft").rename(tmp_path / "away")
    (tmp_path / "another").rename(tmp_path / "sft")
    with pytest.raises(RunError, match=r"has changed:\n  the file sft/.* has other content"):
        resume(tmp_path / "swapped")


def test_a_model_of_other_tokens_is_refused(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model, folder = tiny_model(), tmp_path / "small"
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"objective\.reference: .*other tokens"):
        train_recipe(tmp_path / "run", "dpo_lora", *SMALL, "steps=1", f"objective.reference={folder}")


# --- evaluation of a finished run -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("which", ["initial", "base"])
def test_a_finished_run_is_evaluated_against_its_reference(which: str, tmp_path: Path) -> None:
    """On top of an SFT run: the margins are those of the run's own last evaluation, not zero."""
    from llmrecipe.evaluation.evaluate_model import evaluate_path

    train_recipe(tmp_path / "sft", "sft_lora", "batch.size=4", "eval.batches=1", "data.limit=16", "steps=3")
    words = [*SMALL, "steps=3", "optim.lr=2e-3", f"model.path={tmp_path / 'sft'}", f"objective.reference={which}"]
    train_recipe(tmp_path / "run", "dpo_lora", *words)
    (seen,) = events(tmp_path / "run", "evaluation")
    found = evaluate_path(str(tmp_path / "run"), [])
    for name in ("loss", "kl", "rewards/margins", "logps/chosen"):
        assert found[name] == pytest.approx(seen[f"eval/{name}"], rel=1e-4, abs=1e-4), name
    assert abs(found["rewards/margins"]) > 1e-3


# --- a continued adapter ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [2, pytest.param(16, marks=pytest.mark.slow)])
def test_the_reference_of_a_continued_adapter_is_that_adapter_also_after_a_stop(rank: int, tmp_path: Path) -> None:
    """Rank 2 is small enough to be remembered, rank 16 is scored beforehand."""
    shape = [f"stack.lora.r={rank}", "stack.lora.alpha=8.0"]
    train_recipe(tmp_path / "sft", "sft_lora", "batch.size=4", "eval.batches=1", "data.limit=16", "steps=3", *shape)
    words = [*SMALL, *shape, "steps=4", f"model.path={tmp_path / 'sft'}", "model.continue=true"]
    train_recipe(tmp_path / "whole", "dpo_lora", *words)
    assert events(tmp_path / "whole")[0]["loss"] == pytest.approx(LOG2, abs=1e-5)
    stop_after(2, tmp_path / "cut", "dpo_lora", *words)
    resume(tmp_path / "cut")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
