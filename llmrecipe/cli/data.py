"""`llmrecipe data`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmrecipe.cli.arguments import ConfigDir, Json, Quiet, Verbose, Words, need_recipe, sort_words, tell
from llmrecipe.core.console import print_json
from llmrecipe.core.errors import RecipeError
from llmrecipe.core.printable import printable

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

    from llmrecipe.data.token_data import TokenData
    from llmrecipe.recipe.schema import Recipe

PANEL = "Look"
ORDER = 4
TRAINED, MASKED, PAD = "bold green", "dim", "dim red"


def verb(
    words: Words = None,
    rows: Annotated[int, typer.Option("--rows", "-n", min=0, help="How many rows to print.")] = 3,
    start: Annotated[int, typer.Option("--start", min=0, help="First row to print.")] = 0,
    split: Annotated[str, typer.Option("--split", help="train or validation; the test split stays sealed.")] = "train",
    each: Annotated[bool, typer.Option("--tokens", help="Separate tokens with a bar.")] = False,
    config_dir: ConfigDir = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Show rows as the model sees them: trained and masked tokens, template, truncation and end tokens."""
    request = sort_words(words)
    recipe = need_recipe(request, "data")
    from llmrecipe.cli.early_checks import check_files
    from llmrecipe.recipe.compose import compose

    composition = compose(recipe, request.overrides)
    if composition.recipe.stages:
        stages = ", ".join(composition.recipe.stages)
        raise RecipeError(f"recipe={recipe} is a pipeline of {stages}; look at the recipe of one of its stages")
    tell(composition.notes)
    check_files(composition.recipe)
    data, tokenizer, mask = tokenized_rows(composition.recipe, split)
    from llmrecipe.data import preview, validation

    shown = [data[i] for i in range(start, min(start + rows, len(data)))]
    facts = preview.length_facts(data, composition.recipe.batch.size, composition.recipe.seed)
    warnings = validation.warnings(data.report)
    if as_json:
        print_json(
            {
                "recipe": composition.name,
                "split": split,
                "mask": mask,
                "key": data.key,
                "report": data.report.to_dict(),
                "lengths": facts,
                "labels": data.labels,
                "tasks": data.tasks and list(data.tasks.names or ()),
                "warnings": warnings,
                "rows": [preview.row_facts(row, tokenizer) for row in shown],
            }
        )
        return
    _print(data, tokenizer, shown, facts, each, composition.recipe)
    tell(warnings)


def tokenized_rows(recipe: Recipe, split: str) -> tuple[TokenData, Any, str]:
    """Return the rows of a split, the tokenizer and the mask in use; class names come from the training rows."""
    from llmrecipe.core import registry
    from llmrecipe.core.errors import DataError
    from llmrecipe.data import TokenData, prepare
    from llmrecipe.data.tokenize.row_type import row_type
    from llmrecipe.models.load import load_tokenizer
    from llmrecipe.recipe.validate import instantiate
    from llmrecipe.runs.open_model import own_tokenizer, resolve_section
    from llmrecipe.training.read_rows import feature_reader, note_unread, other_tasks, tasks_of

    kind = str(recipe.objective["kind"])
    spec = registry.spec("objective", kind, "objective.kind")
    rows = spec.facts.get("rows") or registry.load_class("objective", kind).rows
    default = spec.options["mask"].default if "mask" in spec.options else spec.facts.get("mask")
    mask = recipe.objective.get("mask") or default or "completion"
    base, saved, folder = resolve_section(recipe.model)
    tokenizer = load_tokenizer(base, own_tokenizer(recipe.tokenizer, folder))
    whole = recipe.data.model_copy(update={"streaming": False})
    labels = None
    parts = instantiate(recipe)
    tasks = tasks_of(parts.objective, parts.wrappers, saved)
    if split != "train" and (row_type(rows).numbered or (tasks is not None and tasks.names is None)):
        training = prepare(whole, tokenizer, rows, mask=mask, split="train", seed=recipe.seed, tasks=tasks)
        if training is not None:
            labels, tasks = training.labels, other_tasks(training)
    data = prepare(
        whole, tokenizer, rows, mask=mask, split=split, seed=recipe.seed, label_map=labels, tasks=tasks,
        needs=parts.objective.columns(), reader=feature_reader(recipe, parts.objective),
    )  # fmt: skip
    if not isinstance(data, TokenData):
        raise DataError(f"this recipe has no {split} split; set data.{split} to a file or a share")
    note_unread(data, parts.objective)
    return data, tokenizer, mask


def _print(
    data: TokenData,
    tokenizer: PreTrainedTokenizerBase,
    shown: list[dict[str, Any]],
    facts: dict[str, float],
    each: bool,
    recipe: Recipe,
) -> None:
    from rich.text import Text

    from llmrecipe.core.console import console

    out = console()
    colour = out.is_terminal
    for line in map(printable, data.report.lines()):
        key, _, rest = line.partition(": ")
        out.print(Text.assemble((f"{key}: ", "bold"), rest) if not line.startswith(" ") else Text(line))
    out.print(
        Text.assemble(
            ("lengths: ", "bold"),
            f"{facts['shortest']:.0f} to {facts['longest']:.0f}, median {facts['median']:.0f}, 95 % under {facts['p95']:.0f}; "
            f"padding of random batches of {recipe.batch.size} if they were padded: {facts['padding_if_padded']:.0%}",
        )
    )
    if shown:
        legend = [("trained", TRAINED), " ", ("masked", MASKED)] if colour else ["«trained» masked"]
        out.print(Text.assemble(("\nrows: ", "bold"), *legend))
    longest = max((sum(len(v) for k, v in row.items() if k.endswith("ids")) for row in shown), default=0)
    for row in shown:
        out.print(_row_text(row, tokenizer, each, colour, longest if recipe.data.packing == "off" else 0))


def _row_text(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, each: bool, colour: bool, longest: int) -> Text:
    """Format one row as coloured text; without colours trained text is enclosed in « and »."""
    from rich.text import Text

    from llmrecipe.data import preview
    from llmrecipe.data.features.table import Features

    text = Text(f"\n[{row['row']}] ", "bold")
    text.append(f"source row {row['source_row']}", "dim")
    for name in ("label", "score", "margin", "columns"):
        if name in row:
            text.append(printable(f"  {name}: {row[name]}"), "cyan")
    if isinstance(row.get("features"), Features):
        shape = " x ".join(map(str, row["features"].shape))
        text.append(printable(f"  {row['features'].path} ({shape})"), "cyan")
    tokens = 0
    for name, parts in preview.pieces(row, tokenizer, each).items():
        text.append("\n" if name == "ids" else f"\n{name.removesuffix('_ids').removeprefix('ids_')}: ", "bold")
        for n, piece in enumerate(parts):
            tokens += len(piece.ids)
            if each and n:
                text.append("|", "red")
            opened = piece.trained and not colour and not each
            shown = printable(f"«{piece.text}»" if opened else piece.text)
            text.append(shown, TRAINED if piece.trained else MASKED)
    if longest > tokens:
        text.append(f" [pad x {longest - tokens}]", PAD)
    return text
