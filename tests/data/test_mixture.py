"""Mixtures, shuffles, draws; and the splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmrecipe.core.errors import DataError
from llmrecipe.data import TokenData, has_split, order, prepare
from llmrecipe.recipe.data_section import DataSection
from tests.data.toys import byte_tokenizer


def texts(path: Path, prefix: str, count: int) -> str:
    path.write_text("".join(json.dumps({"text": f"{prefix}{i:04d}"}) + "\n" for i in range(count)))
    return str(path)


def read(seed: int = 0, split: str = "train", **data: Any) -> TokenData:
    found = prepare(DataSection(**data), byte_tokenizer(), "text", split=split, seed=seed, unseal=split == "test")
    assert found is not None
    return found


def words(data: TokenData) -> list[str]:
    tokenizer = byte_tokenizer()
    return [tokenizer.decode(row["ids"], skip_special_tokens=True) for row in data]


def test_weights_hold_for_every_stretch_from_the_start(tmp_path: Path) -> None:
    a, b = texts(tmp_path / "a.jsonl", "a", 900), texts(tmp_path / "b.jsonl", "b", 100)
    data = read(path={a: 1.0, b: 3.0})
    for epoch in range(4):
        drawn = order(data, 0, epoch)
        assert len(drawn) == 1000
        # Two sources: a count is never two rows from its share.
        assert np.abs((drawn >= 900).cumsum() - 0.75 * np.arange(1, 1001)).max() < 2
    np.testing.assert_array_equal(order(data, 0, 1), order(data, 0, 1))
    assert not np.array_equal(order(data, 0, 0) >= 900, order(data, 1, 0) >= 900), "the seed decides where each source begins"
    assert all(word[0] == "b" for word in (words(data)[i] for i in drawn[drawn >= 900][:5]))


def test_shares_of_tokens_hold_for_targets_whatever_the_length_of_rows_is(tmp_path: Path) -> None:
    """Replay of a tenth: answers of 3 to 5 tokens with long prompts, next to texts of 41 that are targets throughout."""
    lines = [{"prompt": "p" * 30, "completion": "c" * (2 + i % 3)} for i in range(300)]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "old.jsonl").write_text("".join(json.dumps({"text": "o" * 40}) + "\n" for _ in range(40)))
    paths = {str(tmp_path / "new.jsonl"): 0.9, str(tmp_path / "old.jsonl"): 0.1}

    def share(**more: Any) -> float:
        data = prepare(DataSection(path=paths, **more), byte_tokenizer(), "dialogue", mask="completion", seed=0)
        assert isinstance(data, TokenData)
        sizes = np.array([sum(row["trained"]) for row in data])
        drawn = order(data, 0, 0)
        return float(sizes[drawn[drawn >= 300]].sum() / sizes[drawn].sum())

    assert share(shares="tokens") == pytest.approx(0.1, abs=0.02)
    assert share() > 0.4
    with pytest.raises(DataError, match=r"data\.shares: .* streamed"):
        share(shares="tokens", streaming=True)


def test_shares_of_three_sources_are_exact_to_a_few_rows(tmp_path: Path) -> None:
    counts, weights = (50, 300, 7), np.array([0.07, 2.0, 0.5])
    paths = [texts(tmp_path / f"{name}.jsonl", name, count) for name, count in zip("abc", counts, strict=True)]
    data = read(path=dict(zip(paths, weights.tolist(), strict=True)))
    drawn = order(data, 3, 2)
    for low, high, share in zip((0, 50, 350), (50, 350, 357), weights / weights.sum(), strict=True):
        seen = ((drawn >= low) & (drawn < high)).cumsum()
        assert np.abs(seen - share * np.arange(1, len(drawn) + 1)).max() < 3


def test_a_source_is_used_up_before_it_repeats(tmp_path: Path) -> None:
    a, b = texts(tmp_path / "a.jsonl", "a", 60), texts(tmp_path / "b.jsonl", "b", 20)
    drawn = order(read(path={a: 1.0, b: 1.0}), 0, 0)
    for low, high in ((0, 60), (60, 80)):
        counts = np.bincount(drawn[(drawn >= low) & (drawn < high)] - low, minlength=high - low)
        assert counts.max() - counts.min() <= 1


def test_order_is_a_permutation_that_depends_on_seed_and_epoch(tmp_path: Path) -> None:
    data = read(path=texts(tmp_path / "a.jsonl", "a", 50))
    first = order(data, 0, 0)
    assert sorted(first.tolist()) == list(range(50))
    np.testing.assert_array_equal(first, order(data, 0, 0))
    assert not np.array_equal(first, order(data, 1, 0)) and not np.array_equal(first, order(data, 0, 1))


def test_limit_is_a_seeded_draw_not_the_first_rows(tmp_path: Path) -> None:
    path = texts(tmp_path / "a.jsonl", "a", 400)
    one, two, again = (words(read(path=path, limit=40, seed=seed)) for seed in (0, 1, 0))
    assert len(set(one)) == 40 and one == again and set(one) != set(two)
    assert max(int(w[1:]) for w in one) > 200


def test_limit_counts_rows_that_are_kept_and_encodes_little_more(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * (500 if i % 2 else 5) + str(i)}) + "\n" for i in range(400)))
    data = read(path=str(path), limit=30, max_length=50, max_dropped=0.9, truncation="drop")
    assert len(data) == 30 and data.report.kept == 30
    assert data.report.read < 120 and data.report.read - data.report.lost == 30


def test_limit_of_a_mixture_follows_the_weights(tmp_path: Path) -> None:
    a, b = texts(tmp_path / "a.jsonl", "a", 100), texts(tmp_path / "b.jsonl", "b", 100)
    found = words(read(path={a: 1.0, b: 3.0}, limit=40))
    assert sum(w[0] == "a" for w in found) == 10 and len(found) == 40
    assert len(read(path=[a, b], limit=7)) == 7


def test_weights_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"weight 0.0 must be larger than 0"):
        read(path={texts(tmp_path / "a.jsonl", "a", 3): 0.0})


def test_shares_are_disjoint_stable_and_complete(tmp_path: Path) -> None:
    path = texts(tmp_path / "a.jsonl", "a", 600)
    setting = {"path": path, "validation": 0.2, "test": 0.1}
    parts = {split: set(words(read(split=split, **setting))) for split in ("train", "validation", "test")}
    assert sum(map(len, parts.values())) == 600 == len(set.union(*parts.values()))
    assert abs(len(parts["validation"]) - 120) < 40 and abs(len(parts["test"]) - 60) < 30
    lines = Path(path).read_text().splitlines()
    Path(path).write_text("\n".join(reversed(lines)) + "\n")
    assert set(words(read(split="validation", **setting))) == parts["validation"]
    Path(path).write_text("\n".join(lines + lines) + "\n")
    doubled = {split: words(read(split=split, **setting)) for split in parts}
    assert all(set(doubled[split]) == parts[split] for split in parts), "copies of a row must not straddle splits"


def test_the_test_split_is_sealed(tmp_path: Path) -> None:
    for name in ("train", "dev", "test"):
        texts(tmp_path / f"{name}.jsonl", name[0], 5)
    section = DataSection(path=str(tmp_path))
    with pytest.raises(DataError, match="sealed"):
        prepare(section, byte_tokenizer(), "text", split="test", seed=0)
    assert words(read(path=str(tmp_path), split="test"))[0] == "t0000"
    assert words(read(path=str(tmp_path), split="validation"))[0] == "d0000"
    assert words(read(path=str(tmp_path)))[0] == "t0000" and len(read(path=str(tmp_path))) == 5


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    section = DataSection(path=texts(tmp_path / "a.jsonl", "a", 5))
    assert prepare(section, byte_tokenizer(), "text", split="validation", seed=0) is None
    assert has_split(section, "train") and not has_split(section, "validation")
    named = DataSection(path=section.path, validation=texts(tmp_path / "v.jsonl", "v", 2))
    assert (
        has_split(named, "validation")
        and words(read(path=named.path, validation=named.validation, split="validation"))[0] == "v0000"
    )
    with pytest.raises(DataError, match="leaves no rows to train on"):
        read(path=section.path, validation=0.5, test=0.5)


def labelled(path: Path, labels: list[Any]) -> str:
    path.write_text("".join(json.dumps({"text": f"t{i}", "label": label}) + "\n" for i, label in enumerate(labels)))
    return str(path)


def test_labels_are_numbered_naturally_and_alike_in_every_split(tmp_path: Path) -> None:
    path = labelled(tmp_path / "a.jsonl", ["10", "2", "1"])
    training = prepare(DataSection(path=path), byte_tokenizer(), "labelled", seed=0)
    assert training is not None and training.labels == ["1", "2", "10"]
    assert [row["label"] for row in training] == [2, 1, 0]
    other = DataSection(path=path, validation=labelled(tmp_path / "v.jsonl", ["10", "10"]))
    held = prepare(other, byte_tokenizer(), "labelled", split="validation", seed=0, label_map=training.labels)
    assert held is not None and [row["label"] for row in held] == [2, 2]
    strange = DataSection(path=path, validation=labelled(tmp_path / "w.jsonl", ["3"]))
    with pytest.raises(DataError, match="labels the training rows lack: 3"):
        prepare(strange, byte_tokenizer(), "labelled", split="validation", seed=0, label_map=training.labels)


@pytest.mark.parametrize(
    ("labels", "names", "found"),
    [([0.5, 2.0], None, [0.5, 2.0]), ([3, 1], ["1", "3"], [1, 0]), ([["a", "b"], ["b"]], ["a", "b"], [[0, 1], [1]]), ([True, False], ["0", "1"], [1, 0])],  # noqa: E501
)  # fmt: skip
def test_kinds_of_labels(tmp_path: Path, labels: list[Any], names: Any, found: Any) -> None:
    data = prepare(DataSection(path=labelled(tmp_path / "a.jsonl", labels)), byte_tokenizer(), "labelled", seed=0)
    assert data is not None and data.labels == names and [row["label"] for row in data] == found
