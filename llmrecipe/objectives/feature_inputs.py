"""Pictures and feature files before the text of a row: options, heads and layout of the objectives that read them.

An evaluation reads each row in three views: with its own features, without them, and with those of another row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.option_types import Literal, PositiveInt
from llmrecipe.core.registry import options
from llmrecipe.data.collate import Batch, FeatureVectors, Sequence
from llmrecipe.engine.role_models import Roles
from llmrecipe.models import task_heads
from llmrecipe.models.heads.feature_head import GEOMETRY, FeatureHead
from llmrecipe.objectives.base import Measures

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from llmrecipe.data.prepare import Rows, SplitRows
    from llmrecipe.models.pretrained import LanguageModel

OWN, REMOVED, SHUFFLED = "own", "removed", "shuffled"
VIEWS = (OWN, REMOVED, SHUFFLED)
VIEW = "view"
"""Key of an evaluated row's view."""


@options
class FeatureInputs:
    """Mixin for an `Objective` whose rows name a picture or a file of features, read as inputs before their text."""

    features: Literal["patch", "region", "frame"] = "patch"
    """What the rows' files hold: pictures, cut into patches; vectors of regions with their boxes; or vectors in an order."""
    patch: PositiveInt = 8
    """Height and width of a patch, in pixels of the prepared picture."""
    feature_width: PositiveInt | None = None
    """Numbers of a vector (of a patch: channels x patch x patch; with 7 for a box); default: the data's."""

    @cached_property
    def widths(self) -> set[int]:
        """Hold the width of the data's vectors, once they are known."""
        return set()

    def slots(self, config: PreTrainedConfig, shape: tuple[int, ...]) -> int:
        """Return the number of patches of a picture, or of vectors."""
        return shape[0] if len(shape) == 2 else (shape[1] // self.patch) * (shape[2] // self.patch)

    def check_features(self, data: SplitRows) -> None:
        """Refuse files of another form than `features` says, or of several widths.

        Raises:
            RecipeError: naming the key to change.
        """
        widths = {self._width(shape) for shape in data.shapes()}
        if len(widths | {self.feature_width or min(widths)}) > 1:
            raise RecipeError(
                f"objective.feature_width: the vectors of the data have the widths {', '.join(map(str, sorted(widths)))}; one "
                "head reads them all, so they must have one width, and the recipe's where it names one"
            )
        self.widths.update(widths)
        if self.features == "region" and min(widths) <= GEOMETRY:
            raise RecipeError(
                "objective.features: region needs vectors with their boxes (arrays 'features' and 'boxes' in a .npz)"
            )

    def _width(self, shape: tuple[int, ...]) -> int:
        is_picture = len(shape) == 3
        if is_picture != (self.features == "patch"):
            held = "pictures; set objective.features=patch" if is_picture else "vectors; set objective.features=region or frame"
            raise RecipeError(f"objective.features: {self.features} does not fit rows whose files hold {held}")
        if is_picture and (shape[1] % self.patch or shape[2] % self.patch):
            raise RecipeError(
                f"objective.patch: prepared pictures of {shape[1]} x {shape[2]} pixels cannot be cut into patches of "
                f"{self.patch} x {self.patch}; change it, or the size of pictures (processor.config.size)"
            )
        return shape[0] * self.patch**2 if is_picture else shape[1]

    def add_feature_head(self, model: LanguageModel, seed: int) -> None:
        """Add the head that turns features into inputs; one that came with the model keeps its values."""
        task_heads.add_feature_head(model, self.features, self.feature_width or next(iter(self.widths), None), seed)

    def vectors(self, row: dict[str, Any]) -> FeatureVectors | None:
        """Return the vectors of a row; None of a view without features."""
        return vectors_of(torch.from_numpy(row["features"].load()), self.patch) if "features" in row else None

    def lay_out(self, sequences: list[Sequence], rows: list[dict[str, Any]], roles: Roles, packed: bool = True) -> Batch:
        """Lay sequences out behind their features, which are of segment 1 where the model has segments.

        Args:
            rows: token row of each sequence.
            packed: False where what reads the states needs one row a sequence.
        """
        head = roles.engine.head_of(task_heads.FEATURES)
        assert isinstance(head, FeatureHead), "made by `prepare_model`"
        # A process without rows reads a filler that goes through the head too, or the others would wait for its gradient.
        filler = Sequence([0], [0], features=FeatureVectors(torch.zeros(1, head.width), torch.zeros(1, 2, dtype=torch.long)))
        batch = roles.layout(sequences or [filler], [row["row"] for row in rows], packed=packed)
        batch = batch if rows else replace(batch, tokens=0)
        if int(getattr(roles.model.config, "type_vocab_size", 0) or 0) > 1:
            here = batch.here
            types = torch.zeros_like(here.input_ids).flatten()
            types = types if here.slots is None else types.index_fill(0, here.slots.index, 1)
            batch = batch.with_extra(token_type_ids=types.view_as(batch.input_ids))
        return batch

    def evaluation_rows(self, data: Rows, indices: list[int]) -> list[dict[str, Any]]:
        """Return every view of each row."""
        return [view for i in indices for view in views_of(data, i)]


def vectors_of(array: torch.Tensor, patch: int) -> FeatureVectors:
    """Return the vectors of a picture (C, H, W), cut into patches row by row, or of vectors (m, W), with their places.

    Examples:
        >>> vectors_of(torch.arange(8.0).view(1, 2, 4), patch=2).values.tolist()
        [[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]
    """
    if array.dim() == 2:
        count = torch.arange(len(array))
        return FeatureVectors(array, torch.stack((count, torch.zeros_like(count)), 1))
    cut = array.unflatten(1, (-1, patch)).unflatten(3, (-1, patch))
    rows, columns = cut.shape[1], cut.shape[3]
    values = cut.permute(1, 3, 0, 2, 4).reshape(rows * columns, -1)
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return FeatureVectors(values, grid)


def views_of(data: Rows, index: int) -> Iterator[dict[str, Any]]:
    """Yield the views of a row of a split; the other row's picture is half the split away, or the next that differs."""
    row = data[index]
    yield {**row, VIEW: OWN}
    yield {**{k: v for k, v in row.items() if k != "features"}, VIEW: REMOVED}
    count = len(data)
    for step in range(count):
        other = data[(index + max(count // 2, 1) + step) % count]["features"]
        if other.key != row["features"].key:
            yield {**row, "features": other, VIEW: SHUFFLED}
            return


def measures_by_view(better: Measures) -> Measures:
    """Return metrics of the other views under their names, and the gains.

    Args:
        better: metrics that each view has.
    """
    others = (REMOVED, SHUFFLED)
    views = {f"{name}/{view}": None for view in others for name in better}
    gains: Measures = {f"gain/{view}": "max" for view in others}
    return {**better, **views, **gains}


def gains(sums: dict[str, float]) -> dict[str, float]:
    """Return by how much the nll of the other views exceeds that of the rows with their own features."""
    return {f"gain/{view}": sums[f"nll/{view}"] - sums["nll"] for view in (REMOVED, SHUFFLED) if f"nll/{view}" in sums}
