"""The command line: one file of this folder is one verb.

A module with a function `verb` is a verb named after the file (a trailing underscore is dropped: `list_.py` is
`list`); its docstring is the help text and `PANEL` the group it is listed under. Modules import nothing heavy at
the top, so `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

import typer

from llmrecipe.core.errors import Interrupted, LlmRecipeError, UserError
from llmrecipe.core.lazy import load_module
from llmrecipe.core.redact import redact_text

PANELS = ("Train", "Look", "Use", "Tools")


def build_app() -> typer.Typer:
    """Build the application with every verb of this folder."""
    app = typer.Typer(
        name="llmrecipe",
        help="Train language models from recipes.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog="Overrides are plain words: llmrecipe train recipe=dpo_lora optim.lr=1e-4 stack=\\[nf4,lora]",
    )
    app.callback()(_root)
    modules = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if "\ndef verb(" in path.read_text(encoding="utf-8"):
            modules.append(load_module(f"llmrecipe.cli.{path.stem}"))
    for module in sorted(modules, key=lambda m: (PANELS.index(m.PANEL), getattr(m, "ORDER", 50))):
        app.command(module.__name__.rsplit(".", 1)[-1].rstrip("_"), rich_help_panel=module.PANEL)(module.verb)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        from llmrecipe import __version__

        print(f"llmrecipe {__version__}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version and exit."),
) -> None:
    """Train language models from recipes: a YAML in, a trained model out."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code: 0 done, 2 the user's input, 1 our bug, 130 interrupted."""
    sys.exit(run_command(sys.argv[1:] if arguments is None else arguments))


def run_command(arguments: list[str]) -> int:
    """Run the command line and return the exit code instead of exiting."""
    try:
        result = build_app()(args=arguments, standalone_mode=False, prog_name="llmrecipe")
        return result if isinstance(result, int) else 0
    except UserError as error:
        # All processes of one run hit the same user error; one of them reports it.
        if os.environ.get("RANK", "0") == "0":
            complain(str(error))
        return error.exit_code
    except Interrupted as error:
        if os.environ.get("RANK", "0") == "0":
            print(str(error) or "interrupted", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return Interrupted.exit_code
    except BrokenPipeError:
        # The reader of a pipe has left (`llmrecipe list | head`); nothing is wrong, and nothing more can be written.
        sys.stdout = None
        return 0
    except Exception as error:
        return _other(error, arguments)


def _other(error: Exception, arguments: list[str]) -> int:
    """Report usage errors of the command line itself, and bugs; return the exit code."""
    show = getattr(error, "format_message", None)
    if callable(show):
        context = getattr(error, "ctx", None)
        where = getattr(context, "command_path", "llmrecipe")
        complain(f"{show()}\nTry '{where} --help' for help.")
        return UserError.exit_code
    code = getattr(error, "exit_code", None)
    if isinstance(code, int) and not isinstance(error, LlmRecipeError):
        return code
    path = _save_traceback(error, arguments)
    saved = f"\nThe traceback is in {path}" if path else "\n" + "".join(traceback.format_exception(error))
    complain(f"This is a bug of llmrecipe, not of your input: {type(error).__name__}: {error}{saved}", title="Bug")
    return LlmRecipeError.exit_code


def _save_traceback(error: Exception, arguments: list[str]) -> Path | None:
    path = Path(tempfile.gettempdir()) / f"llmrecipe-bug-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6:06d}.txt"
    text = f"llmrecipe {' '.join(arguments)}\n\n{''.join(traceback.format_exception(error))}"
    try:
        path.touch(mode=0o600)
        path.write_text(redact_text(text), encoding="utf-8")
    except OSError:
        return None
    return path


def complain(message: str, title: str = "Error") -> None:
    """Print one message on stderr, without secrets: a panel on a terminal, plain lines in a pipe."""
    message = redact_text(message)
    if not sys.stderr.isatty():
        print(f"{title}: {message}", file=sys.stderr)
        return
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    Console(stderr=True).print(Panel(Text(message), title=title, title_align="left", border_style="red"))
