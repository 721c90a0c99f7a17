"""The anatomy of a model: one vocabulary of sites for every family.

    block                       a whole layer (its output is the residual stream)
    attn  cross  mlp            the attention, cross-attention and feed-forward modules
    attn.q|k|v|o  cross.q|..    their projections; attn.qkv where the three are one matrix
    mlp.gate|up|down            the feed-forward projections; mlp.gate_up where two are one matrix
    experts  router             the 3-D expert tensors and the gate of a mixture; shared.* for shared experts
    norm.attn|mlp|q|k|final     norms; `norm` alone means all of them
    embed  embed.position  head

A target is a role with an optional prefix of side and range of layers (see `target_grammar`):
`attn.q|v`, `layers.0:4.mlp.down`, `layers.-1.block`, `decoder.layers.4:.cross.k|v`, `experts.0|5`, `attn.q + mlp.down`,
`all-linear` (every projection of attention, feed-forward and shared experts; routed experts, router and head stay out).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llmrecipe.core.errors import ModelError, did_you_mean
from llmrecipe.models import target_grammar
from llmrecipe.models.site import Site


@dataclass
class Anatomy:
    """The parts of one model and its shape."""

    family: str
    layers: int
    """Blocks of the main stack: the decoder where there is one."""
    heads: int
    kv_heads: int
    head_dim: int
    """Size of one query/key head."""
    width: int
    ffn_width: int
    pre_norm: bool
    parallel_blocks: bool
    encoder_decoder: bool
    causal: bool
    rope: bool
    sites: list[Site] = field(repr=False)
    source: str = "family"
    """Source of the names: `family` (a row of the table), `inference` or `recipe` (model.anatomy)."""

    def blocks(self, side: str) -> int:
        """Return the number of blocks of a side."""
        return sum(site.role == "block" and site.side == side for site in self.sites)

    def roles(self) -> list[str]:
        """Return every role of this model, in the order of the model."""
        return list(dict.fromkeys(site.role for site in self.sites))

    def at(self, target: str) -> list[Site]:
        """Return the sites a target names, in model order.

        Raises:
            ModelError: the target cannot be parsed, or one of its terms matches nothing; the message prints the anatomy.
        """
        found: dict[Any, Site] = {}
        for term in target_grammar.parse_target(target):
            sites = target_grammar.select_sites(term, self.sites, self.blocks)
            if not sites:
                raise ModelError(self._explain(target, term))
            for site in sites:
                known = found.get(site.key)
                if known is None or known.chosen is None or site.chosen is None:
                    found[site.key] = site if known is None or site.chosen is None else known
                else:
                    union = tuple(sorted({*known.chosen, *site.chosen}))
                    found[site.key] = Site(**{**vars(site), "chosen": union})
        order = {site.key: place for place, site in reversed(list(enumerate(self.sites)))}
        return sorted(found.values(), key=lambda site: order[site.key])

    def table(self) -> list[dict[str, Any]]:
        """Return one row per role: side, role, number of sites, an example path, widths."""
        rows: dict[tuple[str, str, str | None], dict[str, Any]] = {}
        for site in self.sites:
            row = rows.setdefault(
                (site.side, site.role, site.tensor),
                {
                    "side": site.side,
                    "role": site.role,
                    "sites": 0,
                    "example": site.path + (f".{site.tensor}" if site.tensor else ""),
                    "in": site.width_in,
                    "out": site.width_out,
                    "fused": site.rows is not None,
                },
            )
            row["sites"] += 1
        return list(rows.values())

    def describe(self) -> str:
        """Return the anatomy as text."""
        lines = [f"{self.family}: {self.layers} layers, width {self.width}, {self.heads} heads ({self.kv_heads} key/value)"]
        for row in self.table():
            side = f"{row['side']}." if self.encoder_decoder else ""
            fused = " (rows of a fused matrix)" if row["fused"] else ""
            shape = f"{row['in']} -> {row['out']}"
            lines.append(f"  {side + row['role']:<22} {row['sites']:>4} x {shape:<16} {row['example']}{fused}")
        return "\n".join(lines)

    def _explain(self, target: str, term: target_grammar.Term) -> str:
        where = f"target '{target}'" if str(term) == target else f"target '{target}': '{term}'"
        return f"{where} matches nothing in this {self.family} model{self._reason(term)}\n{self.describe()}"

    def _reason(self, term: target_grammar.Term) -> str:
        roles = self.roles()
        for name in term.names:
            if name in roles and term.layers is not None:
                return f"; it has {self.layers} layers, numbered 0 to {self.layers - 1}"
            named = [s for s in self.sites if s.path == name or s.path.endswith("." + name) or s.path.endswith("." + term.tail)]
            if named:
                return f"; the module {named[0].path} is the site '{named[0].role}'"
            if name == "mlp" and "mlp.down" in roles:
                return "; its feed-forward has no module of its own: use 'mlp.up', 'mlp.down' or 'block'"
            if name.startswith("mlp.") and "experts" in roles and "mlp.down" not in roles:
                return "; its feed-forward is a mixture: use 'experts', 'experts.0|5' or 'shared.down'"
            if name.startswith("cross"):
                return "; only encoder-decoder models have cross-attention"
            hint = did_you_mean(name, [*roles, "norm", "all-linear"])
            if hint:
                return hint
        return ""
