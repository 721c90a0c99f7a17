"""From a model and the names of its family to its sites: paths, widths, rows of fused matrices, expert tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol, cast

from torch import nn

from llmrecipe.core.errors import ModelError
from llmrecipe.models.anatomy import Anatomy
from llmrecipe.models.family import part_names_of
from llmrecipe.models.hooks.shared_module import base_modules
from llmrecipe.models.infer_family import ATTENTION, infer, is_rotary
from llmrecipe.models.part_names import PartNames
from llmrecipe.models.pretrained import pretrained
from llmrecipe.models.site import Site
from llmrecipe.models.vocabulary import input_embedding

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


PARTS = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.gate_up": ("mlp.gate", "mlp.up"), "attn.kv": ("attn.k", "attn.v")}
"""Fused role -> the roles its outputs consist of, in order."""


def build_anatomy(model: nn.Module, by_hand: dict[str, str] | None = None) -> Anatomy:
    """Build the anatomy of a model.

    Raises:
        ModelError: the block list or the attention cannot be found.
    """
    whole = getattr(model, "config", None)
    if whole is None:
        raise ModelError(f"{type(model).__name__} is not a Transformers model: it has no config")
    config = whole.get_text_config()
    family, source = part_names_of(config.model_type), "family"
    if family is None or not _stacks(model, family):
        family, source = infer(model), "inference"
    if by_hand:
        family, source = _by_hand(family, by_hand), "recipe"
    stacks = _stacks(model, family) if family is not None else {}
    if family is None or not stacks:
        raise ModelError(_lost(model, "the list of its layers"))
    if not _uniform(config):
        raise ModelError(
            f"{config.model_type}: its config gives no single width and number of heads for all layers, which this method "
            "needs; stack=[] trains the whole model without"
        )
    shape = _Shape(config)
    sites = list(_top_sites(model, family, stacks, shape))
    for side, path in stacks.items():
        sites += _stack_sites(model, side, path, family, shape)
    if not any(site.role == "attn" for site in sites):
        raise ModelError(_lost(model, "attention"))
    return _summary(model, config, family, source, sites, shape)


def is_convolutional(model: nn.Module) -> bool:
    """Return whether a model reads pictures and has no attention, so that its parts have no roles."""
    return getattr(model, "main_input_name", "") == "pixel_values" and not any(
        ATTENTION.search(path) for path, _ in model.named_modules()
    )


def _lost(model: nn.Module, what: str) -> str:
    family = pretrained(model).config.model_type
    return (
        f"{family}: cannot find {what} by its module names, which this method needs; stack=[] trains the whole model without. "
        "Name the parts in the recipe, for example\n"
        "model:\n  anatomy: {layers: model.blocks, attn: attention, attn.q: attention.query, attn.v: attention.value, "
        "mlp: ffn, mlp.down: ffn.out}"
    )


def _uniform(config: object) -> bool:
    """Return whether a config gives one width and one number of heads, not one for each stage of a pyramid."""
    heads = getattr(config, "num_attention_heads", None) or 1
    return isinstance(getattr(config, "hidden_size", None), int) and isinstance(heads, int)


class _Sizes(Protocol):
    """What the config of every family says."""

    hidden_size: int


class _Shape:
    """Head sizes from a config, under whatever names the family uses."""

    def __init__(self, config: _Sizes):
        self.width: int = config.hidden_size
        # Recurrent families without heads, such as RWKV, compute over the whole width.
        self.heads: int = getattr(config, "num_attention_heads", None) or 1
        self.kv_heads: int = getattr(config, "num_key_value_heads", None) or self.heads
        self.nope: int = getattr(config, "qk_nope_head_dim", None) or 0
        self.value_dim: int = getattr(config, "v_head_dim", None) or 0
        latent = self.nope + getattr(config, "qk_rope_head_dim", 0) if self.nope else 0
        given = latent or getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
        self.head_dim: int = given or self.width // self.heads

    def split(self, role: str, layout: str, width: int) -> list[tuple[int, ...] | slice]:
        """Return the rows of each part of a fused projection, or an empty list where the sizes do not add up."""
        if layout == "latent":
            return _interleave((self.nope, self.value_dim), self.heads, width)
        if role == "mlp.gate_up":
            return [slice(0, width // 2), slice(width // 2, width)]
        if layout == "heads":
            return _interleave((self.head_dim,) * 3, self.heads, width)
        ends = [self.heads * self.head_dim]
        ends += [ends[0] + self.kv_heads * self.head_dim, ends[0] + 2 * self.kv_heads * self.head_dim]
        return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)] if ends[-1] == width else []


def _interleave(sizes: tuple[int, ...], heads: int, width: int) -> list[tuple[int, ...] | slice]:
    """Return the rows of each part when every head stores its parts next to each other."""
    per_head = sum(sizes)
    if per_head * heads != width:
        return []
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        tuple(head * per_head + start + i for head in range(heads) for i in range(size))
        for start, size in zip(starts, sizes, strict=True)
    ]


def _stacks(model: nn.Module, family: PartNames) -> dict[str, str]:
    """Return side -> full path of its block list; text stacks take precedence over image or audio stacks of that name."""
    lists = [path for path, module in base_modules(model) if isinstance(module, nn.ModuleList)]
    found: dict[str, str] = {}
    for side, ending in family.stacks.items():
        fits = [path for path in lists if path == ending or path.endswith("." + ending)]
        fits.sort(key=lambda path: ("language_model" not in path and "text_model" not in path, path.count("."), len(path)))
        if fits:
            found[side] = fits[0]
    return found


def _by_hand(family: PartNames | None, names: dict[str, str]) -> PartNames:
    layers = dict(names)
    stacks = dict(family.stacks) if family else {}
    for key in ("layers", "encoder.layers", "decoder.layers"):
        if key in layers:
            stacks["encoder" if key.startswith("encoder") else "decoder"] = layers.pop(key)
    top = {role: "/" + layers.pop(role) for role in list(layers) if role in ("norm.final", "norm.embed", "embed.position")}
    base = family or PartNames(stacks={}, layer={})
    fused = {role: layout for role, layout in base.fused.items() if role not in layers}
    return PartNames(
        stacks, base.layer | layers, base.top | top, fused, pre_norm=base.pre_norm, parallel=base.parallel, causal=base.causal
    )


def find_module(root: nn.Module, path: str) -> tuple[str, nn.Module] | None:
    """Return the first existing alternative of a path below a module."""
    for choice in path.split("|"):
        try:
            module = root.get_submodule(choice.strip())
        except AttributeError:
            continue
        if isinstance(module, nn.Module):
            return choice.strip(), module
    return None


def _whole(module: nn.Module, name: str) -> int:
    return int(cast(int, getattr(module, name)))


def widths(module: nn.Module, default: int) -> tuple[int, int, bool]:
    """Return (features in, features out, stored transposed) of a module; 4-bit layers have logical sizes as attributes."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return _whole(module, "in_features"), _whole(module, "out_features"), False
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim, True
    if hasattr(module, "nx") and hasattr(module, "nf"):
        return _whole(module, "nx"), _whole(module, "nf"), True
    weight = getattr(module, "weight", None)
    if weight is not None and weight.dim() == 2:
        return weight.shape[1], weight.shape[0], False
    if weight is not None and weight.dim() == 1:
        return weight.shape[0], weight.shape[0], False
    return default, default, False


