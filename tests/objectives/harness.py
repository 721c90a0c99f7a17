"""Every objective on a small model in float64: rows of its type, its model, one step through the loop's own rule."""

from __future__ import annotations

import json
import operator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from llmrecipe.core import registry
from llmrecipe.data.collate import Batch
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.role_models import Roles
from llmrecipe.engine.teacher import Teacher
from llmrecipe.methods._base.late_values import Largest, Smallest
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods._base.update_rule import StepContext, StepResult, backprop
from llmrecipe.recipe.schema import RuntimeSection
from llmrecipe.runtime.processes import Runtime
from llmrecipe.training.run import Run
from tests.objectives.rollouts import REWARD, Numbers
from tests.pictures import held_picture
from tests.tiny import tiny_masked_model, tiny_model, tiny_span_model, tiny_vision_model

LENGTHS = [2, 9, 4, 7, 3, 11, 5, 6]


def ids(row: int, length: int, first: int = 3) -> list[int]:
    """Tokens that differ from row to row."""
    return [first + (7 * row + 5 * i) % 50 for i in range(length)]


def dialogue(row: int, length: int) -> dict[str, Any]:
    targets = max(1, length - 2)
    return {"row": row, "ids": ids(row, length), "trained": [0] * (length - targets) + [1] * targets}


def pair(row: int, length: int) -> dict[str, Any]:
    answers = {"chosen_ids": [*ids(row, length - 1, 5), 2], "rejected_ids": [*ids(row, 1 + row % 3, 9), 2]}
    return {"row": row, "prompt_ids": ids(row, 2 + row % 4), **answers}


def feedback(row: int, length: int) -> dict[str, Any]:
    return {"row": row, "prompt_ids": ids(row, 3), "completion_ids": [*ids(row, length, 5), 2], "label": row % 3 != 0}


def labelled(row: int, length: int) -> dict[str, Any]:
    return {"row": row, "ids": ids(row, length), "label": row % 3}


def scored(row: int, length: int) -> dict[str, Any]:
    return {"row": row, "ids": ids(row, length), "score": 0.5 * (row % 5)}


