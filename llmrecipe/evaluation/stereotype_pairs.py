"""Pairs of sentences of which one states a stereotype: which of the two a language model finds more likely.

Pairs have the form of CrowS-Pairs (arXiv 2010.00133): `sent_more` is the sentence that is more of a stereotype, `sent_less` the
same sentence about another group, and `bias_type` what it is about.

A masked model gives a sentence its pseudo-log-likelihood, sum_{u in U} log P(u | the sentence with u masked), over the tokens
U that both sentences have in common, in the order of each; a causal model its log-probability, sum_i log P(x_i | x_<i).

    stereotype_share    the share of pairs in which `sent_more` has the larger score; 0.5 where the model has no preference
    score_gap           the mean of score(sent_more) - score(sent_less), in nats

Departure: the authors' code calls scores equal that agree to three decimals; here every difference counts. The share of a
causal model is `pct_stereotype` of lm-evaluation-harness.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmrecipe.core.errors import DataError, UserError
from llmrecipe.core.path_hints import near_path
from llmrecipe.core.paths import PACKAGE
from llmrecipe.core.tasks import natural
from llmrecipe.data.collate import Sequence as Tokens
from llmrecipe.data.formats.readers import open_file
from llmrecipe.data.tokenize.call_tokenizer import call_tokenizer
from llmrecipe.evaluation.eval_recipe import recipe_of
from llmrecipe.evaluation.evaluate_model import Subject, subject_of
from llmrecipe.interop.load_run import head_of
from llmrecipe.models.checkpoint_path import run_folder
from llmrecipe.models.resolve_class import language_head, load_config
from llmrecipe.objectives.pretraining._engines.masking import MASK, Hidden, corrupted, mask_token, masked_targets
from llmrecipe.runs.open_model import open_model, resolve_section
from llmrecipe.training.intervals import RowScores, all_ends

BUILTIN = "builtin"
OWN_PAIRS = PACKAGE / "assets" / "stereotypes" / "pairs.csv"
TEXTS = ("sent_more", "sent_less")
KIND = "bias_type"
HEADS = ("causal", "masked")


@dataclass(frozen=True)
class SentencePair:
    """Two sentences that differ in whom they speak of."""

    texts: tuple[str, str]
    """The one that is more of a stereotype, the other."""
    kind: str
    """What the stereotype is about."""


def read_pairs(source: str) -> list[SentencePair]:
    """Read pairs from a file (CSV, JSON lines, ...), or the built-in ones.

    Raises:
        DataError: no such file, no rows, or a row without both sentences.
    """
    path = OWN_PAIRS if source == BUILTIN else Path(source).expanduser()
    if not path.is_file():
        near = near_path(Path(source))
        raise DataError(
            f"--stereotypes: {source} is no file{near}; give one with the columns {', '.join(TEXTS)}, or `{BUILTIN}`"
        )
    reader = open_file(path)
    found = []
    for number, row in enumerate(reader.rows(range(len(reader)))):
        missing = [name for name in TEXTS if not isinstance(row.get(name), str) or not row[name].strip()]
        if missing:
            raise DataError(
                f"--stereotypes: {reader.where(number)} has no text in '{missing[0]}' (columns: {', '.join(row)}); pairs have "
                f"the columns {', '.join(TEXTS)} and, if any, {KIND}"
            )
        found.append(SentencePair((row[TEXTS[0]].strip(), row[TEXTS[1]].strip()), str(row.get(KIND) or "all")))
    if not found:
        raise DataError(f"--stereotypes: {source} holds no pairs")
    return found


def common_places(one: Sequence[int], other: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the places of the tokens that two sequences have in common, in each of them.

    Examples:
        >>> common_places([7, 1, 2, 3], [7, 5, 5, 2, 3])
        ([0, 2, 3], [0, 3, 4])
    """
    blocks = SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks()
    return [b.a + i for b in blocks for i in range(b.size)], [b.b + i for b in blocks for i in range(b.size)]


def score_stereotypes(path: str, overrides: list[str], source: str) -> list[dict[str, Any]]:
    """Score pairs with a run or a model: share and gap over all of them and by what they are about, with intervals.

    Raises:
        UserError: the pairs, the path or the recipe; or a model that is no causal or masked language model.
    """
    pairs = read_pairs(source)
    subject = _language_model(path, overrides)
    scores = pair_scores(subject, pairs)
    kinds = sorted({pair.kind for pair in pairs}, key=natural)
    groups = [("all", list(range(len(pairs))))]
    if len(kinds) > 1:
        groups += [(f"{KIND}={kind}", [i for i, pair in enumerate(pairs) if pair.kind == kind]) for kind in kinds]
    recipe = subject.composition.recipe
    return [{"group": name, **share_and_gap(scores[rows], recipe.eval.bootstrap, recipe.seed)} for name, rows in groups]