def _stack_sites(model: nn.Module, side: str, path: str, family: PartNames, shape: _Shape) -> Iterator[Site]:
    for index, block in enumerate(model.get_submodule(path).children()):
        home = f"{path}.{index}"
        yield Site(home, "block", index, block, side, shape.width, shape.width)
        for key, below in family.layer.items():
            only, _, role = key.rpartition(":")
            hit = find_module(block, below) if only in ("", side) else None
            if hit is None:
                continue
            place, module = f"{home}.{hit[0]}", hit[1]
            if role == "experts":
                yield from _expert_sites(place, index, module, side, shape)
                continue
            wide_in, wide_out, transposed = widths(module, shape.width)
            yield Site(place, role, index, module, side, wide_in, wide_out, transposed)
            if role in family.fused:
                rows = shape.split(role, family.fused[role], wide_out)
                for part, owned in zip(PARTS[role], rows, strict=False):
                    count = len(owned) if isinstance(owned, tuple) else owned.stop - owned.start
                    yield Site(place, part, index, module, side, wide_in, count, transposed, owned)


def _expert_sites(path: str, layer: int, module: nn.Module, side: str, shape: _Shape) -> Iterator[Site]:
    for tensor in ("gate_up_proj", "up_proj", "down_proj"):
        weight = getattr(module, tensor, None)
        if weight is None or weight.dim() != 3:
            continue
        count, rows, columns = weight.shape
        # Most families store (E, out, in); those with the flag store (E, in, out).
        transposed = bool(getattr(module, "is_transposed", False))
        wide_out, wide_in = (columns, rows) if transposed else (rows, columns)
        yield Site(path, "experts", layer, module, side, wide_in, wide_out, transposed, tensor=tensor, experts=count)


