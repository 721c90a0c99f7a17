"""Model cards: what was trained from what, how, and what it scored; with the front matter that the Hugging Face hub reads.

A card names no place of this machine: a base or a data set that is a folder is named by its last part, and only hub ids stand
in the front matter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData, try_to_load_from_cache

from llmrecipe.core.redact import redact_text
from llmrecipe.core.score_intervals import shown, with_ends
from llmrecipe.models.checkpoint_path import HUB_NAME
from llmrecipe.recipe.yaml_file import load_bounded

TASKS = {
    "causal": "text-generation",
    "seq2seq": "text-generation",
    "classification": "text-classification",
    "token_classification": "token-classification",
    "masked": "fill-mask",
    "image_classification": "image-classification",
    "question_answering": "question-answering",
}
"""Head of a model -> the task the hub lists it under."""
CACHED = re.compile(r"models--(?P<id>[^/\\]+)[/\\]snapshots[/\\]")
"""A snapshot in the cache of the hub's library; its folder is named after the model, with -- in the place of the slash."""
SPLITS = {"eval": "validation", "test": "test"}
"""Section of a metric's name -> the split it was measured on."""
USE = "Use it:"


@dataclass(frozen=True)
class CardFacts:
    """What a card says of a run."""

    name: str
    base: str
    """Path or hub name of the base model."""
    objective: str
    methods: list[tuple[str, str]]
    """(name, kind) of each method of the stack; empty where every weight was trained."""
    trained: int
    parameters: int
    data: list[str]
    """Sources of the training rows, as the recipe names them."""
    rows: int
    metrics: Mapping[str, Any]
    head: str = "causal"


def model_card(facts: CardFacts) -> str:
    """Return the card of a run's own folder as Markdown with front matter."""
    methods = ", ".join(f"{name} ({kind})" for name, kind in facts.methods) or "none: every weight was trained"
    values = shown(facts.metrics, lambda value: f"{value:.6g}" if isinstance(value, float) else str(value))
    rows = "\n".join(f"| {name} | {value} |" for name, value in values.items())
    base = hub_id(facts.base) or place_name(facts.base)
    body = (
        f"# {facts.name}\n\n"
        f"Trained with llmrecipe from `{base}`.\n\n"
        f"- objective: {facts.objective}\n"
        f"- stack: {methods}\n"
        f"- trained parameters: {facts.trained:,} of {facts.parameters:,}\n"
        f"- data: {', '.join(map(place_name, facts.data))} ({facts.rows:,} rows)\n"
        f"- steps: {facts.metrics['steps']}\n\n"
        f"| metric | value |\n| --- | --- |\n{rows}\n\n"
        f"{USE}\n\n"
        "```\nllmrecipe chat RUN_DIR\nllmrecipe export RUN_DIR --to merged\n```\n"
    )
    return redact_text(with_front_matter(front_matter(facts), body))


def front_matter(facts: CardFacts) -> ModelCardData:
    """Return the facts that the hub reads."""
    base = hub_id(facts.base)
    datasets = [name for source in facts.data if (name := source.partition(":")[0]) and is_hub_dataset(source)]
    return ModelCardData(
        base_model=base,
        license=base_licence(facts.base),
        library_name="llmrecipe",
        pipeline_tag=TASKS.get(facts.head),
        tags=sorted({"llmrecipe", facts.objective, *(kind for _, kind in facts.methods)}),
        datasets=datasets or None,
        model_name=facts.name,
        eval_results=results_of(facts.metrics, facts.data, TASKS.get(facts.head, "other")) or None,
    )


def results_of(metrics: Mapping[str, Any], data: list[str], task: str) -> list[EvalResult]:
    """Return scores as the hub lists them (model-index): metrics of the validation and the test split, by their values.

    Examples:
        >>> [r.metric_value for r in results_of({"steps": 9, "eval/loss": 0.5}, ["rows.jsonl"], "text-generation")]
        [0.5]
    """
    found = []
    name = ", ".join(map(place_name, data)) or "unknown"
    for metric, (value, _) in with_ends(metrics).items():
        section, _, kind = metric.partition("/")
        if section not in SPLITS or not kind or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        found.append(
            EvalResult(
                task_type=task,
                dataset_type=data[0].partition(":")[0] if data and is_hub_dataset(data[0]) else "custom",
                dataset_name=name,
                dataset_split=SPLITS[section],
                metric_type=kind,
                metric_name=metric,
                metric_value=value,
            )
        )
    return found


def with_front_matter(data: ModelCardData, body: str) -> str:
    """Return a card: the front matter between its lines, then the text."""
    return f"---\n{data.to_yaml()}\n---\n\n{body.lstrip()}"


def hub_id(path: str) -> str | None:
    """Return the hub id of a model: the name itself, or that of a snapshot in the library's cache; None for other folders.

    Examples:
        >>> hub_id("Qwen/Qwen3-0.6B"), hub_id("/home/ann/models--gpt2/snapshots/1a2b3c"), hub_id("./mine")
        ('Qwen/Qwen3-0.6B', 'gpt2', None)
    """
    cached = CACHED.search(f"{path}/")
    if cached:
        return cached["id"].replace("--", "/")
    if path == "tiny" or Path(path).expanduser().exists() or not HUB_NAME.fullmatch(path):
        return None
    return path


def is_hub_dataset(source: str) -> bool:
    """Return whether a source of rows is a data set on the hub: OWNER/NAME, with or without a configuration."""
    name = source.partition(":")[0]
    return "/" in name and HUB_NAME.fullmatch(name) is not None and not Path(name).exists() and not Path(name).suffix


def place_name(source: str) -> str:
    """Return a source as a reader elsewhere may see it: a hub id or a built-in set as it is, a file or folder by its name.

    Examples:
        >>> place_name("/home/ann/rows.jsonl"), place_name("builtin:sft"), place_name("allenai/c4:en")
        ('rows.jsonl', 'builtin:sft', 'allenai/c4:en')
    """
    if source.startswith("builtin:") or is_hub_dataset(source) or HUB_NAME.fullmatch(source):
        return source if not Path(source).exists() else Path(source).name
    return Path(source).expanduser().name or source


def base_licence(path: str) -> str | None:
    """Return the licence that the card in a base model's folder, or in the library's cache, states."""
    card: object = Path(path).expanduser() / "README.md"
    if not Path(path).expanduser().is_dir():
        card = try_to_load_from_cache(path, "README.md") if HUB_NAME.fullmatch(path) else None
    found = read_card(Path(card))[0].get("license") if isinstance(card, str | Path) and Path(card).is_file() else None
    return found if isinstance(found, str) else None


def read_card(card: Path) -> tuple[dict[str, Any], str]:
    """Return the front matter of a card, empty where it has none that can be read, and the text behind it."""
    text = card.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n"):
        return {}, text
    front, closed, _ = text[4:].partition("\n---")
    try:
        found = load_bounded(front) if closed else {}
    except (yaml.YAMLError, ValueError):
        found = {}
    return found if isinstance(found, dict) else {}, text[4:].partition("\n---\n")[2].lstrip()
