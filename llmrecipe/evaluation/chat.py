"""A conversation with a run or a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmrecipe.evaluation.generation import Sampling, generate, text_of
from llmrecipe.evaluation.standalone import Subject, open_subject


def prompt_ids(tokenizer: Any, turns: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation up to the next answer; plain text where the tokenizer has no template."""
    if not tokenizer.chat_template:
        return list(tokenizer("\n".join(t["content"] for t in turns))["input_ids"])
    text = tokenizer.apply_chat_template([dict(t) for t in turns], tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass
class Chat:
    """The turns so far, and the model that answers them with the template it was trained under."""

    subject: Subject
    sampling: Sampling
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def open(cls, path: str, overrides: list[str], sampling: Sampling, system: str | None = None) -> Chat:
        """Open a run directory or a model."""
        return cls(open_subject(path, overrides), sampling, system)

    def prompt_ids(self, turns: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation up to the answer, the system message in front."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return prompt_ids(self.subject.opened.tokenizer, [*system, *turns])

    def answer(self, text: str, remember: bool = True) -> str:
        """The model's answer to one more user turn."""
        turns = [*self.turns, {"role": "user", "content": text}]
        new = generate(self.subject.roles.model, self.subject.opened.tokenizer, [self.prompt_ids(turns)], self.sampling)[0]
        answer = text_of(self.subject.opened.tokenizer, new)
        if remember:
            self.turns = [*turns, {"role": "assistant", "content": answer}]
        return answer

    def interactive(self) -> None:
        """Read turns from the terminal until the end of input; `/new` starts over, `/quit` leaves."""
        from rich.console import Console
        from rich.prompt import Prompt

        console = Console()
        console.print("[dim]/new starts over, /quit leaves[/dim]")
        while True:
            try:
                text = Prompt.ask("[bold]you[/bold]", console=console).strip()
            except (EOFError, KeyboardInterrupt):
                console.print()
                return
            if text == "/quit":
                return
            if text == "/new":
                self.turns = []
            elif text:
                console.print(self.answer(text), markup=False, style="cyan")
