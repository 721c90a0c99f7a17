"""Checks before the first step of a run that starts at its own reference: made in every run, recorded in its events.

Policy and reference are the same function at step 0, so losses and rewards have known values: log 2 for DPO,
1 / (4 beta^2) for IPO, one half of the mean weight for KTO, margins and divergences of 0. Another value means another
reference, dropout or noise in one of the two, or rows scored differently, and every later step would be wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from llmrecipe.core.errors import ProofError
from llmrecipe.methods._base.late_values import MetricSums
from llmrecipe.training.startup_report import record_proof

if TYPE_CHECKING:
    from llmrecipe.training.run_state import RunState

TOLERANCE = 2e-3
"""Tolerance of float32 computation; relative to expected values above 1."""
COARSE = 0.1
"""Tolerance where hidden states have 8 to 11 significant bits, and a different batch layout rounds differently."""


def check_step_zero(run: RunState) -> None:
    """Measure the first step's rows under the untrained policy, compare with the expected values, and write a `check` event.

    Raises:
        ProofError: a value is not what it must be.
    """
    wanted = run.objective.step_zero() if same_policy(run) else {}
    facts = run.objective.facts(run.roles)
    if not (wanted or facts):
        return
    measured = measure(run) if wanted and run.steps else {}
    event = {k: v for name in measured if name in wanted for k, v in ((name, measured[name]), (f"{name}/wanted", wanted[name]))}
    run.events.check(step=0, **event, **facts)
    low = run.roles.engine.autocast is not None or next(run.model.parameters()).dtype != torch.float32
    tolerance = COARSE if low else TOLERANCE
    wrong = [
        f"{name} is {measured[name]:.6g} and must be {value:.6g}"
        for name, value in wanted.items()
        if name in measured and not abs(measured[name] - value) <= tolerance * max(1.0, abs(value))
    ]
    if wrong:
        raise ProofError(
            f"before the first step policy and reference are the same model, but {'; '.join(wrong)}. Something changes one of "
            "them between two scorings (dropout, noise, another reference); nothing was trained"
        )
    record_proof(run, {"step_zero": {name: measured[name] for name in wanted if name in measured}})


def same_policy(run: RunState) -> bool:
    """Return whether the reference is the policy of step 0."""
    which = run.objective.reference_of()
    mounted = bool(run.loaded.mounted) or run.loaded.continued is not None
    return which == "initial" or (which == "base" and not mounted and all(w.starts_at_base() for w in run.stack))


def measure(run: RunState) -> dict[str, float]:
    """Compute mean loss and metrics of the first step's rows, over all processes, without metrics that no row has."""
    sums = MetricSums()
    state = run.objective.state()
    _, first, end = run.plan.place(0)
    rows = [run.data[int(i)] for i in run.order(0)[first:end]][run.runtime.rank :: run.runtime.world]
    # In training mode: dropout that was left on must show here.
    with torch.no_grad():
        batches = next(iter(run.objective.batches(iter([rows]), run.roles)))
        missing = run.runtime.passes(len(batches)) - len(batches)
        for batch in [*batches, *(run.objective.collate([], run.roles) for _ in range(missing))]:
            loss = run.objective.loss(batch, run.roles)
            sums.add({"loss": (loss.total, run.objective.weight(batch)), **loss.metrics})
    run.objective.load_state(state)
    names = sorted(sums.counts)
    counts = run.runtime.sum(torch.tensor([sums.counts[n] for n in names], dtype=torch.float64)).tolist()
    means = sums.mean(run.runtime)
    # A mean over nothing (rejected answers of a batch that has none) is no measurement.
    return {name: means[name] for name, count in zip(names, counts, strict=True) if count}
