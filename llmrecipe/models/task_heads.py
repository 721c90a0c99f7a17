"""Further heads of a model, one per role (reward, value, next sentence, pool), in addition to its language-model head.

They are children of `model.task_head`, so one base in memory can serve as policy, value function and reward model, each with
its own adapter and head, and the base's fingerprint is that of the plain model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.core.foreign import reading
from llmrecipe.models.feature_head import FORMS, GEOMETRY, FeatureHead
from llmrecipe.models.label_head import LabelHead
from llmrecipe.models.masked_heads import head_chain
from llmrecipe.models.module_map import anatomy
from llmrecipe.models.pretrained import pretrained
from llmrecipe.models.projection_head import ProjectionHead

if TYPE_CHECKING:
    from llmrecipe.models.pretrained import LanguageModel


ATTRIBUTE = "task_head"
FEATURES = "features"
"""Role of the head that turns features (patches, regions, frames) into inputs of a text model."""
FILE = "heads.safetensors"
"""File next to a whole model's folder, which other programs load too and which therefore has no scalar head."""
POOLING_FILE = "pooling.json"
"""File next to a finished model that gives one vector a text: how its states are pooled."""


class ScalarHead(nn.Module):
    """gain * (w . h) + bias in float32 at least, (N, D) -> (N, 1). Only w trains; gain and bias normalise what it learned."""

    gain: Tensor
    bias: Tensor

    def __init__(self, width: int, std: float = 0.0, seed: int = 0):
        super().__init__()
        start = torch.zeros(1, width)
        if std:
            start = torch.randn(1, width, generator=torch.Generator().manual_seed(seed)) * std
        self.weight = nn.Parameter(start)
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("bias", torch.zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        """Return the scores (N, 1) of hidden states (N, D)."""
        with torch.autocast(h.device.type, enabled=False):
            wide = torch.promote_types(h.dtype, torch.float32)
            return self.gain * F.linear(h.to(wide), self.weight.to(wide)) + self.bias


class PooledHead(nn.Module):
    """W2 tanh(W1 h + b1) + b2 in float32 at least, (N, D) -> (N, C): the pooler and the outputs of BERT."""

    def __init__(self, width: int, outputs: int, seed: int = 0, std: float = 0.02):
        super().__init__()
        self.dense, self.out = nn.Linear(width, width), nn.Linear(width, outputs)
        draws = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in (self.dense, self.out):
                layer.weight.normal_(0.0, std, generator=draws)
                layer.bias.zero_()

    def forward(self, h: Tensor) -> Tensor:
        """Return the scores (N, C) of hidden states (N, D)."""
        with torch.autocast(h.device.type, enabled=False):
            weight = self.dense.weight
            return self.out(torch.tanh(self.dense(h.to(torch.promote_types(weight.dtype, torch.float32)))))


def add_pooled_head(model: LanguageModel, role: str, outputs: int, seed: int = 0) -> PooledHead:
    """Add a trained head with a pooler and return it; an existing one (of the run that is continued) keeps its values.

    Raises:
        ModelError: the existing one has another number of outputs.
    """
    heads = _container(model)
    if role not in heads:
        width = int(model.config.get_text_config().hidden_size)
        heads[role] = PooledHead(width, outputs, seed).to(model.get_input_embeddings().weight.device)
    found = heads[role]
    assert isinstance(found, PooledHead)
    _refuse_outputs(role, found.out.out_features, outputs)
    _set_frozen(found, False)
    return found


class DenseHead(nn.Module):
    """tanh(W h + b) in float32 at least, (N, D) -> (N, D). W is normal, b zero at the start."""

    def __init__(self, width: int, std: float = 0.0, seed: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width, generator=torch.Generator().manual_seed(seed)) * std)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, h: Tensor) -> Tensor:
        """Return the vectors (N, D) of hidden states (N, D)."""
        with torch.autocast(h.device.type, enabled=False):
            wide = torch.promote_types(h.dtype, torch.float32)
            return torch.tanh(F.linear(h.to(wide), self.weight.to(wide), self.bias.to(wide)))


def add_dense_head(model: LanguageModel, role: str, seed: int = 0) -> DenseHead:
    """Add a trained dense head for a role and return it; an existing one (of the run that is continued) keeps its values.

    W is drawn with the deviation of the family's own layers (`initializer_range`, 0.02 where it has none).
    """
    heads = _container(model)
    config = model.config.get_text_config()
    if role not in heads:
        std = float(getattr(config, "initializer_range", None) or 0.02)
        head = DenseHead(int(config.hidden_size), std, seed)
        heads[role] = head.to(model.get_input_embeddings().weight.device)
    found = heads[role]
    assert isinstance(found, DenseHead)
    _set_frozen(found, False)
    return found


