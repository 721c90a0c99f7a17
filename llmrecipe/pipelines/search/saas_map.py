"""The sampler `saas_map`: Gaussian processes with a sparsity prior, and the expected gain of the front, by BoTorch.

    x     a point in [0, 1]^d: a number by its place in its range, or in the logarithm of the range where that is what is
          searched; a value of a list of numbers by its rank; values without an order one-hot
    y     score and costs, the sign such that large is good, each less its mean and over its standard deviation
    y_j   = f_j(x) + noise, f_j a Gaussian process with a Matern-5/2 kernel whose inverse squared lengthscales are tau times
          half-Cauchy variables, so that few keys matter unless the trials say otherwise; maximum a posteriori for four tau
    next  = argmax of log E[volume(front and f(x)) - volume(front)] over the points that have not been tried

The volume is counted from a reference point that is worse than every trial, by a tenth of the spread of each y. Trials that
run at the same time are taken to be on the way (`X_pending`). Until STARTUP trials are completed, points are random. Without a
cost the gain is that of the best score. A proposal is a function of (seed, number) and the trials before it, and no point is
proposed twice while there are others. A range of floats is searched at LEVELS values.

Papers: High-Dimensional Bayesian Optimization with Sparse Axis-Aligned Subspaces (arXiv 2103.00349), whose posterior is sampled
and here maximized; Parallel Bayesian Optimization of Multiple Noisy Objectives with Expected Hypervolume Improvement
(arXiv 2105.08195); its logarithm as in Unexpected Improvements to Expected Improvement (arXiv 2310.20708).
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import optuna
import torch
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from llmrecipe.pipelines.search import space
from llmrecipe.recipe.search_section import RangeSection, SearchSection

if TYPE_CHECKING:
    from botorch.acquisition import AcquisitionFunction
    from botorch.models import ModelListGP

STARTUP = 8
"""Completed trials before the first model."""

LEVELS = 65
"""Values of a range of floats, or of a long range of whole numbers, that are compared."""

ENUMERATED = 1000
"""Points of the largest space that is compared as a whole."""

DRAWS = 100
"""Random draws that look for a point which has not been tried."""


@dataclass(frozen=True)
class Coordinate:
    """A key of the space as numbers."""

    drawn: tuple[Any, ...]
    """Optuna's values that are compared."""
    places: tuple[float, ...]
    """Their places in [0, 1]; their numbers where values have no order."""
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    ordered: bool = True

    def place(self, value: Any) -> float:  # noqa: ANN401
        """Return the place of one of Optuna's values, which need not be one that is compared."""
        if value in self.drawn:
            return self.places[self.drawn.index(value)]
        return _place(value, self.low, self.high, self.log)

    def nearest(self, place: float) -> Any:  # noqa: ANN401
        """Return the value that is compared at a place."""
        return self.drawn[min(range(len(self.places)), key=lambda i: abs(self.places[i] - place))]


def coordinate_of(value: list[Any] | RangeSection, distribution: BaseDistribution) -> Coordinate:
    """Return the coordinate of one key of the space."""
    if isinstance(value, list):
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
        if not numbers and len(value) > 2:
            return Coordinate(tuple(range(len(value))), tuple(map(float, range(len(value)))), ordered=False)
        ranks = sorted(range(len(value)), key=value.__getitem__) if numbers else list(range(len(value)))
        places = tuple(ranks.index(i) / max(1, len(value) - 1) for i in range(len(value)))
        return Coordinate(tuple(range(len(value))), places)
    low, high = float(value.low), float(value.high)
    drawn = _levels(value, isinstance(distribution, IntDistribution))
    return Coordinate(drawn, tuple(_place(v, low, high, value.log) for v in drawn), low, high, value.log)


def _levels(value: RangeSection, whole: bool) -> tuple[Any, ...]:
    """Return the values of a range that are compared, rounded as a trial's point is."""
    step = value.step or (1 if whole else None)
    if step is not None and (value.high - value.low) / step < LEVELS:
        count = math.floor((value.high - value.low) / step + 1e-9) + 1
        drawn = [value.low + k * step for k in range(count)]
    else:
        shares = [k / (LEVELS - 1) for k in range(LEVELS)]
        low, high = float(value.low), float(value.high)
        drawn = [low * (high / low) ** s if value.log else low + (high - low) * s for s in shares]
        if step is not None:
            drawn = [value.low + math.floor((v - low) / step + 0.5) * step for v in drawn]
            drawn = [v if v <= value.high else v - step for v in drawn]
    return tuple(dict.fromkeys(drawn if whole else [space.rounded(v, value) for v in drawn]))


def _place(value: float, low: float, high: float, log: bool) -> float:
    return math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)


