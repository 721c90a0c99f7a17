"""A recipe fitted to a file: `llmrecipe new --from-data FILE` reads rows, guesses what they are for, and says why."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrecipe.cli.fitted import Fitted
from llmrecipe.core.errors import DataError, RecipeError, UserError

if TYPE_CHECKING:
    from llmrecipe.data.formats.splits import Part
    from llmrecipe.recipe.data_section import DataSection

USUAL = {
    "preference": ("dpo_lora", "a better and a worse answer to each prompt"),
    "unpaired": ("kto_lora", "single answers, each liked or not"),
    "passages": ("extractive_qa", "questions whose answers are spans of a passage"),
    "tagged": ("token_classification", "a tag for each word"),
    "labelled_images": ("image_classification", "pictures with labels"),
    "pictured_questions": ("vqa", "questions about pictures, with answers"),
    "multimodal": ("caption", "pictures with texts"),
    "text": ("clm", "texts without a question or a label"),
    "dialogue": ("sft_lora", "prompts with answers, or conversations"),
    "labelled": ("classify", "a label for each text"),
    "scored": ("regression", "a number for each text"),
    "structured_text": ("outliers", "texts, some of them marked as outliers"),
    "pairs": ("contrastive", "texts that belong together"),
    "prompt": ("grpo", "prompts without answers"),
    "choices": ("choices", "a prompt with answers to choose from"),
}
"""Row type -> (the recipe that usually trains on it, what the rows are); rows that can be several are the first of them."""
QUESTION = re.compile(r"[\w ,.?'-]{4,60}")
"""A prompt that needs no escaping between double quotes."""
SAMPLE = 20
"""Rows that are looked at to guess what they are."""
MEASURED = 2000
"""Rows whose lengths are counted."""
LENGTHS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384, 32768)
LONGEST = 4096
"""Longest row that is proposed; more is the user's choice."""
WINDOW = 384
"""Longest window of a passage."""


def fit_recipe(
    file: str, name: str, model: str | None, columns: dict[str, str], objective: str | None, stack: list[str] | None
) -> Fitted:
    """Read a file and find out which recipe fits it.

    Args:
        file: as `data.path` takes it.
        model: the model to train; None for that of the recipe that is extended.
        columns: {wanted: column in the file}, where names say too little.
        objective: what to train; None to guess.
        stack: methods; None for those of the recipe that is extended.

    Raises:
        UserError: there is no such file, it holds no rows, or no format fits their columns.
    """
    from llmrecipe.data.formats.detect import check_mapping
    from llmrecipe.data.formats.guess import readings
    from llmrecipe.data.formats.mismatch import objectives_for
    from llmrecipe.data.formats.splits import open_split
    from llmrecipe.recipe.data_section import DataSection

    section = DataSection(path=file, columns=columns)
    part = open_split(section, "train")[0]
    sample = [row for _, row in islice(part.reader.stream(), SAMPLE)]
    if not sample:
        raise DataError(f"{part.reader.name}: there are no rows")
    check_mapping(columns, sample[0], part.reader.name, "text")
    order = [_rows_of(objective)] if objective else _order()
    reading = readings(part, sample, order, columns)[0]
    parent, chosen = _parent(reading.rows, objective)
    format_name = reading.found.name
    others = [o for o in objectives_for(format_name) if o != chosen]
    found = Fitted(name, file, parent, chosen, reading, _count(part), others, model)
    if parent == "base":
        found.choices["objective"] = chosen
    if stack is not None:
        found.choices["stack"] = stack
    found.settings = _settings(found, section, sample)
    _fit_lengths(found, sample)
    return found


def _order() -> list[str]:
    from llmrecipe.core import registry

    return [*USUAL, *(rows for rows in registry.names("row_type") if rows not in USUAL)]


def _rows_of(objective: str) -> str:
    from llmrecipe.core import registry

    spec = registry.spec("objective", objective, "--objective")
    return str(spec.facts.get("rows") or registry.load_class("objective", objective).rows)


