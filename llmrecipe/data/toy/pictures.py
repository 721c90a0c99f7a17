"""Seeded generator of the pictures inside the package: one coloured thing on grey, a sentence and a question about it.

    python -m llmrecipe.data.toy.pictures           rewrites llmrecipe/assets/data/pictures

Thing, colour, size and height are drawn independently, so no word of the sentence follows from the others, only from the
picture. A combination of words, radius and place belongs to one split; the shade of grey is free. The files are Arrow tables
with the bytes of PNG pictures of 32 x 32 pixels.
"""

from __future__ import annotations

import argparse
import struct
import zlib
from pathlib import Path
from random import Random
from typing import Any

from llmrecipe.core.paths import ASSETS
from llmrecipe.data.toy.generate import split_of

FOLDER = ASSETS / "data" / "pictures"
SIDE = 32
SIZES = {"train": 640, "valid": 120, "test": 120}
"""Rows of each split."""
THINGS = ("ball", "box", "kite", "hat")
COLOURS = {
    "red": (220, 40, 40),
    "blue": (40, 70, 220),
    "green": (30, 150, 60),
    "yellow": (235, 200, 30),
    "black": (20, 20, 20),
    "pink": (240, 120, 180),
}
RADII = {"small": (3, 4), "big": (6, 7)}
HEIGHTS = {"high": 8, "low": 24}
"""Word -> row of the middle of the thing."""
COLUMNS = (8, 16, 24)
"""Columns of the middle of the thing."""
FORMS = (
    "A {size} {colour} {thing} is {height}.",
    "The {thing} is {size} and {colour}, and it is {height}.",
    "It is a {colour} {thing}, {size} and {height}.",
)

QUESTIONS = ("What is it?", "Which colour is it?", "How big is it?", "Is it high or low?")
"""What a question is about: thing, colour, size, height."""


def covers(thing: str, dx: int, dy: int, r: int) -> bool:
    """Return whether a thing of radius r covers the pixel at (dx, dy) from its middle."""
    if thing == "ball":
        return dx * dx + dy * dy <= r * r
    if thing == "box":
        return max(abs(dx), abs(dy)) <= r - 1
    if thing == "kite":
        return abs(dx) + abs(dy) <= r
    return abs(dy) <= r - 1 and 2 * abs(dx) <= dy + r


def draw_row(rng: Random) -> tuple[str, dict[str, Any]]:
    """Draw a row with the key that decides its split: picture, sentence, the words for the thing, and its name as a label."""
    words = {
        "thing": rng.choice(THINGS),
        "colour": rng.choice(list(COLOURS)),
        "size": rng.choice(list(RADII)),
        "height": rng.choice(list(HEIGHTS)),
    }
    r = rng.randint(*RADII[words["size"]])
    x, y = rng.choice(COLUMNS), HEIGHTS[words["height"]]
    grey, colour = rng.randint(170, 255), COLOURS[words["colour"]]
    pixels = [
        colour if covers(words["thing"], column - x, row - y, r) else (grey, grey, grey)
        for row in range(SIDE)
        for column in range(SIDE)
    ]
    text = rng.choice(FORMS).format(**words)
    row = {"image": png(pixels), "text": text, "attributes": list(words.values()), "label": words["thing"]}
    return f"{words['thing']} {words['colour']} {words['height']} {r} {x}", row


def png(pixels: list[tuple[int, int, int]]) -> bytes:
    """Return the bytes of a PNG picture of SIDE x SIDE pixels, listed row by row."""
    lines = b"".join(
        b"\0" + bytes(value for pixel in pixels[row * SIDE : (row + 1) * SIDE] for value in pixel) for row in range(SIDE)
    )

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")


def picture_rows(seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every split; no picture is in two of them, or twice in one."""
    rng, asking, seen = Random(f"{seed}/pictures"), Random(f"{seed}/questions"), set()
    found: dict[str, list[dict[str, Any]]] = {}
    for split, count in SIZES.items():
        found[split] = []
        while len(found[split]) < count:
            key, row = draw_row(rng)
            if split_of(key) == split and row["image"] not in seen:
                seen.add(row["image"])
                subject = asking.randrange(len(QUESTIONS))
                found[split].append({**row, "question": QUESTIONS[subject], "answer": row["attributes"][subject]})
    return found


def write_pictures(out: Path, seed: int = 0) -> list[Path]:
    """Write the three files and return their paths."""
    import pyarrow as pa

    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for split, own in picture_rows(seed).items():
        texts = dict.fromkeys(("label", "question", "answer"), pa.string())
        names = {"image": pa.binary(), "text": pa.string(), "attributes": pa.list_(pa.string()), **texts}
        table = pa.table({name: pa.array([row[name] for row in own], kind) for name, kind in names.items()})
        paths.append(out / f"{split}.arrow")
        with pa.ipc.new_file(str(paths[-1]), table.schema) as file:
            file.write_table(table)
    return paths


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: write the files and print where."""
    parser = argparse.ArgumentParser(description="Write the generated pictures.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder that receives the files")
    parser.add_argument("--seed", type=int, default=0, help="seed; the committed files use 0")
    options = parser.parse_args(arguments)
    for path in write_pictures(options.out, options.seed):
        print(path)


if __name__ == "__main__":
    main()
