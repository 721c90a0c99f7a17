"""The command line: one file of this folder is one verb.

A module with a function `verb` is a verb named after the file (a trailing underscore is dropped: `list_.py` is
`list`); its docstring is the help text and `PANEL` the group it is listed under. Modules import nothing heavy at
the top, so `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

import typer

from llmrecipe.cli.completion import answering_bash
from llmrecipe.core.errors import Interrupted, LlmRecipeError, UserError
from llmrecipe.core.foreign import as_user_error
from llmrecipe.core.lazy import load_module
from llmrecipe.core.printable import message_text
from llmrecipe.core.redact import redact_text
from llmrecipe.core.steady_output import let_go, open_streams, steady_output
from llmrecipe.core.verbosity import for_one_command

PANELS = ("Train", "Look", "Use", "Tools")
WORK = ("train", "launch", "search", "step", "generate", "label", "export", "push", "new", "migrate")
"""Verbs whose result is in files: it stands, whether or not the screen could be written."""
PRINTED = {"launch": "--to"}
"""Of these the option with which they print their result."""
REPORT = (
    "Please report it where you got llmrecipe from, with that file (read it first: it holds your command and paths; the values "
    "of secrets are left out)."
)


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
    arguments = sys.argv[1:] if arguments is None else arguments
    open_streams()
    with answering_bash():
        code = run_command(arguments)
    refused = let_go(sys.stdout)
    if refused is not None and refused.errno != errno.EPIPE and not _works(arguments):
        code = code or _unwritten(refused)
    let_go(sys.stderr)
    sys.exit(code)


def _works(arguments: list[str]) -> bool:
    if not arguments or arguments[0] not in WORK:
        return False
    option = PRINTED.get(arguments[0])
    return option is None or not any(word.partition("=")[0] == option for word in arguments)


def _unwritten(error: OSError) -> int:
    """Report that standard output could not be written; return the exit code."""
    complain(f"the output cannot be written: {error.strerror or error}")
    return UserError.exit_code


def run_command(arguments: list[str]) -> int:
    """Run the command line and return the exit code instead of exiting."""
    with for_one_command():
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    try:
        with steady_output() if _works(arguments) else contextlib.nullcontext():
            result = build_app()(args=arguments, standalone_mode=False, prog_name="llmrecipe")
        return result if isinstance(result, int) else 0
    except UserError as error:
        # All processes of one run hit the same user error, and one of them reports it; or one hits it alone.
        if error.process or os.environ.get("RANK", "0") == "0":
            complain(f"{error.process}: {error}" if error.process else str(error))
        return error.exit_code
    except Interrupted as error:
        if os.environ.get("RANK", "0") == "0":
            _say(str(error) or "interrupted")
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _say("interrupted")
        return Interrupted.exit_code
    except SystemExit as leaving:
        if not isinstance(leaving.__context__, BrokenPipeError):
            raise
        # The reader of a pipe has left (`llmrecipe list | head`); nothing is wrong, and nothing more can be written.
        return 0
    except Exception as error:
        return _other(error, arguments)
    except BaseException as error:
        panicked = as_user_error(error)
        if panicked is None:
            raise
        complain(str(panicked))
        return panicked.exit_code


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(message_text(redact_text(line)), file=sys.stderr)


def _other(error: Exception, arguments: list[str]) -> int:
    """Report usage errors of the command line itself, and bugs; return the exit code."""
    show = getattr(error, "format_message", None)
    if callable(show):
        context = getattr(error, "ctx", None)
        where = getattr(context, "command_path", "llmrecipe")
        hint = ""
        if name := str(getattr(error, "option_name", "") or ""):
            from llmrecipe.recipe.key_hints import flag_as_word

            hint = flag_as_word(name)
        if hint:
            error.possibilities = None  # type: ignore[attr-defined]  # an option that is only like it
        complain(f"{show()}{hint}\nTry '{where} --help' for help.")
        return UserError.exit_code
    code = getattr(error, "exit_code", None)
    if isinstance(code, int) and not isinstance(error, LlmRecipeError):
        return code
    reported = as_user_error(error)
    if reported is not None:
        complain(str(reported))
        return reported.exit_code
    if isinstance(error, OSError):
        # Files are named in an error; a stream is not.
        return 0 if error.errno == errno.EPIPE else _unwritten(error)
    path = _save_traceback(error, arguments)
    saved = f"\nThe traceback is in {path}\n{REPORT}" if path else "\n" + "".join(traceback.format_exception(error))
    complain(f"This is a bug of llmrecipe, not of your input: {type(error).__name__}: {error}{saved}", title="Bug")
    return LlmRecipeError.exit_code


def _save_traceback(error: Exception, arguments: list[str]) -> Path | None:
    path = Path(tempfile.gettempdir()) / f"llmrecipe-bug-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6:06d}.txt"
    text = f"llmrecipe {' '.join(arguments)}\n\n{''.join(traceback.format_exception(error))}"
    try:
        # Readable for its owner alone, and never through a link that somebody else has put there.
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(redact_text(text))
    except OSError:
        return None
    return path


def complain(message: str, title: str = "Error") -> None:
    """Print one message on stderr, without secrets and printable: a panel on a terminal, plain lines in a pipe."""
    with contextlib.suppress(OSError, ValueError):
        _complain(message_text(redact_text(message)), title)


def _complain(message: str, title: str) -> None:
    if not sys.stderr.isatty():
        print(f"{title}: {message}", file=sys.stderr)
        return
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    Console(stderr=True).print(Panel(Text(message), title=title, title_align="left", border_style="red"))
