"""Every format from every file kind, and errors that teach."""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.core import registry
from llmrecipe.core.errors import DataError
from llmrecipe.data import prepare
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.formats.data_format import Conversion, data_format
from llmrecipe.data.formats.detect import detect
from llmrecipe.data.formats.readers import open_file
from llmrecipe.recipe.data_section import DataSection
from tests.data.toys import byte_tokenizer, turn

U, A, B = turn("user", "u"), turn("assistant", "a"), turn("assistant", "b")
HH = {"chosen": "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: x\n\nAssistant: good", "rejected": "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: x\n\nAssistant: gone"}  # noqa: E501  # fmt: skip
HH_PROMPT = [turn("user", "hi"), turn("assistant", "yo"), turn("user", "x")]
CASES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("text", "text", {"text": "t"}, {"text": "t"}),
    ("dialogue", "messages", {"messages": [U, A]}, {"messages": [U, A]}),
    ("dialogue", "messages", {"conversations": [U, A], "id": 3}, {"messages": [U, A]}),
    (
        "dialogue", "sharegpt", {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}], "system": "s"},  # noqa: E501
        {"messages": [turn("system", "s"), U, A]},
    ),
    (
        "dialogue", "sharegpt",
        {"conversations": [{"from": "user", "value": "u"}, {"from": "chatgpt", "value": "a"}, {"from": "observation", "value": "o"}]},  # noqa: E501
        {"messages": [U, A, turn("tool", "o")]},
    ),
    ("dialogue", "prompt_completion", {"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": "c"}),
    ("dialogue", "prompt_completion", {"prompt": [U], "completion": [A]}, {"prompt": [U], "completion": [A]}),
    ("dialogue", "prompt_completion", {"prompt": [U], "completion": "a"}, {"prompt": [U], "completion": [A]}),
    ("dialogue", "tokens", {"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [1, 2], "labels": [-100, 2]}),
    ("dialogue", "text", {"text": "t"}, {"text": "t"}),
    ("preference", "preference", {"prompt": "p", "chosen": "c", "rejected": "r"}, {"prompt": "p", "chosen": "c", "rejected": "r"}),  # noqa: E501
    ("preference", "preference", {"prompt": "p", "chosen": [A], "rejected": [B], "margin": 2}, {"prompt": [turn("user", "p")], "chosen": [A], "rejected": [B], "margin": 2.0}),  # noqa: E501
    ("preference", "preference", {"prompt": "p", "chosen": "c", "rejected": "r", "p": 1}, {"prompt": "p", "chosen": "c", "rejected": "r", "p": 1.0}),  # noqa: E501
    ("preference", "preference_implicit", {"chosen": [U, A], "rejected": [U, B]}, {"prompt": [U], "chosen": [A], "rejected": [B]}),  # noqa: E501
    ("preference", "preference_implicit", {"chosen": "abc x", "rejected": "abc y"}, {"prompt": "abc", "chosen": " x", "rejected": " y"}),  # noqa: E501
    ("preference", "preference_implicit", HH, {"prompt": HH_PROMPT, "chosen": [turn("assistant", "good")], "rejected": [turn("assistant", "gone")]}),  # noqa: E501
    ("unpaired", "unpaired", {"prompt": "p", "completion": "c", "label": "false"}, {"prompt": "p", "completion": "c", "label": False}),  # noqa: E501
    ("labelled", "labelled", {"text": "t", "label": 1}, {"text": "t", "label": 1}),
    ("labelled", "labelled_pair", {"premise": "p", "hypothesis": "h", "label": "x"}, {"text": "p", "text_b": "h", "label": "x"}),  # noqa: E501
    ("labelled", "labelled_pair", {"sentence1": "p", "sentence2": "h", "score": 3}, {"text": "p", "text_b": "h", "label": 3.0}),
    ("pairs", "pairs", {"sentence1": "p", "sentence2": "h", "score": 4.2}, {"texts": ["p", "h"], "score": 4.2, "label": None}),
    ("pairs", "triples", {"anchor": "x", "positive": "y", "negative": "z"}, {"texts": ["x", "y", "z"], "score": None, "label": None}),  # noqa: E501
    ("prompt", "prompt", {"prompt": "p", "answer": "18"}, {"prompt": "p", "columns": {"answer": "18"}}),
    ("prompt", "messages", {"messages": [U, A], "k": 1}, {"prompt": [U], "columns": {"k": 1, "completion": "a"}}),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "name", "row", "expected"), CASES, ids=[f"{c[0]}-{c[1]}-{i}" for i, c in enumerate(CASES)])
