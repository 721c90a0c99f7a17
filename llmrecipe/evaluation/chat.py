"""A conversation with a run or a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from llmrecipe.core.errors import UserError
from llmrecipe.core.forward_context import Context
from llmrecipe.data.tokenize.chat_templates import prompt_ids
from llmrecipe.engine.answer_ends import answer_ends
from llmrecipe.engine.generation import answered, generate
from llmrecipe.engine.sampling import Report, Sampling
from llmrecipe.evaluation.evaluate_model import open_subject
from llmrecipe.evaluation.open_several import REQUESTED, open_several
from llmrecipe.evaluation.serving.text_stream import TextStream, cleans_spaces
from llmrecipe.interop.multi_adapter import Adapters, task_adapters
from llmrecipe.runs.open_model import LoadedModel
from llmrecipe.runtime.processes import pick_device


@dataclass
class Chat:
    """The turns so far, and the model that answers them with the template it was trained under."""

    loaded: LoadedModel
    adapters: Adapters | None
    """Adapters to choose from: of several runs, or the tasks of one."""
    sampling: Sampling
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    used: list[str] = field(default_factory=list)
    """Adapters that answer; in a conversation the first."""
    attempt: int = 0
    """Names the random stream of the answers: another number draws others."""

    @classmethod
    def open(cls, paths: list[str], overrides: list[str], sampling: Sampling, system: str | None = None) -> Chat:
        """Open a run directory or a model, or several runs of one base.

        Raises:
            UserError: the runs do not stand on one base, or an override has no effect on them (see `several`).
        """
        if len(paths) == 1:
            loaded = open_subject(paths[0], overrides).loaded
            chat = cls(loaded, task_adapters(loaded), sampling, system)
        else:
            adapters, recipes = open_several(paths, overrides, REQUESTED)
            adapters.model.to(pick_device(recipes[0].recipe.runtime.device))
            chat = cls(adapters.loaded, adapters, sampling, system)
        chat.use([])
        return chat

    def use(self, names: list[str]) -> None:
        """Select the adapters that answer; no name selects all of them.

        Raises:
            UserError: there are no adapters to choose from, or none of that name.
        """
        if self.adapters is None:
            if names:
                raise UserError(f"'{names[0]}': there is one model here, nothing to choose from")
            return
        for name in names:
            self.adapters.choice(name)
        self.used = names or list(self.adapters.choices)

    def prompt_ids(self, turns: list[dict[str, str]]) -> list[int]:
        """Return the token ids of a conversation up to the answer, beginning with the system message."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return prompt_ids(self.loaded.tokenizer, [*system, *turns])

    def answers(self, prompts: list[str]) -> list[dict[str, str]]:
        """Answer every prompt with every adapter in use, in batches that mix them."""
        if not self.used:
            return [{"prompt": text, "answer": self.answer(text, remember=False)} for text in prompts]
        pairs = [(text, name) for text in prompts for name in self.used]
        ids = [self.prompt_ids([{"role": "user", "content": text}]) for text, _ in pairs]
        found = self._generated(ids, [name for _, name in pairs])
        return [{"prompt": t, "adapter": name, "answer": a} for (t, name), a in zip(pairs, found, strict=True)]

    def _generated(self, prompts: list[list[int]], names: list[str]) -> list[str]:
        if self.adapters is not None:
            new = self.adapters.generate(prompts, names, self.sampling)
        else:
            new = generate(self.loaded.model, self.loaded.tokenizer, prompts, self.sampling)
        ends = answer_ends(self.loaded.model, self.loaded.tokenizer, self.sampling)
        return [ends.text(ids) for ids in new]

    def decoded(
        self, prompt: list[int], name: str, sampling: Sampling, key: int, report: Report
    ) -> Iterator[tuple[int, list[int]]]:
        """Yield the tokens of the answer to one prompt under an adapter, as `engine.generation.answered`.

        Args:
            name: of the adapter; not read where there is one model.
            key: name of the answer's random stream.
            report: called with each new token.
        """
        context, tasks = Context(), None
        if self.adapters is not None:
            off, _, tasks = self.adapters.groups([name])[0]
            context = Context(off=off)
        return answered(self.loaded.model, self.loaded.tokenizer, [prompt], sampling, context, tasks, [key], report)

    def streamed(self, text: str, emit: Callable[[str], None]) -> str:
        """Return the model's answer to one more user turn, which is remembered; `emit` gets its text piece by piece."""
        tokenizer, ends = self.loaded.tokenizer, answer_ends(self.loaded.model, self.loaded.tokenizer, self.sampling)
        turns = [*self.turns, {"role": "user", "content": text}]
        stream = TextStream(
            lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
            self.sampling.stop,
            cleans_spaces(tokenizer),
            stripped=True,
        )

        def report(_: int, token: int) -> None:
            if token not in ends.tokens and (piece := stream.feed(token)):
                emit(piece)

        found = self.decoded(self.prompt_ids(turns), self.used[0] if self.used else "", self.sampling, self.attempt, report)
        answer = ends.text(next(found)[1])
        if piece := stream.close():
            emit(piece)
        self.turns = [*turns, {"role": "assistant", "content": answer}]
        return answer

    def answer(self, text: str, remember: bool = True) -> str:
        """Return the model's answer to one more user turn."""
        turns = [*self.turns, {"role": "user", "content": text}]
        answer = self._generated([self.prompt_ids(turns)], self.used[:1])[0]
        if remember:
            self.turns = [*turns, {"role": "assistant", "content": answer}]
        return answer
