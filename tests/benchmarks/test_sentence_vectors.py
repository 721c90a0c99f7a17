"""The regression that a fine-tuned sentence encoder is compared with."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression

from tests.benchmarks.sentence_vectors import STRENGTHS, fitted, report


def rows(seed: int, count: int) -> tuple[np.ndarray, list[str]]:
    """Vectors of norm 1 whose class is a small part of them."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    vectors = rng.normal(size=(count, 40))
    vectors[:, 0] += 1.5 * (2 * labels - 1)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), [str(label) for label in labels]


def test_c_is_chosen_inside_the_training_rows_and_all_of_them_are_fitted() -> None:
    vectors, labels = rows(0, 120)
    found = fitted(vectors, labels)
    best = found.best_params_["C"]
    again = LogisticRegression(C=best, max_iter=5000).fit(vectors, labels)
    np.testing.assert_allclose(found.best_estimator_.coef_, again.coef_)
    scores = found.cv_results_["mean_test_score"]
    assert len(scores) == len(STRENGTHS) and scores.max() == found.best_score_ > scores.min()


def test_the_table_names_the_chosen_c() -> None:
    text = report({"toy": {"regression": 0.8, "C": 10.0, "rows": 50, "test": [0.9, 0.92, 0.91]}})
    assert "| toy | 50 | 0.8000 | 10 | 0.9000, 0.9200, 0.9100 | 0.9100 | 0.0058 | +19.1 |" in text