def test_detected_and_converted(rows: str, name: str, row: dict[str, Any], expected: dict[str, Any]) -> None:
    found = detect([row], rows, "auto", "f.jsonl:1")
    assert found.name == name
    assert found.convert(row, Conversion(rows, template=True)) == [expected]


def test_transcripts_stay_text_without_a_template() -> None:
    (row,) = data_format("preference_implicit").convert(HH, Conversion("preference"))
    assert row["prompt"] == "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: x\n\nAssistant:"
    assert (row["chosen"], row["rejected"]) == (" good", " gone")


@pytest.mark.parametrize("name", ["prompt_completion", "alpaca"])
def test_of_several_right_answers_the_first_is_trained_and_the_others_are_kept(name: str) -> None:
    column, rest = (
        ("completion", {"prompt": "Name it."}) if name == "prompt_completion" else ("output", {"instruction": "Name it."})
    )
    form = data_format(name)
    (row,) = form.convert({**rest, column: ["Blue.", "Azure.", "Blue."]}, Conversion("dialogue"))
    assert (row["completion"], row["references"]) == ("Blue.", ["Azure."])
    (row,) = form.convert({**rest, column: ["Blue.", "Azure."]}, Conversion("dialogue", wrap=True))
    assert row["completion"] == [{"role": "assistant", "content": "Blue."}] and row["references"] == ["Azure."]
    (row,) = form.convert({**rest, column: ["Blue."]}, Conversion("dialogue"))
    assert row["completion"] == "Blue." and "references" not in row
    for wrong in (["Blue.", " "], ["", "Blue."], [], [4], ["Blue.", None]):
        with pytest.raises(BadRow):
            form.convert({**rest, column: wrong}, Conversion("dialogue"))


def test_alpaca_has_two_forms_and_becomes_a_conversation_where_a_template_is_named() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    (plain,) = data_format("alpaca").convert(row, Conversion("dialogue"))
    assert [plain] == data_format("alpaca").convert(row, Conversion("dialogue", template=True))
    assert "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n" in plain["prompt"] and plain["completion"] == "3"
    (short,) = data_format("alpaca").convert({**row, "input": ""}, Conversion("dialogue"))
    assert "### Input" not in short["prompt"] and short["prompt"].endswith("### Instruction:\nAdd.\n\n### Response:\n")
    for options in ({"wrap": True}, {"spoken": True}):
        (talk,) = data_format("alpaca").convert(row, Conversion("dialogue", template=True, **options))
        assert talk["prompt"][0]["content"] == "Add.\n\n1 2" and talk["completion"] == [turn("assistant", "3")]


def test_a_named_template_wraps_strings_and_system_goes_first() -> None:
    options = Conversion("dialogue", wrap=True, template=True, system="S")
    (row,) = data_format("prompt_completion").convert({"prompt": "p", "completion": "c"}, options)
    assert row == {"prompt": [turn("system", "S"), turn("user", "p")], "completion": [turn("assistant", "c")]}
    with pytest.raises(DataError, match=r"data.system is set, but prompts here are plain text"):
        data_format("prompt_completion").convert({"prompt": "p", "completion": "c"}, Conversion("dialogue", system="S"))


