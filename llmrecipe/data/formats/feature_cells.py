"""Reading the cell that names a row's picture, or its file of features."""

from __future__ import annotations

from llmrecipe.data.cache import keep_picture
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.formats.data_format import Conversion, Row

COLUMNS = ("image", "features")
"""Columns that name a file: a picture, or a file of vectors; bytes of a picture may be in the cell itself."""


def feature_file(row: Row, conversion: Conversion) -> str:
    """Return the path of a row's file, which is in the folder of its rows; bytes in the cell are stored in the cache first.

    Whether the file can be read is known when it is (`data.features`).

    Raises:
        BadRow: the cell is no path, or one that leaves the folder.
    """
    column = next(name for name in COLUMNS if name in row)
    cell = row[column]
    if isinstance(cell, dict):
        if cell.get("bytes"):
            return str(keep_picture(cell["bytes"]))
        cell = cell.get("path")
    if isinstance(cell, bytes) and cell:
        return str(keep_picture(cell))
    if not isinstance(cell, str) or not cell:
        raise BadRow(f"'{column}' is not a path", f"{cell!r:.80}")
    if conversion.base is None:
        raise BadRow(f"'{column}' is a path, and these rows are in no folder", f"{cell!r:.80}")
    path = (conversion.base / cell).resolve()
    if not path.is_relative_to(conversion.base.resolve()):
        raise BadRow(f"the {column} file is outside of the folder of its rows", f"{cell!r:.80}")
    return str(path)
