"""The rows of a run, by split, and whether its model can read rows as long as they are."""

from __future__ import annotations

from typing import Any

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.tasks import Tasks, common
from llmrecipe.data.prepare import TokenData
from llmrecipe.methods._base.method import Wrapper
from llmrecipe.runs import delta, open_model


def tasks_of(wrappers: list[Wrapper], saved: delta.SavedStack | None) -> Tasks | None:
    """Return the tasks that a stack, and the stacks of the runs below it, keep separate; None where no method does.

    Raises:
        DataError: two of them keep different tasks separate.
    """
    mounted = [delta.build_wrapper(n, m) for layer in (saved.layers if saved else []) for n, m in layer.wrappers.items()]
    named = [(f"{w.name} of model.path", w) for w in mounted] + [(w.name, w) for w in wrappers]
    return common([(name, tasks) for name, w in named if (tasks := w.mixes()) is not None])


def read_data(recipe: Any, objective: Any, wrappers: list[Wrapper]) -> tuple[Any, Any, list[str] | None]:
    """Read training rows, validation rows (or None) and, for labelled rows, the label names.

    Raises:
        DataError: there are no training rows, or rows that cannot be used.
    """
    from llmrecipe.data import prepare

    tokenizer = open_model.tokenizer_of(recipe.model, recipe.tokenizer)
    mask = objective.loss_mask()
    tasks = tasks_of(wrappers, open_model.resolve_section(recipe.model)[1])
    needs = objective.columns()
    data = prepare(recipe.data, tokenizer, objective.rows, mask=mask, split="train", seed=recipe.seed, tasks=tasks, needs=needs)
    assert data is not None, "only validation and test rows may be absent"
    labels = data.labels
    validation = prepare(
        recipe.data, tokenizer, objective.rows, mask=mask, split="validation", seed=recipe.seed, label_map=labels,
        tasks=data.tasks, needs=needs,
    )  # fmt: skip
    return data, validation, labels


def test_rows(recipe: Any, objective: Any, data: Any, tokenizer: Any) -> Any:
    """Return the test split, or None: for its reference scores before step 0 and its single evaluation after the last."""
    from llmrecipe.data import prepare

    if not recipe.eval.test:
        return None
    mask = objective.loss_mask()
    return prepare(
        recipe.data, tokenizer, objective.rows, mask=mask, split="test", seed=recipe.seed,
        label_map=getattr(data, "labels", None), unseal=True, tasks=data.tasks, needs=objective.columns(),
    )  # fmt: skip


def check_positions(recipe: Any, objective: Any, data: Any, validation: Any) -> None:
    """Refuse, before weights are read, rows that are longer than a model with learned positions can read.

    Raises:
        RecipeError: it names `data.max_length` and the positions of the model.
    """
    from llmrecipe.models import positions
    from llmrecipe.models.load import load_config, skeleton

    base, _, _ = open_model.resolve_section(recipe.model)
    sampled = getattr(objective, "max_new_tokens", 0) if objective.rows == "prompt" else 0
    stated = positions.stated_positions(load_config(base))
    if stated is None or recipe.data.max_length + sampled <= stated:
        return
    test = test_rows(recipe, objective, data, open_model.tokenizer_of(recipe.model, recipe.tokenizer))
    splits = [rows for rows in (data, validation, test) if rows is not None]
    longest = max(rows.report.longest if isinstance(rows, TokenData) else recipe.data.max_length for rows in splits)
    if longest + sampled <= stated:
        return
    room = positions.learned(skeleton(base, rows_head=objective.head))
    if room is not None and longest + sampled > room:
        answer = f" less the {sampled} of objective.max_new_tokens" if sampled else ""
        raise RecipeError(
            f"data.max_length: {recipe.data.max_length} is more than the {room} positions of the model{answer}, and the "
            f"longest row has {longest} tokens; set data.max_length={max(room - sampled, 1)}"
        )