def tagged(row: int, length: int) -> dict[str, Any]:
    words = [-1, *(i // 2 for i in range(length - 1))]
    return {"row": row, "ids": ids(row, length), "words": words, "label": [(row + i) % 3 for i in range(max(words) + 1)]}


def passage(row: int, length: int) -> dict[str, Any]:
    """A passage of one to three windows: two tokens of the question, those of the passage, the end token."""
    count = 1 + row % 3
    windows = [[*ids(row + 3 * w, 2, 9), *ids(row + w, length), 2] for w in range(count)]
    text = " ".join(f"w{i}" for i in range(length))
    spans = [(-1, -1), (-1, -1), *((3 * i, 3 * i + 2) for i in range(length)), (-1, -1)]
    null = length + 2
    starts = [2 + row % length if w == row % count else null for w in range(count)]
    stops = [min(s + 1, null - 1) if s < null else null for s in starts]
    return {
        "row": row,
        "ids": [token for window in windows for token in window],
        "windows": [length + 3] * count,
        "begins": [a for a, _ in spans] * count,
        "ends": [b for _, b in spans] * count,
        "starts": starts,
        "stops": stops,
        "nulls": [null] * count,
        "answers": json.dumps(text.split()[:1]),
        "context": text,
    }


def question(row: int, length: int) -> dict[str, Any]:
    choices = [[*ids(row, 1 + (length + i) % 4, 5 + i), 2] for i in range(1 + row % 3)]
    flat = [token for choice in choices for token in choice]
    sizes: dict[str, Any] = {name: [first + i for i in range(len(choices))] for name, first in (("chars", 3), ("bytes", 5))}
    sizes = {f"choice_{name}": values for name, values in sizes.items()}
    sizes |= {"choice_tokens": [len(choice) - 1 for choice in choices], "right": row % len(choices)}
    return {
        "row": row,
        "prompt_ids": ids(row, 2 + row % 4),
        "choice_ids": flat,
        "choice_lengths": [*map(len, choices)],
        **sizes,
        "task": row % 2,
    }


def prompt(row: int, length: int) -> dict[str, Any]:
    return {"row": row, "prompt_ids": ids(row, length), "columns": "{}"}


def document(row: int, length: int) -> dict[str, Any]:
    return {"row": row, "ids": [1, *ids(row, length), 2], "words": [-1, *range(length), -1]}


def noisy_document(row: int, length: int) -> dict[str, Any]:
    return {**document(row, length), "sentences": [-1, *(i // 3 for i in range(length)), -1], "outlier": None}


def sentences(row: int, length: int) -> dict[str, Any]:
    lengths = [2, *([3] * (1 + row % 3)), length]
    return {"row": row, "ids": ids(row, sum(lengths)), "words": [*range(sum(lengths))], "sentences": lengths}


def triple(row: int, length: int) -> dict[str, Any]:
    texts = {"ids_a": ids(row, length), "ids_b": ids(row, length + 1, 5), "ids_c": ids(row, 1 + length % 4, 11)}
    return {"row": row, **texts, "score": None, "label": None}


def labelled_image(row: int, length: int) -> dict[str, Any]:
    return {"row": row, "features": held_picture(row), "label": row % 3}


def pictured(row: int, length: int) -> dict[str, Any]:
    return {**document(row, length), "features": held_picture(row), "attribute": [0, 1, *([0] * (length - 1)), 0]}


def captioned(row: int, length: int) -> dict[str, Any]:
    return {"row": row, "ids": [1, *ids(row, length), 2], "trained": [0, *([1] * (length + 1))], "features": held_picture(row)}


def pictured_question(row: int, length: int) -> dict[str, Any]:
    return {**labelled(row, length), "features": held_picture(row)}


MAKERS = {
    "dialogue": dialogue,
    "text": dialogue,
    "words": document,
    "structured_text": noisy_document,
    "sentences": sentences,
    "preference": pair,
    "unpaired": feedback,
    "labelled": labelled,
    "labelled_images": labelled_image,
    "scored": scored,
    "tagged": tagged,
    "passages": passage,
    "pictured_words": pictured,
    "pictured_questions": pictured_question,
    "multimodal": captioned,
    "choices": question,
    "prompt": prompt,
    "pairs": triple,
}
"""Row type -> its token rows; a plugin's objective that reads another type adds its maker here."""
OBJECTIVES = registry.names("objective")
SAMPLED = [name for name in OBJECTIVES if registry.spec("objective", name).facts.get("samples")]
"""Objectives whose rows are written by the policy."""
READ = [name for name in OBJECTIVES if name not in SAMPLED]
STACKS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"target": "attn.q|k|v|o + mlp.gate|up|down"},
    "prefix_tuning": {"num_virtual_tokens": 3, "hidden": 8},
}
"""Wrapper -> options on the small model; `full` is none."""


HYPERMODEL: dict[str, Any] = {"r": 2, "depth": 1, "width": 16, "head_init": "bias"}
"""Options of the stack that objectives which give examples have in the place of `full`."""
SHAPES: dict[str, dict[str, Any]] = {name: {"patch": 4, "feature_width": 48} for name in ("mmlm", "clip", "caption", "vqa")}
"""Options that follow from the data in a run."""


def objective_of(name: str) -> Any:
    """An objective with its defaults, and short rollouts judged by a function where it samples."""
    wanted: dict[str, Any] = {"reward": REWARD, "answers": 2, "max_new_tokens": 5, "epochs": 1, "minibatches": 1}
    options = registry.spec("objective", name).options
    found = {k: v for k, v in wanted.items() if name in SAMPLED and k in options} | SHAPES.get(name, {})
    return registry.load_class("objective", name)(**found)


def rows_of(objective: Any, count: int = len(LENGTHS)) -> list[dict[str, Any]]:
    """Token rows of the type an objective reads."""
    return [MAKERS[objective.rows](row, length) for row, length in enumerate(LENGTHS[:count])]


def model_for(objective: Any) -> nn.Module:
    """A small model with the heads of an objective."""
    makers = {"masked": tiny_masked_model, "image": tiny_vision_model, "question_answering": tiny_span_model}
    model = makers.get(objective.head, tiny_model)()
    if objective.head in ("classification", "token_classification"):
        torch.manual_seed(3)
        model.score = nn.Linear(32, len(objective.label_names() or "abc"), bias=False)
    if objective.rows == "pictured_questions":
        objective.answers[:] = "abc"
    objective.prepare_model(model, 5)
    return model


class Held(list[dict[str, Any]]):
    """Rows of a data set, which what follows from them may be kept for."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def task_numbers(self) -> list[int]:
        """The number of each row's task."""
        return [int(row["task"]) for row in self]


@dataclass
class Case:
    """An objective on a small model under one wrapper or none; the policy is its own reference."""

    name: str
    kind: str = "full"
    packing: bool = True
    micro: int | None = None
    objective: Any = field(init=False)
    roles: Roles = field(init=False)
    rows: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.objective = objective_of(self.name)
        model = model_for(self.objective)
        if self.kind == "full" and self.objective.gives_examples:
            self.kind = "hypertuning"
        own = (
            []
            if self.kind == "full"
            else [registry.load_class("stack", self.kind)(name=self.kind, **STACKS.get(self.kind, HYPERMODEL))]
        )
        stack = Stack([*own, *self.objective.role_wrappers(own)])
        torch.manual_seed(4)
        stack.attach(model)
        if own:
            stack.set_trainable(model)
        model.double().train()
        stack.snapshot_reference(model)
        self.roles = Roles(Engine(model), stack, Numbers(), torch.device("cpu"), self.packing, self.micro)
        if "teacher" in self.objective.roles:
            self.roles.others["teacher"] = Teacher(tiny_model(seed=9).double(), Numbers(), torch.device("cpu"))
        self.rows = rows_of(self.objective)
        self.roles.data = Held(self.rows)
        self.objective.start(self.roles)

    @property
    def model(self) -> nn.Module:
        """The policy."""
        return self.roles.model

    def trained(self) -> dict[str, nn.Parameter]:
        """What trains, by name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def micros(self, rows: list[dict[str, Any]] | None = None) -> list[Batch]:
        """The micro-batches of the first step; rollouts of two cases are the same answers."""
        torch.manual_seed(7)
        return next(iter(self.objective.batches(iter([self.rows if rows is None else rows]), self.roles)))

    def sums(self, micros: list[Batch]) -> tuple[float, float, dict[str, tuple[float, float]], dict[str, Tensor]]:
        """(total, weight, metric -> (sum, count), gradients of the total) over micro-batches."""
        self.model.zero_grad(set_to_none=True)
        total, weight = 0.0, 0.0
        metrics: dict[str, tuple[float, float]] = {}
        for batch in micros:
            loss = self.objective.loss(batch, self.roles)
            loss.total.backward()
            total, weight = total + float(loss.total.detach()), weight + self.objective.weight(batch)
            for name, entry in loss.metrics.items():
                value, count = entry
                if name in metrics:
                    known, add = metrics[name], {Smallest: min, Largest: max}.get(type(entry), operator.add)
                    metrics[name] = (add(known[0], float(value)), known[1] + count)
                else:
                    metrics[name] = (float(value), count)
        return total, weight, metrics, self.gradients()

    def gradients(self) -> dict[str, Tensor]:
        """Gradients by name; zeros where none arrived."""
        return {n: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for n, p in self.trained().items()}


def update(name: str, micro: int | None, count: int = len(LENGTHS)) -> tuple[StepResult, dict[str, Tensor]]:
    """One step of plain gradient descent at rate 1; what it reported and how far every tensor moved."""
    case = Case(name, micro=micro)
    model, objective = case.model, case.objective
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(case.trained().values(), lr=1.0)
    runtime = Runtime.start(RuntimeSection(device="cpu"))
    run: Any = SimpleNamespace(objective=objective, runtime=runtime, model=model, optim=SimpleNamespace(clip=None))
    context = StepContext(
        0, 1, 1.0, 0, Path(), model, case.roles.stack, optimizer, objective, case.roles, runtime,
        lambda micros: Run.total_weight(run, micros), lambda: Run.clip(run),
    )  # fmt: skip
    micros = case.micros(case.rows[:count])
    assert micro is None or objective.whole_step or len(micros) >= count // micro
    result = backprop(context, micros)
    return result, {n: p.detach() - before[n] for n, p in model.named_parameters()}
