"""A conversation at the terminal: turns of one or several lines, commands that begin with `/`, answers as they are decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmrecipe.core.console import console
from llmrecipe.core.errors import UserError, did_you_mean
from llmrecipe.core.printable import message_text

if TYPE_CHECKING:
    from rich.console import Console

    from llmrecipe.evaluation.chat import Chat

COMMANDS = {
    "/help": "this list",
    "/new": "forget the turns so far",
    "/system TEXT": "set the system message; without a text, take it out",
    "/regenerate": "answer the last turn again",
    "/use NAME": "answer with another run or task",
    "/quit": "leave (also Ctrl-D)",
}
"""Command -> what it does."""
MORE = "\\"
"""End of a line that another line follows."""


def converse(chat: Chat) -> None:
    """Read turns until the end of input, and print each answer while it is decoded; Ctrl-C ends an answer, or leaves."""
    screen = console()
    screen.print(f"/help lists the commands; {MORE} at the end of a line continues it", style="dim")
    if chat.adapters is not None:
        screen.print(f"/use NAME switches: {', '.join(chat.adapters.choices)}; now {chat.used[0]}", style="dim")
    while (text := read_turn(screen)) is not None and text != "/quit":
        try:
            if text.startswith("/"):
                obey(chat, text, screen)
            elif text:
                print_answer(chat, text, screen)
        except UserError as error:
            screen.print(message_text(str(error)), style="red")


def read_turn(screen: Console) -> str | None:
    """Return what the user writes, its lines joined; None at the end of input."""
    from rich.prompt import Prompt

    lines = []
    try:
        lines.append(Prompt.ask("[bold]you[/bold]", console=screen))
        while lines[-1].endswith(MORE):
            lines[-1] = lines[-1].removesuffix(MORE)
            lines.append(Prompt.ask("[bold]...[/bold]", console=screen))
    except (EOFError, KeyboardInterrupt):
        screen.print()
        return None
    return "\n".join(lines).strip()


def obey(chat: Chat, text: str, screen: Console) -> None:
    """Do what a command says.

    Raises:
        UserError: there is no such command, or nothing that it could be done to.
    """
    name, _, rest = text.partition(" ")
    if name == "/help":
        for command, what in COMMANDS.items():
            screen.print(f"{command:14} {what}", style="dim")
    elif name == "/new":
        chat.turns = []
    elif name == "/system":
        chat.system = rest.strip() or None
    elif name == "/use":
        chat.use([rest.strip()])
    elif name == "/regenerate":
        if not chat.turns:
            raise UserError("/regenerate: nothing has been answered yet")
        if not chat.sampling.temperature:
            raise UserError("/regenerate: without a temperature the answer is the same: llmrecipe chat ... --temperature 1")
        last = chat.turns[-2]["content"]
        chat.turns, chat.attempt = chat.turns[:-2], chat.attempt + 1
        print_answer(chat, last, screen)
    else:
        known = [command.split()[0] for command in COMMANDS]
        raise UserError(f"{name}: there is no such command{did_you_mean(name, known)} (known: {', '.join(known)})")


def print_answer(chat: Chat, text: str, screen: Console) -> None:
    """Print the answer to a turn while it is decoded; one that Ctrl-C ends is forgotten."""
    try:
        chat.streamed(text, lambda piece: screen.print(piece, style="cyan", end="", soft_wrap=True))
        screen.print()
    except KeyboardInterrupt:
        screen.print("\n(stopped)", style="dim")
