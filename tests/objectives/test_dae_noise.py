"""Noise of denoising autoencoders: BART's by its formulas and by statistics of fairseq's code, T5's by its own code."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from llmrecipe.core.errors import DataError
from llmrecipe.objectives.pretraining._engines.span_corruption import (
    corrupt_spans,
    noise_mask,
    segment_lengths,
    span_counts,
)
from llmrecipe.objectives.pretraining._engines.text_noise import (
    NEW,
    NoisePlan,
    PlainText,
    Token,
    Vocabulary,
    add_noise,
    span_lengths,
)
from llmrecipe.objectives.row_draws import generator

MASK, POOL = 999, np.arange(500, 600)
PLAIN = Vocabulary(MASK, POOL)


def text(length: int, word: int = 1, sentence: int = 8) -> PlainText:
    """A text of words and sentences of equal length whose ids are 100, 101, ..."""
    return PlainText(list(range(100, 100 + length)), [i // word for i in range(length)], [i // sentence for i in range(length)])


def noised(length: int, number: int = 0, given: PlainText | None = None, **options: Any) -> list[Token]:
    plan = NoisePlan(**{"mask_random": 0.0, **options})
    return add_noise(given or text(length), plan, PLAIN, generator(0, 0, number))


def ids(tokens: list[Token]) -> list[int]:
    return [token for token, _ in tokens]


# --- BART --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.3, 0.77])
def test_token_masks_stand_one_for_one(share: float) -> None:
    for length in (1, 7, 50):
        found = noised(length, length, mask_tokens=share)
        masked = [i for i, (token, _) in enumerate(found) if token == MASK]
        assert len(found) == length and len(masked) == math.ceil(share * length)
        assert all(token == 100 + i and place == i for i, (token, place) in enumerate(found) if i not in masked)


def test_random_tokens_take_their_share_of_the_masks_and_are_never_special() -> None:
    kinds: Counter[bool] = Counter()
    for number in range(200):
        new = [token for token, place in noised(100, number, mask_tokens=0.5, mask_random=0.1) if place == NEW]
        assert all(token == MASK or token in POOL for token in new)
        kinds.update(token == MASK for token in new)
    assert kinds[False] / sum(kinds.values()) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("share", [0.15, 0.5, 1.0])
def test_deletion_leaves_n_minus_k_tokens_in_order(share: float) -> None:
    for length in (1, 9, 64):
        found = noised(length, length, delete=share)
        assert len(found) == length - math.ceil(share * length)
        assert ids(found) == sorted(ids(found)) and set(ids(found)) <= set(range(100, 100 + length))


def test_words_are_deleted_whole_and_one_of_them_stays() -> None:
    left = 0
    for number in range(400):
        found = noised(0, number, text(60, word=3), delete=0.6, by_word=True)
        words = Counter(place // 3 for _, place in found)
        assert set(words.values()) == {3}
        left += len(found)
    assert left / (400 * 60) == pytest.approx(0.4, abs=0.02)
    assert all(len(noised(2, number, delete=1.0, by_word=True)) == 1 for number in range(20))


def test_permutation_moves_whole_sentences_and_keeps_the_tokens() -> None:
    for share, least in ((1.0, 5), (0.4, 1)):
        moved: Counter[int] = Counter()
        for number in range(60):
            found = noised(40, number, permute_sentences=share)
            assert sorted(ids(found)) == list(range(100, 140))
            parts = [ids(found)[i : i + 8] for i in range(0, 40, 8)]
            assert all(part == list(range(part[0], part[0] + 8)) for part in parts)
            moved[sum(part[0] != 100 + 8 * i for i, part in enumerate(parts))] += 1
        assert max(moved) == (5 if least == 5 else math.ceil(0.4 * 5)) and min(moved) < max(moved)


def test_rotation_starts_elsewhere_and_keeps_the_order() -> None:
    starts = set()
    for number in range(200):
        found = ids(noised(10, number, rotate=1.0))
        first = found.index(100)
        assert found[first:] + found[:first] == list(range(100, 110)) and first
        starts.add(first)
    assert starts == set(range(1, 10))
    unmoved = sum(ids(noised(10, number, rotate=0.3)) == list(range(100, 110)) for number in range(500))
    assert unmoved / 500 == pytest.approx(0.7, abs=0.06)


def test_insertion_adds_a_share_of_the_length() -> None:
    found = noised(50, insert=0.11)
    assert len(found) == 56 and [t for t in ids(found) if t != MASK] == list(range(100, 150))


def test_span_lengths_are_poisson_and_add_up_to_the_budget() -> None:
    for table in (False, True):
        found = [span_lengths(154, 3.0, generator(0, 0, number), table) for number in range(400)]
        assert all(sum(lengths) == 154 for lengths in found)
        drawn = [length for lengths in found for length in lengths[:-1]]
        assert np.mean(drawn) == pytest.approx(3.0, abs=0.05)
        for length in range(6):
            share = sum(one == length for one in drawn) / len(drawn)
            assert share == pytest.approx(math.exp(-3) * 3**length / math.factorial(length), abs=0.01)


@pytest.mark.parametrize("replace", [1, 0, -1])
def test_infilling_replaces_whole_words(replace: int) -> None:
    """What is left of a text is whole words in order; each run of missing words is one mask, none, or one for each token."""
    for number in range(100):
        found = noised(0, number, text(60, word=3), mask_ratio=0.3, replace_length=replace)
        kept = [place for _, place in found if place != NEW]
        assert kept == sorted(kept) and set(Counter(place // 3 for place in kept).values()) == {3}
        gone = 60 - len(kept)
        assert 3 <= gone <= 3 * math.ceil(0.3 * 20)
        masks = sum(token == MASK for token in ids(found))
        if replace == -1:
            assert masks >= gone
        if replace == 1:
            assert masks >= 1


def test_without_poisson_each_word_is_a_span() -> None:
    found = noised(0, 3, text(60, word=3), mask_ratio=0.3, poisson=None)
    assert len(found) == 60 - 6 * 3 + 6 and ids(found).count(MASK) == 6


def test_special_tokens_are_neither_noised_nor_in_a_span() -> None:
    plain = text(40)
    special = {5, 6, 20, 33}
    given = PlainText(plain.ids, [-1 if i in special else i for i in range(40)], plain.sentences)
    for number in range(200):
        for options in ({"mask_ratio": 0.9}, {"mask_tokens": 1.0}, {"delete": 1.0}, {"mask_ratio": 0.5, "replace_length": 0}):
            found = noised(0, number, given, **options)
            assert special <= {place for _, place in found}


def test_noises_combine_in_order() -> None:
    """All of them at once: what stays of a sentence is in order, and counts are those of each noise on what came before."""
    found = noised(
        64, 1, permute_sentences=1.0, mask_ratio=0.25, mask_tokens=0.1, delete=0.1, insert=0.2, rotate=1.0, poisson=3.0
    )
    for sentence in range(8):
        own = [place for _, place in found if place != NEW and place // 8 == sentence]
        turned = sum(a > b for a, b in itertools.pairwise(own))
        assert turned <= 1  # the sentence that the text begins in
    assert len({place for _, place in found if place != NEW}) == sum(place != NEW for _, place in found) < 50


# --- fairseq -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "fewer", "masks"), [(3.0, 94.3, 37.1), (3.5, 99.7, 31.7)])
def test_infilling_has_the_statistics_of_fairseq(mean: float, fewer: float, masks: float) -> None:
    """Measured on fairseq's code: 300 sequences of 512 tokens, two of them special, mask 0.3, random 0.1."""
    plan = NoisePlan(mask_ratio=0.3, poisson=mean, fairseq=True)
    vocabulary = Vocabulary(MASK, np.arange(1, 900), None, around=2)
    found = [add_noise(text(510), plan, vocabulary, generator(1, 0, n)) for n in range(800)]
    assert np.mean([510 - len(one) for one in found]) == pytest.approx(fewer, rel=0.03)
    assert np.mean([ids(one).count(MASK) for one in found]) == pytest.approx(masks, rel=0.03)