def share_and_gap(scores: np.ndarray, samples: int, seed: int = 0) -> dict[str, float]:
    """Return share and gap with their intervals from the scores (R, 2) of pairs.

    Examples:
        >>> share_and_gap(np.array([[-1.0, -2.0], [-3.0, -1.5], [-2.0, -2.25]]), samples=0)["score_gap"]
        -0.08333333333333333
    """
    gaps = scores[:, 0] - scores[:, 1]
    values = {"stereotype_share": (gaps > 0).astype(float), "score_gap": gaps}
    rows = RowScores(samples, seed, {name: np.stack([v, np.ones_like(v)], 1) for name, v in values.items()})
    ends = all_ends(rows.drawn(None)) if samples and len(gaps) > 1 else {}
    found = {"pairs": float(len(gaps))}
    for name, own in values.items():
        found |= {name: float(own.mean()), **{key: end for key, end in ends.items() if key.startswith(f"{name}/")}}
    return found


def _language_model(path: str, overrides: list[str]) -> Subject:
    composition = recipe_of(path, overrides)
    recipe = composition.recipe
    run = run_folder(path)
    head = language_head(load_config(resolve_section(recipe.model)[0])) if run is None else head_of(run)
    if head not in HEADS:
        raise UserError(
            f"--stereotypes: {path} has a head of kind {head}; sentences get their scores from a causal or a masked language "
            "model"
        )
    return subject_of(composition, open_model(recipe.model, recipe.tokenizer, head=head, seed=recipe.seed))


def pair_scores(subject: Subject, pairs: Sequence[SentencePair]) -> np.ndarray:
    """Return the score of each sentence, (R, 2)."""
    read = _pseudo if subject.loaded.head == "masked" else _whole
    rows = [(i, *row) for i, pair in enumerate(pairs) for row in read(subject, pair)]
    sums, size = np.zeros((len(pairs), 2)), subject.composition.recipe.batch.size
    for at in range(0, len(rows), size):
        part = rows[at : at + size]
        for (i, side, _, _), value in zip(part, _scored(subject, [row[2:] for row in part]), strict=True):
            sums[i, side] += value
    return sums


def _whole(subject: Subject, pair: SentencePair) -> Iterator[tuple[int, list[int], list[int]]]:
    """Yield each sentence as (its number in the pair, tokens, scored places): all behind a first token, if there is one."""
    tokenizer = subject.loaded.tokenizer
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    for side, text in enumerate(pair.texts):
        ids = call_tokenizer(tokenizer, text, add_special_tokens=False)["input_ids"]
        before = [] if first is None else [int(first)]
        yield side, before + ids, list(range(1, len(before) + len(ids)))


def _pseudo(subject: Subject, pair: SentencePair) -> Iterator[tuple[int, list[int], list[int]]]:
    """Yield each sentence once for every token that it has in common with the other one, which is what is scored."""
    tokenizer = subject.loaded.tokenizer
    ids = [call_tokenizer(tokenizer, text)["input_ids"] for text in pair.texts]
    for side, places in enumerate(common_places(*ids)):
        special = tokenizer.get_special_tokens_mask(ids[side], already_has_special_tokens=True)
        for place in places:
            if not special[place]:
                yield side, ids[side], [place]


@torch.no_grad()
def _scored(subject: Subject, rows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    """Return the summed log-probability of the scored tokens of each row: its tokens, and the places that are scored."""
    roles = subject.roles
    numbers = list(range(len(rows)))
    if subject.loaded.head == "masked":
        mask = mask_token(subject.loaded.tokenizer)
        hidden = [Hidden(places, [MASK] * len(places), [mask] * len(places)) for _, places in rows]
        laid = roles.layout([corrupted(ids, one) for (ids, _), one in zip(rows, hidden, strict=True)], numbers)
        batch = masked_targets(laid, [ids for ids, _ in rows], hidden)
    else:
        scored = [[int(i in places) for i in range(len(ids))] for ids, places in rows]
        batch = roles.layout([Tokens(ids, own) for (ids, _), own in zip(rows, scored, strict=True)], numbers)
    with roles.evaluating():
        logprobs = roles.policy(batch)["logprobs"].double()
    return logprobs.new_zeros(len(rows)).index_add(0, batch.sequence, logprobs).tolist()
