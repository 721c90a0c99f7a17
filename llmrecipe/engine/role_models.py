"""Auxiliary models of an objective by role (policy, reference, value, reward), most of which share one base."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from llmrecipe.core.forward_context import activate, current
from llmrecipe.data.collate import Batch, Sequence, pack, pad
from llmrecipe.data.transfer import to_device
from llmrecipe.engine.forward import Critic, Engine
from llmrecipe.engine.logprob import Comparison, upcast
from llmrecipe.engine.pooling import Pool
from llmrecipe.engine.reference_cache import ReferenceCache
from llmrecipe.methods._base.stack import Stack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmrecipe.models.pretrained import LanguageModel

T = TypeVar("T")


class Roles:
    """What an objective needs of a run: the models by role, layout of batches, reductions over processes."""

    def __init__(
        self,
        engine: Engine,
        stack: Stack,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        packing: bool,
        micro_rows: int | None = None,
        micro_tokens: int | None = None,
        reference_cache: ReferenceCache | None = None,
    ):
        self.engine = engine
        self.prepared: nn.Module = engine
        self.stack = stack
        self.tokenizer = tokenizer
        self.device = device
        self.packing = packing
        self.micro_rows = micro_rows
        self.micro_tokens = micro_tokens
        self.cache = reference_cache or ReferenceCache()
        self.reference_off: frozenset[str] = frozenset()
        """Wrappers disabled in the reference in addition to the run's own: mounted ones, where the base is the reference."""
        self.reference_moves = False
        """Whether the reference follows the policy, so that no score of it may be kept."""
        self.max_length: int = 1024
        """Most tokens of a sequence (`data.max_length`), for objectives that make their own."""
        self.seed: int = 0
        """The run's seed, for objectives that draw (masks, negatives)."""
        self.runtime: Any = None
        """Reductions over processes; None where there is one process without a run."""
        self.data: Any = None
        """The training rows of the run."""
        self.events: Any = None
        """Where samples are shown; None without a run."""
        self.auxiliary: list[Tensor] | None = None
        """Losses of the model's own from the policy's passes, while they are collected."""
        self.passes: dict[tuple[Any, ...], tuple[Any, dict[str, Tensor]]] | None = None
        """What the policy's passes gave, while the same one is not made twice."""
        self.others: dict[str, Any] = {}
        """Separate models by role name (a reward model, a judge); filled by the run."""

    @property
    def model(self) -> LanguageModel:
        """Return the policy's model, unwrapped."""
        return self.engine.model

    @property
    def pad_id(self) -> int:
        """Return the token written into padding; never used to find padding."""
        return int(self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0)

    def layout(
        self, sequences: list[Sequence], rows: Seq[int] = (), extra: dict[str, Tensor] | None = None, packed: bool = True
    ) -> Batch:
        """Lay sequences out as a batch on the device, packed where the attention backend can isolate documents.

        Args:
            packed: False where what reads the hidden states needs one row a sequence.
        """
        packed = packed and self.packing
        batch = pack(sequences, rows, extra) if packed else pad(sequences, self.pad_id, "right", rows, extra)
        return batch.to(self.device)

    def split(self, rows: list[dict[str, Any]], shared: str = "") -> Iterator[list[dict[str, Any]]]:
        """Cut the rows of an optimizer step into micro-batches; no rows still give one empty micro-batch.

        Args:
            shared: key of ids that adjacent rows share in a packed micro-batch, where both hold the same list.
        """
        part: list[dict[str, Any]] = []
        tokens = 0
        for row in rows:
            size = own = row_tokens(row)
            if shared and self.packing and part and part[-1][shared] is row[shared]:
                own -= len(row[shared])
            full = (self.micro_rows and len(part) >= self.micro_rows) or (
                self.micro_tokens and tokens + own > self.micro_tokens
            )
            if part and full:
                yield part
                part, tokens = [], 0
            size = own if part else size
            part.append(row)
            tokens += size
        if part or not rows:
            yield part

    def policy(
        self,
        batch: Batch,
        want: str = "logprobs",
        entropy: bool = False,
        temperature: float = 1.0,
        critic: Critic | None = None,
        entropy_graph: bool = False,
        heads: tuple[str, ...] = (),
        pool: Pool | None = None,
        compare: Comparison | None = None,
        normalizer: bool = False,
    ) -> dict[str, Tensor]:
        """Run the trained model through the prepared module, so that ranks synchronise."""
        options: dict[str, Any] = {
            "want": want, "entropy": entropy, "temperature": temperature, "critic": critic, "entropy_graph": entropy_graph,
            "heads": heads, "pool": pool, "compare": compare, "normalizer": normalizer,
        }  # fmt: skip
        if self.passes is None:
            return self._pass(batch, options)
        wanted = (current().off, *({**options, "compare": id(compare)}.values()))
        if (id(batch), wanted) not in self.passes:
            # With the objects whose places in memory name it.
            self.passes[id(batch), wanted] = (batch, compare), self._pass(batch, options)
        return dict(self.passes[id(batch), wanted][1])

    def _pass(self, batch: Batch, options: dict[str, Any]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = self.prepared(batch, **options)
        own = out.pop("auxiliary", None)
        if own is not None and self.auxiliary is not None:
            self.auxiliary.append(own)
        return out

    @contextlib.contextmanager
    def collecting(self) -> Iterator[list[Tensor]]:
        """Collect the losses that the model itself adds to each pass of the policy: load balancing of a mixture."""
        self.auxiliary = []
        try:
            yield self.auxiliary
        finally:
            self.auxiliary = None

    @contextlib.contextmanager
    def each_pass_once(self) -> Iterator[None]:
        """Make no pass of the policy twice inside the context, in which its weights stay as they are."""
        self.passes = {}
        try:
            yield
        finally:
            self.passes = None

    def reference(self, batch: Batch) -> Tensor:
        """Return the summed log-probabilities (S,) of each sequence's targets under the reference.

        Rows seen before come from the cache; the rest take one forward pass without gradients, dropout off.
        """
        if self.reference_moves:
            return batch.sum_by_sequence(self.reference_tokens(batch))
        known = self.cache.get(batch)
        if self._for_all(known is not None) and known is not None:
            return to_device(known, self.device)
        sums = batch.sum_by_sequence(self.reference_tokens(batch))
        self.cache.put(batch, sums)
        return sums

    def _for_all(self, here: bool) -> bool:
        """Return whether something holds on every process where each has to make the same passes, else whether it does here."""
        if self.runtime is None or not self.runtime.in_step:
            return here
        return not float(self.runtime.maximum(torch.tensor([float(not here)])))

    @torch.no_grad()
    def reference_tokens(self, batch: Batch, temperature: float = 1.0) -> Tensor:
        """Return the log-probabilities (N,) of the targets under the policy of step 0."""
        with self.evaluating(), self.stack.reference(self.model):
            return self.engine(batch, role=self._reference_role, off=self.reference_off, temperature=temperature)["logprobs"]

    @property
    def _reference_role(self) -> str:
        """Return the role of a pass of the reference: with a snapshot hooks stay enabled, disabled stacks have their own."""
        return "policy" if self.stack.snapshot is not None else "reference"

    @torch.no_grad()
    def reference_states(self, batch: Batch) -> Tensor:
        """Return the states (N, D) that predict the targets under the policy of step 0; `reference_logits` reads them."""
        with self.evaluating(), self.stack.reference(self.model):
            states = self.engine(batch, want="states", role=self._reference_role, off=self.reference_off)["states"]
        return states.reshape(-1, states.shape[-1])[batch.source]

    @torch.no_grad()
    def reference_logits(self, states: Tensor) -> Tensor:
        """Return the logits (n, V) of states (n, D) of the policy of step 0, in float32 at least; call it in a policy pass."""
        own = dataclasses.replace(current(), role=self._reference_role, off=self.reference_off | current().off)
        with _EvalMode(self.engine.head), self.stack.reference(self.model), activate(own):
            return self.engine.post(upcast(self.engine.head(states)))

    def sum(self, values: list[float]) -> list[float]:
        """Sum each value over all processes."""
        if self.runtime is None:
            return values
        return self.runtime.sum(torch.tensor(values, dtype=torch.float64)).tolist()

    def sum_tensor(self, values: Tensor) -> Tensor:
        """Sum a tensor over all processes, without waiting for its values."""
        return values if self.runtime is None else self.runtime.sum(values)

    def gather_rows(self, values: Tensor) -> tuple[Tensor, int]:
        """Join tensors (R, ...) of all processes, with their gradients; also return where this process's own rows begin."""
        return (values, 0) if self.runtime is None else self.runtime.gather_rows(values)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Compute without the other processes, which need not do the same: the bare engine, and no reductions."""
        kept = self.prepared, self.runtime
        self.prepared, self.runtime = self.engine, None
        try:
            yield
        finally:
            self.prepared, self.runtime = kept

    @property
    def rank(self) -> int:
        """Return the index of this process."""
        return 0 if self.runtime is None else int(self.runtime.rank)

    def gather(self, value: T) -> list[T]:
        """Return every process's JSON value, by rank."""
        return [value] if self.runtime is None else self.runtime.gather_json(value)

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        """Return a context with the engine in eval mode; the former mode is restored on exit."""
        return _EvalMode(self.engine)


def row_tokens(row: dict[str, Any]) -> int:
    """Return the number of places of a token row in the model's input, over all its id lists and its features."""
    slots = row["features"].slots if "features" in row else 0
    return slots + sum(len(v) for k, v in row.items() if v and (k == "ids" or k.startswith("ids_") or k.endswith("_ids")))


@dataclasses.dataclass
class _EvalMode:
    module: nn.Module
    was: bool = False

    def __enter__(self) -> None:
        self.was = self.module.training
        self.module.eval()

    def __exit__(self, *_: object) -> None:
        self.module.train(self.was)
