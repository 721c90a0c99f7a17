"""The `search` section: what `llmrecipe search` tries."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from llmrecipe.recipe.section import Section


class RangeSection(Section):
    """Numbers between two ends, both allowed; whole numbers where both ends are."""

    low: int | float
    high: int | float
    log: bool = Field(False, description="Draw evenly in the logarithm.")
    step: PositiveInt | PositiveFloat | None = Field(None, description="Only low + k * step.")

    @model_validator(mode="after")
    def _ends(self) -> RangeSection:
        if not self.low < self.high:
            raise ValueError(f"a range whose low ({self.low}) is below its high ({self.high})")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("a range above 0 and without step where log is true")
        return self


class SearchSection(Section):
    """What `llmrecipe search` tries."""

    space: dict[str, list[Any] | RangeSection] = Field(
        default_factory=dict, description="Key of the recipe -> values to choose from, or {low, high, log, step}."
    )
    sampler: Literal["tpe", "gp", "saas_map", "auto", "nsga2", "random", "grid", "stepwise"] = Field(
        "tpe",
        description="How the next trial is chosen: densities, a Gaussian process, one with a sparsity prior by BoTorch "
        "(saas_map; auto takes it where it is installed, else gp), evolution, by chance; grid tries everything; stepwise fixes "
        "one key after the other, each at the value that is best on average.",
    )
    against: list[Literal["parameters", "memory", "seconds"]] = Field(
        default_factory=list,
        description="Costs to make small while eval.monitor gets better: numbers a run leaves, peak MB, seconds of its steps.",
    )
    pick: Literal["best", "knee"] = Field(
        "best", description="Trial of the front that becomes searched.yaml: the best score, or the bend of score over cost."
    )
    limits: dict[Literal["parameters", "memory", "seconds"], PositiveInt | PositiveFloat] = Field(
        default_factory=dict, description="Largest cost of the trial that is picked."
    )
    start: list[dict[str, Any]] = Field(
        default_factory=list, description="Points that are tried first, such as designs made by hand."
    )
    samples: PositiveInt = Field(
        4, description="Trials stepwise makes for each value of a key, with the keys after it drawn by chance."
    )
    trials: PositiveInt = Field(20, description="Trials; grid and stepwise have as many as they need.")
    parallel: PositiveInt = Field(
        1,
        description="Trials that run at once; a trial is chosen by what the rounds of that many before its own have shown.",
    )
    seeds: list[NonNegativeInt] = Field(
        default_factory=list, description="Seeds each trial is run with; its value is their mean. Default: the recipe's seed."
    )
    seed: NonNegativeInt = Field(0, description="Seed of the sampler.")
    lr_scaling: Literal["off", "sqrt", "linear"] = Field(
        "off",
        description="Multiply the learning rate of a trial by (b / b0)^(1/2) (sqrt: Adam) or b / b0 (linear: SGD), b its "
        "batch.size and b0 the recipe's, so that optim.lr of the space is that of b0.",
    )
    final: bool = Field(
        False,
        description="Train the best point once more on training and validation rows together, for as long as its trial took to "
        "its best evaluation, and score the test split once.",
    )
    prune: Literal["off", "halving", "median"] = Field(
        "off", description="Stop trials early that are behind at an evaluation (needs eval.every)."
    )

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, given: object) -> object:
        """Flatten `optim: {lr: ...}` in the space to `optim.lr: ...`."""
        if not isinstance(given, dict) or not isinstance(given.get("space"), dict):
            return given
        return {**given, "space": _flat_space(given["space"])}


def _flat_space(space: dict[str, Any], at: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in space.items():
        key = f"{at}.{name}" if at else str(name)
        if isinstance(value, dict) and not set(value) & set(RangeSection.model_fields):
            inner = _flat_space(value, key)
        else:
            inner = {key: value}
        for path, choice in inner.items():
            both = isinstance(found.get(path), dict) and isinstance(choice, dict)
            found[path] = {**found[path], **choice} if both else choice
    return found
