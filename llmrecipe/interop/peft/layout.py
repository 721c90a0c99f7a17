"""The layout of a PEFT adapter folder, in one place for writing and reading.

    adapter_config.json          which method, which modules, ranks and scales
    adapter_model.safetensors    base_model.model.<path>.lora_A.weight (r, in)      .lora_B.weight (out, r)
                                 ... .lora_embedding_A (r, V)                       .lora_embedding_B (D, r)
                                 fused experts: one wrapper a tensor, nested; A (E r, in) expert-major, B (out, r E) rank-major
                                 ... .lora_B.bias (out,)                            lora_bias
                                 ... .bias, ... .base_layer.bias (out,)             bias of the base, trained with the adapter
                                 ... .lora_magnitude_vector (out,)                  DoRA
                                 ... .lora_A (k, in), .lora_E (k, 1), .lora_B       AdaLoRA, without `.weight`
                                 base_model.model.<path>.<parameter>                modules saved whole (a new head)

A change of one weight is a `Branch`; everything else in this file turns branches into such files and back.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmrecipe.core.errors import ModelError
from llmrecipe.core.foreign import read_json, reading
from llmrecipe.models.anatomy import Anatomy
from llmrecipe.models.site import Site

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Branch:
    """s B A added to one weight; `kind` says how A and B are shaped."""

    path: str
    kind: str
    """`linear`: A (r, in), B (out, r). `embedding`: A (r, V), B (D, r). `experts`: A (E, r, in), B (E, out, r)."""
    A: Tensor
    B: Tensor
    scale: float
    tensor: str = ""
    """Name of the fused expert tensor."""
    magnitude: Tensor | None = None
    """DoRA's m (out,)."""
    bias: Tensor | None = None
    """b (out,) with s b added to the output."""

    @property
    def r(self) -> int:
        """Return the rank."""
        return self.A.shape[-2]

    @property
    def key(self) -> tuple[str, str]:
        """Return the weight it belongs to."""
        return self.path, self.tensor

    def folded(self) -> Branch:
        """Return the same change with scale 1."""
        bias = None if self.bias is None else self.bias * self.scale
        return replace(self, B=self.B * self.scale, scale=1.0, bias=bias)

    def padded(self, r: int) -> Branch:
        """Return the same change at a larger rank."""
        more = r - self.r
        return replace(self, A=torch.nn.functional.pad(self.A, (0, 0, 0, more)), B=torch.nn.functional.pad(self.B, (0, more)))


@dataclass
class Adapter:
    """An adapter as PEFT stores it."""

    config: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)


def concatenate_branches(branches: list[Branch]) -> list[Branch]:
    """Concatenate the branches of one weight: s1 B1 A1 + s2 B2 A2 = [s1 B1, s2 B2] [A1; A2].

    Raises:
        ModelError: a magnitude stands on a weight that another branch changes as well.
    """
    groups: dict[tuple[str, str], list[Branch]] = {}
    for branch in branches:
        groups.setdefault(branch.key, []).append(branch)
    result = []
    for group in groups.values():
        if len(group) > 1:
            if any(b.magnitude is not None for b in group):
                raise ModelError(
                    f"{group[0].path}: a DoRA branch and another one cannot become one adapter; export merged instead"
                )
            parts = [b.folded() for b in group]
            A, B = torch.cat([b.A for b in parts], -2), torch.cat([b.B for b in parts], -1)
            biases = [b.bias for b in parts if b.bias is not None]
            result.append(replace(parts[0], A=A, B=B, bias=torch.stack(biases).sum(0) if biases else None))
        else:
            result.append(group[0])
    return result


def with_one_rank(branches: list[Branch]) -> list[Branch]:
    """Return one rank and scale 1 for all, for servers that read a single rank and alpha: zero-padded, scales in B."""
    widest = max(b.r for b in branches)
    return [b.folded().padded(widest) for b in branches]


def lora_adapter(branches: list[Branch], *, use_rslora: bool = False, dropout: float = 0.0) -> Adapter:
    """Convert branches into a LoRA adapter (DoRA where they carry magnitudes).

    Ranks and scales that differ between modules become `rank_pattern` and `alpha_pattern`.

    Raises:
        ModelError: some branches have a bias and others are of a kind PEFT gives none.
    """
    branches = _all_biased(_level_experts(concatenate_branches(branches)))
    root = math.sqrt if use_rslora else float
    alphas = {b.key: _number(b.scale * root(b.r)) for b in branches}
    r = Counter(b.r for b in branches).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": use_rslora,
        "use_dora": any(b.magnitude is not None for b in branches),
        "lora_bias": any(b.bias is not None for b in branches),
        "lora_dropout": dropout,
        "bias": "none",
        "target_modules": sorted({b.path for b in branches if not b.tensor}),
        "target_parameters": [f"{b.path}.{b.tensor}" for b in branches if b.tensor] or None,
        "rank_pattern": {b.path: b.r for b in branches if b.r != r},
        "alpha_pattern": {b.path: alphas[b.key] for b in branches if alphas[b.key] != alpha},
        "init_lora_weights": True,
        "inference_mode": True,
    }
    return Adapter(config, {key: value for b in branches for key, value in _tensors(b, branches).items()})