class TableHead(nn.Module):
    """Numbers (V, D) kept with a model, which nothing trains."""

    table: Tensor

    def __init__(self, values: Tensor):
        super().__init__()
        self.register_buffer("table", values.detach().to(torch.promote_types(values.dtype, torch.float32), copy=True))


def add_table(model: LanguageModel, role: str, values: Tensor) -> TableHead:
    """Add a table of values for a role and return it; an existing one (of the run that is continued) keeps its own."""
    heads = _container(model)
    if role not in heads:
        heads[role] = TableHead(values)
    found = heads[role]
    assert isinstance(found, TableHead)
    return found


class CrossAttentionHead(nn.Module):
    """Cross-attention of every layer to one vector, in float32 at least: c = W_o W_v z + biases is added to the states.

    With one key, attention is its value: there are no queries and no keys. Where norms come after sublayers there is one here.

    Args:
        like: a norm behind a sublayer of the model; None where norms come before them.
    """

    def __init__(self, width: int, layers: int, like: nn.Module | None = None, std: float = 0.02, seed: int = 0):
        super().__init__()
        self.value = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norm = nn.ModuleList([] if like is None else [_fresh_norm(like, width) for _ in range(layers)])
        draws = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in (*self.value, *self.out):
                layer.weight.normal_(0.0, std, generator=draws)
                layer.bias.zero_()

    def forward(self, z: Tensor) -> list[Tensor]:
        """Return c (R, D) of every layer for the vectors (R, D)."""
        with torch.autocast(z.device.type, enabled=False):
            wide = z.to(torch.promote_types(z.dtype, torch.float32))
            return [_linear(out, _linear(value, wide)) for value, out in zip(self.value, self.out, strict=True)]

    def add(self, layer: int, states: Tensor, c: Tensor) -> Tensor:
        """Return states (R, T, D) with a layer's c (R, D) added, normed where the layers of the model are."""
        with torch.autocast(c.device.type, enabled=False):
            found = states.to(torch.promote_types(states.dtype, c.dtype)) + c[:, None]
            if len(self.norm):
                norm = self.norm[layer]
                found = norm(found.to(next(norm.parameters()).dtype))
            return found.to(states.dtype)


def _fresh_norm(like: nn.Module, width: int) -> nn.Module:
    """Return an untrained norm of the kind of another: a LayerNorm where it has a bias, otherwise an RMSNorm."""
    eps = float(getattr(like, "eps" if hasattr(like, "eps") else "variance_epsilon"))
    return nn.RMSNorm(width, eps=eps) if getattr(like, "bias", None) is None else nn.LayerNorm(width, eps=eps)


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.Linear)
    return F.linear(x, layer.weight.to(x), layer.bias.to(x))


def add_cross_attention_head(model: LanguageModel, role: str, layers: int, seed: int = 0) -> CrossAttentionHead:
    """Add trained cross-attention for a role and return it; an existing one (of the run that is continued) keeps its values."""
    heads = _container(model)
    if role not in heads:
        config = model.config.get_text_config()
        std = float(getattr(config, "initializer_range", None) or 0.02)
        head = CrossAttentionHead(int(config.hidden_size), layers, _norm_behind(model), std, seed)
        heads[role] = head.to(model.get_input_embeddings().weight.device)
    found = heads[role]
    assert isinstance(found, CrossAttentionHead)
    _set_frozen(found, False)
    return found


def add_feature_head(model: LanguageModel, form: str, width: int | None, seed: int = 0) -> FeatureHead:
    """Add the trained head that turns features into inputs and return it; an existing one keeps its values.

    Args:
        form, width: see `FeatureHead`.

    Raises:
        ModelError: the existing one reads other features.
    """
    heads = _container(model)
    config = model.config.get_text_config()
    if FEATURES not in heads:
        assert width is not None, "the width is the recipe's or the data's"
        std = float(getattr(config, "initializer_range", None) or 0.02)
        head = FeatureHead(form, width, int(config.hidden_size), seed, std)
        heads[FEATURES] = head.to(model.get_input_embeddings().weight.device)
    found = heads[FEATURES]
    assert isinstance(found, FeatureHead)
    if found.form != form or width not in (None, found.width):
        raise ModelError(
            f"model.path: the run reads {found.form} features of {found.width} numbers, the recipe gives {form} features of "
            f"{width}; use the same objective.features, patch and processor"
        )
    _set_frozen(found, False)
    return found


