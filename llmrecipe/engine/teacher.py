"""The teacher of a distillation: another model, or a server, that gives distributions over the next token.

Letters: N scored positions, V tokens, K tokens kept of a distribution, D width of the teacher's states.

A local teacher keeps only its states (N, D) of a micro-batch; its logits exist for the same chunk of positions as the student's
do. Where its K likeliest tokens are stored, all rows are scored before the student is loaded, into a file named by the content
of the teacher's weights and of the rows, with its checksum; two models are then never in memory together.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from llmrecipe.core.errors import ModelError
from llmrecipe.core.forward_context import Context, activate
from llmrecipe.data.batch_parts import sequences_in
from llmrecipe.data.collate import Batch, Sequence, pad, row_key
from llmrecipe.data.tokenize.call_tokenizer import call_tokenizer
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.logprob import compared, upcast
from llmrecipe.engine.packing import packing_for
from llmrecipe.engine.reference_cache import read_scores, weights_digest, write_scores
from llmrecipe.recipe.schema import ModelSection, TokenizerSection
from llmrecipe.runs.open_model import open_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmrecipe.models.pretrained import LanguageModel


@dataclass(frozen=True)
class TopTokens:
    """The likeliest tokens of N distributions; what is left of each belongs to all other tokens together."""

    ids: Tensor
    """(N, K)"""
    logprobs: Tensor
    """(N, K) float32, largest first."""


class TopTeacher(Protocol):
    """What gives the likeliest tokens of sequences: a local teacher or a server."""

    def top(self, sequences: Seq[Sequence], count: int, temperature: float) -> list[TopTokens]:
        """Return the `count` likeliest tokens at the targets of each sequence, of softmax(logits / temperature)."""


class Teacher:
    """A model without gradients, in memory next to the student."""

    def __init__(self, model: LanguageModel, tokenizer: PreTrainedTokenizerBase, device: torch.device, packing: str = "auto"):
        self.model, self.tokenizer, self.device = model, tokenizer, device
        model.to(device).eval().requires_grad_(False)
        self.engine = Engine(model).eval()
        self.packing = packing_for("off" if packing == "off" else "auto", self.engine, device)

    @property
    def pad_id(self) -> int:
        """Return the token written into padding."""
        return int(self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0)

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """Return the states (N, D) before the targets of a batch, whose tokens are the teacher's own."""
        if batch.layout is not None and not self.packing:
            batch = pad(sequences_in(batch), self.pad_id).to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            states = self.engine(batch, want="states")["states"]
        return states.reshape(-1, states.shape[-1])[batch.source]

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """Return the logits (n, V) of some states (n, D)."""
        # Called from within the student's pass, whose context and dtype are the student's.
        with activate(Context()), torch.autocast(self.device.type, enabled=False):
            return self.engine.post(upcast(self.engine.head(states)))

    @torch.no_grad()
    def top(self, sequences: Seq[Sequence], count: int, temperature: float) -> list[TopTokens]:
        """Return the likeliest tokens at the targets of each sequence."""
        batch = pad(sequences, self.pad_id).to(self.device)

        def likeliest(logits: Tensor, rows: slice) -> dict[str, Tensor]:
            values, ids = (logits / temperature).log_softmax(-1).topk(min(count, logits.shape[-1]), dim=-1)
            return {"logprobs": values.float(), "ids": ids}

        with activate(batch.context()):
            found = compared(self.states(batch), self.engine.head, self.engine.post, likeliest)
        if "ids" not in found:
            return [TopTokens(torch.zeros(0, count, dtype=torch.long), torch.zeros(0, count)) for _ in sequences]
        lengths = batch.here.counts().long().tolist()
        parts = zip(found["ids"].cpu().split(lengths), found["logprobs"].cpu().split(lengths), strict=True)
        return [TopTokens(ids, logprobs) for ids, logprobs in parts]

    def digest(self) -> str:
        """Return a hash of the weights."""
        return weights_digest({**dict(self.model.named_parameters()), **dict(self.model.named_buffers())})


def open_teacher(section: ModelSection, device: torch.device, packing: str = "auto") -> Teacher:
    """Load a teacher: a folder, a hub name, a finished run with its adapters, or `tiny`."""
    loaded = open_model(section, TokenizerSection(), device=device.type)
    return Teacher(loaded.model, loaded.tokenizer, device, packing)


