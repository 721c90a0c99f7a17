"""Files that rows name: read, prepared, kept by content; what is damaged, missing or too large is named with its row."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from llmrecipe.core.errors import DataError
from llmrecipe.data import prepare
from llmrecipe.data.features import table as tables
from llmrecipe.data.features.read_file import FeatureReader
from llmrecipe.data.overlap import shared_rows
from llmrecipe.data.prepare import TokenData
from llmrecipe.recipe.data_section import DataSection
from tests.data.toys import byte_tokenizer
from tests.pictures import save_picture, save_rows

SEEN: list[str] = []


def reader(fingerprint: str = "a", **more: Any) -> FeatureReader:
    """Pictures as (channels, height, width) of 0 to 255, and how often one was prepared in `SEEN`."""

    def prepared(picture: Any) -> np.ndarray:
        SEEN.append(picture.mode)
        array = np.asarray(picture, dtype=np.float32)
        return array[None] if picture.mode == "L" else array.transpose(2, 0, 1)

    return FeatureReader(prepared, fingerprint, lambda shape: shape[0], lambda folder: None, **more)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMRECIPE_CACHE", str(tmp_path / "cache"))
    SEEN.clear()


def read(path: Path, rows: str = "labelled_images", **more: Any) -> TokenData:
    options = {k: more.pop(k) for k in list(more) if k in DataSection.model_fields}
    found = prepare(DataSection(path=str(path), **options), byte_tokenizer(), rows, seed=0, **{"reader": reader(), **more})
    assert isinstance(found, TokenData)
    return found


def folder_of(tmp_path: Path, count: int = 3) -> Path:
    for i in range(count):
        save_picture(tmp_path / "data" / "in" / f"{i}.png", i)
    rows = [{"image": f"in/{i}.png", "label": "ab"[i % 2], "text": f"picture {i}"} for i in range(count)]
    return save_rows(tmp_path / "data", "train", rows).parent


def test_a_row_brings_the_array_of_its_own_picture(tmp_path: Path) -> None:
    """Pixel for pixel, from disk and from memory; a path named twice is prepared once."""
    folder = folder_of(tmp_path)
    for cached in (True, False):
        SEEN.clear()
        data = read(folder, cache=cached)
        assert len(SEEN) == 3 and data.labels == ["a", "b"] and [row["label"] for row in data] == [0, 1, 0]
        for i, row in enumerate(data):
            wanted = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8).transpose(2, 0, 1)
            assert row["features"].shape == (3, 8, 8) and row["features"].slots == 3
            assert np.array_equal(row["features"].load(), wanted)
    assert read(folder, rows="pictured_words")[1]["features"].load().shape == (3, 8, 8)


def test_tables_are_kept_by_the_content_of_files_and_by_what_prepares_them(tmp_path: Path) -> None:
    """The same again prepares nothing; a changed picture, another processor or a damaged table do."""
    folder = folder_of(tmp_path)
    first = read(folder)
    assert len(SEEN) == 3
    assert read(folder).content() == first.content() and len(SEEN) == 3
    other = read(folder, reader=reader("b"))
    assert len(SEEN) == 6 and other.key != first.key
    save_picture(folder / "in" / "1.png", 9)
    changed = read(folder)
    assert len(SEEN) == 9 and changed.key != first.key
    assert changed.content() != first.content(), "a run that goes on must notice"
    wanted = changed[1]["features"].load()
    held = next((tmp_path / "cache" / "features").glob(f"*/{changed.tables[0].features.key}/{tables.VALUES}"))
    held.write_bytes(b"\1" * held.stat().st_size)
    os.utime(held, ns=(1, 1))
    assert np.array_equal(read(folder)[1]["features"].load(), wanted)
    assert len(SEEN) == 12, "a table with other bytes is prepared again"


def test_grey_pictures_and_turned_ones(tmp_path: Path) -> None:
    """The colours are those of the reader, and a camera's note that a picture lies on its side is followed."""
    from PIL import Image

    path = tmp_path / "a.jpg"
    pixels = np.zeros((8, 4, 3), np.uint8)
    pixels[:4] = 255
    turned = Image.fromarray(pixels)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(path, exif=exif, quality=95)
    found = reader(mode="L").read(path, "x:1")
    assert found.shape == (1, 4, 8) and found[0, :, :3].max() < 80 and found[0, :, 5:].min() > 180