def add_projection_head(model: LanguageModel, role: str, outputs: int | None, scale: float, seed: int = 0) -> ProjectionHead:
    """Add the trained projection of pooled states and return it; an existing one keeps its values.

    Args:
        outputs: numbers of a vector; default those of the existing one, or the model's hidden width.
        scale: see `ProjectionHead`.

    Raises:
        ModelError: the existing one has another width.
    """
    heads = _container(model)
    if role not in heads:
        width = int(model.config.get_text_config().hidden_size)
        head = ProjectionHead(width, outputs or width, scale, width**-0.5, seed)
        heads[role] = head.to(model.get_input_embeddings().weight.device)
    found = heads[role]
    assert isinstance(found, ProjectionHead)
    if outputs not in (None, len(found.projection)):
        raise ModelError(
            f"model.path: the vectors of the run have {len(found.projection)} numbers, and objective.width is {outputs}; "
            "set it to the run's, or leave it out"
        )
    _set_frozen(found, False)
    return found


def _norm_behind(model: nn.Module) -> nn.Module | None:
    """Return a norm behind the attention of a model; None where norms come before sublayers."""
    found = anatomy(model)
    return None if found.pre_norm else found.at("norm.attn")[0].module


def _set_frozen(head: nn.Module, frozen: bool) -> None:
    for parameter in head.parameters():
        parameter.frozen_head = frozen  # type: ignore[attr-defined]
        parameter.requires_grad_(not frozen)


def add_head(model: LanguageModel, role: str, std: float | None = None, seed: int = 0) -> ScalarHead:
    """Add a trained head for a role and return it; an existing one (of the run that is continued) keeps its values.

    Args:
        std: of the normal initialization; default 1 / sqrt(D + 1); 0 initializes to zero.
    """
    heads = _container(model)
    if role not in heads:
        width = int(model.config.get_text_config().hidden_size)
        place = model.get_input_embeddings().weight.device
        heads[role] = ScalarHead(width, (width + 1) ** -0.5 if std is None else std, seed).to(place)
    found = heads[role]
    assert isinstance(found, ScalarHead)
    _set_frozen(found, False)
    return found


