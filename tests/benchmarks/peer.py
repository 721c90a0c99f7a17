"""One training run in TRL + PEFT: `python peer.py SPEC.json`, started by the harness in a process of its own.

The spec names task, model folder, rows, steps and settings; the run writes one JSON object a step to `events`, in the
product's own words (`step`, `loss`, `tokens`), so that one reader serves both sides.

`setting` is `defaults` (nothing set that TRL sets by itself) or `best` (packing or precomputed reference, no recomputation,
the stated precision).
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any


def main(spec: dict[str, Any]) -> None:
    """Run a spec to its end and save the adapter, as the other side does."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    rows = load_dataset("json", data_files=spec["data"], split="train", cache_dir=str(Path(spec["out"]) / "cache"))
    lora = LoraConfig(
        r=spec["r"], lora_alpha=spec["alpha"], target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    trainer = build(spec, rows, AutoTokenizer.from_pretrained(spec["model"]), lora)
    counts = None if spec["task"] == "grpo" else count_tokens(trainer)
    trainer.add_callback(recorder(Path(spec["events"]), counts))
    trainer.train()
    trainer.save_model(str(Path(spec["out"]) / "final"))


def build(spec: dict[str, Any], rows: Any, tokenizer: Any, lora: Any) -> Any:
    """The trainer of TRL for the spec's task."""
    import trl

    config, trainer = {
        "sft": (trl.SFTConfig, trl.SFTTrainer),
        "dpo": (trl.DPOConfig, trl.DPOTrainer),
        "grpo": (trl.GRPOConfig, trl.GRPOTrainer),
    }[spec["task"]]
    if spec["task"] == "dpo":
        time_reference(trainer, Path(spec["events"]))
    return trainer(
        model=spec["model"],
        args=config(**arguments(spec)),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora,
        **({"reward_funcs": even_words} if spec["task"] == "grpo" else {}),
    )


def even_words(completions: list[str], **columns: Any) -> list[float]:
    """The reward of each answer."""
    from tests.benchmarks.workload import even_share

    return [even_share(text) for text in completions]


def time_reference(trainer: Any, path: Path) -> None:
    """Write down the CPU time of scoring the reference before training."""
    score = trainer._precompute_ref_logps

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.process_time()
        scored = score(*args, **kwargs)
        write(path, {"event": "reference", "cpu": time.process_time() - began})
        return scored

    trainer._precompute_ref_logps = timed


def write(path: Path, event: dict[str, Any]) -> None:
    """Add one line to the event file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")


def arguments(spec: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the trainer's config."""
    common: dict[str, Any] = {
        "output_dir": spec["out"],
        "num_train_epochs": spec["passes"],
        "per_device_train_batch_size": spec["batch"],
        "train_sampling_strategy": "sequential",
        "learning_rate": spec["lr"],
        "lr_scheduler_type": "constant",
        "seed": spec["seed"],
        "logging_steps": 1,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if spec["beta"] is not None:
        common["beta"] = spec["beta"]
    if spec["task"] == "grpo":
        common |= sampling(spec)
    if spec["setting"] == "defaults":
        return common
    half = spec["dtype"] == "bfloat16"
    common |= {"gradient_checkpointing": False, "bf16": half, "model_init_kwargs": {"dtype": spec["dtype"]}}
    if spec["task"] == "grpo":
        return common
    if spec["task"] == "dpo":
        return common | {"precompute_ref_log_probs": True}
    # As many tokens a step as the padded run trains on, in rows just long enough for the longest document:
    # TRL's packed rows pay for a dense mask that grows with the square of their length.
    return common | {"packing": True, "max_length": spec["pack"], "per_device_train_batch_size": spec["packs"]}


def sampling(spec: dict[str, Any]) -> dict[str, Any]:
    """What GRPO is given besides: all answers of a step are sampled at once and trained on by as many as a prompt has."""
    return {
        "shuffle_dataset": False,
        "per_device_train_batch_size": spec["answers"],
        "gradient_accumulation_steps": spec["batch"],
        "num_generations": spec["answers"],
        "max_completion_length": spec["new_tokens"],
    }


def count_tokens(trainer: Any) -> deque[int]:
    """Non-padding tokens of each batch, in the order the loader reads them (it reads ahead)."""
    counts: deque[int] = deque()
    collate = trainer.data_collator

    def counting(examples: list[dict[str, Any]]) -> Any:
        counts.append(sum(tokens(example) for example in examples))
        return collate(examples)

    trainer.data_collator = counting
    return counts


def tokens(example: dict[str, Any]) -> int:
    """Tokens of one tokenized example; both answers carry the prompt."""
    if "chosen_ids" in example:
        return 2 * len(example["prompt_ids"]) + len(example["chosen_ids"]) + len(example["rejected_ids"])
    return len(example["input_ids"])


def recorder(path: Path, counts: deque[int] | None) -> Any:
    """A callback that writes a step event as soon as the step's loss is known; without counts, of sampled answers."""
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        seen = 0

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" not in logs:
                return
            event = {"event": "step", "step": state.global_step, "loss": logs["loss"]}
            if counts is None:
                write(path, {**event, "objective/scores": logs["reward"], "response/length": logs["completions/mean_length"]})
                return
            self.seen += counts.popleft()
            write(path, {**event, "tokens": self.seen})

    return Recorder()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
