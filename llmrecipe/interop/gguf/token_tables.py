"""A tokenizer as a GGUF file describes it.

llama.cpp has the algorithms itself and reads their tables. `gpt2`: byte-level BPE by merges, on words cut by one of a list of
patterns that the file calls by name (`tokenizer.ggml.pre`). `llama`: SentencePiece's BPE with bytes for what is in no piece,
where the pair with the best score of its union is merged first. A tokenizer that neither can express is refused, and so is one
whose prompts would be cut in another way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from llmrecipe.core.errors import ModelError
from llmrecipe.interop.gguf.cutting import SPACE, Cuts, as_llama_cpp, cut_otherwise, cuts_of, other_texts, probe_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of a token in a file."""
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
ENDS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {CONTRACTIONS + r"\p{N}{1,3}" + ENDS: "llama-bpe", CONTRACTIONS + r"\p{N}" + ENDS: "qwen2"}
"""Pattern that cuts words before byte-level BPE -> its name in a file."""
WHOLE_WORDS = ("llama-bpe",)
"""Names with which llama.cpp takes a word that is in the vocabulary as it is, without merges (`ignore_merges`)."""
SHOWN = 3
"""Most texts that a note names."""


@dataclass(frozen=True)
class TokenTables:
    """The tables of a tokenizer."""

    model: str
    """`gpt2` or `llama`."""
    pre: str
    """Name of the pattern that cuts words."""
    tokens: list[str]
    kinds: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    space_first: bool = False
    """A space is put before every part of a text."""
    lead: str = ""
    """What the chat template of the file writes before all else."""
    notes: list[str] = field(default_factory=list)


def token_tables_of(tokenizer: PreTrainedTokenizerBase, size: int) -> TokenTables:
    """Return the tables of a tokenizer for an embedding of `size` rows.

    Raises:
        ModelError: llama.cpp has no such tokenizer, naming the part.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refusal("it is no tokenizer of the tokenizers library")
    parts = json.loads(backend.to_str())
    model = parts["model"]
    if model["type"] != "BPE":
        raise _refusal(f"its model is {model['type']}, and a file written here holds BPE")
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    tokens, kinds = _tokens(tokenizer, model, parts["added_tokens"], size)
    if model.get("byte_fallback"):
        if kinds.count(BYTE) < 256:
            raise _refusal("it has no token for some of the 256 bytes, which llama.cpp writes unknown text in")
        scores = _scores(tokens, kinds, merges)
        (first, lead), notes = _spaces(tokenizer, parts)
        return TokenTables("llama", "default", tokens, kinds, scores=scores, space_first=first, lead=lead, notes=notes)
    normalizer = (parts["normalizer"] or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise _refusal(f"it changes text before cutting it ({normalizer})")
    notes = ["llama.cpp does not bring text into the normal form NFC, as this tokenizer does"] if normalizer else []
    pre = _pattern_name(parts["pre_tokenizer"])
    if bool(model.get("ignore_merges")) != (pre in WHOLE_WORDS):
        raise _refusal(f"llama.cpp's '{pre}' and ignore_merges={model.get('ignore_merges', False)} do not go together")
    theirs = as_llama_cpp(tokenizer, None)
    if (refused := _prompts_refused(tokenizer, theirs)) is not None:
        raise refused
    notes += _other_cuts(tokenizer, theirs)
    # The separator of a merge is a space, so a space inside is written as byte-level BPE spells it.
    return TokenTables("gpt2", pre, tokens, kinds, [" ".join(p.replace(" ", "\u0120") for p in m) for m in merges], notes=notes)


def _refusal(why: str) -> ModelError:
    return ModelError(
        f"export --to gguf: the tokenizer has no counterpart in llama.cpp that is written here: {why}; llama.cpp's own "
        "converter knows more (--converter convert_hf_to_gguf.py), and --to merged keeps the tokenizer as it is"
    )


def _tokens(
    tokenizer: PreTrainedTokenizerBase, model: Mapping[str, Any], added: Sequence[Mapping[str, Any]], size: int
) -> tuple[list[str], list[int]]:
    """Return the text and the kind of every row of the embedding; rows without a token are unused."""
    known = {number: (text, NORMAL) for text, number in model["vocab"].items()}
    if model.get("byte_fallback"):
        for byte in range(256):
            text = f"<0x{byte:02X}>"
            if text in model["vocab"]:
                known[model["vocab"][text]] = (text, BYTE)
    for token in added:
        known[token["id"]] = (token["content"], CONTROL if token["special"] else USER_DEFINED)
    if model.get("unk_token") in model["vocab"]:
        known[model["vocab"][model["unk_token"]]] = (model["unk_token"], UNKNOWN)
    if known and max(known) >= size:
        raise _refusal(f"it has token {max(known)}, and the embedding {size} rows")
    rows = [known.get(number, (f"[PAD{number}]", UNUSED)) for number in range(size)]
    return [text for text, _ in rows], [kind for _, kind in rows]


def _pattern_name(pre: Mapping[str, Any] | None) -> str:
    """Return llama.cpp's name of the way in which a byte-level tokenizer cuts words."""
    steps = list(pre["pretokenizers"]) if pre and pre["type"] == "Sequence" else [pre] if pre else []
    if steps and steps[-1]["type"] == "ByteLevel" and not steps[-1]["add_prefix_space"]:
        before, own = steps[:-1], steps[-1].get("use_regex", True)
        if own and not before:
            return "gpt-2"
        if own and [(s["type"], s.get("individual_digits")) for s in before] == [("Digits", True)]:
            return "smollm"
        if not own and len(before) == 1 and before[0]["type"] == "Split" and not before[0]["invert"]:
            pattern = before[0]["pattern"].get("Regex")
            if before[0]["behavior"] == "Isolated" and pattern in PATTERNS:
                return PATTERNS[pattern]
    raise _refusal("it cuts words by a pattern that is none of gpt-2, smollm, llama-bpe and qwen2")


