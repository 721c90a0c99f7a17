"""Further heads of a model, one per role (reward, value, next sentence, pool), in addition to its language-model head.

They are children of `model.task_head`, so one base in memory can serve as policy, value function and reward model, each with
its own adapter and head, and the base's fingerprint is that of the plain model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.models.excluded import is_excluded
from llmrecipe.models.heads.cross_attention_head import CrossAttentionHead
from llmrecipe.models.heads.dense_head import DenseHead
from llmrecipe.models.heads.feature_head import FeatureHead
from llmrecipe.models.heads.label_head import LabelHead
from llmrecipe.models.heads.pooled_head import PooledHead
from llmrecipe.models.heads.projection_head import ProjectionHead
from llmrecipe.models.heads.scalar_head import ScalarHead
from llmrecipe.models.heads.table_head import TableHead
from llmrecipe.models.module_map import anatomy

if TYPE_CHECKING:
    from llmrecipe.models.pretrained import LanguageModel

Head = TypeVar("Head", bound=nn.Module)

ATTRIBUTE = "task_head"
FEATURES = "features"
"""Role of the head that turns features (patches, regions, frames) into inputs of a text model."""
POOLING_FILE = "pooling.json"
"""File next to a finished model that gives one vector a text: how its states are pooled."""


def _added(model: LanguageModel, role: str, kind: type[Head], make: Callable[[int, float], Head]) -> Head:
    """Return the trained head of a role; one that is there already (of the run that is continued) keeps its values.

    Args:
        make: makes a head from the width of the states and the deviation of the family's own layers (`initializer_range`,
            0.02 where it has none).
    """
    heads = container(model)
    if role not in heads:
        config = model.config.get_text_config()
        std = float(getattr(config, "initializer_range", None) or 0.02)
        heads[role] = make(int(config.hidden_size), std).to(model.get_input_embeddings().weight.device)
    found = heads[role]
    assert isinstance(found, kind)
    set_frozen(found, False)
    return found


def add_head(model: LanguageModel, role: str, std: float | None = None, seed: int = 0) -> ScalarHead:
    """Add a trained head with one output and return it; an existing one (of the run that is continued) keeps its values.

    Args:
        std: of the normal initialization; default 1 / sqrt(D + 1); 0 initializes to zero.
    """
    return _added(
        model, role, ScalarHead, lambda width, _: ScalarHead(width, (width + 1) ** -0.5 if std is None else std, seed)
    )


def add_pooled_head(model: LanguageModel, role: str, outputs: int, seed: int = 0) -> PooledHead:
    """Add a trained head with a pooler and return it; an existing one (of the run that is continued) keeps its values.

    Raises:
        ModelError: the existing one has another number of outputs.
    """
    found = _added(model, role, PooledHead, lambda width, _: PooledHead(width, outputs, seed))
    _refuse_outputs(role, found.out.out_features, outputs)
    return found


def add_label_head(model: LanguageModel, role: str, outputs: int, seed: int = 0) -> LabelHead:
    """Add a trained linear layer with one output a label; an existing one (of the run that is continued) keeps its values.

    W is drawn with the deviation of the family's own layers.

    Raises:
        ModelError: the existing one has another number of outputs.
    """
    found = _added(model, role, LabelHead, lambda width, std: LabelHead(width, outputs, std, seed))
    _refuse_outputs(role, found.out.out_features, outputs)
    return found


def _refuse_outputs(role: str, held: int, wanted: int) -> None:
    if held != wanted:
        raise ModelError(
            f"model.path: the head '{role}' of the run has {held} outputs, and {wanted} are needed; train on rows with the "
            "labels of the run"
        )


def add_dense_head(model: LanguageModel, role: str, seed: int = 0) -> DenseHead:
    """Add a trained dense head for a role and return it; an existing one (of the run that is continued) keeps its values.

    W is drawn with the deviation of the family's own layers.
    """
    return _added(model, role, DenseHead, lambda width, std: DenseHead(width, std, seed))


def add_table(model: LanguageModel, role: str, values: Tensor) -> TableHead:
    """Add a table of values for a role and return it; an existing one (of the run that is continued) keeps its own."""
    return _added(model, role, TableHead, lambda *_: TableHead(values))


def add_cross_attention_head(model: LanguageModel, role: str, layers: int, seed: int = 0) -> CrossAttentionHead:
    """Add trained cross-attention for a role and return it; an existing one (of the run that is continued) keeps its values."""
    return _added(
        model, role, CrossAttentionHead, lambda width, std: CrossAttentionHead(width, layers, norm_behind(model), std, seed)
    )


def add_feature_head(model: LanguageModel, form: str, width: int | None, seed: int = 0) -> FeatureHead:
    """Add the trained head that turns features into inputs and return it; an existing one keeps its values.

    Args:
        form, width: see `FeatureHead`.

    Raises:
        ModelError: the existing one reads other features.
    """

    def new(hidden: int, std: float) -> FeatureHead:
        assert width is not None, "the width is the recipe's or the data's"
        return FeatureHead(form, width, hidden, seed, std)

    found = _added(model, FEATURES, FeatureHead, new)
    if found.form != form or width not in (None, found.width):
        raise ModelError(
            f"model.path: the run reads {found.form} features of {found.width} numbers, the recipe gives {form} features of "
            f"{width}; use the same objective.features, patch and processor"
        )
    return found


def add_projection_head(model: LanguageModel, role: str, outputs: int | None, scale: float, seed: int = 0) -> ProjectionHead:
    """Add the trained projection of pooled states and return it; an existing one keeps its values.

    Args:
        outputs: numbers of a vector; default those of the existing one, or the model's hidden width.
        scale: see `ProjectionHead`.

    Raises:
        ModelError: the existing one has another width.
    """
    found = _added(
        model, role, ProjectionHead, lambda width, _: ProjectionHead(width, outputs or width, scale, width**-0.5, seed)
    )
    if outputs not in (None, len(found.projection)):
        raise ModelError(
            f"model.path: the vectors of the run have {len(found.projection)} numbers, and objective.width is {outputs}; "
            "set it to the run's, or leave it out"
        )
    return found


def norm_behind(model: nn.Module) -> nn.Module | None:
    """Return a norm behind the attention of a model; None where norms come before sublayers."""
    found = anatomy(model)
    return None if found.pre_norm else found.at("norm.attn")[0].module


def set_frozen(head: nn.Module, frozen: bool) -> None:
    """Say whether a head came with a mounted run and stays as it is, or trains."""
    for parameter in head.parameters():
        parameter.frozen_head = frozen  # type: ignore[attr-defined]
        parameter.requires_grad_(not frozen)


def container(model: nn.Module) -> nn.ModuleDict:
    """Return the module that holds the heads of a model, by role."""
    if not isinstance(getattr(model, ATTRIBUTE, None), nn.ModuleDict):
        setattr(model, ATTRIBUTE, nn.ModuleDict())
    return getattr(model, ATTRIBUTE)


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


def is_head(model: nn.Module, name: str) -> bool:
    """Return whether a tensor or module belongs to a new task head: the loader's, or a role's scalar head.

    A head that the objective excluded is none, though its weights may be new (an encoder stored without a language-model head).
    """
    if is_frozen(model, name):
        return False
    new = ("task_head", *getattr(model, "new_heads", ()))
    return any(name == head or name.startswith(f"{head}.") for head in new) and not is_excluded(model, name)
