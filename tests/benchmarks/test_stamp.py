"""Result files say which version of their benchmark wrote them, and that it is the present one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks import stamp
from tests.benchmarks.stamp import RESULTS, declared, judge, line, read, source_hash, writer_of

ELSEWHERE = (
    "parity", "alignment_leaderboard", "peft_leaderboard", "forgetting_leaderboard", "nsp_qa", "real-models",
)  # fmt: skip
"""Results that no script of this folder writes: `make parity`, recipes, and runs of the command line."""


@pytest.mark.parametrize("name", declared())
def test_the_declared_version_is_that_of_the_sources(name: str) -> None:
    benchmark = declared()[name]
    assert benchmark["hash"] == source_hash(benchmark["sources"]), (
        f"{name} has been edited: python -m tests.benchmarks.stamp [--bump {name}], the latter if it measures something else"
    )


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.*")), ids=lambda p: p.name)
def test_a_result_is_of_the_present_version_of_its_benchmark(path: Path) -> None:
    if path.suffix != ".png" and path.stem not in ELSEWHERE:
        assert judge(path, declared()) is None


def test_the_two_files_of_a_result_say_the_same() -> None:
    for path in RESULTS.glob("*.json"):
        if path.stem not in ELSEWHERE:
            assert read(path) == read(path.with_suffix(".md")), path.name


BENCHMARKS = {"race": {"version": 2, "sources": ["a.py"], "hash": "", "results": ["race-*"]}}


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        ({"name": "race", "version": 2, "commit": "abc1234"}, None),
        ({"name": "race", "version": 1, "commit": "abc1234"}, "measure again"),
        ({"name": "race", "version": 1, "commit": "abc1234+", "outdated": "needs a machine with 2.5 GB"}, None),
        ({"name": "race", "version": 3, "commit": "abc1234"}, "version 3 of race, which is at 2"),
        ({"name": "walk", "version": 2, "commit": "abc1234"}, "does not carry"),
        (None, "does not carry"),
    ],
)
def test_what_is_refused(tmp_path: Path, found: dict[str, object] | None, fault: str | None) -> None:
    as_json, as_text = tmp_path / "race-1.json", tmp_path / "race-1.md"
    as_json.write_text(json.dumps({"harness": found} if found else [1]))
    as_text.write_text("| a |\n\n" + (line(found) if found else ""))
    for path in (as_json, as_text):
        said = judge(path, BENCHMARKS)
        assert said is None if fault is None else said is not None and fault in said
    assert writer_of(tmp_path / "other.md", BENCHMARKS) is None


def test_an_edit_changes_the_hash_and_a_name_counts(tmp_path: Path) -> None:
    for name, text in (("a.py", "x = 1"), ("b.py", "x = 1")):
        (tmp_path / name).write_text(text)
    both, one, other = (source_hash(names, tmp_path) for names in (["a.py", "b.py"], ["a.py"], ["b.py"]))
    assert len({both, one, other}) == 3 and both == source_hash(["b.py", "a.py"], tmp_path)
    (tmp_path / "a.py").write_text("x = 2")
    assert source_hash(["a.py"], tmp_path) != one


def test_a_checkout_knows_its_commit() -> None:
    assert stamp.stamp("harness")["version"] == declared()["harness"]["version"]
    assert stamp.commit()
