"""The one module that is prepared for DDP, FSDP or DeepSpeed: backbone, heads and log-prob engine in one `forward`.

Objectives get from it token log-probabilities, hidden states, scores or class logits and never call a submodule of the
model, so every rank's gradients are synchronised.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmrecipe.core.forward_context import activate, current
from llmrecipe.data.collate import Batch
from llmrecipe.data.transfer import to_device
from llmrecipe.engine.logprob import Comparison, compared, token_logprobs
from llmrecipe.engine.pooling import Pool
from llmrecipe.engine.recomputation import forget_blocks, recomputing
from llmrecipe.engine.trunk import Trunk
from llmrecipe.models.masked_heads import language_head_of


@dataclass(frozen=True)
class Critic:
    """A value function read in the same forward call as the policy."""

    trunk: str = "own"
    """`own`: a second pass under the role's own adapter; `shared`: the policy's states; `detached`: those, without gradient."""
    role: str = "value"
    off: frozenset[str] = frozenset()
    """Wrappers that are disabled in a pass of its own: the policy's."""


HEADS = ("scores", "token_scores", "pooled")
"""What heads of the model give that need no states of single tokens."""
READ = ("states", "hidden", "reward", "values")
"""What is read off the last hidden states."""


class Engine(Trunk):
    """A model with every output an objective may need."""

    def forward(
        self,
        batch: Batch,
        want: str = "logprobs",
        role: str = "policy",
        entropy: bool = False,
        off: frozenset[str] = frozenset(),
        temperature: float = 1.0,
        critic: Critic | None = None,
        entropy_graph: bool = False,
        heads: tuple[str, ...] = (),
        pool: Pool | None = None,
        compare: Comparison | None = None,
        normalizer: bool = False,
    ) -> dict[str, Tensor]:
        """Run the model once over a batch.

        Args:
            want: `logprobs` (N,) of the batch's targets; `continued` the same, where an encoder, too, sees of what follows the
                prompt of a row only what stands before a token; `decoded` the same, the model decoding a vector that it pools
                from the rows in `extra["encoder_ids"]`; `hidden` (S, D) the state of each sequence's last token; `states`
                (R, T, D) those of all tokens; `pooled` (S, D) one vector a sequence (see `pool`); `values` (N,)
                of the role's head before each target and `values_end` (S,) at the last token; `scores` (S, C) of a sequence
                head; `token_scores` (R, T, C) of a head that reads every token; `reward` (S,) of the reward head at each
                sequence's last token (or where `extra["pool"]` points).
            role: which hooks take part (see `Context.role`).
            off: names of wrappers to disable, in addition to those the surrounding context disables.
            temperature: divides the logits of `logprobs`.
            entropy_graph: with `entropy`, give it its graph.
            heads: with `logprobs`, also return (S, C) of these heads of the model, by name, on the state that each sequence
                is pooled by (`extra["pool"]`, or the last token).
            pool: with `pooled` and `decoded`, from which states and through which head; default the last token's.
            compare: with `logprobs`, return what it makes of the logits of the targets, chunk by chunk, instead.
            normalizer: with `logprobs`, also return log Z (N,), Z the sum of exp over the logits of a target's place.
            critic: with `logprobs`, also return `values` (N,) and `values_end` (S,), the value of each sequence's last state.

        Returns:
            The requested tensors by name, and `auxiliary`, a scalar, where the model has a loss of its own.
        """
        device = batch.input_ids.device.type
        with (
            activate(
                dataclasses.replace(batch.context(role), read=read_rows(batch, want, critic, heads), off=off | current().off)
            ),
            torch.autocast(device, dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None),
            recomputing(self.model),
        ):
            if want in HEADS:
                value, auxiliary = self._scored(batch, want, pool or Pool(), role)
                return _with({want: value}, auxiliary)
            if want == "decoded":
                hidden, auxiliary = self.decoded(batch, pool or Pool())
            else:
                hidden, auxiliary = self.continued(batch) if want == "continued" else self.states(batch)
            if want in READ:
                return _with(self._read(hidden, batch, want, role), auxiliary)
            flat = hidden.reshape(-1, hidden.shape[-1])
            post = dataclasses.replace(self.post, temperature=temperature)
            if compare is not None:
                return _with(compared(flat[batch.source], self.head, post, compare), auxiliary)
            out = token_logprobs(flat[batch.source], batch.target, self.head, post, entropy, entropy_graph, normalizer)
            out |= {name: self.head_of(name)(flat[pooled(batch)]) for name in heads}
            if critic is not None and critic.trunk == "own":
                # The critic's pass is the second over the same tokens: the policy's loss of its own is the one that counts.
                out = self.forward(batch, "values", critic.role, off=off | critic.off) | out
                out.pop("auxiliary", None)
            elif critic is not None:
                out |= self.values(flat.detach() if critic.trunk == "detached" else flat, batch, critic.role)
            return _with(out, auxiliary)

    def _scored(self, batch: Batch, want: str, pool: Pool, role: str) -> tuple[Tensor, Tensor | None]:
        """Return one of `HEADS`, and the loss the model itself adds, if any."""
        if want == "pooled":
            return self.pooled(batch, pool, role)
        return self.scores(batch) if want == "scores" else self.token_scores(batch)

    def _read(self, hidden: Tensor, batch: Batch, want: str, role: str) -> dict[str, Tensor]:
        """Return one of `READ` of the last hidden states, (R, T, D)."""
        if want == "states":
            return {"states": hidden}
        flat = hidden.reshape(-1, hidden.shape[-1])
        if want == "values":
            return self.values(flat, batch, role)
        if want == "reward":
            return {"reward": self.head_of("reward")(flat[pooled(batch)]).squeeze(-1)}
        return {"hidden": flat[batch.last]}

    def values(self, flat: Tensor, batch: Batch, role: str) -> dict[str, Tensor]:
        """Return a role's scalar of the state before each target (N,), and of each sequence's last state (S,)."""
        head = self.head_of(role)
        return {"values": head(flat[batch.source]).squeeze(-1), "values_end": head(flat[batch.last]).squeeze(-1)}

    @property
    def head(self) -> nn.Module:
        """Return the module that maps hidden states (..., D) to logits (..., V)."""
        return language_head_of(self.model)

    def train(self, mode: bool = True) -> Engine:
        """Set training mode; batch normalization keeps to its running statistics, so that no row depends on its neighbours."""
        super().train(mode)
        forget_blocks(self.model)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


def _with(out: dict[str, Tensor], auxiliary: Tensor | None) -> dict[str, Tensor]:
    return out if auxiliary is None else out | {"auxiliary": auxiliary}


def pooled(batch: Batch) -> Tensor:
    """Return the flat index (S,) of the state each sequence is scored by."""
    return batch.extra.get("pool", batch.last)


def read_rows(batch: Batch, want: str, critic: Critic | None = None, heads: tuple[str, ...] = ()) -> Tensor | None:
    """Return sorted flat indices (M,) of the final states the requested tensor depends on; None where any may be used."""
    # On the host, where the batch was laid out: how many rows there are depends on their values.
    here = batch.here
    both = torch.cat([here.source, here.last])
    sources = both if critic is not None and critic.trunk != "own" else here.source
    if heads:
        sources = torch.cat([sources, pooled(here)])
    rows = {"logprobs": sources, "continued": sources, "values": both, "hidden": here.last, "reward": pooled(here)}.get(want)
    return None if rows is None else to_device(torch.unique(rows), batch.input_ids.device)
