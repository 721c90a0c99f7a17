"""Bottleneck adapters in the layout of adapter-hub's `adapters` library, and back.

    adapter_config.json     where bottlenecks stand, their activation, scale and reduction factor (`BnConfig`)
    adapter.safetensors     <block>.<place>.adapters.<name>.adapter_down.0.{weight (r, d), bias (r)}
                            ... .adapter_up.{weight (d, r), bias (d)}
    head_config.json        the class of the model and its labels, with model_head.safetensors: a task head that was trained

There, `SeqBnConfig` is the placement of Pfeiffer et al., `DoubleSeqBnConfig` that of Houlsby et al., and `ParBnConfig` the
parallel adapter, whose branch reads the residual stream. A width r is written as d over a reduction factor; trained scales are
folded into the up-projection, s (W_u h + b_u) = (s W_u) h + s b_u, and missing biases are zeros.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.core.foreign import parse_json, read_json, reading
from llmrecipe.interop.adapter_hub.hub_layout import hub_place
from llmrecipe.methods.additive._engines.bottleneck import Bottleneck, Sublayer
from llmrecipe.methods.additive.adapter import Adapter
from llmrecipe.methods.additive.parallel_adapter import ParallelAdapter
from llmrecipe.models.checkpoint_path import locate
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.models.module_map import anatomy
from llmrecipe.models.pretrained import pretrained
from llmrecipe.runs.delta import Layer, build_wrapper
from llmrecipe.runs.open_model import LoadedModel

if TYPE_CHECKING:
    from llmrecipe.methods._base.method import Wrapper


CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter.safetensors"
HEAD_CONFIG_FILE, HEAD_FILE = "head_config.json", "model_head.safetensors"
VERSION = "adapters.1.3.0"
"""The release whose layout this is."""

ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "silu": "swish", "tanh": "tanh", "identity": "linear"}
LEAVES = {
    "adapter_down.0.weight": "down",
    "adapter_down.0.bias": "down_bias",
    "adapter_up.weight": "up",
    "adapter_up.bias": "up_bias",
    "scaling": "scale",
}
"""The library's name of a tensor -> ours."""
FIXED: dict[str, Any] = {
    "ln_before": False,
    "ln_after": False,
    "original_ln_after": True,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "inv_adapter": None,
    "use_gating": False,
    "phm_layer": False,
}
"""Options of the library that have one value here."""