def test_a_pair_becomes_two_unpaired_rows() -> None:
    rows = data_format("preference").convert({"prompt": "p", "chosen": "c", "rejected": "r"}, Conversion("unpaired"))
    assert [(r["completion"], r["label"]) for r in rows] == [("c", True), ("r", False)]


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("prompt_completion", {"prompt": "p", "completion": "  "}, "'completion' is empty"),
        ("prompt_completion", {"prompt": None, "completion": "c"}, "'prompt' is not text"),
        ("unpaired", {"prompt": "p", "completion": "c", "label": 0.3}, "'label' is neither true nor false"),
        ("messages", {"messages": [{"role": "narrator", "content": "x"}]}, "unknown role 'narrator'"),
        ("tokens", {"input_ids": [1, 2], "labels": [1]}, "'labels' and 'input_ids' differ in length"),
        ("preference_implicit", {"chosen": [U, A], "rejected": [B]}, "chosen and rejected share no prompt"),
        (
            "preference",
            {"prompt": "p", "chosen": "c", "rejected": "r", "p": 1.2},
            "'p' is no probability that the chosen answer is the better one",
        ),
        ("image_text", {"image": "no/such.png", "text": "t"}, "'image' is a path, and these rows are in no folder"),
    ],
)
def test_bad_rows_have_a_reason(name: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        data_format(name).convert(row, Conversion("dialogue", template=True))
    assert caught.value.reason == reason


def save(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as pa
    from pyarrow import csv, feather, parquet

    path = folder / f"rows.{kind}"
    text = "".join(json.dumps(row, default=str) + "\n\n" for row in rows)
    if kind == "jsonl":
        path.write_text("\ufeff" + text, encoding="utf-8")
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "csv":
        csv.write_csv(pa.Table.from_pylist(rows), path)
    elif kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        feather.write_feather(pa.Table.from_pylist(rows), str(path), compression="uncompressed")
    return path


FLAT = {"text", "prompt_completion", "preference", "unpaired", "labelled", "labelled_pair", "pairs", "triples", "prompt"}


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "parquet", "arrow"])
def test_every_file_kind_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    for rows, name, row, _ in CASES:
        flat = all(not isinstance(v, list | dict) for v in row.values())
        if kind == "csv" and not flat:
            continue
        reader = open_file(save(tmp_path, kind, [row, row]))
        assert len(reader) == 2
        for found in (reader.rows(range(2)), reader.rows([1, 0]), [r for _, r in reader.stream()]):
            assert detect(found, rows, "auto", "x").convert(found[1], Conversion(rows, template=True)) == detect(
                [row], rows, "auto", "x"
            ).convert(row, Conversion(rows, template=True))
        assert name in registry.names("format")


def test_csv_text_keeps_its_zeros_and_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n007,"a, b\nc"\n')
    assert open_file(path).rows([0]) == [{"prompt": "007", "completion": "a, b\nc"}]


def test_plain_text_is_cut_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\nstill one\n\n\n  \ntwo\n")
    reader = open_file(path)
    assert reader.rows(range(2)) == [{"text": "one\nstill one"}, {"text": "two"}]
    assert reader.where(1) == f"{path}:6"


DAMAGED = [
    ("a.jsonl", b'{"text": "x"}\n{"text": "y"\n', r"a.jsonl:2: not valid JSON .*the line was cut off, the file is incomplete"),
    ("a.jsonl", b'{"text": "x"}\n\n[1, 2]\n', r'a.jsonl:3: a row must be an object like \{"text": "..."\}, this is a list'),
    ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a.jsonl:2: not UTF-8 text"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n', mtime=0)[:-9], r"a.jsonl.gz: the gzip file is damaged"),
    ("a.json", b'[{"text": "x"},\n {"text": }]', r"a.json:2: not valid JSON"),
    ("a.csv", b"text,label\na,1\nb,2,3\n", r"a.csv:3: 3 columns where the header has 2; quote commas"),
    ("a.parquet", b"PAR1 nonsense", r"a.parquet: the file is damaged or not parquet"),
    ("a.arrow", b"nonsense", r"a.arrow: the file is damaged or not arrow"),
    ("a.jsonl", b"", r"a.jsonl: the file is empty"),
    ("a.xlsx", b"x", r"cannot read '.xlsx' files; known: .jsonl"),
]


def read_whole(path: Path) -> list[dict]:
    reader = open_file(path)
    return reader.rows(range(len(reader)))


