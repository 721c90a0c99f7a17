"""The image processor of a model: how a picture becomes the numbers it reads.

It is Transformers' own, in its Pillow form, so results do not depend on which other libraries are installed: the recipe's
(`processor`), else that of the model's folder, else a ViT's with the size and channels of the model's config.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrecipe.core.errors import ModelError, did_you_mean
from llmrecipe.models.checkpoint_path import locate, offline, shown_reading, unreachable
from llmrecipe.models.resolve_class import first_line, quiet
from llmrecipe.recipe.schema import ModelSection, ProcessorSection

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from transformers import BaseImageProcessor, PreTrainedConfig

FILE = "preprocessor_config.json"
STRIDE = 32
"""Pixels that a side of one final state of a convolutional network stands for."""


class ImageProcessor:
    """A processor of Transformers with the colours it expects."""

    def __init__(self, processor: BaseImageProcessor) -> None:
        self.processor = processor
        mean = processor.to_dict().get("image_mean")
        self.mode = "L" if isinstance(mean, list | tuple) and len(mean) == 1 else "RGB"

    def __call__(self, picture: Image.Image) -> np.ndarray:
        """Return the numbers (C, H, W) of a picture.

        Raises:
            ValueError: the processor gives something else, such as several crops.
        """
        import numpy as np

        given: Any = picture if self.mode == "RGB" else np.asarray(picture)[None]
        more: dict[str, Any] = {} if self.mode == "RGB" else {"input_data_format": "channels_first"}
        found = np.asarray(self.processor(images=given, return_tensors="np", **more)["pixel_values"])
        if found.ndim != 4 or len(found) != 1:
            raise ValueError(f"{type(self.processor).__name__} gives an array of shape {found.shape}, not one picture")
        return found[0]

    @property
    def fingerprint(self) -> str:
        """Return a hash of everything the numbers depend on but the picture."""
        text = json.dumps(self.processor.to_dict(), sort_keys=True, default=str)
        return hashlib.sha256(f"{type(self.processor).__name__} {text}".encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write the processor's file into a folder, for `AutoImageProcessor`."""
        self.processor.save_pretrained(folder)


def load_processor(
    model: ModelSection, section: ProcessorSection, config: PreTrainedConfig, folder: Path | None = None
) -> ImageProcessor:
    """Load the image processor of a recipe.

    Args:
        model: section of the base model.
        config: of the model.
        folder: the finished run whose processor is preferred to the base's.

    Raises:
        ModelError: there is no such processor, or one of its values is unknown.
    """
    changes = dict(section.config)
    kind = changes.pop("image_processor_type", None)
    if kind is not None:
        return ImageProcessor(_made(_class_of(str(kind)), changes))
    place = section.path or _folder_of(model, folder)
    if place is None:
        from transformers import ViTImageProcessorPil

        return ImageProcessor(_made(ViTImageProcessorPil, {**_size_of(config), **changes}))
    found = _loaded(place, model.trust_remote_code and not section.path)
    if changes:
        found = _made(type(found), {**found.to_dict(), **changes}, known=found.to_dict())
    return ImageProcessor(found)


def _folder_of(model: ModelSection, run: Path | None) -> str | None:
    """Return where the model's own processor is; None where it has none."""
    if run is not None and (run / FILE).is_file():
        return str(run)
    if model.init == "random" and "model_type" in model.config:
        return None
    place, local = locate(model.path)
    return place if not local or (Path(place) / FILE).is_file() else None


def _loaded(path: str, trust: bool) -> BaseImageProcessor:
    from transformers import AutoImageProcessor

    place, local = locate(path, "processor.path")
    reason = None if local else offline()
    if local and not (Path(place) / FILE).is_file():
        raise ModelError(f"processor.path: {path} has no {FILE}; name a folder or hub model that has one")
    try:
        with quiet(), shown_reading(path, local):
            return AutoImageProcessor.from_pretrained(
                place, backend="pil", trust_remote_code=trust, local_files_only=local or reason is not None
            )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        if not local and isinstance(error, OSError):
            raise unreachable(path, reason or "the hub has no such processor, or it needs a login (HF_TOKEN)") from error
        raise ModelError(f"processor.path: {path}: cannot read its {FILE}: {first_line(error)}") from error


def _class_of(name: str) -> type[BaseImageProcessor]:
    import transformers

    with quiet():
        known = [n.removesuffix("Pil") for n in dir(transformers) if n.endswith("ImageProcessorPil")]
        found = getattr(transformers, f"{name.removesuffix('Pil').removesuffix('Fast')}Pil", None)
    if found is None:
        raise ModelError(
            f"processor.config.image_processor_type: Transformers has no '{name}' for Pillow{did_you_mean(name, known)}"
        )
    return found


def _made(cls: type[BaseImageProcessor], values: dict[str, Any], known: dict[str, Any] | None = None) -> BaseImageProcessor:
    base = {**cls().to_dict(), **(known or {})}
    for name in values:
        if name not in base:
            raise ModelError(f"processor.config.{name}: {cls.__name__} has no such value{did_you_mean(name, base)}")
    try:
        with quiet():
            return cls(**{k: v for k, v in values.items() if k != "image_processor_type"})
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"processor.config: {first_line(error)}") from error


def _size_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the values of a processor that follow from the config of a model that reads pictures."""
    size, channels = getattr(config, "image_size", None), int(getattr(config, "num_channels", None) or 3)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    sized = {} if size is None else {"size": {"height": int(height), "width": int(width)}}
    return {**sized, "image_mean": [0.5] * channels, "image_std": [0.5] * channels}


def places(config: PreTrainedConfig, shape: tuple[int, ...]) -> int:
    """Return how many states a model makes of features: one a vector, one a patch and one more, or one for 32 x 32 pixels."""
    if len(shape) == 2:
        return shape[0]
    patch = getattr(config, "patch_size", None)
    if patch is None:
        return max(1, (shape[1] // STRIDE) * (shape[2] // STRIDE))
    high, wide = patch if isinstance(patch, list | tuple) else (patch, patch)
    return 1 + (shape[1] // int(high)) * (shape[2] // int(wide))
