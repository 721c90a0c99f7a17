"""Training a tokenizer on the rows of a recipe (`tokenizer.train`), by the `tokenizers` library.

The result is kept in `$LLMRECIPE_CACHE/tokenizers`, keyed by the content of the data, the options and the code. The same
data and options give the same file, on any number of threads: pieces are numbered by a rule of their own, and the scores of a
unigram model, which the library adds up in an order that changes from run to run, are rounded to six places.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llmrecipe.core.cache_sweep import UNFINISHED, mark_used, sweep
from llmrecipe.core.console import lasting, say_aside
from llmrecipe.core.errors import DataError, ModelError
from llmrecipe.core.foreign import parse_json, read_json
from llmrecipe.core.paths import cache_root
from llmrecipe.data import texts
from llmrecipe.data.cache import table_key
from llmrecipe.data.formats.splits import Part
from llmrecipe.data.texts import parts_of, texts_of
from llmrecipe.recipe.data_section import DataSection
from llmrecipe.recipe.schema import TokenizerTrainingSection
from llmrecipe.recipe.trained_tokenizer import special_tokens

FACTS = "facts.json"
TRIED = 1000
"""Held-out rows that the tokenizer is tried on."""
PENALTY = 0.0256 + 1e-6
"""What the library adds to the lowest score for at most 256 bytes that no text has, 0.0001 each, in an order of its own."""
CONTINUES = "##"
Texts = Callable[[], Iterator[str]]
"""Gives all texts each time it is called."""

logger = logging.getLogger("llmrecipe")


def trained_tokenizer(train: TokenizerTrainingSection) -> Path:
    """Return the folder of the tokenizer that a section describes, trained now or earlier.

    Raises:
        DataError: there are no training rows, or no text in them.
        ModelError: the vocabulary is too small or too large for the data.
    """
    data, kind = train.source()
    parts, held_out = parts_of(data, "train"), parts_of(data, "validation")
    folder = cache_root() / "tokenizers" / _key(train, data, kind, [parts, held_out])
    if _intact(folder):
        mark_used(folder)
        return folder
    names = ", ".join(part.reader.name for part in parts)
    say_aside(f"training a tokenizer of {train.vocab_size:,} tokens on {names}", progress=True)
    with lasting("training the tokenizer"):
        made, read = _train(train, lambda: texts_of(parts, data, kind, train.rows))
    # Without a validation split the training texts are what there is to try it on.
    tried = texts_of(held_out or parts, data, kind, TRIED)
    facts = {
        "algorithm": train.algorithm,
        "vocab_size": len(made),
        "trained_bytes": read,
        "tried_on": "validation" if held_out else "train",
        **try_on(made, tried),
    }
    _keep(made, facts, folder)
    sweep((cache_root() / "tokenizers").glob("*"))
    return folder


def training_facts(train: TokenizerTrainingSection) -> dict[str, Any]:
    """Return what is known of a trained tokenizer: its size, and how it does on held-out text (see `try_on`)."""
    facts: dict[str, Any] = read_json(trained_tokenizer(train) / FACTS)["facts"]
    return facts


def try_on(tokenizer: PreTrainedTokenizerFast, texts: Iterator[str]) -> dict[str, Any]:
    """Measure a tokenizer on texts: texts, bytes, tokens, bytes a token, and the share of texts that decoding gives back."""
    count = size = tokens = same = 0
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        count, size, tokens = count + 1, size + len(text.encode()), tokens + len(ids)
        same += tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    return {
        "texts": count,
        "bytes": size,
        "tokens": tokens,
        "bytes_per_token": size / tokens if tokens else None,
        "round_trip": same / count if count else None,
    }


def _key(train: TokenizerTrainingSection, data: DataSection, kind: str, splits: Sequence[Sequence[Part]]) -> str:
    return table_key(
        {
            "data": [[(part.reader.fingerprint(remember=True), part.keep) for part in parts] for parts in splits],
            "read": [kind, data.format, data.columns, data.drop_fields, data.system],
            "train": train.model_dump(mode="json", exclude={"replace"}),
            "code": [
                tokenizers.__version__,
                *(hashlib.sha256(Path(f).read_bytes()).hexdigest() for f in (__file__, texts.__file__)),
            ],
        }
    )


def _intact(folder: Path) -> bool:
    """Tell whether a folder holds a whole tokenizer; a damaged one is removed."""
    if not folder.is_dir():
        return False
    try:
        kept = parse_json((folder / FACTS).read_bytes())
        if all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == value for name, value in kept["files"].items()):
            return True
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.info("%s: %s", folder, error)
    logger.warning("%s: this tokenizer of the cache is damaged; it is trained again", folder)
    shutil.rmtree(folder, ignore_errors=True)
    return False


def _keep(tokenizer: PreTrainedTokenizerFast, facts: dict[str, Any], folder: Path) -> None:
    """Write a tokenizer under a temporary name and rename it; where another process was first, its own is the same."""
    aside = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}{UNFINISHED}")
    try:
        aside.mkdir(parents=True)
        tokenizer.save_pretrained(aside)
        files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(aside.iterdir())}
        (aside / FACTS).write_text(json.dumps({"facts": facts, "files": files}), encoding="utf-8")
        aside.rename(folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        if not _intact(folder):
            raise ModelError(
                f"{folder.parent}: the trained tokenizer cannot be written ({error.strerror or error}); free some space, or "
                "set LLMRECIPE_CACHE to another folder"
            ) from error


def _train(train: TokenizerTrainingSection, texts: Texts) -> tuple[PreTrainedTokenizerFast, int]:
    """Train, check the size and return the tokenizer with the number of bytes it has read."""
    read = 0

    def counted() -> Iterator[str]:
        nonlocal read
        read = 0
        for text in texts():
            read += len(text.encode())
            yield text

    roles = special_tokens(train)
    special = [*roles.values(), *train.special.extra]
    raw = {"bpe": _bpe, "unigram": _unigram, "wordpiece": _wordpiece}[train.algorithm](
        train.vocab_size, special, roles, counted
    )
    if not read:
        raise DataError("tokenizer.train: the training rows have no text")
    raw.add_special_tokens(special)
    size = raw.get_vocab_size()
    if size != train.vocab_size:
        way = "small" if size > train.vocab_size else "large"
        why = "its characters alone need" if size > train.vocab_size else "it has material for"
        raise ModelError(
            f"tokenizer.train.vocab_size: {train.vocab_size} is too {way} for the {read:,} bytes of the training rows: {why} "
            f"{size} tokens; set tokenizer.train.vocab_size={size}" + (" or less" if way == "large" else " or more")
        )
    _frame(raw, roles)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        **{f"{role}_token": token for role, token in roles.items()},
        extra_special_tokens=list(train.special.extra),
        model_input_names=["input_ids", *(["token_type_ids"] if "cls" in roles else []), "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    return tokenizer, read


def _byte_level(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _bpe(size: int, special: list[str], roles: dict[str, str], texts: Texts) -> Tokenizer:
    """Byte-level BPE as GPT-2 has it."""
    tokenizer = _byte_level(models.BPE())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def _unigram(size: int, special: list[str], roles: dict[str, str], texts: Texts) -> Tokenizer:
    """Unigram language model of pieces (arXiv 1804.10959) over bytes."""
    tokenizer = _byte_level(models.Unigram())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    try:
        tokenizer.train_from_iterator(texts(), trainer)
    except Exception as error:  # the library raises plain exceptions, here for texts with nothing to learn from
        raise ModelError(f"tokenizer.train: no unigram model can be made of the training rows ({error})") from error
    vocabulary = json.loads(tokenizer.to_str())["model"]["vocab"]
    scores = {piece: float(score) for piece, score in vocabulary if piece not in special}
    lowest = min(scores.values())
    known = set(alphabet)

    def settled(piece: str) -> float:
        score = scores[piece]
        return round(lowest if piece in known and score < lowest + PENALTY else score, 6)

    pieces = sorted(((piece, settled(piece)) for piece in scores), key=lambda one: (-one[1], one[0]))
    tokenizer.model = models.Unigram([*((token, 0.0) for token in special), *pieces])
    return tokenizer


def _wordpiece(size: int, special: list[str], roles: dict[str, str], texts: Texts) -> Tokenizer:
    """WordPiece as BERT has it, cased: words split at white space and punctuation, pieces inside a word begin with ##."""

    def blank(model: models.Model) -> Tokenizer:
        made = Tokenizer(model)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece(prefix=CONTINUES, cleanup=False)
        return made

    # The library numbers characters in an order that changes from run to run and breaks ties between pairs by these numbers,
    # so they are given in order, as special tokens of the trainer alone.
    words = blank(models.WordPiece(unk_token=roles["unk"]))
    starts: set[str] = set()
    inside: set[str] = set()
    for text in texts():
        for word, _ in words.pre_tokenizer.pre_tokenize_str(text):
            starts.add(word[0])
            inside.update(word[1:])
    first = [*special, *sorted(starts), *(f"{CONTINUES}{letter}" for letter in sorted(inside))]
    trainer = trainers.WordPieceTrainer(vocab_size=max(size, len(first)), special_tokens=first, show_progress=False)
    words.train_from_iterator(texts(), trainer)
    return blank(models.WordPiece(words.get_vocab(), unk_token=roles["unk"], continuing_subword_prefix=CONTINUES))


def _frame(tokenizer: Tokenizer, roles: dict[str, str]) -> None:
    """Make the tokenizer write `bos A`, and `bos A sep B` of two texts; with a class token, as BERT, `cls A sep B sep`."""
    start, sep = roles.get("cls", roles.get("bos")), roles.get("sep")
    if start is None and sep is None:
        return
    end = f" {sep}:0" if "cls" in roles and sep else ""
    before = f"{start}:0 " if start else ""
    between = f" {sep}:0" if sep else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{before}$A:0{end}",
        pair=f"{before}$A:0{between} $B:1" + end.replace(":0", ":1"),
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (start, sep) if token],
    )
