"""`eval`: evaluation of a model on a split, as a stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError, RunError
from llmrecipe.core.option_types import ClassVar, Field, Literal, PositiveInt, StopText
from llmrecipe.core.registry import register
from llmrecipe.objectives.reward_interface import Answer, Rewards
from llmrecipe.pipelines.step import Step
from llmrecipe.recipe.overrides import as_word
from llmrecipe.recipe.step_spec import unfinished

if TYPE_CHECKING:
    from llmrecipe.data.formats.prompts import Prompt
    from llmrecipe.evaluation.evaluate_model import Subject
    from llmrecipe.pipelines.steps.workspace import Work
    from llmrecipe.recipe.data_section import DataSection

PREFIX = {"validation": "eval"}
"""Split -> its prefix in the metrics of a training."""


@register
class Eval(Step):
    """Metrics of a model on a split, as `llmrecipe eval` computes them, under the names a training gives them (`eval/loss`).

    With `reward`, the mean of r(x, y) over greedy answers y to the split's prompts x: `eval/reward`, and each reward's own
    unweighted mean. By default a run is measured on the data of its own recipe; `data` names other rows.
    """

    needs: ClassVar[dict[str, str]] = {"model": "model", "data": "rows"}

    model: str
    """A run directory, a model folder, a hub name or `tiny`."""
    split: Literal["train", "validation", "test"] = "validation"
    """Rows that are measured."""
    data: str | None = None
    """Other rows than those of the model's recipe: the `data.path` of a recipe."""
    metrics: list[str] = Field(default_factory=list)
    """Metrics of generated answers (`llmrecipe list metric`) besides those of the objective."""
    reward: dict[str, Any] = Field(default_factory=dict)
    """Rewards of generated answers, written as `objective.reward` is: {rule: {}} or {NAME: {kind: ..., weight: 1.0}}."""
    limit: PositiveInt | None = None
    """Maximum number of prompts whose answers are rewarded, from the first."""
    max_new_tokens: PositiveInt = 64
    """Maximum number of tokens of a generated answer."""
    stop: list[StopText] = Field(default_factory=list)
    """Texts before which a generated answer ends."""
    batch: PositiveInt = 16
    """Answers generated at once."""
    words: list[str] = Field(default_factory=list)
    """Words for the model's own recipe, such as objective=sft, model.dtype=bfloat16 or eval.batches=4."""

    def check(self, where: str) -> None:
        """Refuse unknown metrics and rewards, and rows that no reward can score."""
        from llmrecipe.evaluation.evaluate_model import check_subject

        for name in self.metrics:
            registry.spec("metric", name, f"{where}.metrics")
        rewards = Rewards(self.reward, f"{where}.reward") if self.reward else None
        if unfinished(self.model):
            return
        composition = check_subject(self.model, self._words())
        if rewards is not None and not unfinished(self.data):
            rewards.check(sorted(self._prompts(composition.recipe.data, where, 1)[0].columns))
            self._prompts(composition.recipe.data, where, self.limit, rewards.needs())

    def run(self, work: Work) -> dict[str, Any]:
        """Evaluate the split, then generate answers and score them."""
        from llmrecipe.evaluation.evaluate_model import open_subject, score_subject

        subject = open_subject(self.model, self._words())
        measured = score_subject(subject, self.split)
        if self.reward:
            measured |= self._rewarded(work, subject)
        prefix = PREFIX.get(self.split, self.split)
        facts = {f"{prefix}/{name}": value for name, value in measured.items()}
        work.events.evaluation(0, **facts)
        return facts

    def _words(self) -> list[str]:
        """Return the overrides for the model's recipe."""
        own: dict[tuple[str, str], Any] = {("eval", "max_new_tokens"): self.max_new_tokens}
        if self.data is not None:
            # Rows of other files have other splits: those the recipe cut from its own do not count.
            own |= {("data", "path"): self.data, ("data", "validation"): None, ("data", "test"): None}
        if self.stop:
            own["eval", "stop"] = self.stop
        if self.metrics:
            own["eval", "metrics"] = self.metrics
        return [*(as_word(key, value) for key, value in own.items()), *self.words]

    def _prompts(self, data: DataSection, where: str, limit: int | None, needs: dict[str, str] | None = None) -> list[Prompt]:
        from llmrecipe.data.formats.prompts import read_prompts

        if data.path is None:
            raise RecipeError(f"{where}.data: must be given; the model's recipe names no rows")
        return read_prompts(data, self.split, limit, f"{where}.data", needs)

    def _rewarded(self, work: Work, subject: Subject) -> dict[str, float]:
        """Compute the mean rewards of greedy answers."""
        from llmrecipe.data.tokenize.chat_templates import prompt_ids
        from llmrecipe.engine.answer_ends import answer_ends
        from llmrecipe.engine.generation import answered, decode_ids
        from llmrecipe.engine.sampling import Sampling

        rewards = Rewards(self.reward, "reward")
        rewards.open(subject.roles)
        tokenizer, model = subject.loaded.tokenizer, subject.roles.model
        sampling = Sampling(self.max_new_tokens, batch=self.batch, stop=tuple(self.stop))
        ends = answer_ends(model, tokenizer, sampling)
        prompts = self._prompts(subject.composition.recipe.data, "eval", self.limit, rewards.needs())
        requested: list[dict[str, Any]] = [
            {"ids": prompt_ids(tokenizer, p.turns, p.tools, p.kwargs), "columns": p.columns} for p in prompts
        ]

        def answer(part: list[list[int]], keys: list[str]) -> Iterator[tuple[int, list[int]]]:
            return answered(model, tokenizer, part, sampling)

        def ask(part: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
            answers = []
            for r in part:
                texts = decode_ids(tokenizer, r["ids"]), ends.text(r["new"])
                answers.append(Answer(*texts, r["columns"], r["ids"], r["new"], ends.finished(r["new"])))
            total, own = rewards.score(answers)
            named = {f"reward/{name}": scores for name, scores in own.items()}
            return [
                {"answer": a.text, "reward": total[i], **{name: scores[i] for name, scores in named.items()}}
                for i, a in enumerate(answers)
            ]

        new = work.streamed([row["ids"] for row in requested], answer, batch=self.batch)
        requested = [{**row, "new": ids} for row, ids in zip(requested, new, strict=True)]
        values = work.each(requested, ask, batch=self.batch, name="rewards")
        for prompt, value in list(zip(prompts, values, strict=True))[:3]:
            work.events.sample(0, prompt.turns[-1]["content"], value["answer"], reward=value["reward"])
        if values and all(value["reward"] is None for value in values):
            raise RunError(f"reward: no reward has an opinion of any of the {len(values)} answers (all are None)")
        known = {name: [v[name] for v in values if v[name] is not None] for name in values[0] if name != "answer"}
        return {name: sum(scores) / len(scores) for name, scores in known.items() if scores}
