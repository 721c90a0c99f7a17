"""Reading adapter folders of PEFT: as a starting point, for merging, and to prove what an export wrote.

The tensors say which modules are adapted; the config only for the scale and for what the method is. Each adapter
becomes a wrapper of this package with its tensors, so everything that works on a run works on it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.core.time_limit import compiled, within
from llmrecipe.interop.peft import additive_adapters, bias_adapters
from llmrecipe.interop.peft.layout import PREFIX, Adapter, Branch, read_adapter_folder, target_of
from llmrecipe.methods._engines.biases import every_bias
from llmrecipe.models.anatomy import Anatomy
from llmrecipe.models.module_map import anatomy
from llmrecipe.models.pretrained import pretrained
from llmrecipe.models.site import Site
from llmrecipe.models.task_heads import is_head
from llmrecipe.runs.delta import Layer

T = TypeVar("T")

FACTOR = re.compile(r"(?P<path>.*)\.lora_(?P<part>A|B|B\.bias|E|embedding_A|embedding_B|magnitude_vector)(?:\.weight)?")
REFUSED = {
    "megatron_config": "Megatron layers",
    "trainable_token_indices": "trained token rows",
    "alora_invocation_tokens": "activated LoRA",
}
"""Options that change the function and have no counterpart here."""
OTHERS = {
    "IA3": additive_adapters.read_ia3,
    "PREFIX_TUNING": additive_adapters.read_virtual_tokens,
    "PROMPT_TUNING": additive_adapters.read_virtual_tokens,
    **dict.fromkeys(bias_adapters.KINDS, bias_adapters.read_biases),
}
"""Types that change no matrix -> their reader."""


def adapter_layer(folder: str | Path, model: nn.Module, weight: float = 1.0) -> Layer:
    """Read an adapter folder as a layer that can be mounted on a model.

    Args:
        weight: multiplies the adapter's change.

    Raises:
        ModelError: the adapter does not fit the model, or cannot be expressed here; the message says what and why.
    """
    folder = Path(folder)
    adapter = read_adapter_folder(folder)
    kind = str(adapter.config.get("peft_type", "")).upper()
    if kind in OTHERS:
        if weight != 1.0:
            raise ModelError(
                f"{folder}: an adapter of type {kind} is no low-rank change, so it cannot be taken {weight:g} times"
            )
        return OTHERS[kind](adapter, model, str(folder))
    if kind == "ADALORA":
        branches, rest = _adalora(adapter)
    elif kind == "LORA":
        branches, rest = _lora(adapter, model, folder)
    else:
        raise ModelError(
            f"{folder}: an adapter of type {kind or 'unknown'} cannot be read here "
            f"(LORA, DoRA, ADALORA, {', '.join(OTHERS)} can)"
        )
    # What is left besides the branches: modules saved in full and biases of the base.
    found = _trained_biases(rest, adapter.config, model)
    rest = _saved_modules({n: v for n, v in rest.items() if n not in found}, model, folder)
    biases = {name.replace(".base_layer.", "."): value for name, value in found.items()}
    if weight != 1.0:
        if any(b.magnitude is not None for b in branches):
            raise ModelError(f"{folder}: a DoRA adapter rescales whole weights; it cannot be taken with a weight of {weight:g}")
        branches = [Branch(**{**vars(b), "scale": b.scale * weight}) for b in branches]
        base = dict(model.named_parameters(remove_duplicate=False))
        biases = {name: torch.lerp(base[name].detach().float(), value, weight) for name, value in biases.items()}
    layer = layer_of(branches, rest, model, float(adapter.config.get("lora_dropout") or 0.0), str(folder))
    return with_biases(layer, biases, str(adapter.config.get("bias")), model) if biases else layer


def with_biases(layer: Layer, biases: dict[str, Tensor], which: str, model: nn.Module) -> Layer:
    """Return a `lora` or `dora` layer that trained biases of the base as well.

    Args:
        biases: parameter name -> value.
        which: PEFT's word for them, `all` or `lora_only`.
    """
    ((kind, options),) = layer.wrappers.items()
    paths = {id(module): path for path, module in model.named_modules()}
    # A bias may have several names; its master weight belongs to the module that applies it.
    homes = {id(getattr(module, tensor)): paths[id(module)] for module, tensor in every_bias(model)}
    base = dict(model.named_parameters(remove_duplicate=False))
    tensors = {f"{homes[id(base[name])]}.{kind}__bias.bias": value.float() for name, value in biases.items()}
    return replace(layer, wrappers={kind: {**options, "bias": which}}, tensors={**layer.tensors, **tensors})


def layer_of(branches: list[Branch], rest: dict[str, Tensor], model: nn.Module, dropout: float, where: str) -> Layer:
    """Convert branches into a `lora` (or `dora`) layer: its target, its ranks and scales by path, its tensors by our names."""
    parts = anatomy(model)
    # Alpha is positive; a change that is subtracted or taken with weight 0 keeps its factor in B.
    branches = [b if b.scale > 0 else b.folded() for b in branches]
    pairs = [(b, _site(parts, b, where)) for b in branches]
    kind = "dora" if any(b.magnitude is not None for b in branches) else "lora"
    first = branches[0]
    options: dict[str, Any] = {
        "kind": kind,
        "target": target_of([site for _, site in pairs], parts),
        "r": first.r,
        "alpha": first.scale * first.r,
        "dropout": 0.0 if first.kind == "experts" else dropout,
        "rank_pattern": {re.escape(b.path): b.r for b in branches if b.r != first.r},
        "alpha_pattern": {re.escape(b.path): b.scale * b.r for b in branches if b.scale * b.r != first.scale * first.r},
    }
    if biased := any(b.bias is not None for b in branches):
        options["lora_bias"] = True
    _check_tied(pairs, model, where)
    tensors = dict(rest)
    for branch, site in pairs:
        if site.role == "head" and branch.kind == "linear" and _is_tied_pair(branches, branch, model):
            continue
        home = f"{branch.path}.{site.name(kind)}"
        tensors |= {f"{home}.A": branch.A, f"{home}.B": branch.B}
        if biased:
            tensors[f"{home}.bias"] = branch.bias if branch.bias is not None else branch.B.new_zeros(branch.B.shape[0])
        if branch.magnitude is not None:
            tensors[f"{home}.magnitude"] = branch.magnitude
    return Layer({kind: options}, {}, tensors=tensors)


def _site(parts: Anatomy, branch: Branch, where: str) -> Site:
    for site in parts.sites:
        if site.path == branch.path and site.rows is None and (site.tensor or "") == branch.tensor and _adaptable(site):
            if site.tensor is None and branch.kind == "linear":
                wanted = (branch.B.shape[0], branch.A.shape[1])
                if (site.width_out, site.width_in) != wanted:
                    raise ModelError(
                        f"{where}: the adapter of {branch.path} is for a weight of {wanted[0]} x {wanted[1]}, this model has "
                        f"{site.width_out} x {site.width_in}; was it trained on another base?"
                    )
            return site
    raise ModelError(
        f"{where}: it adapts {branch.path}{'.' * bool(branch.tensor)}{branch.tensor}, which this model does not have"
    )


def _adaptable(site: Site) -> bool:
    return site.tensor is not None or hasattr(site.module, "weight")


def _head_and_embedding(branches: list[Branch], head: Branch) -> Branch | None:
    return next((b for b in branches if b.kind == "embedding"), None) if head.kind == "linear" else None


def _is_tied_pair(branches: list[Branch], head: Branch, model: nn.Module) -> bool:
    embed, out = pretrained(model).get_input_embeddings(), pretrained(model).get_output_embeddings()
    return out is not None and out.weight is embed.weight and _head_and_embedding(branches, head) is not None


def _check_tied(pairs: list[tuple[Branch, Site]], model: nn.Module, where: str) -> None:
    branches = [b for b, _ in pairs]
    for branch, site in pairs:
        if site.role != "head" or not _is_tied_pair(branches, branch, model):
            continue
        embed = _head_and_embedding(branches, branch)
        same = (
            embed is not None
            and embed.r == branch.r
            and torch.equal(embed.B.t(), branch.A)
            and torch.equal(embed.A.t(), branch.B)
            and embed.scale == branch.scale
        )
        if not same:
            raise ModelError(
                f"{where}: the model's head is tied to its embedding, but the adapter changes the two differently; "
                "here one pair serves both. Train it again with target `embed + head`, or untie the model"
            )


def _plain(adapter: Adapter) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return the factors by module path, and the tensors that are no factors."""
    factors: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, value in adapter.tensors.items():
        name = key.removeprefix(PREFIX)
        found = FACTOR.fullmatch(name)
        if found:
            factors.setdefault(found["path"], {})[found["part"]] = value.float()
        elif ".original_module." not in name:
            rest[name.replace(".modules_to_save.", ".")] = value
    return factors, rest


