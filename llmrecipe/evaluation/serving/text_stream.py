"""The text of an answer while its tokens arrive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llmrecipe.engine.answer_ends import first_stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"
"""What stands for the first bytes of a character whose other bytes are in the next token."""
JOINED = len(" n't")
"""Characters behind which a tokenizer that cleans up spaces may still take one away."""


def cleans_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer takes spaces away before punctuation when it decodes."""
    return bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))


class TextStream:
    """Turns tokens into pieces of text; all pieces joined are the text of the whole answer.

    What may still change is held back: half a character, the end where a stop text may begin, spaces that are cleaned up.

    Args:
        decode: returns the text of all tokens so far.
        stops: texts before which the answer ends.
        cleans: whether `decode` takes spaces away before punctuation.
        stripped: whether white space around the text is taken off.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stops: Sequence[str] = (),
        cleans: bool = False,
        stripped: bool = False,
    ):
        self.decode, self.stops, self.stripped = decode, stops, stripped
        self.held = max([JOINED if cleans else 0, *(len(stop) - 1 for stop in stops)])
        self.tokens: list[int] = []
        self.sent = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """Add a token and return the text that is certain now; empty once a stop text was found."""
        if self.stopped:
            return ""
        self.tokens.append(token)
        text = self.decode(self.tokens)
        if (stop := first_stop(text, self.stops)) is not None:
            self.stopped = True
            return self._send(text[:stop])
        certain = text[: len(text) - self.held] if self.held else text
        return "" if text.endswith(BROKEN) else self._send(certain)

    def close(self) -> str:
        """Return what was held back, when no token follows."""
        return "" if self.stopped else self._send(self.decode(self.tokens))

    def _send(self, text: str) -> str:
        text = text.strip() if self.stripped else text
        if not text.startswith(self.sent):
            return ""
        piece = text[len(self.sent) :]
        self.sent = text
        return piece
