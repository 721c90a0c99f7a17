"""Image classification."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch, picture_batch
from llmrecipe.engine.role_models import Roles
from llmrecipe.models.load import load_config
from llmrecipe.objectives.base import Objective
from llmrecipe.objectives.finetuning._engines.label_prediction import LabelPrediction
from llmrecipe.runs.open_model import resolve_section

if TYPE_CHECKING:
    from llmrecipe.data.prepare import SplitRows
    from llmrecipe.recipe.schema import Recipe

ONE_SIZE = ("llmrecipe_native", "vit", "deit")
"""Model types with one learned position for each patch of a picture of `image_size`; others read pictures of any size."""


@register
class ImageClassification(LabelPrediction, Objective):
    """Image classification: L = -(1/n) sum_i log softmax(f(x_i))[y_i], x the picture as the model's image processor gives it.

    The model reads the picture itself: a vision transformer (`model=native_vit`, ViT, DeiT, Swin, ...) or a convolutional
    network (ResNet, ConvNeXt, ...) of Transformers, with the pooling and the head of its family; the head is new where the
    labels are. `stack=[bitfit]` trains the biases, `head_only` the head alone. Batch normalization keeps to the statistics
    it was loaded with, in training too, so a picture's loss depends on no other picture. `problem` and metrics are those of
    `classification`.

    Papers: An Image is Worth 16x16 Words (arXiv 2010.11929); Deep Residual Learning (arXiv 1512.03385).
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    rows: ClassVar[str] = "labelled_images"
    head: ClassVar[str] = "image"
    resampled: ClassVar[bool] = True

    def check(self, recipe: Recipe, data: SplitRows) -> None:
        """Refuse what no prediction of labels can be, and pictures of a size for which the model has no positions."""
        super().check(recipe, data)
        config = load_config(resolve_section(recipe.model, tensors=False)[0])
        if config.model_type not in ONE_SIZE:
            return
        side = config.image_size
        size = (side, side) if isinstance(side, int) else tuple(side)
        other = next((shape for shape in sorted(data.shapes()) if shape[1:] != size), None)
        if other is not None:
            raise RecipeError(
                f"processor.config.size: pictures are prepared as {other[1]} x {other[2]} pixels, and this model reads "
                f"{size[0]} x {size[1]}; set 'processor.config.size={{height: {size[0]}, width: {size[1]}}}', or leave it out"
            )

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Stack the pictures with their labels, (S,), or (S, C) for several labels each."""
        labels = self.labels_of(rows, roles)
        if not rows:
            return self._filler(roles, labels)
        pixels = torch.stack([torch.from_numpy(row["features"].load()) for row in rows])
        states = rows[0]["features"].slots
        return picture_batch(pixels, states, [row["row"] for row in rows], {"labels": labels}).to(roles.device)

    def _filler(self, roles: Roles, labels: torch.Tensor) -> Batch:
        """Return a batch of one picture without a label, for a process that has no rows of a step."""
        assert roles.data is not None, "a process without rows is one of a run"
        features = roles.data[0]["features"]
        pixels = torch.zeros(1, *features.shape)
        return picture_batch(pixels, features.slots, extra={"labels": labels}, real=False).to(roles.device)
