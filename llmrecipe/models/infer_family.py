"""Inference of the names of parts from module names, for models of no registered family.

Block lists are the outermost lists of similar modules, some of which contain attention; roles follow from the usual names of
projections. A fused projection found this way is available as a whole only: which of its rows are queries does not follow from
a name.
"""

from __future__ import annotations

import re

from torch import nn

from llmrecipe.models.hooks.shared_module import base_modules
from llmrecipe.models.part_names import PartNames
from llmrecipe.models.pretrained import pretrained

ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
CROSS = re.compile(r"cross|encoder_attn|EncDec", re.IGNORECASE)
PROJECTIONS: tuple[tuple[str, str], ...] = (
    ("qkv", r"c_attn|qkv|qkv_proj|query_key_value|Wqkv|in_proj|qkv_linear"),
    ("q_a", r"q_a_proj"),
    ("kv_a", r"kv_a_proj|kv_a_proj_with_mqa"),
    ("kv", r"kv_b_proj"),
    ("q", r"q|q_proj|query|query_proj|q_lin|wq|Wq|to_q|q_b_proj"),
    ("k", r"k|k_proj|key|key_proj|k_lin|wk|Wk|to_k"),
    ("v", r"v|v_proj|value|value_proj|v_lin|wv|Wv|to_v"),
    ("o", r"o|o_proj|out_proj|out_lin|c_proj|dense|wo|Wo|to_out|proj"),
)
FEED_FORWARD: tuple[tuple[str, str], ...] = (
    ("gate_up", r"gate_up_proj|Wi"),
    ("gate", r"gate_proj|w1|wi_0"),
    ("up", r"up_proj|fc1|fc_in|c_fc|w3|wi|wi_1|lin1|dense_h_to_4h|linear1|fc|linear_1|linear_in|intermediate\.dense"),
    ("down", r"down_proj|fc2|fc_out|c_proj|w2|wo|Wo|lin2|dense_4h_to_h|linear2|linear_2|linear_out|output\.dense"),
)
NORMS: tuple[tuple[str, str], ...] = (
    ("norm.q", r".*\.(q_norm|q_layernorm|query_norm)"),
    ("norm.k", r".*\.(k_norm|k_layernorm|key_norm)"),
    ("norm.cross", r"encoder_attn_layer_norm|crossattention\.output\.LayerNorm|norm_cross"),
    (
        "norm.mlp",
        r"post_attention_(layer_?)?norm|layernorm_after|ffn_norm|ln_2|ln2|norm2|mlp_norm|final_layer_norm|output\.LayerNorm|output_layer_norm",
    ),
    (
        "norm.attn",
        r"input_layernorm|layernorm_before|attention_norm|attn_norm|ln_1|ln1|norm1|(self_attn|sa)_layer_norm|attention\.output\.LayerNorm",
    ),
)
SANDWICH = {
    "pre_feedforward_layernorm": "norm.mlp",
    "post_attention_layernorm": "norm.attn_post",
    "post_feedforward_layernorm": "norm.mlp_post",
}
FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm", "norm_f", "layernorm")
POSITIONS = ("wpe", "embed_positions", "position_embeddings", "^embeddings.position_embeddings")
SKIPPED = re.compile(r"vision|visual|audio|image|speech", re.IGNORECASE)


def is_rotary(module: nn.Module) -> bool:
    """Return whether a module computes rotary positions."""
    return "Rotary" in type(module).__name__


def infer(model: nn.Module) -> PartNames | None:
    """Return the names of a model's parts inferred from its modules, or None where no block list is found."""
    stacks = _block_lists(model)
    if not stacks:
        return None
    layer: dict[str, str] = {}
    for path in stacks.values():
        for block in model.get_submodule(path).children():
            for role, below in _roles(block).items():
                known = layer.get(role, "").split(" | ")
                if below not in known:
                    layer[role] = " | ".join(filter(None, [*known, below]))
    top = {}
    main = stacks.get("decoder") or next(iter(stacks.values()))
    home = model.get_submodule(main.rpartition(".")[0])
    for name in FINAL_NORMS:
        if isinstance(getattr(home, name, None), nn.Module):
            top["norm.final"] = name
            break
    top["embed.position"] = " | ".join(POSITIONS)
    only_after = "norm.attn_post" in layer and "norm.attn" not in layer
    return PartNames(stacks, layer, top, pre_norm="norm.final" in top and not only_after)


