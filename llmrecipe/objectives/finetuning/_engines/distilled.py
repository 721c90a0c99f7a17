"""What objectives of a student and a teacher share: the teacher, its stored tokens, the comparison of logits."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from llmrecipe.core.console import lasting
from llmrecipe.core.errors import RecipeError
from llmrecipe.core.http_client import check_address
from llmrecipe.core.option_types import Annotated, Field, LossMaskName, NonNegativeFloat, PositiveFloat
from llmrecipe.core.registry import options
from llmrecipe.data.batch_parts import sequences_in
from llmrecipe.data.collate import Batch
from llmrecipe.data.collate import Sequence as Targets
from llmrecipe.engine.logprob import NOTHING, Comparison
from llmrecipe.engine.reference_cache import cache_file
from llmrecipe.engine.reference_policy import PlannedRows, row_groups
from llmrecipe.engine.role_models import Roles
from llmrecipe.engine.teacher import Teacher, TopCache, TopTeacher, TopTokens, aligned, open_teacher, same_vocabulary
from llmrecipe.engine.teacher_server import TeacherServer
from llmrecipe.models.random_state import random_state_kept
from llmrecipe.objectives.base import Loss, Measures
from llmrecipe.objectives.divergences import divergence, on_top_tokens, sorted_distance
from llmrecipe.objectives.token_math import TOKEN_METRICS, collate_tokens, sequences_of
from llmrecipe.recipe.content_key import REFERENCE
from llmrecipe.recipe.rights import rights_of
from llmrecipe.recipe.schema import ModelSection, TokenizerSection
from llmrecipe.runs.open_model import tokenizer_of

if TYPE_CHECKING:
    from llmrecipe.data.prepare import Rows, SplitRows
    from llmrecipe.recipe.schema import Recipe
    from llmrecipe.runs.open_model import LoadedModel

ROLE = "teacher"


@options
class Distilled:
    """Mixin for an `Objective` that compares a student's distributions with a teacher's.

    The objective adds `divergence`, whose choices and default are its own, and `top_k`.
    """

    headline: ClassVar[tuple[str, ...]] = ("agreement", "divergence")

    teacher: str = ""
    """Folder, hub name or run directory of the teacher, `tiny`, or the address of a server up to and without /completions."""
    teacher_model: str = ""
    """Name of the model on the teacher's server."""
    key_env: str | None = None
    """Name of the environment variable with the server's bearer token."""
    mask: LossMaskName = "assistant"
    """Which tokens are supervised; for prompt/completion rows `assistant` means the completion."""
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Of `jsd`: weight of the teacher in the mixture; near 0 it goes as beta KL(P || Q), near 1 as (1 - beta) KL(Q || P)."""
    temperature: PositiveFloat = 1.0
    """T, divides the logits of both."""
    squared: bool = True
    """Multiply the divergence by T^2, so that its gradient keeps its size."""
    nll_coef: NonNegativeFloat = 0.0
    """Weight of the cross-entropy with the rows' own tokens."""

    if TYPE_CHECKING:
        divergence: str
        top_k: int | None
        samples: ClassVar[bool]
        pairs_rows: ClassVar[bool]
        rows: ClassVar[str]

        def model_head(self) -> str: ...
        def reference_of(self) -> str: ...
        def reference_moves(self) -> bool: ...
        def compares_distributions(self) -> bool: ...
        def reference_batches(self, rows: list[dict[str, Any]], roles: Roles) -> Iterator[Batch]: ...
        def evaluation_rows(self, data: Rows, indices: list[int]) -> list[dict[str, Any]]: ...

    @functools.cached_property
    def live(self) -> dict[str, Any]:
        """Hold what is found while running: the rights of the recipe, the stored tokens."""
        return {"rights": {}, "cache": TopCache()}

    @property
    def served(self) -> bool:
        """Return whether the teacher is a server."""
        return self.teacher.startswith(("http://", "https://"))

    def loss_mask(self) -> str:
        """Train on what the option says."""
        return self.mask

    def measures(self) -> Measures:
        """Return the divergence, the metrics of the supervised tokens, and how often both models find one token likeliest.

        The tokens of two tokenizers are never the same ones: `uld` has no agreement.
        """
        found: Measures = {**TOKEN_METRICS, "divergence": "min"}
        return found if self.divergence == "uld" else {**found, "agreement": "max"}

    def check(self, recipe: Recipe, data: SplitRows) -> None:
        """Refuse a teacher that is missing, or whose distributions cannot be compared with the student's.

        Raises:
            RecipeError: naming the key to change.
            ModelError: the vocabularies differ.
        """
        self.live["rights"] = rights_of(recipe.model)
        if not self.teacher:
            raise RecipeError("objective.teacher: must be given: the folder, run, hub name or server address of the teacher")
        if self.divergence == "uld" and (self.top_k is not None or self.served):
            raise RecipeError("objective.divergence: uld sorts whole distributions; use it without top_k, and no server")
        if self.served:
            self._check_server()
        elif not REFERENCE.fullmatch(self.teacher) and self.divergence != "uld":
            theirs = tokenizer_of(self._section(), TokenizerSection())
            same_vocabulary(theirs, tokenizer_of(recipe.model, recipe.tokenizer), self.teacher)

    def _check_server(self) -> None:
        check_address(self.teacher, None, self.key_env, "objective.teacher")
        if not self.teacher_model:
            raise RecipeError("objective.teacher_model: must be given: the name of the model on the teacher's server")
        if self.top_k is None:
            raise RecipeError("objective.top_k: a server gives its likeliest tokens alone; say how many, such as 20")
        if self.temperature != 1.0:
            raise RecipeError(f"objective.temperature: a server gives probabilities at 1; got {self.temperature}")

    def _section(self) -> ModelSection:
        return ModelSection(path=self.teacher, **self.live["rights"])

    def open(self, device: torch.device) -> Teacher | TeacherServer:
        """Load the teacher, or return the connection to its server."""
        if self.served:
            return TeacherServer(self.teacher, self.teacher_model, self.key_env)
        with random_state_kept(device):
            # Loading a model may draw random numbers; the run's own stream must not depend on when that happens.
            return open_teacher(self._section(), device)

    def teacher_of(self, roles: Roles) -> Teacher | TeacherServer:
        """Return the teacher, opened on first use.

        Raises:
            ModelError: its vocabulary is not the student's.
        """
        if ROLE not in roles.others:
            roles.others[ROLE] = opened = self.open(roles.device)
            if isinstance(opened, Teacher) and self.divergence != "uld":
                same_vocabulary(opened.tokenizer, roles.tokenizer, self.teacher)
        found: Teacher | TeacherServer = roles.others[ROLE]
        return found

    def prepare_rows(self, recipe: Recipe, rows: PlannedRows, device: torch.device) -> None:
        """Store the teacher's likeliest tokens of every row, and let go of it."""
        if self.top_k is None or self.samples:
            return
        teacher = self.open(device)
        where = {"url": self.teacher, "name": self.teacher_model}
        facts = {"model": teacher.digest()} if isinstance(teacher, Teacher) else where
        path = cache_file({**facts, "data": rows.train.key, "top": self.top_k, "temperature": self.temperature})
        self.live["cache"] = cache = TopCache(path)
        size = recipe.batch.micro or 16
        with lasting("storing the teacher's likeliest tokens", lambda: f"{len(cache.known):,} rows"):
            for group in row_groups(self, rows):
                for first in range(0, len(group), size):
                    cache.get(sequences_of(group[first : first + size], apart=True), teacher, self.top_k, self.temperature)
        cache.save()
        del teacher
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def prepare_roles(self, loaded: LoadedModel, frozen: bool) -> None:
        """Keep the rights that the recipe gives to the models it opens."""
        self.live["rights"] = rights_of(loaded.section)

    def held_models(self, recipe: Recipe, frozen: bool) -> list[ModelSection]:
        """Return the teacher where it computes next to the student: neither a server nor stored before the student is read."""
        stored = self.top_k is not None and not self.samples
        return [] if self.served or stored or REFERENCE.search(self.teacher) else [self._section()]

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Lay dialogues out for one forward pass."""
        return collate_tokens(rows, roles)

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed divergence of the supervised tokens, with the cross-entropy in its weight."""
        out = roles.policy(batch, compare=self.comparison(batch, roles))
        if NOTHING in out:
            return Loss(out[NOTHING].sum(), dict.fromkeys(self.measures(), (0.0, 0.0)))
        count = float(out["nll"].numel())
        total = out["divergence"].sum()
        if self.nll_coef:
            total = total + self.nll_coef * out["nll"].sum()
        return Loss(total, {name: (out[name].detach().sum(), count) for name in self.measures()})

    def comparison(self, batch: Batch, roles: Roles) -> Comparison:
        """Return what compares the student's logits of a micro-batch with the teacher's, chunk by chunk."""
        against = self._against(batch, roles)
        factor = self.temperature**2 if self.squared else 1.0

        def compare(z: Tensor, rows: slice) -> dict[str, Tensor]:
            y = batch.target[rows]
            found, best = against(z / self.temperature, rows)
            log_q = z.log_softmax(-1)
            with torch.no_grad():
                guess = z.argmax(-1)
            nll = -log_q.gather(-1, y[:, None]).squeeze(-1)
            measured = {"divergence": factor * found, "nll": nll, "accuracy": (guess == y).float()}
            return measured if best is None else {**measured, "agreement": (guess == best).float()}

        return compare

    def _against(self, batch: Batch, roles: Roles) -> Callable[[Tensor, slice], tuple[Tensor, Tensor | None]]:
        """Return what makes of tempered logits (n, V) and their rows the divergence and the teacher's best token, (n,).

        There is no best token where the teacher has other tokens.
        """
        if self.top_k is not None:
            top = self._top(batch, roles)
            return lambda z, rows: self._to_top(z, top.ids[rows], top.logprobs[rows])
        teacher = self.teacher_of(roles)
        assert isinstance(teacher, Teacher), "a server needs top_k"
        if self.divergence == "uld":
            states, place = aligned(batch, teacher, roles.tokenizer)
            return lambda z, rows: (self._sorted(z, states, place[rows], teacher), None)
        own = teacher.states(batch)
        return lambda z, rows: self._to_all(z, teacher.logits(own[rows]).to(z.dtype) / self.temperature)

    def _top(self, batch: Batch, roles: Roles) -> TopTokens:
        assert self.top_k is not None, "only then tokens are kept"
        lazy = _Lazy(lambda: self.teacher_of(roles))
        # What the policy writes never comes again, so nothing of it is kept.
        cache = TopCache() if self.samples else self.live["cache"]
        top = cache.get(sequences_in(batch), lazy, self.top_k, self.temperature)
        return TopTokens(top.ids.to(roles.device), top.logprobs.to(roles.device))

    def _to_all(self, z: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        width = min(z.shape[-1], other.shape[-1])
        log_p, log_q = other[:, :width].log_softmax(-1), z[:, :width].log_softmax(-1)
        return divergence(log_p, log_q, self.divergence, self.beta), log_p.argmax(-1)

    def _to_top(self, z: Tensor, ids: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        log_p, log_q = on_top_tokens(z.log_softmax(-1), ids, logprobs.to(z.dtype))
        return divergence(log_p, log_q, self.divergence, self.beta), ids[:, 0]

    def _sorted(self, z: Tensor, states: Tensor, place: Tensor, teacher: Teacher) -> Tensor:
        paired = place >= 0
        found = z.new_zeros(len(z))
        if bool(paired.any()):
            p = (teacher.logits(states[place[paired]]).to(z.dtype) / self.temperature).softmax(-1)
            found = found.masked_scatter(paired, sorted_distance(p, z[paired].softmax(-1)))
        return found


class _Lazy:
    """A teacher that is opened when the first sequence is not known."""

    def __init__(self, opened: Callable[[], TopTeacher]):
        self.opened = opened

    def top(self, sequences: Sequence[Targets], count: int, temperature: float) -> list[TopTokens]:
        """Return the likeliest tokens at the targets of each sequence."""
        return self.opened().top(sequences, count, temperature)