def test_fairseq_puts_in_at_least_one_random_token() -> None:
    plan = NoisePlan(insert=0.02, fairseq=True)
    found = add_noise(text(98), plan, Vocabulary(MASK, np.arange(1, 9), None, around=2), generator(0, 0, 0))
    new = [token for token, place in found if place == NEW]
    assert len(new) == 2 and sorted(token == MASK for token in new) == [False, True]


def test_fairseq_splits_at_full_stops_alone() -> None:
    """`a . . b . c d`: the second stop of a run ends nothing, and the last token counts as a stop."""
    given = PlainText([1, 13, 13, 2, 13, 3, 4], [0, 1, 2, 3, 4, 5, 6], [0] * 7)
    orders = set()
    for number in range(60):
        plan, vocabulary = NoisePlan(permute_sentences=1.0, fairseq=True), Vocabulary(MASK, POOL, 13)
        orders.add(tuple(place for _, place in add_noise(given, plan, vocabulary, generator(0, 0, number))))
    parts = ((0, 1), (2, 3, 4), (5, 6))
    assert orders == {sum(order, ()) for order in itertools.permutations(parts)}
    # A full stop before the last token takes the last end away: what follows the last sentence stays at the end.
    tail = PlainText([1, 13, 2, 13, 13], [0, 1, 2, 3, 4], [0] * 5)
    found = [add_noise(tail, plan, vocabulary, generator(0, 0, n)) for n in range(40)]
    ends = {tuple(place for _, place in one) for one in found}
    assert ends == {(0, 1, 2, 3, 4), (2, 3, 0, 1, 4)}


