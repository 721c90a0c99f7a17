"""The rows of a run, by split, and whether its model can read rows as long as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from llmrecipe.core.errors import DataError, RecipeError
from llmrecipe.core.key_reads import refuse_unread
from llmrecipe.core.registry import names, spec
from llmrecipe.core.tasks import Tasks, common
from llmrecipe.data import prepare
from llmrecipe.data.features.read_file import FeatureReader
from llmrecipe.data.overlap import shared_rows
from llmrecipe.data.prepare import SplitRows
from llmrecipe.data.token_data import TokenData
from llmrecipe.data.token_report import HIGHEST
from llmrecipe.data.tokenize.row_type import row_type
from llmrecipe.methods._base.method import Wrapper
from llmrecipe.models import positions
from llmrecipe.models.image_processor import load_processor
from llmrecipe.models.load import load_config, skeleton
from llmrecipe.models.resolve_class import CLASSIFIERS, LANGUAGE, own_order
from llmrecipe.models.vocabulary import vocabulary_size
from llmrecipe.recipe.data_section import DataSection
from llmrecipe.recipe.provenance import Origins, leaves
from llmrecipe.recipe.schema import EvalSection, Recipe
from llmrecipe.recipe.yaml_file import dotted
from llmrecipe.runs import delta, open_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmrecipe.objectives.base import Objective


GENERAL_ROWS, GENERAL_MASK = "dialogue", "assistant"
"""Row type and loss mask of the general sets: of plain text every token is a target, of conversations the answers."""


def tasks_of(objective: Objective, wrappers: list[Wrapper], saved: delta.SavedStack | None) -> Tasks | None:
    """Return the tasks that a stack, the stacks of the runs below it, or an objective keep separate; None where nothing does.

    Raises:
        DataError: two of them keep different tasks separate.
    """
    mounted = [delta.build_wrapper(n, m) for layer in (saved.layers if saved else []) for n, m in layer.wrappers.items()]
    named = [(f"{w.name} of model.path", w) for w in mounted] + [(w.name, w) for w in wrappers]
    return common([(name, tasks) for name, w in named if (tasks := w.mixes()) is not None]) or objective.tasks()


def feature_reader(recipe: Recipe, objective: Objective) -> FeatureReader | None:
    """Return how the files that rows name are read; None for objectives whose rows name none.

    Raises:
        ModelError: the recipe names no image processor that exists.
    """
    if not row_type(objective.rows).reads_files:
        return None
    base, _, folder = open_model.resolve_section(recipe.model, tensors=False)
    config = load_config(base)
    processor = load_processor(base, recipe.processor, config, folder)
    return FeatureReader(
        processor, processor.fingerprint, partial(objective.slots, config), processor.save, processor.mode,
        recipe.data.max_pixels, recipe.data.max_unpacked,
    )  # fmt: skip


def read_data(recipe: Recipe, objective: Objective, wrappers: list[Wrapper]) -> tuple[Any, Any, list[str] | None]:
    """Read training rows, validation rows (or None) and, for labelled rows, the label names.

    Raises:
        DataError: there are no training rows, or rows that cannot be used.
    """
    tokenizer = open_model.tokenizer_of(recipe.model, recipe.tokenizer)
    mask = objective.loss_mask()
    tasks = tasks_of(objective, wrappers, open_model.resolve_section(recipe.model)[1])
    needs = objective.columns()
    reader = feature_reader(recipe, objective)
    data = prepare(
        recipe.data, tokenizer, objective.rows, mask=mask, split="train", seed=recipe.seed,
        label_map=objective.label_names(), tasks=tasks, needs=needs, reader=reader,
    )  # fmt: skip
    assert data is not None, "only validation and test rows may be absent"
    note_unread(data, objective)
    names = objective.label_names()
    if isinstance(data, TokenData) and data.labels and names is None and _has_outputs(objective):
        # A checkpoint that has these labels has learned them under its own numbers.
        base, _, _ = open_model.resolve_section(recipe.model, tensors=False)
        data.number_labels(own_order(load_config(base), data.labels) or data.labels)
    labels = data.labels or names
    validation = prepare(
        recipe.data, tokenizer, objective.rows, mask=mask, split="validation", seed=recipe.seed, label_map=labels,
        tasks=other_tasks(data), needs=needs, reader=reader,
    )  # fmt: skip
    if isinstance(data, TokenData) and isinstance(validation, TokenData):
        data.report.overlap, data.report.compared = shared_rows(data, validation), len(validation)
    general_rows(recipe, objective)
    check_forgetting(recipe.eval, validation)
    for wrapper in wrappers:
        if (path := wrapper.calibration_data()) is not None:
            with _of_key(f"stack.{wrapper.name}.data"):
                other_rows(recipe, objective, path, labels)
    return data, validation, labels


def note_unread(data: SplitRows, objective: Objective) -> None:
    """Add the columns that the rows have and the objective does not read to those of the report that nothing reads."""
    held = [name for name in objective.unread() if any(value is not None for value in data.column(name))]
    data.report.unused += [data.report.mapping.get(name, name) for name in held]


def _has_outputs(objective: Objective) -> bool:
    """Return whether the model has an output for each label of the rows."""
    return objective.answers_labels or objective.model_head() in CLASSIFIERS


TOKEN_COLUMNS = {"ids_b": "a second text"}
"""Column of token rows -> what rows of a file have in its place."""


def check_forgetting(section: EvalSection, validation: SplitRows | None) -> None:
    """Refuse to measure forgetting during training without sets, or without evaluations at which it is measured.

    Raises:
        RecipeError: it names the key.
    """
    wanted = {"forgetting_curve": section.forgetting_curve, "forgetting_limit": section.forgetting_limit is not None}
    key = next((f"eval.{name}" for name, is_given in wanted.items() if is_given), None)
    if key is None:
        return
    if not section.forgetting:
        raise RecipeError(f"{key}: there is no general set; name one, such as eval.forgetting.own=held_out.jsonl")
    if section.every is None or validation is None:
        missing = "set eval.every=STEPS" if section.every is None else "give validation rows, such as data.validation=0.1"
        raise RecipeError(f"{key}: forgetting is measured at the evaluations during training, and there are none; {missing}")


def check_monitor(recipe: Recipe, objective: Objective, validation: SplitRows | None, origins: Origins) -> None:
    """Refuse to watch what no evaluation computes: without validation rows, between evaluations, or from a column they lack.

    Args:
        origins: what set each value; a recipe may name a metric for validation rows that the user's own data do not have.

    Raises:
        RecipeError: it names the key.
    """
    origin = origins.get(("eval", "monitor"))
    chosen = origin is not None and origin.kind == "override" and recipe.eval.monitor != EvalSection().monitor
    wanted = [name for name, is_given in (("patience", recipe.eval.patience is not None), ("monitor", chosen)) if is_given]
    if validation is None and wanted:
        raise RecipeError(
            f"eval.{wanted[0]}: there are no validation rows, so that nothing is ever evaluated; set data.validation=FILE or a "
            "share such as data.validation=0.1, or leave the key out"
        )
    if recipe.eval.patience is not None and recipe.eval.every is None:
        raise RecipeError(
            "eval.patience: evaluations are at the start and the end alone, so that none can stop the run; set eval.every=STEPS"
        )
    metric = recipe.eval.monitor.removeprefix("eval/")
    column = objective.measured_columns().get(metric)
    if column is None or not isinstance(validation, TokenData):
        return
    if any(value is not None and value != [] for value in validation.column(column)):
        return
    what = TOKEN_COLUMNS.get(column, f"the column '{column}'")
    raise RecipeError(
        f"eval.monitor: eval/{metric} is computed from {what}, which no row of {validation.report.source} has; "
        "add it to the validation rows, or watch another metric, such as eval.monitor=eval/loss"
    )


def general_rows(recipe: Recipe, objective: Objective) -> dict[str, TokenData]:
    """Return the rows of each set of `eval.forgetting`: the validation rows of a folder that has some, else all rows.

    Raises:
        RecipeError: the objective's model predicts no tokens.
        DataError: a set has no rows, or they cannot be used.
    """
    sets = recipe.eval.forgetting
    if sets and objective.model_head() not in ("causal", "seq2seq"):
        raise RecipeError(
            f"eval.forgetting: it scores texts by their next tokens, and this objective trains a {objective.model_head()} "
            "head; use an objective such as sft, clm or dpo, or leave the key out"
        )
    found: dict[str, TokenData] = {}
    for name, path in sets.items():
        section = _section_of(recipe, path)
        tokenizer = open_model.tokenizer_of(recipe.model, recipe.tokenizer)
        for split in ("validation", "train"):
            rows = prepare(section, tokenizer, GENERAL_ROWS, mask=GENERAL_MASK, split=split, seed=recipe.seed)
            if isinstance(rows, TokenData):
                found[name] = rows
                break
    return found


def _section_of(recipe: Recipe, path: str) -> DataSection:
    """Return the recipe's section for all rows of another place, in whatever format they are."""
    return recipe.data.model_copy(
        update={
            "path": path, "format": "auto", "columns": {}, "validation": None, "test": None, "limit": None,
            "streaming": False, "blocks": False, "system": None,
        }
    )  # fmt: skip


