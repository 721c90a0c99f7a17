"""`llmrecipe new --from-data FILE`: what rows are for is guessed, said, and trains as it is written, for every format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llmrecipe.cli.app import run_command
from llmrecipe.cli.data import tokenized_rows
from llmrecipe.cli.fitted import Fitted
from llmrecipe.cli.fitted_recipe import USUAL, _leave_no_row_alone, _tag_settings
from llmrecipe.core import registry
from llmrecipe.data.formats.guess import readings
from llmrecipe.data.formats.splits import open_split
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.data_section import DataSection
from llmrecipe.recipe.yaml_file import read_yaml

ANIMALS = ("hen", "fox", "frog", "cow", "bird", "owl")
PLACES = ("barn", "forest", "river", "farm")


def _ask(i: int) -> str:
    return f"Where does the {ANIMALS[i % 6]} live? It is {i}."


def _say(i: int) -> str:
    return f"The {ANIMALS[i % 6]} lives in the {PLACES[i % 4]}."


def _turns(i: int, user: str = "user", assistant: str = "assistant", who: str = "role", what: str = "content") -> list[Any]:
    return [{who: user, what: _ask(i)}, {who: assistant, what: _say(i)}]


ROWS: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "alpaca": ("sft_lora", lambda i: {"instruction": _ask(i), "input": PLACES[i % 4], "output": _say(i)}),
    "choices": ("choices", lambda i: {"prompt": _ask(i), "completion": _say(i), "options": [_say(i), _say(i + 1)]}),
    "image_label": ("image_classification", lambda i: {"image": f"{i}.png", "label": PLACES[i % 4]}),
    "image_question": ("vqa", lambda i: {"image": f"{i}.png", "question": _ask(i), "answer": PLACES[i % 2]}),
    "image_text": ("caption", lambda i: {"image": f"{i}.png", "text": _say(i)}),
    "labelled": ("classify", lambda i: {"text": _ask(i), "label": PLACES[i % 2]}),
    "labelled_pair": ("classify", lambda i: {"premise": _ask(i), "hypothesis": _say(i), "label": "yes" if i % 2 else "no"}),
    "messages": ("sft_lora", lambda i: {"messages": _turns(i)}),
    "natural_instructions": ("sft_lora", lambda i: {"definition": "Say where.", "inputs": _ask(i), "targets": _say(i)}),
    "outliers": ("outliers", lambda i: {"text": _say(i) + f" {i}.", "outlier": i % 5 == 0}),
    "p3": ("sft_lora", lambda i: {"inputs_pretokenized": _ask(i), "targets_pretokenized": _say(i)}),
    "pairs": ("contrastive", lambda i: {"sentence1": _ask(i), "sentence2": _say(i)}),
    "preference": ("dpo_lora", lambda i: {"prompt": _ask(i), "chosen": _say(i), "rejected": _say(i + 1)}),
    "preference_alpaca": ("dpo_lora", lambda i: {"instruction": _ask(i), "chosen": _say(i), "rejected": _say(i + 1)}),
    "preference_implicit": (
        "dpo_lora",
        lambda i: {"chosen": _turns(i), "rejected": [_turns(i)[0], {"role": "assistant", "content": _say(i + 1)}]},
    ),
    "preference_messages": (
        "dpo_lora",
        lambda i: {"messages": _turns(i)[:1], "chosen": _say(i), "rejected": _say(i + 1)},
    ),
    "prompt": ("grpo", lambda i: {"prompt": _ask(i)}),
    "prompt_completion": ("sft_lora", lambda i: {"prompt": _ask(i), "completion": _say(i)}),
    "scored": ("regression", lambda i: {"text": _ask(i), "score": i % 5}),
    "sharegpt": ("sft_lora", lambda i: {"conversations": _turns(i, "human", "gpt", "from", "value")}),
    "squad": (
        "extractive_qa",
        lambda i: {
            "context": _say(i), "question": _ask(i),
            "answers": {"text": [PLACES[i % 4]], "answer_start": [_say(i).index(PLACES[i % 4])]},
        },
    ),
    "tagged": ("token_classification", lambda i: {"tokens": ["Ann", str(i), "sings"], "ner_tags": [1, 0, 0]}),
    "text": ("clm", lambda i: {"text": _say(i) + " " + _ask(i)}),
    "tokens": ("clm", lambda i: {"input_ids": [5, 9, 12 + i, 2]}),
    "triples": ("contrastive", lambda i: {"anchor": _ask(i), "positive": _say(i), "negative": _say(i + 1)}),
    "unpaired": ("kto_lora", lambda i: {"prompt": _ask(i), "completion": _say(i), "label": i % 2 == 0}),
    "unpaired_alpaca": ("kto_lora", lambda i: {"instruction": _ask(i), "output": _say(i), "label": i % 2 == 0}),
    "unpaired_messages": ("kto_lora", lambda i: {"messages": _turns(i), "label": i % 2 == 0}),
}  # fmt: skip
"""Format -> (the recipe that is extended, row i)."""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_rows(name: str, count: int = 40) -> Path:
    path = Path(f"my_{name}.jsonl")
    path.write_text("".join(json.dumps(ROWS[name][1](i)) + "\n" for i in range(count)), encoding="utf-8")
    if "image" in ROWS[name][1](0):
        for i in range(count):
            Image.new("RGB", (32, 32), (6 * i, 255 - 6 * i, 128)).save(f"{i}.png")
    return path


def test_every_format_is_tried() -> None:
    assert sorted(ROWS) == sorted(registry.names("format"))


def test_the_recipe_follows_from_the_columns() -> None:
    """Every format is recognised among all others by its columns alone, and has a usual recipe."""
    for name, (recipe, row) in ROWS.items():
        rows = [row(i) for i in range(20)]
        (part,) = open_split(DataSection(path=str(write_rows(name, 20))), "train")
        best = readings(part, rows, list(USUAL), {})[0]
        assert (best.found.name, USUAL[best.rows][0]) == (name, recipe)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "prompt_completion")) for n in ROWS])
def test_what_is_written_says_why_and_trains(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["new", "--from-data", str(write_rows(name))]) == 0
    assert "note:" not in capsys.readouterr().out
    text = Path(f"recipes/my_{name}.yaml").read_text(encoding="utf-8")
    recipe = compose(f"my_{name}").recipe
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n") and f"  - /{small(ROWS[name][0])}\n" in text
    assert json.loads(Path("recipes/recipe.schema.json").read_text(encoding="utf-8"))["title"] == "llmrecipe recipe"
    assert f"# objective    {recipe.objective['kind']}, because the rows are {USUAL[_rows_of(name)][1]}" in text
    assert (recipe.data.format, recipe.data.validation) == (name, 0.2)
    assert run_command(["train", f"recipe=my_{name}", "steps=2", "run.dir=run"]) == 0, capsys.readouterr().err
    losses = [e for e in map(json.loads, Path("run/events.jsonl").read_text().splitlines()) if e["event"] == "step"]
    assert len(losses) == 2 and json.loads(Path("run/status.json").read_text())["status"] == "done"


def small(recipe: str) -> str:
    """Return what is extended for the embedded model: every weight of it trains where a larger one would get a LoRA."""
    return "sft" if recipe == "sft_lora" else recipe


def _rows_of(name: str) -> str:
    return next(rows for rows, (recipe, _) in USUAL.items() if recipe == ROWS[name][0])


def test_lengths_hold_every_row_and_no_more_than_needed() -> None:
    """The bound is the smallest step of the ladder that holds the longest row; nine rows hold nothing out, in small steps."""
    assert run_command(["new", "zoo", "--from-data", str(write_rows("prompt_completion", 9))]) == 0
    recipe = compose("zoo").recipe
    rows = tokenized_rows(recipe, "train")[0]
    longest = max(len(row["ids"]) for row in rows)
    assert rows.report.lost == 0 and recipe.tokenizer.chat_template == "own"
    assert recipe.data.max_length == next(n for n in (32, 64, 96, 128) if n >= longest)
    assert (recipe.data.validation, recipe.batch.size) == (None, 2)
    text = Path("recipes/zoo.yaml").read_text(encoding="utf-8")
    assert "# validation   none: too few rows" in text and f'llmrecipe chat RUN --prompt "{_ask(0)}"' in text


def test_numbers_with_places_are_scores_and_whole_numbers_are_classes() -> None:
    for label, rows in (
        (lambda i: i % 3, "labelled"),
        (lambda i: i / 4, "scored"),
        (lambda i: str(i / 4), "scored"),
        (lambda i: 10**400 if i else 0.5, "labelled"),  # no float holds most of them
    ):
        sample = [{"review": f"It is {i}.", "sentiment": label(i)} for i in range(9)]
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sample))
        best = readings(open_split(DataSection(path="rows.jsonl"), "train")[0], sample, list(USUAL), {})[0]
        assert (best.rows, best.found.aliases) == (rows, {"text": "review", "label": "sentiment"})


def test_tags_that_mark_no_entities_are_judged_by_their_words() -> None:
    """Entities (B-, I-) keep the F1 of the recipe; parts of speech and numbers, which get names to write over, do not."""
    for tags, monitor, names in (
        (["B-PER", "O"], None, None),
        (["NOUN", "VERB"], "eval/accuracy", None),
        ([2, 0], "eval/accuracy", ["tag0", "tag1", "tag2"]),
    ):
        found = fitted([{"tokens": ["Ann", "sings"], "ner_tags": tags}])
        made = _tag_settings(found, [{"tokens": ["Ann", "sings"], "ner_tags": tags}], {})
        assert made.get("eval", {}).get("monitor") == monitor and made.get("objective", {}).get("tags") == names


def test_no_row_is_left_alone_where_rows_are_compared() -> None:
    found = fitted([{"prompt": "a", "completion": "b", "label": True}])
    for rows, size, wanted in ((33, 8, 9), (32, 8, None), (73, 8, 10)):
        found.settings = {}
        _leave_no_row_alone(found, rows, size)
        assert found.settings.get("batch", {}).get("size") == wanted


def fitted(rows: list[dict[str, Any]]) -> Fitted:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    best = readings(open_split(DataSection(path="rows.jsonl"), "train")[0], rows, list(USUAL), {})[0]
    return Fitted("rows", "rows.jsonl", USUAL[best.rows][0], "", best, len(rows), [])


@pytest.mark.slow
def test_another_objective_another_model_another_stack(capsys: pytest.CaptureFixture[str]) -> None:
    rows = str(write_rows("preference"))
    words = ["new", "pairs", "--from-data", rows, "--objective", "kto", "--stack", "lora,bitfit", "--model", "./tiny copy"]
    assert run_command(words) == 2 and "tiny copy" in capsys.readouterr().err and not Path("recipes").exists()
    assert run_command([*words[:-1], "tiny"]) == 0
    recipe = compose("pairs").recipe
    assert recipe.objective["kind"] == "kto" and list(recipe.stack) == ["lora", "bitfit"] and recipe.data.format == "preference"
    assert run_command(["new", "plain", "--from-data", rows, "--objective", "hyper_mtf"]) == 0
    assert compose("plain").recipe.objective["kind"] == "hyper_mtf"


def test_columns_are_named_where_their_names_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    Path("odd.csv").write_text("frage,antwort\n" + "".join(f"{_ask(i)},{_say(i)}\n" for i in range(8)))
    assert run_command(["new", "--from-data", "odd.csv"]) == 2
    said = capsys.readouterr().err
    assert "no data format has the columns frage, antwort" in said and "--columns prompt=frage,completion=antwort" in said
    assert run_command(["new", "--from-data", "odd.csv", "--columns", "prompt=frage,completion=antwort"]) == 0
    assert read_yaml(Path("recipes/odd.yaml")).value["data"]["columns"] == {"prompt": "frage", "completion": "antwort"}
    for columns, reason in (("prompt:frage", "write WANTED=YOURS"), ("prompt=frag", "no column 'frag'; did you mean 'frage'?")):
        assert run_command(["new", "again", "--from-data", "odd.csv", "--columns", columns]) == 2
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("missing.jsonl", None, "no such file"),
        ("empty.jsonl", b"", "the file is empty"),
        ("recipe.yaml", b"defaults: [/sft]\n", "recipe.yaml"),
        ("photo.png", b"\x89PNG\r\n\x1a\n\x00\x01", "photo.png"),
        ("numbers.jsonl", b"1\n2\n", "numbers.jsonl"),
        ("broken.jsonl", b'{"prompt": "a", \n', "broken.jsonl"),
        ("table.xlsx", b"PK\x03\x04aaaa", "table.xlsx"),
        ("two.csv", b"question,answer,response\na,b,c\n", "could be any of the columns answer, response"),
    ],
)
def test_what_is_no_data_is_refused_and_nothing_is_written(
    name: str, content: bytes | None, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        Path(name).write_bytes(content)
    assert run_command(["new", "--from-data", name]) == 2
    said = capsys.readouterr().err
    assert reason in said and "bug" not in said and not Path("recipes").exists()


def test_rows_that_cannot_be_trained_as_they_are_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe is written all the same: it is what has to be changed."""
    row = {"messages": [{**turn, "name": "ann"} for turn in _turns(0)]}
    Path("named.jsonl").write_text((json.dumps(row) + "\n") * 4)
    assert run_command(["new", "--from-data", "named.jsonl"]) == 0
    assert "has no place for 'name'" in capsys.readouterr().out and Path("recipes/named.yaml").exists()


def test_names_of_packaged_recipes_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows("text").rename("sft.jsonl")
    assert run_command(["new", "--from-data", "sft.jsonl"]) == 0 and Path("recipes/sft_rows.yaml").exists()
    for words, reason in (
        (["new", "method", "mine", "--from-data", "sft.jsonl"], "writes a recipe"),
        (["new", "mine", "--model", "tiny"], "belongs to --from-data"),
        (["new"], "name the recipe"),
        (["new", "mine", "--from-data", "sft.jsonl", "--extends", "sft"], "follows from the rows"),
    ):
        assert run_command(words) == 2 and reason in capsys.readouterr().err