def _spaces(tokenizer: PreTrainedTokenizerBase, parts: Mapping[str, Any]) -> tuple[tuple[bool, str], list[str]]:
    """Return whether a space is put before every part of a text, what the chat template leads with, and notes.

    Metaspace puts a space before the start of a text, and after special tokens none. Where a conversation has such tokens, the
    file puts a space nowhere; a conversation that starts with other text gets it from its template.

    Raises:
        ModelError: text is changed in another way as well, or neither cuts the prompts of this model as the tokenizer does.
    """
    normalizer, pre = parts["normalizer"] or {}, parts["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    spaces = [s for s in steps if s["type"] == "Replace" and s["pattern"].get("String") == " " and s["content"] == SPACE]
    first = [s for s in steps if s["type"] == "Prepend" and s["prepend"] == SPACE]
    metaspace = pre.get("type") == "Metaspace"
    if len(spaces) + len(first) < len(steps) or (pre and not metaspace) or not (spaces or metaspace):
        raise _refusal("it changes text in another way than by writing spaces as \u2581")
    if metaspace and pre.get("split", True) and any(SPACE in text[1:] for text in parts["model"]["vocab"]):
        raise _refusal("it cuts words at spaces, and has pieces with a space inside")
    choices: Sequence[tuple[bool, str]] = ((True, ""), (False, ""), (False, " "))
    if not metaspace or pre.get("prepend_scheme") == "never":
        choices = ((bool(first), ""),)
    refusals = []
    for choice in choices:
        theirs = as_llama_cpp(tokenizer, choice[0])
        if (refused := _prompts_refused(tokenizer, theirs, choice[1])) is None:
            return choice, _other_cuts(tokenizer, theirs)
        refusals.append(refused)
    raise refusals[0]


def _prompts_refused(tokenizer: PreTrainedTokenizerBase, theirs: Cuts, lead: str = "") -> ModelError | None:
    """Return why prompts in the form the model was trained on cannot be cut by llama.cpp; None where they can."""
    for text, own, other in cut_otherwise(cuts_of(tokenizer), lambda text: theirs(lead + text), probe_prompts(tokenizer)):
        return _refusal(f"llama.cpp would cut the prompt {text!r} into {other}, and this tokenizer cuts it into {own}")
    return None


def _other_cuts(tokenizer: PreTrainedTokenizerBase, theirs: Cuts) -> list[str]:
    """Return a note on texts that llama.cpp cuts in another way, where there are any."""
    texts = [text for text, _, _ in cut_otherwise(cuts_of(tokenizer), theirs, other_texts(tokenizer))]
    if not texts:
        return []
    named = ", ".join(map(repr, texts[:SHOWN]))
    more = f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return [f"llama.cpp cuts prompts as this tokenizer does, and some other texts otherwise: {named}{more}"]


def _scores(tokens: Sequence[str], kinds: Sequence[int], merges: Sequence[tuple[str, ...]]) -> list[float]:
    """Return a score for each token, by which merging the best union first is merging in the order of `merges`.

    Raises:
        ModelError: there are no such scores.
    """
    normal = {text for text, kind in zip(tokens, kinds, strict=True) if kind == NORMAL}
    unions = [union for union, _ in groupby("".join(pair) for pair in merges)]
    pairs = {(t[:cut], t[cut:]) for t in normal for cut in range(1, len(t)) if t[:cut] in normal and t[cut:] in normal}
    if len(set(unions)) < len(unions) or not pairs <= set(merges):
        raise _refusal("its merges are not those that scores of its pieces would give")
    order = {union: -float(place) for place, union in enumerate(unions)}
    rest = -float(len(unions))
    return [(order.get(text, rest) if kind == NORMAL else 0.0) for text, kind in zip(tokens, kinds, strict=True)]
