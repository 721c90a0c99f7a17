"""`chat` at a terminal: commands, turns of several lines, and answers that arrive in pieces."""

from __future__ import annotations

from typing import Any

import pytest

from llmrecipe.cli.app import run_command as command
from llmrecipe.cli.conversation import COMMANDS, converse
from llmrecipe.engine.sampling import Sampling
from llmrecipe.evaluation.chat import Chat

QUESTION = "What is the hen like?"


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Give these lines to whatever asks, then the end of input."""
    waiting = list(lines)

    def ask(*_: object, **__: object) -> str:
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    monkeypatch.setattr("rich.prompt.Prompt.ask", ask)


@pytest.fixture(scope="module")
def tiny() -> Chat:
    return Chat.open(["tiny"], [], Sampling(max_new_tokens=12))


@pytest.fixture
def chat(tiny: Chat) -> Chat:
    """A conversation without turns."""
    return Chat(tiny.loaded, tiny.adapters, Sampling(max_new_tokens=12))


def test_pieces_of_an_answer_are_the_answer_that_a_prompt_gets(chat: Chat) -> None:
    pieces: list[str] = []
    answer = chat.streamed(QUESTION, pieces.append)
    assert len(pieces) > 1 and "".join(pieces) == answer == chat.answers([QUESTION])[0]["answer"]
    assert chat.turns == [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}]


def test_a_conversation_through_the_verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    typed(monkeypatch, QUESTION, "/quit", "never read")
    assert command(["chat", "tiny", "--max-new-tokens", "12"]) == 0
    shown = capsys.readouterr().out
    assert command(["chat", "tiny", "--max-new-tokens", "12", "--prompt", QUESTION]) == 0
    assert capsys.readouterr().out.strip() in shown


def test_commands(chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    typed(monkeypatch, "/help", "/system Be kind.", "/regenerate", "One line \\", "and another", "/sistem", "/use b")
    converse(chat)
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
    assert "nothing has been answered yet" in shown and "did you mean '/system'" in shown
    assert "there is one model here" in shown
    assert chat.system == "Be kind." and chat.turns[0]["content"] == "One line \nand another"
    typed(monkeypatch, "/system", "/new")
    converse(chat)
    assert chat.system is None and chat.turns == []


def test_regenerate_draws_another_answer_to_the_same_turn(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    chat.sampling = Sampling(max_new_tokens=12, temperature=2.0, seed=0)
    typed(monkeypatch, QUESTION)
    converse(chat)
    first = chat.turns
    typed(monkeypatch, "/regenerate")
    converse(chat)
    assert len(chat.turns) == 2 and chat.turns[0] == first[0] and chat.turns[1] != first[1]


def test_ctrl_c_ends_an_answer_and_not_the_conversation(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> str:
        raise KeyboardInterrupt

    typed(monkeypatch, QUESTION, "/system Go on.")
    monkeypatch.setattr(chat, "streamed", stopped)
    converse(chat)
    assert chat.turns == [] and chat.system == "Go on."