@pytest.mark.parametrize(("name", "content", "message"), DAMAGED)
def test_damaged_files_say_where(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_whole(path)


def test_unknown_columns_print_the_row_and_the_nearest_mapping() -> None:
    with pytest.raises(DataError) as caught:
        detect([{"prompt": "q", "compltion": "a"}], "dialogue", "auto", "qa.jsonl:1")
    first, *formats, last = str(caught.value).splitlines()
    assert first == "qa.jsonl:1: no dialogue row can be made of the columns prompt, compltion."
    assert last == "Nearest: data.columns='{completion: compltion}'"
    assert {
        "  messages             needs messages or conversations  (a list of {role, content})",
        "  sharegpt             needs conversations  (a list of {from, value})",
        "  prompt_completion    needs prompt+completion  (a prompt and its answer)",
        "  alpaca               needs instruction+output  (instruction, input, output)",
        "  tokens               needs input_ids  (token ids, with or without labels)",
        "  text                 needs text  (plain text)",
    } <= set(formats)


def test_the_nearest_mapping_works(tmp_path: Path) -> None:
    path = save(tmp_path, "jsonl", [{"prompt": "q", "compltion": "a"}])
    data = DataSection(path=str(path), columns={"completion": "compltion"})
    found = prepare(data, byte_tokenizer(), "dialogue", seed=0)
    assert found is not None and found.report.mapping == {"completion": "compltion"}
    assert byte_tokenizer().decode(found[0]["ids"]) == "qa</s>"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"columns": {"prompt": "qestion"}}, r"data.columns.prompt: .* has no column 'qestion'; did you mean 'question'\?"),
        ({"format": "sharegtp"}, r"there is no format 'sharegtp'; did you mean 'sharegpt'\?"),
        ({"format": "preference"}, r"preference cannot become dialogue rows"),
        ({"format": "tokens"}, r"needs input_ids"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, setting: dict[str, Any], message: str) -> None:
    path = save(tmp_path, "jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(DataError, match=message):
        prepare(DataSection(path=str(path), **setting), byte_tokenizer(), "dialogue", seed=0)


def test_sources_that_do_not_exist(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"no such file or folder; did you mean 'pairs.jsonl'\?"):
        prepare(DataSection(path=str(tmp_path / "pair.jsonl")), byte_tokenizer(), "text", seed=0)
    with pytest.raises(DataError, match=r"no built-in set is called 'storys'; did you mean 'stories'\?"):
        prepare(DataSection(path="builtin:storys"), byte_tokenizer(), "text", seed=0)
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "gone.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    kinds = {
        "pipe": "a pipe or device, not a file",
        "link": "a link to .*gone.jsonl, which does not exist",
        "loop": "to itself",
    }
    for name, said in kinds.items():
        with pytest.raises(DataError, match=f"data.path: .*{name}.jsonl: .*{said}"):
            prepare(DataSection(path=str(tmp_path / f"{name}.jsonl")), byte_tokenizer(), "text", seed=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no training file"):
        prepare(DataSection(path=str(tmp_path / "empty")), byte_tokenizer(), "text", seed=0)
    with pytest.raises(DataError, match=r"data.path: missing"):
        prepare(DataSection(), byte_tokenizer(), "text", seed=0)


def test_hub_names_go_through_datasets(monkeypatch: Any) -> None:
    import datasets

    asked: list[Any] = []

    def load(path: str, config: str | None, split: str, streaming: bool) -> Any:
        asked.append((path, config, split, streaming))
        return datasets.Dataset.from_list([{"text": split}])

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda path, config: ["train", "validation"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    data = DataSection(path="owner/name:main")
    for split in ("train", "validation"):
        found = prepare(data, byte_tokenizer(), "text", split=split, seed=0)
        assert found is not None and byte_tokenizer().decode(found[0]["ids"]) == f"{split}</s>"
    assert asked == [("owner/name", "main", "train", False), ("owner/name", "main", "validation", False)]
    assert prepare(data, byte_tokenizer(), "text", split="test", seed=0, unseal=True) is None

    def offline(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route to hub\nmore")

    monkeypatch.setattr(datasets, "get_dataset_split_names", offline)
    with pytest.raises(DataError, match=r"'owner/other' is neither a file or folder here nor .* \(no route to hub\)"):
        prepare(DataSection(path="owner/other"), byte_tokenizer(), "text", seed=0)


def test_folders_with_shards_and_saved_data_sets(tmp_path: Path) -> None:
    import datasets

    for i in range(2):
        save(tmp_path, "parquet", [{"text": f"t{i}"}]).rename(tmp_path / f"train-0000{i}-of-00002.parquet")
    found = prepare(DataSection(path=str(tmp_path)), byte_tokenizer(), "text", seed=0)
    assert found is not None and [byte_tokenizer().decode(r["ids"]) for r in found] == ["t0</s>", "t1</s>"]
    folder = tmp_path / "saved"
    datasets.DatasetDict({"train": datasets.Dataset.from_list([{"text": "x"}])}).save_to_disk(str(folder))
    found = prepare(DataSection(path=str(folder)), byte_tokenizer(), "text", seed=0)
    assert found is not None and len(found) == 1
    state = folder / "train" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "_data_files": [{"filename": "../../other.arrow"}]}))
    with pytest.raises(DataError, match=r"state.json: '../../other.arrow' is outside of its folder"):
        prepare(DataSection(path=str(folder)), byte_tokenizer(), "text", seed=0)