def test_fairseq_also_rotates_by_nothing() -> None:
    plan = NoisePlan(rotate=1.0, fairseq=True)
    starts = Counter(add_noise(text(4), plan, PLAIN, generator(0, 0, n))[0][1] for n in range(2000))
    assert starts[0] / 2000 == pytest.approx(2 / 5, abs=0.04) and set(starts) == {0, 1, 2, 3}


# --- T5 ----------------------------------------------------------------------------------------------------------------


def reference_counts(length: int, density: float, mean: float) -> tuple[int, int]:
    """Noise tokens and spans as `random_spans_noise_mask` of T5 has them."""
    noise = int(np.round(length * density))
    noise = min(max(noise, 1), length - 1)
    return noise, max(int(np.round(min(noise, length - noise) / mean)), 1)


@pytest.mark.parametrize("density", [0.15, 0.5, 0.9])
def test_spans_are_counted_as_t5_counts_them(density: float) -> None:
    for length in range(2, 600):
        for mean in (1.0, 3.0, 10.0):
            assert span_counts(length, density, mean) == reference_counts(length, density, mean)
    assert span_counts(1, density, 3.0) == (0, 0)


def test_raw_length_512_of_t5() -> None:
    """568 tokens of text are 512 of input and 114 of target, end tokens included (`compute_input_and_target_lengths`)."""
    mask = noise_mask(568, 0.15, 3.0, generator(0, 0, 0))
    found = corrupt_spans(range(568), range(568), mask, range(1000, 1100))
    assert (len(found.source) + 1, len(found.target) + 1) == (512, 114)


def test_segmentations_are_equally_likely() -> None:
    """Every way to cut 5 items into 3 segments, as shuffling two borders among four gaps gives them."""
    counts = Counter(tuple(segment_lengths(5, 3, generator(0, 0, n))) for n in range(6000))
    assert len(counts) == math.comb(4, 2)
    assert max(counts.values()) / min(counts.values()) < 1.25


def test_input_and_target_interleave_to_the_original() -> None:
    for number in range(1000):
        draws = generator(7, 0, number)
        length, density = int(draws.integers(2, 200)), float(draws.uniform(0.01, 0.9))
        mean = float(draws.uniform(1.0, 5.0))
        mask = noise_mask(length, density, mean, draws)
        noise, spans = reference_counts(length, density, mean)
        starts = int(mask[0]) + int((np.diff(mask.astype(int)) == 1).sum())
        assert (int(mask.sum()), starts) == (noise, spans) and not mask[0] and mask[-1]
        sentinels = list(range(1000, 1200))
        found = corrupt_spans(range(length), range(length), mask, sentinels)
        spans_of: dict[int, list[int]] = {}
        for token in found.target:
            if token >= 1000:
                spans_of[token] = []
            else:
                spans_of[next(reversed(spans_of))].append(token)
        assert list(spans_of) == sentinels[: len(spans_of)]
        restored = [t for token in found.source for t in spans_of.get(token, [token])]
        assert restored == list(range(length)) and found.noised == noise


def test_by_hand_with_a_special_token_in_a_span() -> None:
    found = corrupt_spans([5, 6, 7, 8, 9], [0, 1, -1, 2, 3], np.array([False, True, True, False]), [90, 91, 92])
    assert (found.source, found.target) == ([5, 90, 7, 91, 9], [90, 6, 91, 8, 92])
    assert found.sentinel == [True, False, True, False, True]
    with pytest.raises(DataError, match=r"data\.max_length: .*more than 1 spans.*tokenizer\.add_tokens"):
        corrupt_spans([5, 6, 7, 8, 9], [0, 1, -1, 2, 3], np.array([False, True, True, False]), [90])