def _pattern(patterns: Mapping[str, T] | None, path: str, default: T) -> T:
    """Look a path up by PEFT's rule: the first pattern that matches the end of the path."""
    where = "rank_pattern and alpha_pattern of the adapter"
    for key, value in (patterns or {}).items():
        if within(compiled(rf"(.*\.)?({key})$", where).match, path, where):
            return value
    return default


def _lora(adapter: Adapter, model: nn.Module, folder: Path) -> tuple[list[Branch], dict[str, Tensor]]:
    """Return (branches, the tensors that are no factors)."""
    config = adapter.config
    for option, what in REFUSED.items():
        if config.get(option):
            raise ModelError(f"{folder}: {option}: {what} cannot be read here")
    factors, rest = _plain(adapter)
    parameters = list(config.get("target_parameters") or [])
    branches = []
    for path, found in factors.items():
        home = path.replace(".base_layer", "")
        r = _pattern(config.get("rank_pattern"), home, config["r"])
        alpha = _pattern(config.get("alpha_pattern"), home, config["lora_alpha"])
        scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
        own = _in_module_order(model, home, [p.rpartition(".")[2] for p in parameters if _names(p, home)])
        if "embedding_A" in found:
            branches.append(
                Branch(home, "embedding", found["embedding_A"], found["embedding_B"], scale, "", found.get("magnitude_vector"))
            )
        elif own:
            tensor = own[len(own) - 1 - path.count(".base_layer")]
            branches.append(_experts(home, tensor, found, r, scale))
        else:
            bias = found.get("B.bias")
            branches.append(Branch(home, "linear", found["A"], found["B"], scale, "", found.get("magnitude_vector"), bias))
    return branches, rest


