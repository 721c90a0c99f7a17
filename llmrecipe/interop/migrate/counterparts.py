"""What the tools have in common: batch size, optimizer, learning-rate schedule, precision, adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmrecipe.interop.migrate.account import Account
from llmrecipe.interop.migrate.values import finite_number, flag, whole_number, words

OPTIMIZERS = {
    **dict.fromkeys(("adamw", "adamw_hf", "adamw_torch", "adamw_torch_fused", "adamw_apex_fused"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit"), "adamw_8bit"),
    **dict.fromkeys(("paged_adamw", "paged_adamw_32bit"), "paged_adamw_32bit"),
    **{
        name: name
        for name in (
            "paged_adamw_8bit",
            "adafactor",
            "muon",
            "ademamix",
            "ademamix_8bit",
            "paged_ademamix_8bit",
            "sgd",
            "rmsprop",
        )
    },
    **{"lion": "lion", "lion_32bit": "lion", "lion_8bit": "lion_8bit", "paged_lion_32bit": "paged_lion"},
    **{
        "paged_lion": "paged_lion",
        "paged_lion_8bit": "paged_lion_8bit",
        "rmsprop_bnb": "rmsprop",
        "rmsprop_bnb_8bit": "rmsprop_8bit",
    },
}
"""Optimizer of Transformers -> optimizer here."""
MODULES = {
    **{"q_proj": ("attn", "q"), "k_proj": ("attn", "k"), "v_proj": ("attn", "v"), "o_proj": ("attn", "o")},
    **{"output_proj": ("attn", "o"), "gate_proj": ("mlp", "gate"), "up_proj": ("mlp", "up"), "down_proj": ("mlp", "down")},
    **{"embed_tokens": ("", "embed"), "lm_head": ("", "head")},
}
"""Name of a layer in most checkpoints -> its part and its role in a target."""
EVERY_LINEAR = "attn.q|k|v|o + mlp.gate|up|down"
BETAS = ("adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit")


def known_targets(names: list[str]) -> tuple[str, list[str]]:
    """Return the target that covers layers named as in a checkpoint, and the names it does not cover.

    Examples:
        >>> known_targets(["v_proj", "q_proj", "up_proj", "experts.w1"])
        ('attn.q|v + mlp.up', ['experts.w1'])
    """
    parts: dict[str, list[str]] = {}
    for part, role in MODULES.values():
        if role not in parts.get(part, []) and any(MODULES.get(name) == (part, role) for name in names):
            parts.setdefault(part, []).append(role)
    terms = [f"{part}.{'|'.join(roles)}" for part, roles in parts.items() if part]
    return " + ".join([*terms, *parts.get("", [])]), [name for name in names if name not in MODULES]


def batch(account: Account, micro: str, accumulation: str, default: int = 1) -> None:
    """Set `batch.size` to rows a device times accumulated batches times devices, and `batch.micro`."""
    rows = account.read(micro, whole_number, default)
    steps = account.read(accumulation, whole_number, 1)
    size = rows * steps * account.processes
    devices = f" x {account.processes} devices" if account.processes > 1 else ""
    note = f"{rows} rows x {steps} accumulated batches{devices}; with more devices name them: --processes N"
    if account.raw(micro) is None:
        account.assume(micro, "batch.size", size, note)
        account.settings["batch.micro"] = rows
    else:
        account.carry(micro, "batch.micro", rows)
        account.settings["batch.size"] = size
    if account.raw(accumulation) is not None:
        account.carry(accumulation, "batch.size", size, note)
    elif account.raw(micro) is not None:
        account.assume(accumulation, "batch.size", size, note)


def optimizer(account: Account, key: str, default: str, decay: str = "weight_decay", decay_default: float = 0.0) -> None:
    """Choose the optimizer, with its decay and averages as Transformers sets them."""
    name = account.read(key, str, default)
    ours = OPTIMIZERS.get(name)
    if ours is None:
        account.leave(key, f"no optimizer here is that one ({name}); adamw is chosen instead (`llmrecipe list optim`)")
        account.choices["optim"] = ours = "adamw"
    elif account.raw(key) is None:
        account.choices["optim"] = ours
        account.assume(key, "optim", ours, f"{default} there")
        del account.settings["optim"]
    else:
        account.chosen(key, "optim", ours, "the state has 8 bits in blocks of 256" if ours == "adamw_8bit" else "")
    value = account.read(decay, finite_number, decay_default)
    if account.raw(decay) is None:
        account.assume(decay, "optim.weight_decay", value)
    else:
        account.carry(decay, "optim.weight_decay", value)
    for names, path in ((("adam_beta1",), "beta1"), (("adam_beta2",), "beta2"), (("adam_epsilon", "adam_eps"), "eps")):
        for one in names:
            if account.raw(one) is None:
                continue
            if ours in BETAS or (ours == "muon" and path != "eps"):
                account.carry(one, f"optim.{path}", account.read(one, finite_number))
            else:
                account.leave(one, f"{ours} has no {path} of that meaning; `llmrecipe show {ours}` lists its options")


def adapters_decay(account: Account) -> None:
    """Let the matrices of adapters decay too, as Transformers does: adapters here do not by default."""
    stack = account.choices.get("stack", [])
    if account.settings.get("optim.weight_decay") and any(name in ("lora", "dora") for name in stack):
        note = "weight decay there also pulls the matrices of an adapter to zero"
        account.assume("weight_decay", "optim.decay_adapters", True, note)


def warmup(account: Account, steps: str | None, ratio: str | None, default: float = 0) -> float | int:
    """Return the warm-up, in steps or as a share of the run, and enter its keys; steps take precedence."""
    given = account.read(steps, finite_number) if steps else None
    share = account.read(ratio, finite_number) if ratio else None
    value: float | int = default
    if given:
        value = given if given < 1 else whole_number(given)
    elif share:
        value = share
    used = steps if given else ratio if share else None
    note = "update n of w rises to n / w here, to (n - 1) / w there: the first update is not at rate 0"
    for key in (steps, ratio):
        if key is None or account.raw(key) is None:
            continue
        if key == used:
            account.carry(key, "schedule.warmup", value, note)
        else:
            account.same(key, "no warm-up" if used is None else f"{used} takes precedence")
    return value


def schedule(account: Account, key: str, default: str, warm: float | int, kwargs: str = "lr_scheduler_kwargs") -> None:
    """Choose the learning-rate schedule."""
    name = account.read(key, str, default)
    ours = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}.get(name)
    ours = {"inverse_sqrt": "inverse_sqrt", "cosine_with_min_lr": "cosine", "warmup_stable_decay": "wsd"}.get(name, ours or "")
    if not ours:
        account.leave(key, f"no schedule here is that one ({name}); cosine is chosen instead (`llmrecipe list schedule`)")
        account.choices["schedule"] = ours = "cosine"
    elif account.raw(key) is None:
        account.choices["schedule"] = ours
        account.assume(key, "schedule", ours)
        del account.settings["schedule"]
    else:
        account.chosen(key, "schedule", ours)
    if name == "constant" and warm:
        warm = 0
        account.settings.pop("schedule.warmup", None)
        account.explain(key, "this schedule has no warm-up there, whatever the warm-up keys say")
    if warm or ours == "inverse_sqrt":
        account.settings["schedule.warmup"] = warm
    if (low := account.read(f"{kwargs}.min_lr_rate", finite_number)) is not None and ours in ("cosine", "linear", "wsd"):
        account.carry(f"{kwargs}.min_lr_rate", "schedule.min_ratio", low)
    if (decay := account.read(f"{kwargs}.num_decay_steps", whole_number)) is not None and ours == "wsd":
        account.carry(f"{kwargs}.num_decay_steps", "schedule.decay", decay)
        account.assume(f"{kwargs}.decay_type", "schedule.shape", "cosine", "the decay falls as half a cosine there")


def precision(account: Account, default: str | None = None) -> None:
    """Set the dtype of the computation: bf16, fp16, or the default."""
    for key, dtype in (("bf16", "bfloat16"), ("bfloat16", "bfloat16"), ("fp16", "float16"), ("float16", "float16")):
        value = account.raw(key)
        if value is None:
            continue
        if str(value) in ("auto", "full"):
            account.carry(key, "model.dtype", "auto" if value == "auto" else dtype, "trained tensors stay float32")
        elif account.read(key, flag):
            account.carry(key, "model.dtype", dtype, "trained tensors stay float32 here")
        else:
            account.same(key, "off")
    if default is not None and "model.dtype" not in account.settings:
        account.assume("bf16", "model.dtype", default)


def reports(account: Account, key: str = "report_to") -> None:
    """Set the trackers."""
    if account.raw(key) is None:
        return
    known = ("wandb", "mlflow", "tensorboard", "trackio")
    names = [name for name in account.read(key, words) if name.lower() != "none"]
    if lost := [name for name in names if name not in known]:
        account.leave(key, f"{', '.join(lost)}: trackers here are {', '.join(known)} (log.trackers)")
    elif names:
        account.carry(key, "log.trackers", names)
    else:
        account.same(key, "no tracker, as here")


def stop_after(account: Account, steps: str, epochs: str, default: float | None) -> None:
    """Set the length of the run: steps take precedence over epochs in both tools."""
    count = account.read(steps, whole_number)
    if count is not None and count > 0:
        account.carry(steps, "steps", count)
    elif count is not None:
        account.same(steps, "not limited")
    passes = account.read(epochs, finite_number)
    if passes is not None:
        account.carry(epochs, "epochs", passes, "steps take precedence" if count and count > 0 else "")
    elif default is not None and not (count and count > 0):
        account.assume(epochs, "epochs", default)


def every(account: Account, kind: str, path: str, default: int | None) -> None:
    """Set how often the model is saved or evaluated, from `KIND_strategy` and `KIND_steps`."""
    steps, strategy = f"{kind}_steps", f"{kind}_strategy"
    name = account.raw(strategy)
    count = account.read(steps, finite_number)
    if name in ("no", False) and name is not None:
        account.same(strategy, "not during training: at its end alone")
        if count is not None:
            account.same(steps, f"unused, because {strategy} is {name}")
        return
    if name in ("epoch", "best"):
        account.leave(strategy, f"count the steps of an epoch (rows / batch.size) and set {path}=STEPS")
    elif name is not None:
        account.explain(strategy, f"{path} counts steps")
    if count is not None and count >= 1:
        account.carry(steps, path, int(count))
    elif count:
        account.leave(steps, f"a share of the run; set {path}=STEPS")
    elif default is not None and name in (None, "steps"):
        account.assume(steps, path, default)


def lora(account: Account, keys: dict[str, str], defaults: dict[str, Any], dora: bool, every_linear: bool) -> str:
    """Set the options of LoRA, or of DoRA, whose alpha is divided by the rank in every tool.

    Args:
        keys: option here -> key there, for r, alpha, dropout and target.
        defaults: option here -> what an absent key stands for.
        every_linear: every linear layer of a block is a target.

    Returns:
        The name of the method.
    """
    name = "dora" if dora else "lora"
    readers: dict[str, Callable[[Any], Any]] = {"r": whole_number, "alpha": finite_number, "dropout": finite_number}
    for option, reader in readers.items():
        value = account.read(keys[option], reader)
        if value is not None:
            account.carry(keys[option], f"stack.{name}.{option}", value)
        elif option in defaults:
            account.assume(keys[option], f"stack.{name}.{option}", defaults[option])
    names = [] if every_linear else account.read(keys["target"], words, [])
    target, lost = known_targets(names)
    path = f"stack.{name}.target"
    if every_linear or names in (["all-linear"], ["all"]):
        account.settings[path] = EVERY_LINEAR
        account.carry(keys["target"], path, EVERY_LINEAR)
    elif lost:
        account.leave(keys["target"], f"name the sites of {', '.join(lost)!r:.200} yourself: {path}=... (`llmrecipe check`)")
        account.settings[path] = target or EVERY_LINEAR
    elif names:
        account.carry(keys["target"], path, target)
    else:
        account.assume(keys["target"], path, "attn.q|v", "the layers that PEFT picks for most families; some have others")
    return name


def stand_in_reward(account: Account, key: str) -> None:
    """Write a reward with which the recipe can run until the user's own one stands there."""
    reward = {"length": {"most": 40, "unit": "words"}}
    account.assume(key, "objective.reward", reward, "a stand-in: write what is good for you (`llmrecipe list reward`)")


def carry_sampling(account: Account, answers_key: str, answers: int) -> None:
    """Set what GRPO and RLOO need: a reward, and rows of a step that are prompts here and answers there."""
    stand_in_reward(account, "reward_funcs")
    count = account.read(answers_key, whole_number, answers)
    if account.raw(answers_key) is None:
        account.assume(answers_key, "objective.answers", answers)
    else:
        account.carry(answers_key, "objective.answers", count)
    size = account.settings["batch.size"]
    note = f"rows of a step are prompts here, and were answers there: divided by the {count} answers to one prompt"
    if count > 0 and size % count == 0:
        account.assume(answers_key, "batch.size", size // count, note)
        account.settings.pop("batch.micro", None)
    else:
        account.leave(answers_key, f"set batch.size to the prompts of a step: {size} answers there, {count} to one prompt")