def other_rows(recipe: Recipe, objective: Objective, path: str, labels: list[str] | None) -> SplitRows:
    """Return the training rows of another place, read as the objective reads the run's own.

    Raises:
        DataError: there are none, or they cannot be used.
    """
    rows = prepare(
        _section_of(recipe, path), open_model.tokenizer_of(recipe.model, recipe.tokenizer), objective.rows,
        mask=objective.loss_mask(), split="train", seed=recipe.seed, label_map=labels, needs=objective.columns(),
        reader=feature_reader(recipe, objective),
    )  # fmt: skip
    assert rows is not None, "only validation and test rows may be absent"
    return rows


@contextlib.contextmanager
def _of_key(key: str) -> Iterator[None]:
    """Begin errors of data with the key that names them."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{key}: {error}") from error


def test_rows(recipe: Recipe, objective: Objective, data: SplitRows, tokenizer: PreTrainedTokenizerBase) -> SplitRows | None:
    """Return the test split, or None: for its reference scores before step 0 and its single evaluation after the last."""
    if not recipe.eval.test:
        return None
    mask = objective.loss_mask()
    return prepare(
        recipe.data, tokenizer, objective.rows, mask=mask, split="test", seed=recipe.seed,
        label_map=getattr(data, "labels", None), unseal=True, tasks=other_tasks(data), needs=objective.columns(),
        reader=data.reader,
    )  # fmt: skip


def check_sections(recipe: Recipe) -> None:
    """Refuse whatever stands below `roles`, a section that nothing reads: components name the models they need themselves.

    Raises:
        ProofError: it holds a key.
    """
    refuse_unread(dotted(key) for key, _ in leaves({"roles": recipe.roles}) if len(key) > 1)


def other_tasks(data: SplitRows) -> Tasks | None:
    """Return the tasks by which the rows of other splits are read."""
    return None if data.tasks is None else data.tasks.of_other_split()


def check_family(recipe: Recipe, objective: Objective) -> None:
    """Refuse, before rows are read, an encoder-decoder whose sides the objective cannot use.

    Raises:
        RecipeError: it trains decoders only, or leaves the encoder nothing to read; or the model has no first decoder token.
    """
    config = load_config(open_model.resolve_section(recipe.model, tensors=False)[0])
    if not config.is_encoder_decoder or objective.model_head() not in ("causal", "seq2seq", "classification", LANGUAGE):
        return
    kind = delta.kind_name(objective)
    if objective.model_head() == "causal" and not objective.encoder_decoders:
        able = ", ".join(name for name in names("objective") if spec("objective", name).facts.get("encoder_decoders"))
        raise RecipeError(
            f"model.path: '{config.model_type}' is an encoder-decoder, and objective={kind} trains decoders only; "
            f"objectives that train both: {able}"
        )
    if objective.loss_mask() == "all" and objective.model_head() != "classification":
        raise RecipeError(
            f"objective.mask: all leaves the encoder of '{config.model_type}' nothing to read; use assistant or completion"
        )
    if getattr(config, "decoder_start_token_id", None) is None:
        raise RecipeError(
            f"model.config.decoder_start_token_id: '{config.model_type}' states no token that its decoder starts with; "
            "give its id (a T5 starts with its padding token)"
        )


def check_model_fits(
    recipe: Recipe, objective: Objective, data: SplitRows, validation: SplitRows | None, labels: list[str] | None
) -> None:
    """Refuse, before weights are read, rows that the model of the recipe cannot read, or labels it was not declared for.

    Raises:
        RecipeError: its vocabulary, its positions or its declared classes are contradicted by the data.
    """
    check_labels(recipe, labels)
    check_vocabulary(recipe, data, validation)
    check_positions(recipe, objective, data, validation)


def check_labels(recipe: Recipe, labels: list[str] | None) -> None:
    """Refuse labels that differ from those a recipe declares in `model.config`.

    Raises:
        RecipeError: other names, or another number of them.
    """
    config = recipe.model.config
    if labels is None:
        return
    if (count := config.get("num_labels")) is not None and int(count) != len(labels):
        raise RecipeError(
            f"model.config.num_labels: {count} is declared, and the data has {len(labels)} ({', '.join(labels[:12])}); "
            "leave the key out, or correct the data"
        )
    if (names := config.get("id2label")) is not None and {str(name) for name in dict(names).values()} != set(labels):
        raise RecipeError(
            f"model.config.id2label: {', '.join(map(str, dict(names).values()))} are declared, and the data has "
            f"{', '.join(labels[:12])}; leave the key out, or correct the data"
        )


def check_vocabulary(recipe: Recipe, data: SplitRows, validation: SplitRows | None) -> None:
    """Refuse token ids, of rows or of special tokens, for which the model has no embedding and none were added on purpose.

    Raises:
        RecipeError: it names the first such place, or the token.
    """
    base, saved, _ = open_model.resolve_section(recipe.model, tensors=False)
    room = getattr(load_config(base).get_text_config(), "vocab_size", None)
    if room is None:
        return
    tokenizer = open_model.tokenizer_of(recipe.model, recipe.tokenizer)
    fresh = recipe.model.init == "random" and "vocab_size" not in recipe.model.config
    if recipe.tokenizer.add_tokens or saved is not None or recipe.model.adapters or fresh:
        room = max(room, vocabulary_size(tokenizer))
    for rows in (data, validation):
        if rows is not None and rows.report.highest >= room:
            where = rows.report.first.get(HIGHEST, rows.report.source)
            raise RecipeError(
                f"{where}: token id {rows.report.highest}, and the model has rows for 0 to "
                f"{room - 1}. These are the ids of another vocabulary (tokenizer.path, or input_ids made with another "
                "tokenizer); tokens that are new on purpose are named by tokenizer.add_tokens"
            )
    for name, token in tokenizer.special_tokens_map.items():
        ids = [tokenizer.convert_tokens_to_ids(one) for one in ([token] if isinstance(token, str) else token)]
        highest = max((i for i in ids if isinstance(i, int)), default=0)
        if highest >= room:
            raise RecipeError(
                f"tokenizer: its {name} {token} has the id {highest}, and the model has rows for 0 to {room - 1}; name "
                f"another (tokenizer.pad_token for padding), or add it on purpose: tokenizer.add_tokens=['{token}']"
            )


def check_positions(recipe: Recipe, objective: Objective, data: SplitRows, validation: SplitRows | None) -> None:
    """Refuse, before weights are read, rows that are longer than a model with learned positions can read.

    Raises:
        RecipeError: it names `data.max_length` and the positions of the model.
    """
    base, _, _ = open_model.resolve_section(recipe.model, tensors=False)
    sampled = getattr(objective, "max_new_tokens", 0) if objective.rows == "prompt" else 0
    stated = positions.stated_positions(load_config(base))
    if stated is None or recipe.data.max_length + sampled <= stated:
        return
    test = test_rows(recipe, objective, data, open_model.tokenizer_of(recipe.model, recipe.tokenizer))
    splits = [rows for rows in (data, validation, test) if rows is not None]
    longest = max(rows.report.longest if isinstance(rows, TokenData) else recipe.data.max_length for rows in splits)
    if longest + sampled <= stated:
        return
    room = positions.learned(skeleton(base, rows_head=objective.model_head()))
    if room is not None and longest + sampled > room:
        answer = f" less the {sampled} of objective.max_new_tokens" if sampled else ""
        raise RecipeError(
            f"data.max_length: {recipe.data.max_length} is more than the {room} positions of the model{answer}, and the "
            f"longest row has {longest} tokens; set data.max_length={max(room - sampled, 1)}"
        )
