"""Options that the chosen form, loss or source of positives does not read are refused by name, before weights are read."""

from __future__ import annotations

import pytest

from llmrecipe.core.errors import RecipeError
from llmrecipe.training.dry_run import check

QUIET = ["log.live=off", "data.limit=8"]


@pytest.mark.parametrize(
    ("recipe", "words", "message"),
    [
        ("t5_spans", ["objective.poisson=2.0"], r"objective\.poisson: 2\.0 is not read with objective\.form=t5; .*form=bart"),
        ("t5_spans", ["objective.compat=fairseq"], r"objective\.compat: fairseq .*objective\.form=bart"),
        ("dae", ["objective.mean_span=5"], r"objective\.mean_span: 5\.0 is not read with objective\.form=bart; .*form=t5"),
        ("dae", ["objective.sigma=0.1"], r"objective\.sigma: .*objective\.form=mse"),
        ("dae", ["objective.pool=avg"], r"objective\.pool: .*objective\.form=tsdae"),
        ("tsdae", ["objective.target=ema"], r"objective\.target: .*objective\.form=mse"),
        ("contrastive", ["objective.margin=2.0"], r"objective\.margin: 2\.0 is not read with objective\.loss_type=infonce"),
        ("contrastive", ["objective.loss_type=triplet", "objective.temperature=0.1"], r"objective\.temperature: .*infonce"),
        ("contrastive", ["objective.positives=dropout", "objective.min_score=0.5"], r"objective\.min_score: .*positives=pairs"),
        ("nsp", ["objective.with_mlm=false", "objective.prob=0.3"], r"objective\.prob: 0\.3 is not read .*with_mlm=true"),
        ("nsp", ["objective.with_mlm=false", "objective.weight_nsp=2.0"], r"objective\.weight_nsp: .*with_mlm=true"),
    ],
)
def test_what_is_not_read_is_refused(recipe: str, words: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check(recipe, [*QUIET, *words])


@pytest.mark.parametrize(
    ("recipe", "words", "message"),
    [
        ("outliers", ["data.path=builtin:stories"], r"eval\.monitor: eval/outlier/auc is computed from the column 'outlier'"),
        ("contrastive", ["eval.monitor=eval/spearman"], r"eval\.monitor: eval/spearman is .* column 'score', which no row of"),
    ],
)
def test_a_watched_metric_needs_its_column(recipe: str, words: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check(recipe, [*QUIET, *words])


def test_what_is_read_and_columns_that_are_there_pass() -> None:
    assert check("outliers", QUIET).objective == "dae"
    scored = ["data.path=builtin:pairs", "objective.min_score=0.75", "eval.monitor=eval/spearman"]
    assert check("contrastive", [*QUIET, *scored]).objective == "contrastive"