def _top_sites(model: nn.Module, family: PartNames, stacks: dict[str, str], shape: _Shape) -> Iterator[Site]:
    paths = {id(module): path for path, module in reversed(list(model.named_modules()))}
    main = "decoder" if "decoder" in stacks else next(iter(stacks))

    def site(role: str, side: str, module: nn.Module) -> Site:
        return Site(paths[id(module)], role, None, module, side, *widths(module, shape.width))

    embed = input_embedding(model)
    if embed is not None and id(embed) in paths:
        yield site("embed", main, embed)
    for side, path in stacks.items():
        home = path.split(".")[:-1]
        for role, below in family.top.items():
            for choice in below.split("|"):
                name = choice.strip()
                up = len(name) - len(name.lstrip("^"))
                base = [] if name.startswith("/") else home[: len(home) - up]
                hit = find_module(model, ".".join([*base, name.lstrip("^/")]))
                if hit is not None:
                    yield site(role, side, hit[1])
                    break
    head = _head(model)
    if head is not None:
        yield site("head", main, head)


def _head(model: nn.Module) -> nn.Module | None:
    """Return the module that turns hidden states into logits: of tokens, or of classes."""
    head = pretrained(model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None:
        return head
    for name in ("score", "classifier", "classification_head", "qa_outputs"):
        found = getattr(model, name, None)
        if isinstance(found, nn.Module):
            return found
    return None


def _flag(rule: bool | str, config: object) -> bool:
    return bool(getattr(config, rule, False)) if isinstance(rule, str) else rule


def _summary(
    model: nn.Module, config: PreTrainedConfig, family: PartNames, source: str, sites: list[Site], shape: _Shape
) -> Anatomy:
    main = "decoder" if any(s.role == "block" and s.side == "decoder" for s in sites) else "encoder"
    attention = next(s.module for s in sites if s.role == "attn" and s.side == main)
    down = [s for s in sites if s.role == "mlp.down"] or [s for s in sites if s.tensor == "down_proj"]
    return Anatomy(
        family=config.model_type,
        layers=sum(s.role == "block" and s.side == main for s in sites),
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        width=shape.width,
        ffn_width=down[0].width_in if down else 0,
        pre_norm=_flag(family.pre_norm, config),
        parallel_blocks=_flag(family.parallel, config),
        encoder_decoder=bool(config.is_encoder_decoder),
        causal=bool(getattr(attention, "is_causal", family.causal)),
        rope=any(is_rotary(module) for module in model.modules()),
        sites=sites,
        source=source,
    )
