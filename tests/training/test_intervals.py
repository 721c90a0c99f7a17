"""Bootstrap intervals: worked by hand where the samples can be listed, against SciPy's percentile bootstrap else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap

from llmrecipe.training.evaluate import _in_order, _rows_in_order
from llmrecipe.training.intervals import RowScores, all_ends, ends


def test_a_share_of_rows_has_scipys_interval() -> None:
    values = (np.random.default_rng(3).random(60) < 0.7).astype(float)
    scores = RowScores(4000, 0, {"accuracy": np.stack([values, np.ones(60)], 1)})
    found = all_ends(scores.drawn(None))
    theirs = bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    assert found["accuracy/low"] == pytest.approx(theirs.low, abs=0.02)
    assert found["accuracy/high"] == pytest.approx(theirs.high, abs=0.02)
    assert all_ends(scores.drawn(None)) == found, "the same seed draws the same rows"


def test_rows_count_by_their_own_weight_and_a_corpus_score_is_that_of_the_sums() -> None:
    """Two rows: a sample is (2, 0), (1, 1) or (0, 2), so the ends are the scores of each row alone."""
    rows = np.array([[3.0, 10.0], [8.0, 10.0]])
    scores = RowScores(2000, 0, {"mean": rows, "squared": rows}, {"squared": lambda sums: (sums[0] / sums[1]) ** 2})
    found = all_ends(scores.drawn(None))
    assert (found["mean/low"], found["mean/high"]) == pytest.approx((0.3, 0.8))
    assert (found["squared/low"], found["squared/high"]) == pytest.approx((0.09, 0.64))


def test_scores_of_a_whole_set_are_computed_on_the_drawn_rows() -> None:
    torch.manual_seed(0)
    x = torch.randn(40)

    def finish(means: dict[str, float], tensors: dict[str, torch.Tensor]) -> dict[str, float]:
        return {"range": float(tensors["x"].max() - tensors["x"].min()), "shift": means["m"]}

    rows = np.stack([x.numpy(), np.ones(40)], 1)
    found = all_ends(RowScores(500, 1, {"m": rows}, tensors={"x": x}).drawn(finish))
    assert found["range/high"] == pytest.approx(float(x.max() - x.min())) and found["range/low"] < found["range/high"]
    assert found["shift/low"] == found["m/low"], "means and tensors belong to the same draw"


def test_what_has_no_score_in_some_sample_has_no_interval() -> None:
    assert ends("x", np.array([0.1, np.nan])) == {} and ends("x", np.array([])) == {}
    assert RowScores(10).drawn(None) == {}


def test_rows_of_several_processes_are_put_in_the_order_of_the_split() -> None:
    assert _in_order([[0, 2, 4], [1, 3]]) == [0, 1, 2, 3, 4]
    assert _rows_in_order(torch.tensor([0, 2, 4, 1, 3]), 2).tolist() == [0, 1, 2, 3, 4]
    assert _rows_in_order(torch.tensor([7, 8]), 1).tolist() == [7, 8]