def _trained_biases(rest: dict[str, Tensor], config: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Return the biases of the base among an adapter's other tensors, by their name there, without those of a new head."""
    which = config.get("bias")
    if which in (None, "none"):
        return {}
    state = {n: p for n, p in model.named_parameters(remove_duplicate=False) if not is_head(model, n)}
    found = {}
    for name, value in rest.items():
        home = name.replace(".base_layer.", ".")
        fits = home in state and state[home].shape == value.shape
        if name.endswith(".bias") and fits and (which == "all" or name != home):
            found[name] = value
    return found


def _in_module_order(model: nn.Module, home: str, names: list[str]) -> list[str]:
    """Sort fused tensors of a module in its own order: PEFT wraps them in that order, whatever the order in its config."""
    order = [name for name, _ in model.get_submodule(home).named_parameters(recurse=False)] if names else []
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def _names(parameter: str, home: str) -> bool:
    module = parameter.rpartition(".")[0]
    return home == module or home.endswith(f".{module}")


def _experts(home: str, tensor: str, found: dict[str, Tensor], r: int, scale: float) -> Branch:
    count = found["A"].shape[0] // r
    A = found["A"].reshape(count, r, -1)
    B = found["B"].reshape(found["B"].shape[0], r, count).permute(2, 0, 1)
    return Branch(home, "experts", A, B.contiguous(), scale, tensor)


def _saved_modules(rest: dict[str, Tensor], model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Return modules that were saved in full: kept where they are new, dropped where they are the base's own.

    Raises:
        ModelError: a tensor has no place in this model.
    """
    state = dict(model.named_parameters())
    kept: dict[str, Tensor] = {}
    for name, value in rest.items():
        home = name.replace(".base_layer.", ".")
        if home not in state or state[home].shape != value.shape:
            raise ModelError(f"{folder}: it holds {name} {tuple(value.shape)}, which this model has no place for")
        if name == home:
            kept[home] = value
        elif not torch.equal(state[home].float(), value.to(state[home].device).float()):
            raise ModelError(
                f"{folder}: it was trained with another {home.rpartition('.')[0]} than this model has (a resized vocabulary?)"
            )
    return kept


def _adalora(adapter: Adapter) -> tuple[list[Branch], dict[str, Tensor]]:
    """Return P diag(l) Q alpha / (R + 1e-5) as plain branches; modules that lost every rank stay where they train a bias."""
    factors, rest = _plain(adapter)
    config = adapter.config
    branches = []
    for path, found in factors.items():
        scale = (config["lora_alpha"] or config["init_r"]) / (config["init_r"] + 1e-5)
        branch = Branch(path, "linear", found["A"] * found["E"], found["B"], scale)
        if branch.r or f"{path}.base_layer.bias" in rest:
            branches.append(branch if branch.r else branch.padded(1))
    return branches, rest