def add_biases(adapter: Adapter, biases: dict[str, Tensor]) -> None:
    """Add trained biases of the base to an adapter with branches.

    PEFT keeps them as whole values under their own names, which run through `base_layer` where a module has a branch.

    Args:
        biases: parameter name -> value.

    Raises:
        ModelError: one of them is of a fused expert tensor, for which PEFT has no name.
    """
    if not biases:
        return
    hosts, adapted = {name.rpartition(".")[0] for name in biases}, set(adapter.config["target_modules"])
    for name, value in biases.items():
        home, _, tensor = name.rpartition(".")
        if tensor != "bias":
            raise ModelError(f"{name} was trained, which PEFT cannot store with an adapter; export merged instead")
        adapter.tensors[f"{PREFIX}{home}{'.base_layer' * (home in adapted)}.bias"] = value
    adapter.config["bias"] = "lora_only" if hosts <= adapted else "all"


def _number(value: float) -> float | int:
    near = round(value)
    return near if abs(value - near) < 1e-9 * max(1.0, abs(value)) else value


def _level_experts(branches: list[Branch]) -> list[Branch]:
    """Give tensors of one module one rank and one scale: PEFT's patterns name modules, not tensors."""
    result = []
    for branch in branches:
        peers = [b for b in branches if b.tensor and b.path == branch.path]
        if branch.tensor and len({(b.r, b.scale) for b in peers}) > 1:
            branch = branch.folded().padded(max(b.r for b in peers))
        result.append(branch)
    return result


def _all_biased(branches: list[Branch]) -> list[Branch]:
    """Give branches without a bias one of zeros: PEFT gives every branch of an adapter a bias or none."""
    if all(b.bias is None for b in branches):
        return branches
    for branch in branches:
        if branch.kind != "linear" or branch.magnitude is not None:
            what = "a magnitude" if branch.magnitude is not None else f"a branch of kind {branch.kind}"
            raise ModelError(
                f"{branch.path}: it has {what}, which PEFT cannot hold together with lora_bias on other modules; "
                "export merged instead"
            )
    return [b if b.bias is not None else replace(b, bias=b.B.new_zeros(b.B.shape[0])) for b in branches]


def _nesting(branch: Branch, branches: list[Branch]) -> str:
    """Return the nesting order of wrappers of one module: the first targeted tensor is innermost."""
    order = [b.tensor for b in branches if b.path == branch.path]
    return ".base_layer" * (len(order) - 1 - order.index(branch.tensor))


def _tensors(branch: Branch, branches: list[Branch]) -> dict[str, Tensor]:
    home = PREFIX + branch.path
    if branch.kind == "embedding":
        found = {f"{home}.lora_embedding_A": branch.A, f"{home}.lora_embedding_B": branch.B}
    elif branch.kind == "experts":
        home += _nesting(branch, branches)
        found = {
            # Row e r + j of A, column j E + e of B.
            f"{home}.lora_A.weight": branch.A.reshape(-1, branch.A.shape[-1]),
            f"{home}.lora_B.weight": branch.B.permute(1, 2, 0).reshape(branch.B.shape[1], -1),
        }
    else:
        found = {f"{home}.lora_A.weight": branch.A, f"{home}.lora_B.weight": branch.B}
    if branch.bias is not None:
        found[f"{home}.lora_B.bias"] = branch.bias
    if branch.magnitude is not None:
        found[f"{home}.lora_magnitude_vector"] = branch.magnitude
    return found


def write_adapter_folder(folder: Path, adapter: Adapter) -> None:
    """Write both files."""
    tensors = {k: v.detach().contiguous().cpu().clone() for k, v in adapter.tensors.items()}
    save_file(tensors, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})
    text = json.dumps(adapter.config, indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def read_adapter_folder(folder: Path) -> Adapter:
    """Read an adapter folder.

    Raises:
        ModelError: a file is missing, damaged, or holds pickled weights.
    """
    config = read_json(folder / CONFIG_FILE, "", "save the adapter again", ModelError)
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        why = (
            "its weights are pickled (adapter_model.bin); save them as safetensors" if pickled else f"it has no {WEIGHTS_FILE}"
        )
        raise ModelError(f"{folder}: {why}")
    with reading(str(weights), "save or download the adapter again", ModelError):
        return Adapter(config, load_file(str(weights)))


def target_of(sites: list[Site], parts: Anatomy) -> str:
    """Return a target that names exactly these sites: `attn.q|v`-like roles, with layers where not all of them are named."""
    wanted = {site.key for site in sites}
    groups: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        role = site.role if site.tensor is None else f"experts.{site.tensor.removesuffix('_proj')}"
        groups.setdefault((site.side, role), []).append(site)
    terms = []
    for (side, role), members in groups.items():
        prefix = f"{side}." if parts.encoder_decoder and members[0].layer is not None else ""
        if all(s.key in wanted for s in parts.at(f"{prefix}{role}")):
            terms.append(f"{prefix}{role}")
        else:
            numbers = "|".join(str(site.layer) for site in members)
            terms.append(f"{prefix}layers.{numbers}.{role}")
    return " + ".join(dict.fromkeys(terms))
