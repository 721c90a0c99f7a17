"""How large the compressed buffers of an Arrow message are once unpacked, read from its header.

A header is a flatbuffer: a table begins with the distance back to its list of offsets, one for each field in the order of the
schema (Apache Arrow, format/Message.fbs). A compressed buffer begins with its unpacked size in 8 bytes; -1 says that it is
stored as it is.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

HEADER = 2
"""Field of a message that holds its record batch or dictionary."""
DATA = 1
"""Field of a dictionary that holds its record batch."""
BUFFERS, COMPRESSION = 2, 3
"""Fields of a record batch."""


def arrow_unpacked(message: pa.ipc.Message) -> int:
    """Return the bytes that the compressed buffers of a message take once unpacked; 0 where nothing is compressed.

    Raises:
        ValueError: its header is damaged.
    """
    if message.type not in ("record batch", "dictionary"):
        return 0
    header, body = message.metadata.to_pybytes(), message.body
    try:
        table = _field(header, _follow(header, 0), HEADER)
        if message.type == "dictionary" and table is not None:
            table = _field(header, _follow(header, table), DATA)
        batch = None if table is None else _follow(header, table)
        if batch is None or _field(header, batch, COMPRESSION) is None or body is None:
            return 0
        place = _field(header, batch, BUFFERS)
        return 0 if place is None else _sizes(header, _follow(header, place), body)
    except struct.error as error:
        raise ValueError("the header of a message is damaged") from error


def _sizes(header: bytes, vector: int, body: pa.Buffer) -> int:
    (count,) = struct.unpack_from("<I", header, vector)
    total = 0
    for index in range(count):
        start, length = struct.unpack_from("<qq", header, vector + 4 + 16 * index)
        if length >= 8 and 0 <= start <= len(body) - 8:
            total += max(struct.unpack_from("<q", body, start)[0], 0)
    return total


def _follow(data: bytes, at: int) -> int:
    """Return where the object is whose relative offset stands at a place."""
    return at + int(struct.unpack_from("<I", data, at)[0])


def _field(data: bytes, table: int, number: int) -> int | None:
    """Return where a field of a table is; None where the table leaves it out."""
    offsets = table - int(struct.unpack_from("<i", data, table)[0])
    if offsets < 0:
        raise struct.error("outside of the header")
    (size,) = struct.unpack_from("<H", data, offsets)
    if 4 + 2 * number >= size:
        return None
    (offset,) = struct.unpack_from("<H", data, offsets + 4 + 2 * number)
    return table + int(offset) if offset else None
