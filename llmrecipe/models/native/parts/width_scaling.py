"""Width scaling (muP): the learning rate that is best for a narrow model is best for a wide one. Config: mup_base_width.

With m = D / D_0, D_0 the width at which the learning rate was chosen (`mup_base_width`), and s = `initializer_range`:

                                            deviation at the start     learning rate (Adam)     output
    embeddings, positions, patches          s                          1                        1
    matrices inside blocks                  s / sqrt(m)                1 / m                    1
    output head, tied or not                s                          1                        1 / m
    router, gates, classifiers              s / m                      1 / m                    1
    norms, biases, relative positions       as without                 1                        1

Attention scores are q . k sqrt(E_0) / E in the place of q . k / sqrt(E), E_0 the base's size of a head (`mup_base_head_dim`;
default: that of a base with as many heads). The decay of a weight is multiplied by m where its rate is divided by it, so that
a step shrinks it alike at every width. At m = 1 nothing differs. Depth and batch are not scaled: search the learning rate with
the depth, batch and steps of the run it is for, and let heads and feed-forward widths grow in proportion. For Adam and its
kind; other optimizers are refused.

Config: mup_base_width (D_0), mup_base_head_dim (E_0).
Paper: Tensor Programs V (arXiv 2203.03466), table 8.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from llmrecipe.models.native.parts.mixture_of_experts import NativeRouter, ShareOfToken
from llmrecipe.models.native.parts.patch_embedding import PatchEmbedding
from llmrecipe.models.native.parts.positional_encoding import RelativeBias

if TYPE_CHECKING:
    from llmrecipe.models.native.config import NativeConfig

READOUTS = ("score", "classifier", "qa_outputs")
"""Linear layers of a model that map states to a few numbers and are not the output head."""


def attention_scale(config: NativeConfig) -> float:
    """Return what the product of a query and a key is multiplied by."""
    size = config.sizes()[0]
    base = size if config.mup_base_width is None else config.mup_base_head_dim or size / config.width_ratio()
    return (1.0 if config.positions == "relative" else base**-0.5) * base / size


def scaled_logits(logits: Tensor, config: NativeConfig) -> Tensor:
    """Return logits (..., V) in the scale that the config states."""
    divisor = config.logit_divisor()
    return logits if divisor == 1.0 else logits / divisor


def start_divisor(module: nn.Module, model: nn.Module, config: NativeConfig) -> float:
    """Return what the deviation of a module's first weights is divided by.

    Args:
        model: the model whose weights are initialized.
    """
    ratio = config.width_ratio()
    if isinstance(module, (NativeRouter, ShareOfToken)) or any(module is getattr(model, name, None) for name in READOUTS):
        return ratio
    head = getattr(model, "get_output_embeddings", lambda: None)()
    patches = getattr(getattr(model, "patches", None), "projection", None)
    if isinstance(module, (nn.Embedding, PatchEmbedding, RelativeBias)) or module is head or module is patches:
        return 1.0
    return ratio**0.5


def matrix_rates(model: nn.Module, config: NativeConfig) -> dict[str, float]:
    """Map the name of each matrix whose learning rate depends on the width -> its multiplier; empty without `mup_base_width`.

    Embeddings and the output head are not among them.
    """
    if config.mup_base_width is None:
        return {}
    kept = {id(module.projection.weight) for module in model.modules() if isinstance(module, PatchEmbedding)}
    tables = [m for m in model.modules() if isinstance(m, (RelativeBias, nn.Embedding))]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    kept |= {id(p) for module in (*tables, head) if module is not None for p in module.parameters(recurse=False)}
    named = {name: p for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in kept}
    return dict.fromkeys(named, 1.0 / config.width_ratio())