def _block_lists(model: nn.Module) -> dict[str, str]:
    """Return side -> path of its block list: outermost lists whose elements share a class and contain attention."""
    lists: list[tuple[str, nn.ModuleList]] = []
    for path, module in base_modules(model):
        inside = any(path.startswith(outer + ".") for outer, _ in lists)
        if not isinstance(module, nn.ModuleList) or inside or not len(module) or SKIPPED.search(path):
            continue
        if _alike(module) and any(map(_has_attention, module)):
            lists.append((path, module))
    if not lists:
        return {}
    sides = {"encoder" if re.search(r"\bencoder\b", path) else "decoder": path for path, _ in reversed(lists)}
    if pretrained(model).config.get_text_config().is_encoder_decoder and len(sides) == 2:
        return sides
    path = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))[0]
    causal = "CausalLM" in type(model).__name__ or not re.search(r"\bencoder\b", path)
    return {"decoder" if causal else "encoder": path}


def _alike(blocks: nn.ModuleList) -> bool:
    """Return whether modules are blocks of one stack: of one class, or, in hybrids, with a part of the same name in each."""
    if len({type(block) for block in blocks}) == 1:
        return True
    return bool(set.intersection(*({name for name, _ in block.named_children()} for block in blocks)))


def _has_attention(block: nn.Module) -> bool:
    return any(ATTENTION.search(path) for path, _ in block.named_modules())


def _roles(block: nn.Module) -> dict[str, str]:
    found: dict[str, str] = {}
    for path, module in block.named_modules():
        if not path:
            continue
        gate_up = getattr(module, "gate_up_proj", None)
        if isinstance(gate_up, nn.Parameter) and gate_up.dim() == 3:
            found["experts"] = path
            gate = path.rpartition(".")[0]
            for name in ("gate", "router"):
                if isinstance(getattr(block.get_submodule(gate), name, None), nn.Module):
                    found["router"] = f"{gate}.{name}"
        role = _role_of(path, module)
        if role is not None:
            found.setdefault(role, path)
    names = {name for name, _ in block.named_children()}
    if "pre_feedforward_layernorm" in names or "post_feedforward_layernorm" in names:
        found.pop("norm.mlp", None)
        found |= {role: name for name, role in SANDWICH.items() if name in names}
    for kind in ("attn", "cross"):
        inner = found.get(f"{kind}.q") or found.get(f"{kind}.qkv")
        if inner and "." in inner:
            found[kind] = inner.rpartition(".")[0]
    down, up = found.get("mlp.down"), found.get("mlp.up") or found.get("mlp.gate_up")
    if down and up and "." in down and down.rpartition(".")[0] == up.rpartition(".")[0]:
        found["mlp"] = down.rpartition(".")[0]
    elif "experts" in found and "." in found["experts"]:
        found["mlp"] = found["experts"].rpartition(".")[0]
    return found


def _role_of(path: str, module: nn.Module) -> str | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return None
    if weight.dim() == 1 and "Norm" in type(module).__name__:
        return next((role for role, names in NORMS if re.fullmatch(names, path)), None)
    if weight.dim() != 2 or isinstance(module, nn.Embedding):
        return None
    if CROSS.search(path) or ATTENTION.search(path):
        kind = "cross" if CROSS.search(path) else "attn"
        return _named(kind, PROJECTIONS, path)
    return _named("shared" if "shared" in path else "mlp", FEED_FORWARD, path)


def _named(kind: str, table: tuple[tuple[str, str], ...], path: str) -> str | None:
    """Return `kind.part` for the first row of a table that matches the last one or two parts of a path."""
    return next((f"{kind}.{part}" for part, names in table if re.search(rf"(?:^|\.)(?:{names})$", path)), None)
