"""How much text the targets of a row stand for: what makes losses under different tokenizers comparable.

Over the rows of a document the sizes add up to its own, whatever the tokenizer is and however the document is cut up, as long
as every token is a target of one row. A token counts for the text from the end of the token before it to its own end; the end
token counts for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Encoding


class TextSize:
    """A document with the place of each of its tokens in the text.

    Args:
        count: number of tokens.
        encoding: of a fast tokenizer; None where places are not known.
        framed: whether the first token is a start token, which is no text.
    """

    def __init__(self, text: str, count: int, encoding: Encoding | None, framed: bool) -> None:
        self.text, self.count, self.encoding, self.framed = text, count, encoding, framed

    def of(self, places: Sequence[int], trained: Sequence[int]) -> dict[str, int]:
        """Return the bytes (UTF-8) and words (between white space) of a row's targets; nothing where they are not known.

        Args:
            places: index in the document of each token of the row, without a gap.
            trained: a 0 or 1 for each: whether it is a target. Targets follow each other.
        """
        targets = [place for place, one in zip(places, trained) if one]
        begin = self._end(targets[0] - 1)
        end = len(self.text) if targets[-1] == self.count - 1 else self._end(targets[-1])
        if begin is None or end is None:
            return {}
        part, before = self.text[begin:end], self.text[begin - 1 : begin]
        inside = bool(part and before) and not before.isspace() and not part[0].isspace()
        return {"bytes": len(part.encode()), "words": len(part.split()) - inside}

    def _end(self, place: int) -> int | None:
        """Return how many characters of the text the tokens up to a place cover; None where that is not known."""
        if place < 0 or (place == 0 and self.framed):
            return 0
        span = None if self.encoding is None else self.encoding.token_to_chars(place)
        return None if span is None else min(int(span[1]), len(self.text))