def is_hub(folder: str | Path) -> bool:
    """Return whether an adapter folder has this layout."""
    try:
        config = parse_json((Path(folder) / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "peft_type" not in config and isinstance(config.get("config"), dict)


def homes(model: nn.Module, wrapper: Adapter | ParallelAdapter) -> list[tuple[Sublayer, str, str]]:
    """Return (sublayer, path of our hook, stem of the library's names) for every site of a wrapper.

    Raises:
        ModelError: the library's names for this family are not known here.
    """
    parts = anatomy(model)
    found = []
    for sub in wrapper.places(parts):
        place = hub_place(pretrained(model).config.model_type, sub.side, sub.part)
        found.append((sub, f"{wrapper.host(sub, parts).path}.{wrapper.name}", f"{sub.block.path}.{place}"))
    return found


def _why_not(wrapper: Wrapper) -> str | None:
    """Return what of a wrapper the library's configurations cannot express."""
    if isinstance(wrapper, Adapter):
        if wrapper.ln_before or wrapper.ln_after:
            return "its bottlenecks have norms of their own"
        if wrapper.gate != "none":
            return "its adapters have gates"
        if wrapper.cross_attention:
            return "it comes after cross-attention"
        return "it trained norms of the base" if wrapper.train_norms else None
    if isinstance(wrapper, ParallelAdapter):
        if wrapper.target is not None or wrapper.form != "plain":
            return "the library puts one branch in parallel with a sublayer, not with a single layer"
        return "it is parallel to cross-attention" if "cross" in wrapper.sites else None
    return "it is no bottleneck adapter"


def _wrapper_of(loaded: LoadedModel) -> Adapter | ParallelAdapter:
    """Return the only adapter of a run that the library can hold.

    Raises:
        ModelError: there is none, or more than one method; the message says why.
    """
    names = [w.name.split("_", 1)[1] for w in loaded.mounted]
    if len(names) != 1:
        what = f"this run has {len(names)} methods ({', '.join(names)})" if names else "this run trained every weight"
        raise ModelError(f"export --to adapter_hub: {what}; one bottleneck adapter is what such a folder holds")
    wrapper: Any = loaded.mounted[0]
    why = _why_not(wrapper)
    parts = anatomy(loaded.model)
    if why is None and isinstance(wrapper, ParallelAdapter) and wrapper.input == "normed" and parts.pre_norm:
        why = "its branch reads the normed input, the library's reads the residual stream (input: residual)"
    if why is not None:
        raise ModelError(f"export --to adapter_hub: '{names[0]}': {why}; llmrecipe.load(run) uses it as it is")
    return wrapper


def _factor(width: int, r: int) -> float:
    """Return f with floor(width / f) = r, width / r where floating point allows it."""
    exact = width / r
    return exact if int(width // exact) == r else width / (r + 0.5)


@torch.no_grad()
def hub_files(loaded: LoadedModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (config, tensors) of a run's adapter, named as in the stack.

    Raises:
        ModelError: the library cannot hold it.
    """
    model: Any = loaded.model
    wrapper = _wrapper_of(loaded)
    name = wrapper.name.split("_", 1)[1]
    hooks = {f"{path}.{key}": hook for path, _, key, hook in all_hooks(model, wrapper.name) if isinstance(hook, Bottleneck)}
    tensors: dict[str, Tensor] = {}
    widths: dict[int, int] = {}
    places = homes(model, wrapper)
    numbers = _numbers(model)
    for sub, home, stem in places:
        hook = hooks.get(home)
        if hook is None:
            continue
        scale = 1.0 if hook.scale is None else hook.scale.float()
        up = hook.up.float() * (scale if isinstance(scale, float) else scale.view(-1, 1))
        zeros = (hook.down.new_zeros(hook.down.shape[0]), hook.up.new_zeros(hook.up.shape[0]))
        down_bias, up_bias = (
            b if b is not None else zero for b, zero in zip((hook.down_bias, hook.up_bias), zeros, strict=True)
        )
        values = (hook.down, down_bias, up, up_bias * scale)
        tensors |= {f"{stem}.adapters.{name}.{leaf}": v.float() for leaf, v in zip(LEAVES, values, strict=False)}
        widths[numbers[sub.side, sub.layer]] = hook.down.shape[0]
    width = anatomy(model).width
    usual = max(set(widths.values()), key=list(widths.values()).count)
    factors = {str(n): _factor(width, r) for n, r in widths.items() if r != usual}
    parts = {sub.part for sub, _, _ in places}
    config = {
        **FIXED,
        "mh_adapter": "attn" in parts,
        "output_adapter": "ffn" in parts,
        "is_parallel": isinstance(wrapper, ParallelAdapter),
        "original_ln_before": isinstance(wrapper, Adapter) and wrapper.placement == "pfeiffer",
        "non_linearity": ACTIVATIONS[wrapper.activation],
        "scaling": float(wrapper.scale) if isinstance(wrapper.scale, float) else 1.0,
        "dropout": wrapper.dropout,
        "reduction_factor": {**factors, "default": _factor(width, usual)} if factors else _factor(width, usual),
        "leave_out": sorted(n for n in numbers.values() if n not in widths),
        "init_weights": "mam_adapter" if wrapper.init == "zero_up" else wrapper.init,
    }
    return {"config": config, "name": name, **_about(model), "model_name": locate(loaded.section.path)[0]}, tensors


def _about(model: nn.Module) -> dict[str, Any]:
    family = type(model).__name__
    return {
        "hidden_size": anatomy(model).width,
        "model_class": family,
        "model_type": pretrained(model).config.model_type,
        "version": VERSION,
    }


def _numbers(model: nn.Module) -> dict[tuple[str, int], int]:
    """Map (side, layer) to the library's number of the block: the encoder's first, then the decoder's."""
    blocks = [(s.side, int(s.layer or 0)) for s in anatomy(model).sites if s.role == "block"]
    return {place: n for n, place in enumerate(sorted(blocks, key=lambda b: (b[0] != "encoder", b[1])))}


def head_config(loaded: LoadedModel) -> dict[str, Any]:
    """Return the library's configuration of a task head."""
    config: Any = loaded.model.config
    labels = {"config": None, "name": None, "label2id": config.label2id, "num_labels": config.num_labels}
    return {**_about(loaded.model), **labels, "model_name": locate(loaded.section.path)[0]}


def write_hub_adapter(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], about_head: dict[str, Any], head: dict[str, Tensor]
) -> None:
    """Write an adapter's files, and those of a task head where one was trained."""
    for values, adjacent, names in (
        (tensors, config, (WEIGHTS_FILE, CONFIG_FILE)),
        (head, about_head, (HEAD_FILE, HEAD_CONFIG_FILE)),
    ):
        if values:
            own = {key: value.detach().contiguous().cpu().clone() for key, value in values.items()}
            save_file(own, str(folder / names[0]), metadata={"format": "pt"})
            (folder / names[1]).write_text(json.dumps(adjacent, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_hub_adapter(folder: Path, model: nn.Module) -> Layer:
    """Read a folder of the library as an `adapter` or `parallel_adapter` layer.

    Raises:
        ModelError: its configuration has no counterpart here, or it does not fit the model.
    """
    saved = read_json(folder / CONFIG_FILE, "", "save the adapter again", ModelError)
    with reading(str(folder / CONFIG_FILE), "save the adapter again", ModelError):
        config, name = dict(saved["config"]), str(saved["name"])
    if not (folder / WEIGHTS_FILE).is_file():
        raise ModelError(f"{folder}: it has no {WEIGHTS_FILE}; save it with use_safetensors=True")
    tensors = _tensors(folder / WEIGHTS_FILE)
    options = _options(config, str(folder))
    every: Any = build_wrapper(options["kind"], options)
    found: dict[str, Tensor] = {}
    widths: dict[tuple[str, int], int] = {}
    for sub, home, stem in homes(model, every):
        for leaf, ours in LEAVES.items():
            value = tensors.pop(f"{stem}.adapters.{name}.{leaf}", None)
            if value is not None:
                found[f"{home}.{ours}"] = value.float()
                if ours == "down":
                    widths[sub.side, sub.layer] = value.shape[0]
    if tensors or not widths:
        raise ModelError(f"{folder}: it holds {next(iter(tensors), 'no adapter')}, which this model has no place for")
    sides = {side for side, _ in widths}
    sizes = {layer: r for (_, layer), r in widths.items()}
    if any(sizes[layer] != r for (_, layer), r in widths.items()):
        raise ModelError(f"{folder}: encoder and decoder have bottlenecks of different widths; one width a layer can be read")
    layers = {layer for side, layer in _numbers(model) if side in sides}
    if anatomy(model).encoder_decoder and len(sides) == 1:
        options["side"] = next(iter(sides))
    options["sizes"] = {str(layer): sizes.get(layer, 0) for layer in sorted(layers)}
    if (folder / HEAD_FILE).is_file():
        found |= _tensors(folder / HEAD_FILE)
    return Layer({options["kind"]: options}, {}, tensors=found)


def _tensors(path: Path) -> dict[str, Tensor]:
    with reading(str(path), "save or download the adapter again", ModelError):
        return load_file(str(path))


def _options(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Convert a `BnConfig` into options of a wrapper.

    Raises:
        ModelError: one of its options has a value with no counterpart here.
    """
    other = next((k for k, v in FIXED.items() if config.get(k, v) != v), None)
    if other is not None:
        raise ModelError(f"{where}: {other}: {config[other]} has no counterpart here (only {FIXED[other]})")
    activation = {**{v: k for k, v in ACTIVATIONS.items()}, "silu": "silu"}.get(str(config.get("non_linearity", "")).lower())
    if activation is None:
        raise ModelError(f"{where}: non_linearity: {config.get('non_linearity')} has no counterpart here")
    sites = ["attn"] * bool(config["mh_adapter"]) + ["ffn"] * bool(config["output_adapter"])
    options: dict[str, Any] = {
        "activation": activation,
        "scale": config.get("scaling", 1.0),
        "dropout": float(config.get("dropout", 0.0)),
    }
    if config.get("is_parallel"):
        return {"kind": "parallel_adapter", **options, "sites": sites, "input": "residual"}
    if config.get("original_ln_before"):
        if sites != ["ffn"]:
            raise ModelError(f"{where}: original_ln_before together with mh_adapter has no counterpart here")
        return {"kind": "adapter", **options, "placement": "pfeiffer"}
    return {"kind": "adapter", **options, "sublayers": sites}
