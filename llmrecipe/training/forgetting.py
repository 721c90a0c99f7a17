"""Catastrophic forgetting: what held-out general sets lose between the model a run starts from and the one it ends with.

    a_g = -(1/N) sum over the targets of set g of -log p(y_t | y_<t),   forget_g = a_g(before) - a_g(after)

in nats per token, above 0 where something is forgotten. Both times the same rows are read under the same template and mask,
without dropout, and before step 0 without the stack: that model is the base, quantized where the run's is. The interval is
paired: each sample draws rows, and takes both scores of them. Rows of a set that are training rows, or share 13 tokens in a row
with one, are counted and reported. Source of the measure: arXiv 2308.08747, 2405.09673.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llmrecipe.core.errors import RunError
from llmrecipe.core.foreign import read_json, reading
from llmrecipe.data.overlap import RUN, rows_with_shared_runs, shared_rows
from llmrecipe.data.token_data import TokenData
from llmrecipe.engine.logprob import NOTHING
from llmrecipe.methods._base.method import Stage
from llmrecipe.objectives.divergences import kl, on_top_tokens
from llmrecipe.objectives.token_math import collate_tokens
from llmrecipe.runs.durable import write_text
from llmrecipe.runs.run_dir import FORGETTING
from llmrecipe.training.build_model import base_is_frozen
from llmrecipe.training.intervals import ends
from llmrecipe.training.read_rows import GENERAL_ROWS

if TYPE_CHECKING:
    from llmrecipe.data.collate import Batch
    from llmrecipe.training.run_state import RunState

KEPT = 256
"""Likeliest tokens of the base that are compared one by one."""
Sums = list[list[float]]
"""(R, 2): the summed negative log-likelihood of each row, and how many targets it has."""


def score_before(run: RunState) -> None:
    """Score the general sets under the model the run starts from, and keep the scores of every row in the run directory."""
    sets = run.general
    if not sets:
        return
    before = {name: row_losses(run, rows, base=True) for name, rows in sets.items()}
    run.events.evaluation(step=0, **{f"general/{name}": _mean(np.array(sums)) for name, sums in before.items()})
    if run.runtime.is_main:
        write_text(run.dir.path / FORGETTING, json.dumps(before) + "\n")
    report_overlap(run, sets)


def report_overlap(run: RunState, sets: Mapping[str, TokenData]) -> None:
    """Report how many rows of each general set are training rows, or share a run of tokens with one."""
    found: dict[str, int] = {}
    for name, rows in sets.items():
        if not isinstance(run.data, TokenData):
            run.events.warning(f"eval.forgetting.{name}: training rows that are streamed are not searched for its rows")
            continue
        equal = shared_rows(run.data, rows) if run.objective.rows == GENERAL_ROWS else 0
        found[name] = rows_with_shared_runs(run.data, rows)
        counts = {"are training rows": equal, f"have {RUN} tokens in a row in common with a training row": found[name]}
        if any(counts.values()):
            said = " and ".join(f"{count} {what}" for what, count in counts.items() if count)
            run.events.warning(
                f"eval.forgetting.{name}: of its {len(rows)} rows {said}; a run does not forget what it reads again"
            )
    if found:
        run.events.check(0, **{f"general/{name}/overlap": count for name, count in found.items()})


def score_after(run: RunState) -> dict[str, float]:
    """Return what was forgotten of each general set, `forget/NAME` and their mean, with intervals, in nats per token.

    Where the model of step 0 is still there, the weights of the base being as they were or a copy of what trains being kept
    (`objective.kl_to_base`), `forget/kl` is KL(before || after) of a token, the mean over sets.

    Raises:
        RunError: a set has other rows than before.
    """
    sets = run.general
    metrics = _compared(run, sets, run.recipe.eval.bootstrap)
    if metrics and (base_is_frozen(run.stack) or run.stack.snapshot is not None):
        apart = [_mean(np.array(row_divergences(run, rows))) for rows in sets.values()]
        metrics["forget/kl"] = float(np.mean(apart))
    if metrics:
        run.events.evaluation(step=run.progress.step, **metrics)
    return metrics


def score_between(run: RunState) -> bool:
    """Score the general sets at an evaluation during training, where that is wanted, and report it.

    Returns:
        Whether `forget/mean` is above `eval.forgetting_limit`, which ends the training.

    Raises:
        RunError: as `score_after`.
    """
    section, step = run.recipe.eval, run.progress.step
    if not step or not (section.forgetting_curve or section.forgetting_limit is not None):
        return False
    metrics = _compared(run, run.general, samples=0)
    if not metrics:
        return False
    run.events.evaluation(step=step, **metrics)
    lost, limit = metrics["forget/mean"], section.forgetting_limit
    if limit is None or lost <= limit:
        return False
    run.events.warning(f"eval.forgetting_limit={limit:g}: forget/mean is {lost:.4g} nats a token at step {step}; training ends")
    return True


def _compared(run: RunState, sets: Mapping[str, TokenData], samples: int) -> dict[str, float]:
    """Return the scores of the general sets now and what was forgotten since before the first step; nothing without sets.

    Raises:
        RunError: a set has other rows than before.
    """
    kept = run.dir.path / FORGETTING
    run.runtime.barrier()
    if not sets or not kept.is_file():
        return {}
    with reading(str(kept), "delete it, and continue with eval.forgetting={}"):
        before = {name: np.array(sums) for name, sums in read_json(kept).items()}
    after = {name: np.array(row_losses(run, rows)) for name, rows in sets.items()}
    changed = [n for n, sums in after.items() if n not in before or not np.array_equal(before[n][:, 1], sums[:, 1])]
    if changed:
        raise RunError(
            f"eval.forgetting.{changed[0]}: its rows are not those that were scored before the first step; put them back, or "
            "continue with eval.forgetting={}"
        )
    metrics = {f"general/{name}": _mean(sums) for name, sums in after.items()}
    return metrics | forgotten(before, after, samples, run.recipe.seed)


def forgotten(before: dict[str, np.ndarray], after: dict[str, np.ndarray], samples: int, seed: int) -> dict[str, float]:
    """Return the forgetting of each set and the mean over sets, each with the ends of its interval, and the relative mean.

    `forget/relative` is the mean over sets of forget_g / |a_g(before)|: 0.1 is a loss that rose by a tenth.

    Args:
        before: name -> (R, 2) sums and counts of rows.
        after: the same rows later.
        samples: how often rows are drawn again; 0: no intervals.

    Examples:
        >>> a, b = np.array([[2.0, 1], [4.0, 3]]), np.array([[6.0, 1], [4.0, 3]])
        >>> forgotten({"x": a}, {"x": b}, 0, 0)
        {'forget/x': 1.0, 'forget/mean': 1.0, 'forget/relative': 0.6666666666666666}
    """
    found: dict[str, float] = {}
    drawn: list[np.ndarray] = []
    for place, name in enumerate(after):
        lost = _mean(after[name]) - _mean(before[name])
        found[f"forget/{name}"] = lost
        rows = len(after[name])
        if samples and rows > 1:
            rng = np.random.default_rng([seed, place])
            counts = rng.multinomial(rows, np.full(rows, 1.0 / rows), size=samples)
            sums, old = counts @ after[name], counts @ before[name]
            drawn.append(sums[:, 0] / sums[:, 1] - old[:, 0] / old[:, 1])
            found |= ends(f"forget/{name}", drawn[-1])
    found["forget/mean"] = float(np.mean([found[f"forget/{name}"] for name in after]))
    shares = [found[f"forget/{name}"] / old for name in after if (old := _mean(before[name])) > 0.0]
    if len(shares) == len(after):
        found["forget/relative"] = float(np.mean(shares))
    if len(drawn) == len(after):
        found |= ends("forget/mean", np.mean(drawn, 0))
    return found


def _mean(sums: np.ndarray) -> float:
    return float(sums[:, 0].sum() / sums[:, 1].sum())


@torch.no_grad()
def row_losses(run: RunState, rows: TokenData, base: bool = False) -> Sums:
    """Return the summed negative log-likelihood and the number of targets of each row, in order, over all processes.

    Args:
        base: without what the stack adds.
    """
    off = added(run) if base else frozenset()
    return _by_row(run, rows, lambda batch: -run.roles.engine(batch, off=off)["logprobs"])


@torch.no_grad()
def row_divergences(run: RunState, rows: TokenData) -> Sums:
    """Return the summed KL(before || model) over the next token and the number of targets of each row, as `row_losses`.

    Compared are the `KEPT` likeliest tokens before and all others as one class, which bounds the divergence from below.
    """

    def top(z: Tensor, rows: slice) -> dict[str, Tensor]:
        values, ids = z.log_softmax(-1).topk(min(KEPT, z.shape[-1]), -1)
        return {"values": values, "ids": ids}

    def apart(batch: Batch) -> Tensor:
        if base_is_frozen(run.stack):
            kept = run.roles.engine(batch, off=added(run), compare=top)
        else:
            with run.stack.reference(run.model):
                kept = run.roles.engine(batch, compare=top)
        if NOTHING in kept:
            return kept[NOTHING]

        def against(z: Tensor, rows: slice) -> dict[str, Tensor]:
            log_p, log_q = on_top_tokens(z.log_softmax(-1), kept["ids"][rows], kept["values"][rows])
            return {"kl": kl(log_p, log_q)}

        return run.roles.engine(batch, compare=against)["kl"]

    return _by_row(run, rows, apart)


def added(run: RunState) -> frozenset[str]:
    """Return the wrappers of the run without which its model is the base."""
    return frozenset(w.name for w in run.stack if w.stage in (Stage.INJECT, Stage.SELECT))


def _by_row(run: RunState, rows: TokenData, values: Callable[[Batch], Tensor]) -> Sums:
    """Return the sum over a row's targets of the values (N,) of a batch, and their number, of all processes' rows in order."""
    rank, world = run.runtime.rank, run.runtime.world
    own: Sums = []
    indices = list(range(len(rows)))[rank::world]
    with run.roles.evaluating():
        for part in run.roles.split([rows[i] for i in indices]):
            if not part:
                continue
            batch = collate_tokens(part, run.roles)
            sums = batch.sum_by_sequence(values(batch).double())
            counts = batch.here.counts().tolist()
            own += [[float(value), float(count)] for value, count in zip(sums.tolist(), counts, strict=True)]
    parts: list[Any] = run.runtime.gather_json(own)
    return [part[i] for i in range(max(map(len, parts), default=0)) for part in parts if i < len(part)]