class SaasMap:
    """The sampler of one trial (see the module)."""

    def __init__(self, section: SearchSection, seed: int):
        """Prepare the axes; `seed` is the trial's own."""
        self.seed = seed
        self.distributions = space.distributions(section)
        self.axes = {key: coordinate_of(value, self.distributions[key]) for key, value in section.space.items()}

    def propose(self, study: optuna.Study) -> dict[str, Any]:
        """Return Optuna's values of the next trial of a study."""
        others = study.get_trials(deepcopy=False)
        # An infinite loss says no more than that the point is bad, and has no place on a scale.
        done = [t for t in others if t.state == TrialState.COMPLETE and all(map(math.isfinite, t.values))]
        found = self._best(study, done, others) if len(done) >= STARTUP else None
        return found or self._random(study, [t.params for t in others])

    def _random(self, study: optuna.Study, tried: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return a random point, one that has not been tried where that is soon found."""
        chance = optuna.samplers.RandomSampler(seed=self.seed)
        unused = optuna.trial.create_trial(state=TrialState.FAIL)
        point: dict[str, Any] = {}
        for _ in range(DRAWS):
            point = {key: chance.sample_independent(study, unused, key, own) for key, own in self.distributions.items()}
            if point not in tried:
                break
        return point

    def _best(self, study: optuna.Study, done: Sequence[FrozenTrial], others: Sequence[FrozenTrial]) -> dict[str, Any] | None:
        """Return the point with the largest expected gain; None where all have been tried or no model fits."""
        from botorch.exceptions import ModelFittingError
        from linear_operator.utils.errors import NanError, NotPSDError

        better = optuna.study.StudyDirection.MAXIMIZE
        signs = torch.tensor([1.0 if own == better else -1.0 for own in study.directions], dtype=torch.double)
        y = torch.tensor([list(t.values) for t in done], dtype=torch.double) * signs
        y = (y - y.mean(0)) / y.std(0).clamp_min(1e-9)
        running = [t for t in others if not t.state.is_finished()]
        pending = self._encoded(running) if running else None
        # BoTorch draws its initial points, and the tau of the prior, from torch's generator.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(self.seed)
            try:
                gain = self._gain(self._encoded(done), y, pending)
                x = self._argmax(gain, self._encoded(others))
            except (ModelFittingError, NanError, NotPSDError):
                return None
        return None if x is None else {key: axis.nearest(float(v)) for (key, axis), v in zip(self.axes.items(), x, strict=True)}

    def _encoded(self, trials: Sequence[FrozenTrial]) -> Tensor:
        """Return points as rows of numbers (n, d)."""
        rows = [[axis.place(t.params[key]) for key, axis in self.axes.items()] for t in trials]
        return torch.tensor(rows, dtype=torch.double)

    def _model(self, x: Tensor, y: Tensor) -> ModelListGP:
        """Fit a Gaussian process to each column of y (n, m)."""
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import ModelListGP
        from botorch.models.map_saas import EnsembleMapSaasSingleTaskGP
        from gpytorch.mlls import ExactMarginalLogLikelihood

        models = []
        for column in y.T:
            transform = self._one_hot()
            model = EnsembleMapSaasSingleTaskGP(x, column[:, None], outcome_transform=None, input_transform=transform)
            fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
            models.append(model)
        return ModelListGP(*models)

    def _one_hot(self) -> Any:  # noqa: ANN401
        """Return the transform of axes whose values have no order; None without any."""
        from botorch.models.transforms.input import NumericToCategoricalEncoding
        from torch.nn.functional import one_hot

        plain = {i: len(axis.drawn) for i, axis in enumerate(self.axes.values()) if not axis.ordered}
        if not plain:
            return None
        encoders = {i: functools.partial(one_hot, num_classes=count) for i, count in plain.items()}
        return NumericToCategoricalEncoding(dim=len(self.axes), categorical_features=plain, encoders=encoders)

    def _gain(self, x: Tensor, y: Tensor, pending: Tensor | None) -> AcquisitionFunction:
        """Return the logarithm of the expected gain as a function of a point."""
        from botorch.acquisition.logei import qLogNoisyExpectedImprovement
        from botorch.acquisition.multi_objective import logei
        from botorch.sampling import SobolQMCNormalSampler

        model = self._model(x, y)
        draws = SobolQMCNormalSampler(torch.Size([64]), seed=self.seed % 2**31)
        if y.shape[1] == 1:
            return qLogNoisyExpectedImprovement(model.models[0], x, sampler=draws, X_pending=pending, prune_baseline=True)
        worst, best = y.amin(0), y.amax(0)
        # BoTorch would compile a C++ kernel here, which takes minutes, waits for ever on the lock of a killed process, and
        # rounds otherwise than the Python code that stands in for it elsewhere.
        logei._load_attempted = True
        return logei.qLogNoisyExpectedHypervolumeImprovement(
            model, worst - 0.1 * (best - worst), x, sampler=draws, X_pending=pending, prune_baseline=True
        )

    def _argmax(self, gain: AcquisitionFunction, tried: Tensor) -> Tensor | None:
        """Return the best point (d,) that has not been tried; None where there is none."""
        from botorch.optim.optimize import optimize_acqf_discrete, optimize_acqf_discrete_local_search

        places = [axis.places for axis in self.axes.values()]
        if math.prod(map(len, places)) > ENUMERATED:
            choices = [torch.tensor(own, dtype=torch.double) for own in places]
            x, _ = optimize_acqf_discrete_local_search(gain, choices, q=1, num_restarts=4, raw_samples=256, X_avoid=tried)
            return x[0]
        known = set(map(tuple, tried.tolist()))
        left = [point for point in itertools.product(*places) if point not in known]
        if not left:
            return None
        x, _ = optimize_acqf_discrete(gain, q=1, choices=torch.tensor(left, dtype=torch.double))
        return x[0]
