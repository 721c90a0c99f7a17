"""On-policy distillation: the student learns the teacher's distributions over the student's own answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.foreign import stored_count
from llmrecipe.core.option_types import Field, Fraction, Literal, NonNegativeInt, PositiveFloat, PositiveInt, StopText
from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch
from llmrecipe.engine.answer_ends import AnswerEnds, answer_ends
from llmrecipe.engine.generation import decode_ids, generate
from llmrecipe.engine.role_models import Roles
from llmrecipe.engine.sampling import Sampling, stream
from llmrecipe.engine.teacher import Teacher
from llmrecipe.objectives.base import Objective
from llmrecipe.objectives.finetuning._engines.distilled import Distilled

if TYPE_CHECKING:
    from llmrecipe.data.prepare import SplitRows
    from llmrecipe.recipe.schema import Recipe


@register
class Gkd(Distilled, Objective):
    """Generalised knowledge distillation: L = (1/N) sum over answer tokens of [T^2 D(P_t, Q_t) - c log Q(y_t | y_<t, x)].

    Each step, with probability `on_policy`, all prompts get answers y that the student samples (no gradient passes through the
    sampling); otherwise the rows' own, or with `seq_kd` answers that the teacher samples. The rest is as in `distill`. What is
    sampled depends on the seed, the step and the row alone. Held-out rows keep their own answers.

    Paper: On-policy distillation of language models: learning from self-generated mistakes (arXiv 2306.13649).
    """

    rows: ClassVar[str] = "dialogue"
    head: ClassVar[str] = "causal"
    roles: ClassVar[tuple[str, ...]] = ("teacher",)
    samples: ClassVar[bool] = True
    dropout: ClassVar[bool] = False

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "jsd"
    """Divergence of the student from the teacher."""
    top_k: PositiveInt | None = None
    """Compare over the teacher's K likeliest tokens, all that a server gives; null compares all tokens."""
    on_policy: Fraction = 0.5
    """Probability that the student writes the answers of a step (lambda in the paper)."""
    seq_kd: bool = False
    """In the other steps the teacher writes them; false takes the rows' own."""
    sample_temperature: PositiveFloat = 0.9
    """Divides the logits when sampling."""
    max_new_tokens: PositiveInt = 64
    """Maximum number of tokens of an answer."""
    stop: list[StopText] = Field(default_factory=list)
    """Texts before which an answer ends; its tokens up to the end of one are trained, its text has none."""
    generation_batch: PositiveInt = 64
    """Answers generated at once."""
    show: NonNegativeInt = 2
    """Sampled answers of a step written to the events."""

    def check(self, recipe: Recipe, data: SplitRows) -> None:
        """Refuse a server as the writer of answers.

        Raises:
            RecipeError: naming the key to change.
        """
        if self.seq_kd and self.served:
            raise RecipeError("objective.seq_kd: a server's answers are texts, not tokens; name a folder as objective.teacher")
        super().check(recipe, data)

    def writer(self, step: int, seed: int) -> str:
        """Return who writes the answers of a step: student, teacher or rows."""
        if float(stream(seed, f"gkd/{step}", 1)) <= self.on_policy:
            return "student"
        return "teacher" if self.seq_kd else "rows"

    def batches(self, source: Iterable[list[dict[str, Any]]], roles: Roles) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each step, after its answers are written."""
        for rows in source:
            step = self.live.get("step", 0)
            written = self.written(rows, roles, step)
            self.live["step"] = step + 1
            yield [self.collate(part, roles) for part in roles.split(written)]

    def written(self, rows: list[dict[str, Any]], roles: Roles, step: int) -> list[dict[str, Any]]:
        """Return the rows of a step with the answers it learns from."""
        who = self.writer(step, roles.seed)
        if who == "rows" or not rows:
            return rows
        prompts = [row["ids"][: _prompt(row)] for row in rows]
        sampling = Sampling(
            self.max_new_tokens, self.sample_temperature, batch=self.generation_batch, seed=roles.seed, stop=tuple(self.stop)
        )
        keys = [f"{step}/{row['row']}" for row in rows]
        if who == "student":
            answers = generate(roles.model, roles.tokenizer, prompts, sampling, keys=keys)
        else:
            teacher = self.teacher_of(roles)
            assert isinstance(teacher, Teacher), "the check refuses a server"
            answers = generate(teacher.model, teacher.tokenizer, prompts, sampling, keys=keys)
        self._show(prompts, answers, answer_ends(roles.model, roles.tokenizer, sampling), roles)
        return [
            {**row, "ids": [*prompt, *answer], "trained": [0] * len(prompt) + [1] * len(answer)}
            for row, prompt, answer in zip(rows, prompts, answers, strict=True)
        ]

    def _show(self, prompts: list[list[int]], answers: list[list[int]], ends: AnswerEnds, roles: Roles) -> None:
        if roles.events is None:
            return
        for prompt, answer in list(zip(prompts, answers, strict=True))[: self.show]:
            texts = decode_ids(roles.tokenizer, prompt), ends.text(answer)
            roles.events.sample(step=roles.events.last_step, prompt=texts[0], answer=texts[1])

    def state(self) -> dict[str, Any]:
        """Return how many steps have had their answers."""
        return {"step": self.live.get("step", 0)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on with the next step."""
        self.live["step"] = stored_count(state["step"], "step")


def _prompt(row: dict[str, Any]) -> int:
    """Return how many tokens precede a row's first target."""
    return row["trained"].index(1) if 1 in row["trained"] else len(row["trained"])