def vectors(path: Path, **arrays: np.ndarray) -> Path:
    {".npz": lambda: np.savez(path, **arrays), ".safetensors": lambda: save_file(arrays, str(path))}.get(
        path.suffix, lambda: np.save(path, next(iter(arrays.values())))
    )()
    return path


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_files_of_vectors(suffix: str, tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float64).reshape(2, 3)
    found = reader().read(vectors(tmp_path / f"a{suffix}", features=values), "x:1")
    assert found.dtype == np.float32 and np.array_equal(found, values)


def test_boxes_become_seven_numbers() -> None:
    """x1, y1, x2, y2, width, height, area."""
    path = Path(os.environ["LLMRECIPE_CACHE"]).parent / "a.npz"
    vectors(path, features=np.ones((1, 2)), boxes=np.array([[0.25, 0.5, 0.75, 1.0]]))
    assert reader().read(path, "x:1").tolist() == [[1, 1, 0.25, 0.5, 0.75, 1.0, 0.5, 0.5, 0.25]]


def bad_files(folder: Path) -> dict[str, Path]:
    """Name -> a file that cannot be used."""
    good = save_picture(folder / "good.png", 0, side=64)
    made = {"cut": folder / "cut.png", "text": folder / "text.png", "empty": folder / "empty.png", "pickle": folder / "p.npy"}
    made["cut"].write_bytes(good.read_bytes()[:2000])
    made["text"].write_text("no picture")
    made["empty"].write_bytes(b"")
    np.save(made["pickle"], np.array([{"a": 1}], dtype=object), allow_pickle=True)
    made["flat"] = vectors(folder / "flat.npy", features=np.ones(3))
    made["words"] = vectors(folder / "words.npy", features=np.array([["a", "b"]]))
    made["infinite"] = vectors(folder / "infinite.npy", features=np.array([[1.0, np.inf]]))
    made["several"] = vectors(folder / "several.npz", one=np.ones((1, 2)), two=np.ones((1, 2)))
    made["box"] = vectors(folder / "box.npz", features=np.ones((1, 2)), boxes=np.array([[0, 0, 640, 480]]))
    made["torn"] = folder / "torn.npz"
    made["torn"].write_bytes(made["several"].read_bytes()[:100])
    described = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 4)}"
    with zipfile.ZipFile(folder / "shape.npz", "w") as packed:
        packed.writestr("features.npy", b"\x93NUMPY\x01\0" + len(described).to_bytes(2, "little") + described)
    for name, header in HEADERS.items():
        (folder / f"{name}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\0\0")
    made |= {name: folder / f"{name}.safetensors" for name in HEADERS} | {"shape": folder / "shape.npz"}
    (folder / "code.npy").write_bytes(b"\x93NUMPY\x01\0" + (100).to_bytes(2, "little") + b"(" * 100)
    (folder / "program.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    made |= {"code": folder / "code.npy", "program": folder / "program.png"}
    return made


HEADERS = {
    "half": b'{"features": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [0, 4]}}',
    "byte": b'{"features": {"dtype": "F8_E4M3", "shape": [1, 4], "data_offsets": [0, 4]}}',
    "offsets": b'{"features": {"dtype": "F32", "shape": [1, 9], "data_offsets": [0, 4]}}',
    "deep": b"[" * 20_000,
}
"""Headers of files of tensors that NumPy has no type for, or that are damaged."""
BAD = {
    **dict.fromkeys(("shape", "code", *HEADERS), "is damaged or no file of arrays"),
    "program": r"is damaged or no picture \(cannot identify",
    "cut": "is damaged or no picture",
    "text": "is damaged or no picture",
    "empty": "is damaged or no picture",
    "pickle": "is damaged or no file of arrays",
    "torn": "is damaged or no file of arrays",
    "flat": r"an array of shape \(3,\)",
    "words": "of shape .* and type",
    "infinite": "not finite",
    "several": "has the arrays one, two; name the vectors 'features'",
    "box": r"'boxes' must be \(1, 4\) numbers from 0 to 1",
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_used_is_an_error_with_row_and_file(name: str, tmp_path: Path) -> None:
    path = bad_files(tmp_path)[name]
    with pytest.raises(DataError, match=f"^rows:7: {path}.*{BAD[name]}"):
        reader().read(path, "rows:7")


def test_missing_and_damaged_files_stop_the_run_where_rows_name_them(tmp_path: Path) -> None:
    """Though one row in a hundred would be dropped without a word; also where the token table is cached."""
    folder = folder_of(tmp_path)
    read(folder)
    (folder / "in" / "1.png").write_bytes(b"cut")
    with pytest.raises(DataError, match=r"train.jsonl:2: .*in/1.png is damaged"):
        read(folder)
    (folder / "in" / "1.png").unlink()
    with pytest.raises(DataError, match=r"train.jsonl:2: .*in/1.png"):
        read(folder)


def test_bombs_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    """A picture by the size in its header, an archive by its list of contents."""
    from PIL import Image

    bomb = tmp_path / "bomb.png"
    Image.new("1", (3000, 3000)).save(bomb)
    assert bomb.stat().st_size < 10_000
    with pytest.raises(DataError, match=r"3000 x 3000 pixels, more than data.max_pixels=1000000"):
        reader(max_pixels=1_000_000).read(bomb, "x:1")
    held = io.BytesIO()
    np.save(held, np.zeros((1000, 1000)))
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("features.npy", held.getvalue())
    with pytest.raises(DataError, match=r"8,000,128 bytes once unpacked, more than data.max_unpacked=1000"):
        reader(max_unpacked=1000).read(tmp_path / "bomb.npz", "x:1")
    with pytest.raises(DataError, match="max_unpacked"):
        reader(max_unpacked=10).read(vectors(tmp_path / "a.npy", features=np.ones((2, 3))), "x:1")


def test_pictures_that_two_splits_share_are_counted(tmp_path: Path) -> None:
    """Rows without tokens differ by their pictures alone."""
    folder = folder_of(tmp_path)
    save_picture(folder / "in" / "new.png", 50)
    held = save_rows(tmp_path / "other", "train", [{"image": "1.png", "label": "a"}, {"image": "2.png", "label": "b"}]).parent
    save_picture(held / "1.png", 1)
    save_picture(held / "2.png", 77)
    assert shared_rows(read(folder), read(held)) == 1


def test_rows_with_files_are_not_streamed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.streaming: the files that rows name"):
        read(folder_of(tmp_path), streaming=True)


def test_attributes_are_the_tokens_of_whole_words(tmp_path: Path) -> None:
    """A word inside another one is none of them; one that is not in the text drops the row."""
    save_picture(tmp_path / "data" / "0.png", 0)
    row = {"image": "0.png", "text": "a red redder red", "attributes": ["red"]}
    folder = save_rows(tmp_path / "data", "train", [row] * 30 + [{**row, "attributes": ["blue"]}]).parent
    data = read(folder, rows="pictured_words")
    assert len(data) == 30 and data.report.dropped == {"'attributes' names a word that is not in the text": 1}
    text = "".join(byte_tokenizer().decode([i]) for i, mark in zip(data[0]["ids"], data[0]["attribute"]) if mark)
    assert text.replace(" ", "") == "redred"
