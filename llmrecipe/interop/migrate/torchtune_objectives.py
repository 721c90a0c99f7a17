"""Objectives of torchtune's files: the loss of rows, distillation from a teacher, and training on the model's own answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from llmrecipe.interop.migrate.account import Account
from llmrecipe.interop.migrate.counterparts import batch, stand_in_reward
from llmrecipe.interop.migrate.values import finite_number, flag, whole_number

LOSSES = {
    "DPOLoss": "dpo",
    "PPOLoss": "ppo",
    "GRPOLoss": "grpo",
    "GRPOCompletionLoss": "grpo",
    "GRPOSimpleLoss": "grpo",
    "GRPOWithChunkedOutputLoss": "grpo",
    "LinearCrossEntropyLoss": "sft",
    "CEWithChunkedOutputLoss": "sft",
    "CrossEntropyLoss": "sft",
    "SFTLoss": "sft",
}
"""Last name of the loss component -> objective."""
DIVERGENCES = {"Forward": "forward_kl", "Reverse": "reverse_kl"}
"""First word of the distillation loss -> divergence."""
REFERENCE = re.compile(r"\$\{(\w+)\}")
SAMPLED = ("grpo", "ppo")
"""Objectives whose rows are prompts, and whose answers the model writes itself."""


def component(account: Account, key: str) -> str:
    """Return the last name of a component, empty where there is none."""
    return str(account.raw(f"{key}._component_") or "").rpartition(".")[2]


def place_at(account: Account, key: str) -> tuple[str, str] | None:
    """Return a folder with the keys it refers to written out, and a note; None where it is not given or not known.

    One that refers to what is no key of the file is entered as left over.
    """
    given = account.raw(key)
    if given is None:
        return None
    place = REFERENCE.sub(lambda found: str(account.raw(found[1]) or found[0]), str(given))
    if "${" in place:
        account.leave(key, "it refers to another key: write the place itself")
        return None
    return place, "the key it refers to is written out" if place != given else ""


def choose_objective(account: Account, text_rows: bool) -> str:
    """Enter the loss; return the objective.

    Args:
        text_rows: the rows are plain text.
    """
    name = component(account, "loss")
    objective = LOSSES.get(name)
    if account.raw("kd_loss") is not None and objective in (None, "sft"):
        account.explain("loss._component_", "the cross-entropy next to the divergence: objective.nll_coef")
        return "distill"
    if account.raw("loss") is None:
        return "sft"
    if objective is None:
        account.leave(
            "loss._component_", f"no loss of that meaning is set up here ({name}); sft is chosen (`llmrecipe list objective`)"
        )
        return "sft"
    if objective == "sft" and text_rows:
        objective = "clm"
    note = "" if objective in SAMPLED else "; its mean is over all trained tokens of a step in both tools"
    account.explain("loss._component_", f"objective: {objective}{note}")
    return objective


def enter_batch(account: Account, objective: str) -> None:
    """Enter the rows of a step, which are the prompts of a rollout where the model writes the answers."""
    if objective not in SAMPLED:
        batch(account, "batch_size", "gradient_accumulation_steps")
        return
    prompts = account.read("batch_size", whole_number, 1) * account.processes
    account.carry("batch_size", "batch.size", prompts, "prompts of a rollout")
    account.same("gradient_accumulation_steps", "micro-batches are chosen by tokens")
    account.same("forward_batch_size", "see objective.generation_batch")


def enter_objective(account: Account, objective: str) -> None:
    """Enter the options of an objective that has a teacher or samples."""
    if objective == "distill":
        _distilled(account)
    elif objective == "grpo":
        _sampled(account)
        _grouped(account)
    elif objective == "ppo":
        _sampled(account)
        _proximal(account)


def _distilled(account: Account) -> None:
    """Enter the teacher and the two terms: (1 - k) NLL + k D there, D + c NLL here, so that c = (1 - k) / k."""
    teacher = place_at(account, "teacher_checkpointer.checkpoint_dir")
    if teacher is None:
        account.leave("teacher_checkpointer", "no folder of a teacher: set objective.teacher=FOLDER")
    else:
        account.carry("teacher_checkpointer.checkpoint_dir", "objective.teacher", *teacher)
    account.same("teacher_checkpointer", "the files of a model folder are found by themselves, whatever its family")
    account.same("teacher_model", "the family and size follow from the model folder")
    name = component(account, "kd_loss")
    divergence = next((ours for word, ours in DIVERGENCES.items() if name.startswith(word)), None)
    if divergence is None:
        account.leave("kd_loss._component_", "forward_kl is set; objective.divergence=jsd is symmetric, but another measure")
    else:
        account.carry("kd_loss._component_", "objective.divergence", divergence)
    account.same("kd_loss.num_output_chunks", "logits are computed in chunks")
    share = account.read("kd_ratio", finite_number, 0.5)
    if not 0.0 < share <= 1.0:
        account.leave("kd_ratio", "nothing would be distilled; objective=sft trains on the rows alone")
        return
    weight = float(f"{(1 - share) / share:.6g}")
    if account.raw("kd_ratio") is None:
        account.assume("kd_ratio", "objective.nll_coef", weight, "half of the loss there")
    else:
        account.carry(
            "kd_ratio",
            "objective.nll_coef",
            weight,
            "(1 - k) / k: the loss as a whole is divided by k, which AdamW does not see",
        )


def _sampled(account: Account) -> None:
    """Enter how answers are sampled and how often they are trained on."""
    _carry(account, "temperature", "objective.temperature")
    _carry(account, "max_generated_tokens", "objective.max_new_tokens", read=whole_number)
    account.same("enable_kv_cache", "answers are sampled with a cache")
    for key in ("policy_model", "ref_policy_model", "reward_and_value_model", "value_model", "reward_model"):
        account.same(key, "the family and size follow from the folder")
    for key in ("ref_checkpointer", "ref_policy_checkpointer"):
        account.same(key, "the reference is the policy of step 0")
    _carry(account, "ppo_epochs", "objective.epochs", read=whole_number)


def _grouped(account: Account) -> None:
    """Enter the options of GRPO."""
    name = component(account, "loss")
    stand_in_reward(account, "reward_functions")
    if account.raw("reward_functions") is not None:
        account.leave("reward_functions", "write the reward here: objective.reward={...} (`llmrecipe list reward`)")
    _carry(account, "grpo_samples", "objective.answers", read=whole_number)
    _carry(account, "loss.kl_coeff", "objective.beta", 0.1)
    account.assume("loss", "objective.kl_correction", False, "the divergence has no weight of the ratio there")
    if name in ("GRPOLoss", "GRPOCompletionLoss"):
        _carry(account, "loss.epsilon", "objective.clip", 0.1)
        if name == "GRPOCompletionLoss":
            note = "one ratio an answer: of the mean log-ratio of its tokens here, of their sum there"
            account.assume("loss", "objective.ratio", "sequence", note)
    else:
        account.same("loss.epsilon", "unused there: every rollout is trained on once")
        account.assume("loss", "objective.loss_type", "grpo")
    rollouts = account.read("num_steps", whole_number)
    if rollouts is not None:
        steps = rollouts * account.read("ppo_epochs", whole_number, 1)
        account.carry("num_steps", "steps", steps, "optimizer steps; rollouts there. Steps take precedence over epochs")


def _proximal(account: Account) -> None:
    """Enter the options of PPO; its steps are answers there, optimizer steps here."""
    stand_in_reward(account, "reward_checkpointer")
    account.leave("reward_checkpointer", "a reward model is a run of objective=reward: objective.reward={model: {path: RUN}}")
    account.leave("value_checkpointer", "the value function begins at the policy: objective.value")
    _carry(account, "loss.epsilon", "objective.clip", 0.1)
    _carry(account, "loss.value_coeff", "objective.value_coef", 0.1)
    _carry(account, "loss.value_clip_range", "objective.value_clip", 0.2)
    for key, ours in (("kl_coeff", "beta"), ("gamma", "gamma"), ("lmbda", "lam")):
        _carry(account, key, f"objective.{ours}")
    _carry(account, "whiten_rewards", "objective.whiten_rewards", read=flag)
    if account.read("penalise_no_eos", flag, False):
        penalty = account.read("reward_penalty", finite_number)
        account.carry("penalise_no_eos", "objective.missing_end", penalty)
        account.explain("reward_penalty", "see objective.missing_end")
    else:
        account.assume("penalise_no_eos", "objective.missing_end", None)
    prompts = account.read("batch_size", whole_number, 1)
    part = account.read("ppo_batch_size", whole_number, prompts)
    minibatches = prompts // part if part > 0 and prompts % part == 0 else None
    if minibatches is None:
        account.leave("ppo_batch_size", "set objective.minibatches: the optimizer steps of a pass over a rollout")
    else:
        account.carry("ppo_batch_size", "objective.minibatches", minibatches, "optimizer steps of a pass over a rollout")
    answers = account.read("num_steps", whole_number)
    if answers is not None:
        rollouts = max(1, answers // max(prompts, 1))
        steps = rollouts * account.read("ppo_epochs", whole_number, 1) * (minibatches or 1)
        account.carry("num_steps", "steps", steps, "optimizer steps; answers there. Steps take precedence over epochs")


def _carry(
    account: Account, key: str, path: str, default: float | None = None, read: Callable[[Any], object] = finite_number
) -> None:
    """Carry a value, or write out what an absent key stands for; without a default that is nothing."""
    if account.raw(key) is not None:
        account.carry(key, path, account.read(key, read))
    elif default is not None:
        account.assume(key, path, default)