def test_a_long_cell_and_many_columns_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "x" * (3 << 20) + ",1\n")
    assert len(read_whole(tmp_path / "a.csv")[0]["text"]) == 3 << 20
    names = [f"c{i}" for i in range(30_000)]
    (tmp_path / "b.csv").write_text(",".join([*names, "c7"]) + "\n" + ",".join("1" for _ in range(30_001)))
    started = time.process_time()
    with pytest.raises(DataError, match=r"b.csv:1: the column 'c7' is there 2 times"):
        read_whole(tmp_path / "b.csv")
    assert time.process_time() - started < 5.0, "each name is counted once"
    (tmp_path / "c.csv").write_text("a," + "b" * 200_000 + "\n1,2\n")
    assert read_whole(tmp_path / "c.csv") == [{"a": 1, "b" * 200_000: 2}]


def test_pictures(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(b"png")
    path = save(tmp_path, "jsonl", [{"image": "p.png", "text": "a cat"}])
    found = prepare(DataSection(path=str(path)), byte_tokenizer(), "multimodal", seed=0)
    assert found is not None and Path(found[0]["features"]).read_bytes() == b"png"
    held = save(tmp_path, "parquet", [{"image": {"bytes": b"held", "path": None}, "text": "a cat"}])
    found = prepare(DataSection(path=str(held)), byte_tokenizer(), "multimodal", seed=0)
    assert found is not None and Path(found[0]["features"]).read_bytes() == b"held"


@pytest.mark.parametrize(("rows", "row"), [
    ("dialogue", {"prompt": "p", "completion": "c"}), ("dialogue", {"instruction": "p", "output": "c"}),
    ("preference", {"prompt": "p", "chosen": "c", "rejected": "r"}), ("preference", {"chosen": [U, A], "rejected": [U, B]}),
    ("preference", {"messages": [U], "chosen": "c", "rejected": "r"}),
    ("unpaired", {"prompt": [U], "completion": "c", "label": 1}),
    ("preference", {"instruction": "p", "chosen": "c", "rejected": "r"}), ("prompt", {"prompt": "p", "answer": "c"}),
    ("choices", {"prompt": "p", "completion": "c", "options": ["d"]}), ("dialogue", {"messages": [U, A]}),
])  # fmt: skip
def test_the_system_message_of_a_row_is_the_first_of_its_conversation(rows: str, row: dict[str, Any]) -> None:
    """A column `system` next to a prompt is as much a part of it as next to messages; it comes before the recipe's."""
    given = {**row, "system": "Be brief."}
    for one in detect([given], rows, "auto", "f").convert(given, Conversion(rows, wrap=True, template=True, system="S")):
        said = one.get("messages", one.get("prompt"))
        assert said[0] == turn("system", "Be brief.") and [m["role"] for m in said].count("system") == 1


def test_rows_of_another_layout_are_named_by_the_columns_they_have(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"messages": [U, A]}) + "\n" + json.dumps({"prompt": "p", "completion": "c"}) + "\n"
    )
    with pytest.raises(
        DataError, match=r"1 x not a messages row, first at .*a.jsonl:2: it has no column .*, but prompt, completion"
    ):
        prepare(DataSection(path=str(tmp_path / "a.jsonl"), cache=False), byte_tokenizer(), "dialogue", seed=0)


@pytest.mark.parametrize(("rows", "row", "reason"), [
    ("preference", {"prompt": None, "question": "q", "chosen": "The sky is", "rejected": "The sea is"}, "'prompt' is null"),
    ("preference", {"chosen": "Blue", "rejected": "Red"}, "chosen and rejected share no prompt"),
    ("labelled", {"text": "t", "label": {"a": 1}}, "'label' is neither text nor a number"),
    ("dialogue", {"messages": [U, A], "chat_template_kwargs": "x"}, "'chat_template_kwargs' is no mapping"),
    ("dialogue", {"messages": [U, A], "chat_template_kwargs": {"tools": [1]}}, "gives what the template gets in another way"),
])  # fmt: skip
def test_what_a_row_lacks_or_gives_in_a_wrong_way_is_named(rows: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        detect([row], rows, "auto", "f").convert(row, Conversion(rows))
    assert reason in caught.value.reason
