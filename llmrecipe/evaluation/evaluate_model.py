"""Evaluation of a finished run or a plain model, outside of training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.utils import logging

from llmrecipe.core import registry
from llmrecipe.core.console import say, say_aside
from llmrecipe.core.device_profile import use
from llmrecipe.core.errors import DataError
from llmrecipe.core.tasks import Tasks
from llmrecipe.data import prepare
from llmrecipe.data.prepare import Rows
from llmrecipe.data.streaming import StreamedRows
from llmrecipe.data.token_data import TokenData
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.packing import micro_tokens, packing_for
from llmrecipe.engine.role_models import Roles
from llmrecipe.evaluation.eval_recipe import recipe_of
from llmrecipe.interop.multi_adapter import mounted_tasks
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models.checkpoint_path import run_folder
from llmrecipe.models.load import load_tokenizer
from llmrecipe.models.resolve_class import CLASSIFIERS
from llmrecipe.recipe.compose import Composition, compose
from llmrecipe.recipe.profile_keys import check_device, profile_for
from llmrecipe.recipe.schema import Recipe
from llmrecipe.recipe.validate import instantiate
from llmrecipe.runs.looks import note_look
from llmrecipe.runs.open_model import LoadedModel, open_model, resolve_section
from llmrecipe.runtime.processes import Runtime, pick_device
from llmrecipe.training.evaluate import Evaluation, evaluate, rows_read
from llmrecipe.training.read_rows import feature_reader
from llmrecipe.training.run_profile import finished_profile


@dataclass
class Subject:
    """A model to be evaluated, with the recipe that names the data."""

    composition: Composition
    loaded: LoadedModel
    roles: Roles
    objective: Any
    runtime: Runtime


def open_subject(path: str, overrides: list[str]) -> Subject:
    """Open a run directory or a model for evaluation or chat.

    Raises:
        UserError: the path, the recipe or the weights do not fit.
    """
    logging.disable_progress_bar()
    composition = recipe_of(path, overrides)
    options = chosen_again(composition) if run_folder(path) is not None else {}
    recipe = composition.recipe
    objective = instantiate(recipe).objective
    objective.read_folder(recipe.model)
    device = pick_device(recipe.runtime.device)
    if composition.origins[("runtime", "decoding")].kind == "override":
        check_device(recipe, device)
    model = open_model(
        recipe.model, recipe.tokenizer, head=objective.model_head(), seed=recipe.seed, options=options, device=device
    )
    return subject_of(composition, model)


def subject_of(composition: Composition, loaded: LoadedModel) -> Subject:
    """Combine a loaded model with a recipe's objective and data."""
    # The run's stack is part of the model it left; nothing is stacked on top of it here.
    composition = dataclasses.replace(composition, recipe=composition.recipe.model_copy(update={"stack": {}}))
    recipe = composition.recipe
    parts = instantiate(recipe)
    parts.objective.read_folder(recipe.model)
    runtime = Runtime.start(recipe.runtime)
    use(profile_for(recipe, runtime.device, finished_profile(recipe.model.path)))
    loaded.model.to(runtime.device)
    stack = Stack([])
    engine = Engine(loaded.model).eval()
    roles = Roles(
        engine, stack, loaded.tokenizer, runtime.device, packing_for(recipe.data.packing, engine, runtime.device),
        recipe.batch.micro, recipe.batch.tokens or micro_tokens(runtime.device),
    )  # fmt: skip
    roles.seed, roles.max_length = recipe.seed, recipe.data.max_length
    roles.reference_off = stepped_aside(loaded, parts.objective.reference_of())
    return Subject(composition, loaded, roles, parts.objective, runtime)


def stepped_aside(loaded: LoadedModel, reference: str) -> frozenset[str]:
    """Return the mounted wrappers that the reference disables: the run's own where it was the policy of step 0, or all."""
    own = f"mounted{len(loaded.layers) - 1}_" if reference == "initial" else "mounted"
    return frozenset(w.name for w in loaded.mounted if reference in ("initial", "base") and w.name.startswith(own))


def check_subject(path: str, overrides: list[str]) -> Composition:
    """Return the recipe of an evaluation, after checking everything about the model except its weights.

    Raises:
        UserError: the path, the recipe or the tokenizer.
    """
    composition = recipe_of(path, overrides)
    base, _, _ = resolve_section(composition.recipe.model)
    load_tokenizer(base, composition.recipe.tokenizer)
    return composition