def same_vocabulary(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a teacher that numbers tokens otherwise than the student.

    Raises:
        ModelError: saying what to do.
    """
    theirs, own = teacher.get_vocab(), student.get_vocab()
    if theirs != own:
        raise ModelError(
            f"objective.teacher: {name} has a vocabulary of {len(theirs)} tokens, of which {len(theirs.items() & own.items())} "
            f"are among the student's {len(own)} under the same number, so their distributions cannot be compared token by "
            "token; take a teacher of the same tokenizer, or objective.divergence=uld, which compares sorted probabilities"
        )


class TopCache:
    """Likeliest tokens of sequences, by the digest of their tokens and targets."""

    def __init__(self, path: Path | None = None):
        self.path = path
        """Named by what the numbers depend on; None keeps them in memory."""
        self.known: dict[int, TopTokens] = {}
        self.misses = 0
        if path is not None and path.exists():
            self._read(path)

    def get(self, sequences: Seq[Sequence], teacher: TopTeacher, count: int, temperature: float) -> TopTokens:
        """Return the likeliest tokens at the targets of all sequences, in their order; the teacher scores those not known."""
        keys = [row_key(list(s.ids), list(s.trained)) for s in sequences]
        missing = {key: s for key, s in zip(keys, sequences, strict=True) if key not in self.known}
        if missing:
            self.known |= zip(missing, teacher.top(list(missing.values()), count, temperature), strict=True)
            self.misses += len(missing)
        found = [self.known[key] for key in keys]
        return TopTokens(torch.cat([f.ids for f in found]), torch.cat([f.logprobs for f in found]))

    def save(self) -> None:
        """Write the cache to its file."""
        if self.path is None or not self.misses:
            return
        index = sorted(self.known)
        found = [self.known[key] for key in index]
        write_scores(
            self.path,
            {
                "keys": torch.tensor(index, dtype=torch.int64),
                "lengths": torch.tensor([len(f.ids) for f in found]),
                "ids": torch.cat([f.ids for f in found]).to(torch.int32),
                "logprobs": torch.cat([f.logprobs for f in found]),
            },
        )
        self.misses = 0

    def _read(self, path: Path) -> None:
        held = read_scores(path, ("keys", "lengths", "ids", "logprobs"))
        if held:
            lengths = held["lengths"].tolist()
            parts = zip(held["ids"].long().split(lengths), held["logprobs"].split(lengths), strict=True)
            self.known = dict(zip(held["keys"].tolist(), (TopTokens(*part) for part in parts), strict=True))


def aligned(batch: Batch, teacher: Teacher, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Let the teacher read the text of a batch in its own tokens, and pair its targets with the student's.

    Each run of targets is one text to both tokenizers; the j-th token of one is paired with the j-th of the other, as far as
    the shorter goes. An end token closes a run in both.

    Returns:
        The teacher's states (M, D), and for each of the student's N targets the index of the state it is paired with, or -1.
    """
    sequences, place, count = [], [], 0
    for own in sequences_in(batch):
        ids, trained, pairs = _retold(own, teacher.tokenizer, tokenizer)
        sequences.append(Sequence(ids, trained))
        place += [-1 if at is None else count + at for at in pairs]
        count += sum(trained)
    theirs = pad(sequences, teacher.pad_id).to(teacher.device)
    return teacher.states(theirs), torch.tensor(place, dtype=torch.long, device=teacher.device)


def _retold(
    own: Sequence, teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase
) -> tuple[list[int], list[int], list[int | None]]:
    """Return the teacher's tokens of a sequence, which of them are targets, and which target each of the student's is."""
    starts = bool(own.ids) and own.ids[0] == student.bos_token_id and teacher.bos_token_id is not None
    ids: list[int] = [int(teacher.bos_token_id)] if starts else []
    trained, pairs, targets = [0] * len(ids), [], 0
    first = 0
    while first < len(own.ids):
        last = first
        while last < len(own.ids) and own.trained[last] == own.trained[first]:
            last += 1
        part = list(own.ids[first:last])
        text = student.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        found = list(call_tokenizer(teacher, text, add_special_tokens=False)["input_ids"]) if text else []
        if part[-1] == student.eos_token_id and teacher.eos_token_id is not None:
            found.append(int(teacher.eos_token_id))
        if own.trained[first]:
            # The first token of a sequence has nothing before it and is no target.
            marks = [int(bool(ids) or i > 0) for i in range(len(found))]
            mine = [i for i in range(len(part)) if first or i]
            numbered = {i: targets + sum(marks[:i]) for i, mark in enumerate(marks) if mark}
            pairs += [numbered.get(i) for i in mine]
            targets += sum(marks)
        else:
            marks = [0] * len(found)
        ids, trained, first = ids + found, trained + marks, last
    return ids or [0], trained or [0], pairs