def _parent(rows: str, objective: str | None) -> tuple[str, str]:
    """Return the recipe to extend and its objective."""
    from llmrecipe.recipe.compose import compose
    from llmrecipe.recipe.recipe_paths import packaged, recipes_in

    usual = USUAL.get(rows, ("base", ""))[0]
    if objective is None:
        if usual == "base":
            raise DataError(f"these are {rows} rows; say what to train on them: --objective NAME (llmrecipe list objective)")
        return usual, str(compose(usual).recipe.objective["kind"])
    known = {path.stem for path in recipes_in(packaged()).values()}
    for one in (usual, f"{objective}_lora", objective):
        if one in known and compose(one).recipe.objective["kind"] == objective:
            return one, objective
    return "base", objective


def _count(part: Part) -> int:
    return sum(1 for _ in part.reader.stream()) if not hasattr(part.reader, "__len__") else len(part.reader)


def _settings(found: Fitted, section: DataSection, sample: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the recipe sets, without lengths."""
    from llmrecipe.data.formats.splits import has_split
    from llmrecipe.recipe.compose import compose
    from llmrecipe.recipe.recipe_paths import presets

    parent = compose(found.parent).recipe
    fresh = parent.model.init == "random"
    if found.model is not None and fresh:
        raise RecipeError(
            f"--model: recipe={found.parent} makes a model of its own with fresh weights; leave --model out and train with "
            f"model.path={found.model} model.init=pretrained model.config={{}} tokenizer.path=null"
        )
    made: dict[str, Any] = {}
    if found.model is not None and found.model in presets("model"):
        found.choices["model"] = found.model
    elif not fresh:
        made["model"] = {"path": found.model or parent.model.path}
    detected = found.reading.found
    columns = {**section.columns, **detected.aliases}
    made["data"] = {"path": found.file, "format": detected.name, **({"columns": columns} if columns else {})}
    if has_split(section, "validation"):
        found.remarks.append("validation   the folder's own split")
    elif (share := _share(found.rows)) is not None:
        made["data"]["validation"] = share
        found.remarks.append(f"validation   {share:.0%} of the rows are held out and never trained on")
    else:
        found.remarks.append("validation   none: too few rows to hold some out; name a file, data.validation=FILE")
    held = made["data"].get("validation", 0.0)
    if (size := _batch(int(found.rows * (1 - held)), parent.batch.size)) is not None:
        made["batch"] = {"size": size}
        found.remarks.append(f"batch        {size} rows a step, not {parent.batch.size}: an epoch has several steps")
    if found.objective in ("grpo", "rloo", "ppo"):
        made["objective"] = {"reward": _reward(found, sample, columns)}
    if detected.name == "tagged":
        made |= _tag_settings(found, sample, columns)
    return made


def _share(rows: int) -> float | None:
    """Return the share of rows to hold out: a fifth of few, a tenth of more, of many about a thousand rows."""
    if rows < 20:
        return None
    return 0.2 if rows < 200 else 0.1 if rows <= 10_000 else max(round(1000 / rows, 4), 0.0001)


def _batch(rows: int, size: int) -> int | None:
    """Return a smaller batch where an epoch would have fewer than four steps of the parent's."""
    if rows >= 4 * size:
        return None
    fitting = 2
    while fitting * 2 <= min(size, rows // 4):
        fitting *= 2
    return fitting if fitting < size else None


def _reward(found: Fitted, sample: list[dict[str, Any]], columns: dict[str, str]) -> dict[str, Any]:
    """Return a reward for prompts: the answer of the file where there is one, else a stand-in that is said to be one."""
    if "answer" in sample[0] and "answer" not in columns.values():
        found.remarks.append("reward       1 for an answer equal to the column `answer`; others: llmrecipe list reward")
        return {"exact_match": {}}
    found.remarks.append(
        "reward       a stand-in: short answers are preferred. Write what is good for you here: llmrecipe list reward"
    )
    return {"length": {"most": 40, "unit": "words"}}


def _tag_settings(found: Fitted, sample: list[dict[str, Any]], columns: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return names for tags that are numbers, which the file does not have, and the metric of tags that mark no entities."""
    column = next(columns.get(name, name) for name in found.reading.used if "tags" in name)
    tags = [tag for row in sample for tag in row.get(column) or []]
    made: dict[str, dict[str, Any]] = {}
    if numbers := [tag for tag in tags if isinstance(tag, int)]:
        found.remarks.append("tags         numbers in the file; write their names, in their order, in objective.tags")
        made["objective"] = {"tags": [f"tag{number}" for number in range(max(numbers) + 1)]}
    if not any(str(tag).startswith(("B-", "I-")) for tag in tags):
        found.remarks.append("metric       accuracy of words; where the tags mark entities (B-, I-) it is eval/f1")
        made["eval"] = {"monitor": "eval/accuracy", "mode": "max"}
    return made


# --- lengths ------------------------------------------------------------------------------------------------------------


def _fit_lengths(found: Fitted, sample: list[dict[str, Any]]) -> None:
    """Set the chat template and the longest row from the rows as the model's tokenizer sees them, and how it trains on them."""
    from llmrecipe.cli.early_checks import check_model
    from llmrecipe.cli.fitted_training import fit_training
    from llmrecipe.models.checkpoint_path import locate
    from llmrecipe.models.load import load_tokenizer
    from llmrecipe.models.positions import stated_positions
    from llmrecipe.models.resolve_class import load_config
    from llmrecipe.models.weight_headers import stored_parameters
    from llmrecipe.recipe.compose import compose
    from llmrecipe.runs.open_model import own_tokenizer, resolve_section

    recipe = compose(found.parent, found.words()).recipe
    check_model(recipe.model)
    base, _, folder = resolve_section(recipe.model)
    tokenizer = load_tokenizer(base, own_tokenizer(recipe.tokenizer, folder))
    if (template := _template(found, sample, bool(tokenizer.chat_template))) is not None:
        found.settings["tokenizer"] = {"chat_template": template}
    window = min(stated_positions(load_config(base)) or LONGEST, LONGEST)
    lengths = _lengths(found)
    if not lengths:
        return
    shown = "" if len(lengths) >= found.rows else f" (of {len(lengths)} rows)"
    median = sorted(lengths)[len(lengths) // 2]
    counted = found.model or ("tiny" if base.path == "tiny" else recipe.tokenizer.path or base.path)
    line = f"lengths      {min(lengths)} to {max(lengths)} tokens of `{counted}`, median {median}{shown}"
    most = window if found.reading.rows == "text" else min(window, WINDOW) if found.reading.rows == "passages" else None
    longest = most or next((length for length in LENGTHS if length >= max(lengths)), LENGTHS[-1])
    found.settings["data"]["max_length"] = min(longest, window)
    found.remarks.insert(0, line)
    longer = sum(length > window for length in lengths)
    if longer and most is None:
        found.settings["data"]["truncation"] = "keep_start"
        found.remarks.insert(
            1, f"             {longer} of them are longer than {window} and cut at their end (data.truncation)"
        )
    elif longer:
        found.remarks.insert(1, "             longer ones are read in pieces")
    place, local = locate(base.path)
    fit_training(found, recipe, stored_parameters(Path(place)) if local else None, lengths)


def _template(found: Fitted, sample: list[dict[str, Any]], has_own: bool) -> str | None:
    """Return the chat template to name: the model's own; for conversations and a model without one, a built-in one."""
    from llmrecipe.data.formats.data_format import Conversion
    from llmrecipe.data.formats.detect import map_columns

    rows, detected = found.reading.rows, found.reading.found
    if rows not in ("dialogue", "preference", "unpaired", "prompt") or detected.name in ("text", "tokens"):
        return None
    if has_own:
        found.remarks.append("template     the model's own, so that it is trained as it will be used")
        return "own"
    row = map_columns(sample[0], found.settings["data"].get("columns", {}), sample=True)
    made = detected.format.convert(row, Conversion(rows, template=True))[0]
    if "messages" in made or isinstance(made.get("prompt"), list):
        found.remarks.append("template     chatml, because the model has none of its own")
        return "chatml"
    return None


def _lengths(found: Fitted) -> list[int]:
    """Return the length of the longest sequence of each row, of all rows or a drawn part; empty where none can be read."""
    from llmrecipe.cli.data import tokenized_rows
    from llmrecipe.recipe.compose import compose

    words = [*found.words(), f"data.max_length={1 << 20}", f"data.limit={MEASURED}", "data.cache=false", "data.stride=null"]
    words += ["data.truncation=auto", "data.max_dropped=0.99"]
    try:
        rows = tokenized_rows(compose(found.parent, words).recipe, "train")[0]
        return [length for length in (_longest(row) for row in rows) if length]
    except UserError as error:
        found.remarks.append("not trained as it is: " + str(error).split("\n")[0])
        return []


def _longest(row: dict[str, Any]) -> int:
    """Return the length of the longest sequence that a token row makes."""
    if "prompt_ids" in row:
        answers = [len(row[name]) for name in ("completion_ids", "chosen_ids", "rejected_ids") if name in row]
        return len(row["prompt_ids"]) + max([*answers, *row.get("choice_lengths", [])], default=0)
    return max((len(row[name]) for name in ("ids", "ids_a", "ids_b", "ids_c") if row.get(name)), default=0)


def readable(found: Fitted, path: Path) -> str | None:
    """Read the rows as the written recipe does; a held-out share that cannot be used is taken back, with a remark.

    Returns:
        What keeps the training rows from being used as they are, if anything.
    """
    from llmrecipe.cli.data import tokenized_rows
    from llmrecipe.recipe.compose import compose

    few = [f"data.limit={MEASURED}", "data.cache=false"]
    try:
        recipe = compose(path, few).recipe
        rows = len(tokenized_rows(recipe, "train")[0])
    except UserError as error:
        return f"these rows cannot be trained on as they are:\n{error}"
    if found.reading.rows == "dialogue":
        found.question = _question(recipe.data)
    _leave_no_row_alone(found, rows if found.rows <= MEASURED else _training_rows(recipe.data), recipe.batch.size)
    if "validation" in found.settings["data"]:
        try:
            tokenized_rows(compose(path, few).recipe, "validation")
        except UserError as error:
            del found.settings["data"]["validation"]
            reason = str(error).split("\n")[0]
            found.remarks = [line for line in found.remarks if not line.startswith("validation")]
            found.remarks.append(f"validation   none: a share that is drawn by chance cannot be used ({reason})")
    return None


def _question(section: DataSection) -> str | None:
    """Return a short prompt of a training row that stands on a command line as it is; None where there is none."""
    from llmrecipe.data.formats.splits import open_split

    part = open_split(section, "train")[0]
    prompts = (
        row.get(section.columns.get("prompt", "prompt"))
        for _, row in islice(part.reader.stream(), MEASURED)
        if part.chosen(row)
    )
    return next((text for text in prompts if isinstance(text, str) and QUESTION.fullmatch(text)), None)


def _training_rows(section: DataSection) -> int:
    """Return how many rows of a file are left to train on."""
    from llmrecipe.data.formats.splits import open_split

    return sum(part.chosen(row) for part in open_split(section, "train") for _, row in part.reader.stream())


def _leave_no_row_alone(found: Fitted, rows: int, size: int) -> None:
    """Make the batch larger where the last step of an epoch would have one row, and rows are compared with others."""
    fitting = size
    while found.reading.rows in ("unpaired", "pairs") and rows % fitting == 1:
        fitting += 1
    if fitting != size:
        found.settings["batch"] = {"size": fitting}
        found.remarks = [line for line in found.remarks if not line.startswith("batch")]
        found.remarks.append(f"batch        {fitting} rows a step, so that the last step of an epoch has more than one")