def chosen_again(composition: Composition) -> dict[str, dict[str, Any]]:
    """Return the options of the run's stack that the overrides set again after training (`stack.dylora.rank=2`)."""
    found = {}
    for name, mapping in composition.recipe.stack.items():
        free = registry.load_class("stack", mapping["kind"]).adjustable
        found[name] = {option: mapping[option] for option in free if option in mapping}
    return found


def evaluate_path(path: str, overrides: list[str], split: str = "validation") -> dict[str, float]:
    """Compute metrics of a run or model on a split of the data that its recipe (or the overrides) names.

    Raises:
        DataError: there is no such split.
    """
    subject = open_subject(path, overrides)
    share = subject.composition.recipe.data.validation
    if split == "validation" and isinstance(share, float) and any(word.startswith("data.path=") for word in overrides):
        say_aside(
            f"scored: the {share:.0%} of data.path that data.validation holds out; data.validation=FILE scores a whole file"
        )
    return score_subject(subject, split)


def score_subject(subject: Subject, split: str = "validation") -> dict[str, float]:
    """Compute metrics of a loaded run or model; see `evaluate_path`."""
    return metrics_of(subject, token_rows(subject, split, subject_tasks(subject)))


def subject_tasks(subject: Subject) -> Tasks | None:
    """Return the tasks that what is mounted on a model, or its objective, keeps apart; None where neither does."""
    return mounted_tasks(subject.loaded.mounted) or subject.objective.tasks()


def token_rows(subject: Subject, split: str, tasks: Tasks | None) -> TokenData | StreamedRows:
    """Read token rows of a split of the data that a subject's recipe names.

    Raises:
        DataError: there is no such split.
    """
    recipe = subject.composition.recipe
    names = _label_names(subject)
    mask = subject.objective.loss_mask()
    data = prepare(
        recipe.data, subject.loaded.tokenizer, subject.objective.rows, mask=mask, split=split, seed=recipe.seed,
        label_map=names, unseal=split == "test", tasks=tasks, needs=subject.objective.columns(),
        reader=feature_reader(recipe, subject.objective),
    )  # fmt: skip
    if data is None:
        raise DataError(f"data: {recipe.data.path} has no {split} split; name one with data.{split}=FILE or a share")
    if split == "test":
        _note_look(recipe)
    return data


def _note_look(recipe: Recipe) -> None:
    """Add a look at the test split to those of the run that is scored, if these are the rows of its own recipe."""
    final = run_folder(recipe.model.path)
    if final is None or not (final.parent / "recipe.yaml").is_file():
        return
    own = compose(final.parent / "recipe.yaml", [], foreign=True).recipe.data
    if (own.path, own.test) != (recipe.data.path, recipe.data.test):
        return
    try:
        count = note_look(final.parent, "eval")
    except OSError as error:
        say_aside(f"{final.parent} cannot keep count of the looks at its test split ({error.strerror or error})")
        return
    if count > 1:
        say_aside(
            f"look {count} at the test split of {final.parent}: a choice made by it fits these rows too; validation decides"
        )


def _label_names(subject: Subject) -> list[str] | None:
    """Return the names of the labels a model was trained on, in the order of its outputs; None where it has none for them."""
    objective, loaded = subject.objective, subject.loaded
    if objective.answers_labels and loaded.labels:
        return loaded.labels
    if not (objective.answers_labels or objective.model_head() in CLASSIFIERS):
        return None
    labels = getattr(loaded.model.config, "label2id", None) or {}
    return sorted(labels, key=labels.__getitem__) or None


def metrics_of(subject: Subject, data: Rows, drawn: dict[str, np.ndarray] | None = None) -> dict[str, float]:
    """Compute metrics of token rows.

    Args:
        drawn: filled with each score of every sample of rows, where they are wanted.
    """
    recipe = subject.composition.recipe
    evaluation = Evaluation(
        recipe.eval,
        recipe.batch.size,
        subject.objective,
        subject.roles,
        subject.runtime,
        _Silent(),
        samples=recipe.eval.bootstrap,
        drawn=drawn,
    )
    return {"rows": float(rows_read(evaluation, data)), **evaluate(evaluation, data)}


class _Silent:
    """Events of an evaluation outside a run: samples and warnings are printed, nothing is written."""

    def warning(self, message: str, *, once: bool = False) -> None:
        """Print a warning, on stderr."""
        say_aside(f"warning: {message}")

    def sample(self, step: int, prompt: str, answer: str, **facts: object) -> None:
        """Print one answer."""
        say(f"{prompt!r} -> {answer!r}")
