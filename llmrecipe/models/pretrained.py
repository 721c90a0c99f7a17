"""What a model is to the type checker: a Transformers model with what this package keeps on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self, cast

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    class LanguageModel(PreTrainedModel):
        """Any Transformers model as `models.load` leaves it; a class for annotations only, which nothing is built from."""

        config: Any
        generation_config: Any
        attention_routed: bool
        """Whether attention goes through Transformers' AttentionInterface, where hooks reach it."""
        position_offset: int
        """What the family adds to a position (see `vocabulary.position_offset`)."""
        stored_dtype: torch.dtype
        """Dtype of the checkpoint the weights were read from; that of the model where they are random."""
        new_heads: tuple[str, ...]
        """Paths of modules whose weights no checkpoint held."""
        row_reading: Any
        """How the model reads the rows of a batch, once it has been measured (see `engine.row_reading`)."""
        decoders_tried: dict[str, bool]
        """Which ways to decode are right, of those that have been tried (see `engine.decoders`)."""
        obeys_causal_mask: bool
        """Whether a mask keeps an encoder from later tokens, once it has been measured."""

        def to(self, *args: object, **kwargs: object) -> Self:  # type: ignore[override]
            """Move or cast the model in place."""

        def get_input_embeddings(self) -> nn.Embedding:
            """Return the embedding of tokens."""

        def get_output_embeddings(self) -> nn.Linear | None:
            """Return the head that scores tokens, or None where the model has none."""

        def prepare_inputs_for_generation(self, *args: object, **kwargs: object) -> dict[str, Any]:
            """Return the arguments of the next forward pass of a generation."""

        def generate(self, *args: object, **kwargs: object) -> Tensor:
            """Return the token ids of prompts with their answers."""


def pretrained(model: nn.Module) -> LanguageModel:
    """Return the module itself, typed as the language model that it is.

    Methods and hooks receive models as plain modules, because the same code also walks their parts; where one reads the
    config or the embeddings, it goes through here.
    """
    return cast("LanguageModel", model)


def backbone_of(model: nn.Module) -> nn.Module:
    """Return the part of a language model that gives its last hidden states.

    That is its `base_model`; a text model that was cut out of a larger one may still name the larger one's (Llama 4).
    """
    base: Any = pretrained(model).base_model
    return getattr(model, "model", base) if base is model and hasattr(model, "lm_head") else base
