"""Calls a tokenizer on texts in bounded time: the patterns in a `tokenizer.json` are somebody else's, and so are the texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmrecipe.core.errors import DataError
from llmrecipe.core.foreign import is_panic, reason_of
from llmrecipe.core.time_limit import SECONDS, BoundError, awaited

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

PER_CHARACTER = 1e-5
"""Seconds of CPU time a character may take on top of `SECONDS`: ten times what the slowest tokenizers of this kind need."""
PATTERNS = "the patterns of its pre_tokenizer or normalizer (tokenizer.json) are the usual reason; take another tokenizer.path"


def call_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str],
    pair: str | Sequence[str] | None = None,
    **options: object,
) -> BatchEncoding:
    """Return what a tokenizer makes of texts, or of pairs of them.

    A slow tokenizer, written in Python, has no patterns of its own and holds the interpreter's lock: it is simply called.

    Args:
        options: those of the tokenizer's own call.

    Raises:
        DataError: it takes far longer than a tokenizer should, or gives up.
    """
    call: Any = tokenizer
    given: list[Any] = [_listed(texts)] if pair is None else [_listed(texts), _listed(pair)]
    if not getattr(tokenizer, "is_fast", False):
        found: BatchEncoding = call(*given, **options)
        return found
    every = [text for part in given for text in ([part] if isinstance(part, str) else part)]
    characters = sum(map(len, every))
    try:
        return awaited(lambda: call(*given, **options), SECONDS + PER_CHARACTER * characters)
    except BoundError as error:
        reason = str(error)
        cause: BaseException = error
    except BaseException as error:  # the library gives up on a pattern by a panic, which is no `Exception`
        if not is_panic(error):
            raise
        reason, cause = reason_of(error), error
    longest = max(every, key=len)
    raise DataError(
        f"tokenizer: it cannot encode {len(every):,} texts of {characters:,} characters, the longest {longest!r:.80}: "
        f"{reason}; {PATTERNS}"
    ) from cause


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Return whether a tokenizer puts its BOS before a text, and its end token after it."""
    ids = list(call_tokenizer(tokenizer, "a")["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return bos is not None and ids[:1] == [bos], eos is not None and ids[-1:] == [eos]


def _listed(texts: str | Sequence[str]) -> str | list[str]:
    return texts if isinstance(texts, str) else list(texts)
