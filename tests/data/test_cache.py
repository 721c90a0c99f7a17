"""The token cache is keyed by content, written at once, and read straight from the file."""

from __future__ import annotations

import functools
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmrecipe.core.cache_sweep import sweep
from llmrecipe.core.errors import DataError
from llmrecipe.data import prepare, tokenize_split
from llmrecipe.data.cache import FILE, TableWriter, open_table, schema_of, to_batch
from llmrecipe.data.tokenize.chat_templates import set_template
from llmrecipe.data.tokenize.row_type import row_type
from llmrecipe.recipe.data_section import DataSection
from tests.data.toys import byte_tokenizer, turn


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


TALKS = [{"messages": [turn("user", f"u{i}"), turn("assistant", f"a{i}")]} for i in range(6)]


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one each time a source is really encoded."""
    calls: list[str] = []
    original = tokenize_split.make_encoder

    def counted(part: Any, *args: Any) -> Any:
        calls.append(part.reader.name)
        return original(part, *args)

    monkeypatch.setattr(tokenize_split, "make_encoder", counted)
    return calls


def test_each_ingredient_misses_and_nothing_else_does(tmp_path: Path, encodings: list[str], monkeypatch: Any) -> None:
    path = write(tmp_path / "a.jsonl", TALKS)
    base: dict[str, Any] = {"path": str(path), "max_length": 64}

    def run(mask: str = "assistant", seed: int = 0, tokenizer: Any = None, **data: Any) -> bool:
        """Whether the rows had to be encoded."""
        before = len(encodings)
        prepare(DataSection(**{**base, **data}), tokenizer or byte_tokenizer(), "dialogue", mask=mask, seed=seed)
        return len(encodings) > before

    assert run() and not run()
    # hits: what token ids do not depend on
    assert not run(seed=7)
    assert not run(packing="off")
    assert not run(max_dropped=0.0)
    assert not run(validation=str(path))
    copy = tmp_path / "elsewhere.jsonl"
    copy.write_bytes(path.read_bytes())
    assert not run(path=str(copy))
    # misses: every ingredient
    assert run(mask="last")
    assert run(max_length=63)
    assert run(truncation="keep_start")
    assert run(system="S")
    assert run(validation=0.5)
    assert run(tokenizer=byte_tokenizer([("u", "1")]))
    other = byte_tokenizer()
    other.chat_template = other.chat_template.replace("user", "user")  # same text: the same key
    assert not run(tokenizer=other)
    other.chat_template += " "
    assert run(tokenizer=other)
    assert run(tokenizer=named(byte_tokenizer()))
    monkeypatch.setattr(tokenize_split, "code_version", lambda: "other code")
    assert run()
    write(path, [*TALKS[:-1], {"messages": [turn("user", "u5"), turn("assistant", "b5")]}])
    assert run()


def named(tokenizer: Any) -> Any:
    set_template(tokenizer, "own")
    return tokenizer


def test_padding_the_tokenizer_did_before_is_no_part_of_the_key(tmp_path: Path, encodings: list[str]) -> None:
    path = write(tmp_path / "a.jsonl", TALKS)
    tokenizer = byte_tokenizer()
    prepare(DataSection(path=str(path)), tokenizer, "dialogue", seed=0)
    tokenizer(["a", "bbb"], padding=True, truncation=True, max_length=2)
    prepare(DataSection(path=str(path)), tokenizer, "dialogue", seed=0)
    assert len(encodings) == 1


def test_rows_from_the_file_equal_rows_from_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", TALKS)
    for _ in range(2):
        kept = prepare(DataSection(path=str(path)), byte_tokenizer(), "dialogue", seed=0)
        memory = prepare(DataSection(path=str(path), cache=False), byte_tokenizer(), "dialogue", seed=0)
        assert list(kept) == list(memory) and kept.key == memory.key
        assert kept.lengths().tolist() == [len(row["ids"]) for row in kept]
        assert kept[-1] == kept[5] and kept[1:3] == [kept[1], kept[2]]
        assert [row["row"] for row in kept] == list(range(6))


def test_counts_of_nine_and_of_ten_are_read_back(tmp_path: Path, encodings: list[str]) -> None:
    """Numbers that are counted sort otherwise as the texts they are in a file: ends a row, and lengths of rows left out."""
    rows = [{"messages": [turn(r, "x") for _ in range(n) for r in ("user", "assistant")]} for n in (1, 4, 5, 10, 12, 45)]
    section = DataSection(path=str(write(tmp_path / "a.jsonl", rows)), max_length=240, max_dropped=0.9)
    first, again = (prepare(section, byte_tokenizer(), "dialogue", seed=0) for _ in range(2))
    assert len(encodings) == 1 and list(first) == list(again)
    assert again.report == first.report
    for counted in (again.report.eos, again.report.too_long):
        assert sorted(counted) != sorted(counted, key=str), "one digit and two, or three and four"


def test_nothing_is_written_without_the_cache(tmp_path: Path, own_cache: Path) -> None:
    prepare(DataSection(path=str(write(tmp_path / "a.jsonl", TALKS)), cache=False), byte_tokenizer(), "dialogue", seed=0)
    assert not list(own_cache.iterdir())


def test_an_interrupted_build_leaves_nothing(tmp_path: Path, own_cache: Path, monkeypatch: Any) -> None:
    def broken(*_: Any) -> Any:
        raise KeyboardInterrupt

    path = write(tmp_path / "a.jsonl", TALKS)
    with monkeypatch.context() as patch:
        patch.setattr(tokenize_split.TableWriter, "finish", broken)
        with pytest.raises(KeyboardInterrupt):
            prepare(DataSection(path=str(path)), byte_tokenizer(), "dialogue", seed=0)
    data = prepare(DataSection(path=str(path)), byte_tokenizer(), "dialogue", seed=0)
    assert len(data) == 6


def test_a_damaged_table_is_built_again(tmp_path: Path, own_cache: Path, encodings: list[str]) -> None:
    path = write(tmp_path / "a.jsonl", TALKS)
    first = list(prepare(DataSection(path=str(path)), byte_tokenizer(), "dialogue", seed=0))
    (table,) = own_cache.rglob(FILE)
    table.write_bytes(table.read_bytes()[:50])
    assert list(prepare(DataSection(path=str(path)), byte_tokenizer(), "dialogue", seed=0)) == first
    assert len(encodings) == 2


def test_two_writers_of_one_key_do_not_disturb_each_other(tmp_path: Path) -> None:
    kind = row_type("tokens")
    columns = {"ids": [[1, 2]], "trained": [[0, 1]], "source_row": [0]}
    first, second = TableWriter(kind, tmp_path / "t" / "key"), TableWriter(kind, tmp_path / "t" / "key")
    for writer in (first, second):
        writer.add(to_batch(columns, schema_of(kind)))
    assert [len(w.finish({"key": "k", "report": {}})) for w in (first, second)] == [1, 1]
    assert [p.name for p in (tmp_path / "t").iterdir()] == ["key"]
    table = open_table(tmp_path / "t" / "key", kind)
    assert table is not None and table[0]["ids"] == [1, 2]


def test_a_full_disk_is_one_clear_message(tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.ipc.new_file", full)
    with pytest.raises(DataError, match=r"No space left on device.*LLMRECIPE_CACHE"):
        prepare(DataSection(path=str(write(tmp_path / "a.jsonl", TALKS))), byte_tokenizer(), "dialogue", seed=0)


def test_processes_give_the_same_rows_as_one(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tokenize_split, "BATCH", 7)
    path = write(tmp_path / "a.jsonl", [{"text": "x" * (i % 11 + 1)} for i in range(60)])
    one = prepare(DataSection(path=str(path), cache=False, workers=1), byte_tokenizer(), "text", seed=0)
    two = prepare(DataSection(path=str(path), cache=False, workers=2), byte_tokenizer(), "text", seed=0)
    assert list(one) == list(two) and one.report == two.report


def test_access_across_record_batches(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tokenize_split, "BATCH", 3)
    path = write(tmp_path / "a.jsonl", [{"text": "x" * (i + 1)} for i in range(10)])
    data = prepare(DataSection(path=str(path)), byte_tokenizer(), "text", seed=0)
    assert [len(data[i]["ids"]) for i in (9, 0, 3, 2)] == [11, 2, 5, 4]
    np.testing.assert_array_equal(data.lengths(), np.arange(2, 12))
    with pytest.raises(IndexError):
        data[10]


@pytest.mark.parametrize("harm", ["a bit of the rows", "a number of the facts", "no facts", "no rows", "an older table"])
def test_damage_of_any_kind_heals(harm: str, tmp_path: Path, own_cache: Path, encodings: list[str]) -> None:
    path, section = write(tmp_path / "t.jsonl", TALKS), None
    section = DataSection(path=str(path), format="messages")
    first = prepare(section, byte_tokenizer(), "dialogue", seed=0)
    assert first is not None
    wanted = list(first)
    (rows,) = own_cache.rglob(FILE)
    facts = rows.with_name("facts.json")
    content = json.loads(facts.read_text())
    if harm == "a bit of the rows":
        changed = bytearray(rows.read_bytes())
        changed[len(changed) // 2] ^= 1
        rows.write_bytes(changed)
    elif harm == "a number of the facts":
        content["facts"]["report"]["kept"] += 1
        facts.write_text(json.dumps(content))
    elif harm == "no facts":
        facts.unlink()
    elif harm == "no rows":
        rows.unlink()
    else:
        facts.write_text(json.dumps(content["facts"]))
    again = prepare(section, byte_tokenizer(), "dialogue", seed=0)
    assert again is not None and list(again) == wanted and len(encodings) == 2
    assert again.report.kept == len(wanted)
    prepare(section, byte_tokenizer(), "dialogue", seed=0)
    assert len(encodings) == 2, "the new table is intact"


def aged(folder: Path, days: float) -> None:
    """Set the times of a folder and of all it holds back."""
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (time.time() - days * 86_400,) * 2)


def test_a_new_table_makes_old_ones_and_those_of_killed_writers_go(tmp_path: Path, own_cache: Path) -> None:
    columns = {"ids": [[1, 2]], "trained": [[0, 1]], "source_row": [0]}
    kind, tokens = row_type("tokens"), own_cache / "tokens" / "ab"
    writers = {name: TableWriter(kind, tokens / name) for name in ("old", "used", "alive", "killed", "young")}
    for writer in writers.values():
        writer.add(to_batch(columns, schema_of(kind)))
    for name in ("old", "used"):
        writers[name].finish({"key": name, "report": {}})
        aged(tokens / name, 31)
    assert open_table(tokens / "used", kind) is not None
    for name in ("killed", "young"):
        handle = writers[name]._lock
        assert handle is not None
        handle.close()
    for folder in (*tokens.glob("alive*"), *tokens.glob("killed*")):
        aged(folder, 1.1)
    prepare(DataSection(path=str(write(tmp_path / "a.jsonl", TALKS))), byte_tokenizer(), "dialogue", seed=0)
    assert sorted(path.name.split(".")[0] for path in tokens.iterdir()) == ["alive", "used", "young"]
    assert len(writers["alive"].finish({"key": "alive", "report": {}})) == 1
    assert sorted(path.name for path in (tokens / "alive").iterdir()) == ["facts.json", FILE]


def test_beyond_its_size_a_cache_loses_what_was_unused_for_longest_but_nothing_of_today(tmp_path: Path) -> None:
    for name, days in {"a": 3.0, "b": 2.0, "c": 1.5, "today": 0.5}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows").write_bytes(bytes(100))
        aged(tmp_path / name, days)
    assert [path.name for path in sweep(tmp_path.iterdir(), room=250)] == ["a", "b"]
    assert [path.name for path in sweep(tmp_path.iterdir(), room=50)] == ["c"]
    assert [path.name for path in tmp_path.iterdir()] == ["today"]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_long_tokenising_shows_how_far_it_is(rank: str, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(tokenize_split, "BATCH", 4)
    monkeypatch.setattr(tokenize_split, "Pace", functools.partial(tokenize_split.Pace, every=0.0))
    prepare(DataSection(path=str(write(tmp_path / "a.jsonl", TALKS))), byte_tokenizer(), "dialogue", seed=0)
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line.startswith("tokenising")]
    counts = [line.rpartition(": ")[2] for line in lines if "a.jsonl" in line]
    assert counts == (["4 of 6", "6 of 6"] if rank == "0" else []) and "tokenising" not in shown.out
