"""One pretraining run outside this program, for `pretraining.py`: `python pretraining_peer.py SPEC.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

IGNORED = -100


class Strip(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows sliced out of a memory-mapped file of tokens; a document's first token is no target."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.tokens = np.memmap(spec["strip"], dtype=np.uint16, mode="r")
        self.order, self.length, self.eos = spec["order"], spec["length"], spec["eos"]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        begin = self.order[index] * (self.length - 1)
        ids = torch.from_numpy(self.tokens[begin : begin + self.length].astype(np.int64))
        labels = ids.clone()
        labels[1:][ids[:-1] == self.eos] = IGNORED
        return {"input_ids": ids, "labels": labels}


def write(path: Path, step: int, loss: float) -> None:
    """Add one line to the event file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"event": "step", "step": step, "loss": loss}) + "\n")


def train_in_loop(spec: dict[str, Any], model: Any, rows: Strip, events: Path) -> None:
    """Forward, loss, backward, clip, step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec["lr"], weight_decay=0.0, fused=True)
    size = spec["rows"]
    for step in range(len(rows) // size):
        batch = [rows[i] for i in range(step * size, (step + 1) * size)]
        ids, labels = (torch.stack([row[key] for row in batch]) for key in ("input_ids", "labels"))
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        write(events, step + 1, float(loss.detach()))


def train_in_trainer(spec: dict[str, Any], model: Any, rows: Strip, events: Path) -> None:
    """Train with `transformers.Trainer`."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Recorder(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                write(events, state.global_step, logs["loss"])

    arguments = TrainingArguments(
        output_dir=spec["out"], num_train_epochs=1, per_device_train_batch_size=spec["rows"], learning_rate=spec["lr"],
        train_sampling_strategy="sequential", lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0,
        seed=spec["seed"], logging_steps=1, use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Recorder()]).train()


def main(spec: dict[str, Any]) -> None:
    """Load the model and train it."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(spec["seed"])
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32).train()
    train = train_in_trainer if spec["side"] == "trainer" else train_in_loop
    train(spec, model, Strip(spec), Path(spec["events"]))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
