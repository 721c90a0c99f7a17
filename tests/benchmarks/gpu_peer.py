"""The peers' side of a cell: Transformers with PEFT, and TRL.

`transformers` is its Trainer on a model under PEFT, `trl` its trainers as they come but for recomputation, which is off,
`trl_best` those with packing where rows have unlike lengths, Liger's kernels and flash attention, each where it is importable.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.benchmarks.gpu_work import LORA, SEED, Cell, Meter, Size, rows_at_once, rows_per_step
from tests.benchmarks.peer import count_tokens

RATE = 1e-4
ROUTE = "model.packed_attention"
"""Key of the route of packed attention."""
LIBRARY = ("qlora", "int8", "_8bit")
"""Methods and parts of further words that need bitsandbytes."""
NEEDS = {
    "product": (),
    "transformers": ("transformers", "peft"),
    "trl": ("transformers", "peft", "trl"),
    "trl_best": ("transformers", "peft", "trl"),
}


def missing(cell: Cell, device: str) -> str | None:
    """Why a side cannot do a cell on a device; None where it can."""
    import torch

    from llmrecipe.models.fused_kernels import kernels_lacking
    from llmrecipe.models.packed_attention import lacking

    quantized = any(word in f"{cell.method} {cell.words}" for word in LIBRARY)
    needed = [*NEEDS[cell.side], *(["bitsandbytes"] if quantized else [])]
    absent = [name for name in needed if find_spec(name) is None]
    if absent:
        return f"not importable: {', '.join(absent)}"
    if "model.kernels=liger" in cell.words and (lacks := kernels_lacking(device)) is not None:
        return f"liger {lacks}"
    route = next((word.partition("=")[2] for word in cell.words.split() if word.startswith(f"{ROUTE}=")), None)
    if route is not None and (lacks := lacking(route, torch.device(device))) is not None:
        return f"{route} {lacks}"
    if "runtime.decoding=graphs" in cell.words and device != "cuda":
        return f"graphs need a GPU, and the device is {device}"
    if cell.side == "trl_best" and not extras(cell):
        return "nothing to add to trl here: liger_kernel and flash_attn are not importable"
    return None


def extras(cell: Cell) -> list[str]:
    """What `trl_best` adds on this machine."""
    found = ["packing"] if cell.task == "sft" and cell.lengths == "real" else []
    found += ["liger"] if find_spec("liger_kernel") else []
    return found + (["flash"] if find_spec("flash_attn") else [])


def train(cell: Cell, size: Size, spec: dict[str, Any], meter: Meter) -> dict[str, Any]:
    """Train; returns the settings that were used."""
    from datasets import load_dataset

    rows = load_dataset("json", data_files=spec["data"], split="train", cache_dir=str(Path(spec["out"]) / "cache"))
    best = extras(cell) if cell.side == "trl_best" else []
    common = arguments(cell, size, spec, best)
    build = transformers_trainer if cell.side == "transformers" else trl_trainer
    trainer = build(cell, size, spec, rows, common, best)
    trainer.add_callback(recorder(cell, meter, trainer, common["gradient_accumulation_steps"]))
    trainer.train()
    return {"with": best, "rows_at_once": common["per_device_train_batch_size"]}


def arguments(cell: Cell, size: Size, spec: dict[str, Any], best: list[str]) -> dict[str, Any]:
    """What all configs are given."""
    at_once = rows_at_once(cell, size)
    rows = rows_per_step(cell, size) * (size.answers if cell.task == "grpo" else 1)
    return {
        "output_dir": spec["out"],
        "max_steps": size.steps,
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": rows // at_once,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "seed": SEED,
        "logging_steps": 1,
        "bf16": cell.dtype == "bfloat16",
        "gradient_checkpointing": False,
        "use_cpu": spec["device"] == "cpu",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_liger_kernel": "liger" in best,
    }


def loading(cell: Cell, best: list[str]) -> dict[str, Any]:
    """How the model is loaded: weights that all train in float32 under autocast, frozen ones in the cell's precision."""
    import torch

    found: dict[str, Any] = {"dtype": torch.float32 if cell.method == "full" else getattr(torch, cell.dtype)}
    if "flash" in best:
        found["attn_implementation"] = "flash_attention_2"
    if cell.method == "qlora":
        from transformers import BitsAndBytesConfig

        found["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, cell.dtype),
        )
    return found


def adapter(cell: Cell) -> Any:
    """PEFT's LoRA on every linear layer of a block; None where all weights train."""
    from peft import LoraConfig

    if cell.method == "full":
        return None
    return LoraConfig(
        r=LORA["r"], lora_alpha=LORA["alpha"], target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
    )


def transformers_trainer(
    cell: Cell, size: Size, spec: dict[str, Any], rows: Any, common: dict[str, Any], best: list[str]
) -> Any:
    """Transformers' Trainer on rows padded by its own collator."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    model = AutoModelForCausalLM.from_pretrained(spec["model"], **loading(cell, best))
    if cell.method == "qlora":
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if (lora := adapter(cell)) is not None:
        model = peft.get_peft_model(model, lora)

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        prompt, answer = (tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in ("prompt", "completion"))
        ids = [*prompt, *answer, tokenizer.eos_token_id]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(prompt) + ids[len(prompt) :]}

    return Trainer(
        model=model,
        args=TrainingArguments(**common),
        train_dataset=rows.map(encode, remove_columns=rows.column_names),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )


def trl_trainer(cell: Cell, size: Size, spec: dict[str, Any], rows: Any, common: dict[str, Any], best: list[str]) -> Any:
    """The trainer of TRL for the cell's task."""
    import trl
    from transformers import AutoTokenizer

    config, trainer = {
        "sft": (trl.SFTConfig, trl.SFTTrainer),
        "dpo": (trl.DPOConfig, trl.DPOTrainer),
        "grpo": (trl.GRPOConfig, trl.GRPOTrainer),
    }[cell.task]
    options: dict[str, Any] = {**common, "model_init_kwargs": loading(cell, best)}
    more: dict[str, Any] = {}
    if cell.task == "grpo":
        most = 4 * size.new
        options |= {"num_generations": size.answers, "max_completion_length": size.new, "beta": 0.04}
        more["reward_funcs"] = lambda completions, **_: [-min(1.0, max(0, len(c) - most) / most) for c in completions]
    else:
        options["max_length"] = size.longest
    if "packing" in best:
        # As many tokens at once as the padded rows have at full length.
        options |= {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
        options["max_length"] = size.micro
    return trainer(
        model=spec["model"],
        args=config(**options),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(spec["model"]),
        peft_config=adapter(cell),
        **more,
    )


def recorder(cell: Cell, meter: Meter, trainer: Any, accumulation: int) -> Any:
    """A callback that tells the meter of every step."""
    from transformers import TrainerCallback

    counts = count_tokens(trainer) if cell.task != "grpo" else None
    micros = trainer.args.gradient_accumulation_steps

    class Recorder(TrainerCallback):
        seen = 0

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" not in logs:
                return
            self.seen += 1 if counts is None else sum(counts.popleft() for _ in range(micros))
            meter.step(logs["loss"], self.seen)

    return Recorder()