def mount_heads(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Mount frozen heads with the values of a saved run (names `task_head.<role>.weight` and so on); leave others alone."""
    heads = None
    for name, value in tensors.items():
        if not name.startswith(f"{ATTRIBUTE}."):
            continue
        heads = _container(model) if heads is None else heads
        _, role, part = name.split(".", 2)
        if role not in heads:
            heads[role] = _empty_head(tensors, role, model).to(pretrained(model).get_input_embeddings().weight.device)
        head = heads[role]
        with torch.no_grad():
            head.state_dict(keep_vars=True)[part].copy_(value)
        _set_frozen(head, True)


def add_label_head(model: LanguageModel, role: str, outputs: int, seed: int = 0) -> LabelHead:
    """Add a trained linear layer with one output a label; an existing one (of the run that is continued) keeps its values.

    W is drawn with the deviation of the family's own layers (`initializer_range`, 0.02 where it has none).

    Raises:
        ModelError: the existing one has another number of outputs.
    """
    heads = _container(model)
    if role not in heads:
        config = model.config.get_text_config()
        std = float(getattr(config, "initializer_range", None) or 0.02)
        head = LabelHead(int(config.hidden_size), outputs, std, seed)
        heads[role] = head.to(model.get_input_embeddings().weight.device)
    found = heads[role]
    assert isinstance(found, LabelHead)
    _refuse_outputs(role, found.out.out_features, outputs)
    _set_frozen(found, False)
    return found


def _refuse_outputs(role: str, held: int, wanted: int) -> None:
    if held != wanted:
        raise ModelError(
            f"model.path: the head '{role}' of the run has {held} outputs, and {wanted} are needed; train on rows with the "
            "labels of the run"
        )


def _empty_head(tensors: Mapping[str, Tensor], role: str, model: nn.Module) -> nn.Module:
    """Return a head of the kind and the size that a role's saved tensors have; only a scalar head has a gain."""
    inside = f"{ATTRIBUTE}.{role}."
    own = {name.removeprefix(inside): value for name, value in tensors.items() if name.startswith(inside)}
    form = next((form for form in FORMS if f"{form}.weight" in own), None)
    if form is not None:
        hidden, width = own[f"{form}.weight"].shape
        return FeatureHead(form, int(width) + (GEOMETRY if form == "region" else 0), int(hidden))
    if "weight" in own:
        width = int(own["weight"].shape[1])
        return ScalarHead(width) if "gain" in own else DenseHead(width)
    if "projection" in own:
        outputs, width = own["projection"].shape
        return ProjectionHead(int(width), int(outputs))
    if "table" in own:
        return TableHead(own["table"])
    if "value.0.weight" in own:
        layers = sum(name.startswith("value.") and name.endswith(".weight") for name in own)
        return CrossAttentionHead(int(own["value.0.weight"].shape[1]), layers, _norm_behind(model))
    if "dense.weight" not in own:
        outputs, width = own["out.weight"].shape
        return LabelHead(int(width), int(outputs))
    return PooledHead(int(own["dense.weight"].shape[1]), int(own["out.weight"].shape[0]))


def is_frozen(model: nn.Module, name: str) -> bool:
    """Return whether a tensor or module belongs to a head that came with a mounted run."""
    parts = name.split(".")
    heads = getattr(model, ATTRIBUTE, None)
    if parts[0] != ATTRIBUTE or len(parts) == 1 or not isinstance(heads, nn.ModuleDict):
        return False
    parameters = list(heads[parts[1]].parameters())
    return bool(parameters) and all(getattr(parameter, "frozen_head", False) for parameter in parameters)


def head_roles(model: LanguageModel) -> list[str]:
    """Return the roles that have a head."""
    heads = getattr(model, ATTRIBUTE, None)
    return list(heads) if isinstance(heads, nn.ModuleDict) else []


def split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a state dict into (the model's own tensors, those of its scalar heads)."""
    own = {k: v for k, v in state.items() if not k.startswith(f"{ATTRIBUTE}.")}
    return own, {k: v for k, v in state.items() if k not in own}


def write_heads(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Save heads next to a whole model; nothing is written where there are none."""
    if tensors:
        save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, str(folder / FILE))


def read_heads(model: LanguageModel, folder: Path) -> None:
    """Mount the heads saved next to a whole model, if there are any."""
    if (folder / FILE).is_file():
        with reading(str(folder / FILE), "copy the run again", ModelError):
            heads = load_file(str(folder / FILE))
        mount_heads(model, heads)


def freeze_below_head(model: LanguageModel) -> None:
    """Exclude everything but the head of a classifier from training, where no wrapper of a stack says what trains."""
    for name, parameter in model.named_parameters():
        if name.startswith(f"{model.base_model_prefix}."):
            parameter.frozen_base = True  # type: ignore[attr-defined]


def without_language_head(model: LanguageModel) -> None:
    """Exclude a language-model head from training, save what it shares with the embedding: hidden states get by without it."""
    head, embed = head_chain(model) or model.get_output_embeddings(), model.get_input_embeddings()
    tied = {id(p) for p in embed.parameters()} if embed is not None else set()
    for module in head.modules() if head is not None else ():
        module.frozen_base = True  # type: ignore[assignment]
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in tied:
                parameter.frozen_base = True  # type: ignore[attr-defined]


def excluded(part: nn.Module | Tensor | None) -> bool:
    """Return whether the objective excluded a weight of the base from training, or a module that its losses do not call."""
    return getattr(part, "frozen_base", False)


def _container(model: nn.Module) -> nn.ModuleDict:
    if not isinstance(getattr(model, ATTRIBUTE, None), nn.ModuleDict):
        setattr(model, ATTRIBUTE, nn.ModuleDict())
    return getattr(model, ATTRIBUTE)


def is_head(model: nn.Module, name: str) -> bool:
    """Return whether a tensor or module belongs to a new task head: the loader's, or a role's scalar head.

    A head that the objective excluded is none, though its weights may be new (an encoder stored without a language-model head).
    """
    if is_frozen(model, name):
        return False
    new = ("task_head", *getattr(model, "new_heads", ()))
    return any(name == head or name.startswith(f"{head}.") for head in new) and not _is_excluded(model, name)


def _is_excluded(model: nn.Module, name: str) -> bool:
    """Return whether a tensor or module, or a module that it is in, is excluded from training."""
    part: Any = model
    for step in name.split("."):
        part = getattr(part, step, None)
        if excluded(part):
            return True
    return False
