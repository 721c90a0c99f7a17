"""The screen: what is shown cannot steer a terminal, and a screen that refuses cannot end the work."""

from __future__ import annotations

import ast
import contextlib
import errno
import io
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.core import file_lock
from llmrecipe.core.background import Background
from llmrecipe.core.console import console, lasting
from llmrecipe.core.errors import RunError
from llmrecipe.core.foreign import as_user_error, parse_json, read_json, reading
from llmrecipe.core.paths import PACKAGE
from llmrecipe.core.printable import LONGEST_LINE, UNPRINTABLE, message_text, printable
from llmrecipe.core.signals import handled_by
from llmrecipe.core.steady_output import Steady, steady_output

EVIL = "\x1b]0;title\x07\x1b[2J\x9b31m\r\b\u202egpj\ud800\x00"


def test_control_characters_are_escapes_and_text_stays() -> None:
    assert printable("a\tb\nc é 日本 🙂 ñ") == "a\tb\nc é 日本 🙂 ñ"
    assert printable("\x1b[1m\r\u202e\ud83d") == "\\x1b[1m\\r\\u202e\\ud83d"
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(chr(rng.choice([rng.randrange(256), rng.randrange(0x2000, 0x2100), 0xD800, 65])) for _ in range(20))
        assert not UNPRINTABLE.search(printable(text))
        printable(text).encode("utf-8")


def test_messages_are_shortened_line_by_line() -> None:
    text = message_text("x" * 10**6 + "\nthe remedy")
    assert len(text) < LONGEST_LINE + 50 and text.endswith("\nthe remedy") and "left out" in text
    assert len(message_text("row\n" * 10**5)) < 21_000


def test_tables_and_lines_show_data_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    table = Table("name", box=None)
    table.add_row(f"[/red]{EVIL}")
    out = console()
    out.print(table)
    out.print(f"[bold]{EVIL}[/bold] :smile:")
    shown = capsys.readouterr().out
    assert "[/red]" in shown and "[bold]" in shown and ":smile:" in shown
    assert not UNPRINTABLE.search(shown)


class Refusing(io.StringIO):
    """A stream that fails as a full disk, a closed pipe or a lost terminal does."""

    def __init__(self, error: Exception):
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error

    def isatty(self) -> bool:
        raise self.error


FAILURES = [OSError(errno.ENOSPC, "full"), BrokenPipeError(), OSError(errno.EIO, "gone"), ValueError("I/O on closed file")]


@pytest.mark.parametrize("error", FAILURES)
def test_work_goes_on_without_a_screen(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Refusing(error))
    monkeypatch.setattr(sys, "stderr", None)
    from llmrecipe.runs.progress_display import display

    with steady_output():
        screen = display("auto", 3)
        screen.show({"event": "step", "step": 1, "loss": 1.0})
        screen.close()
        print("still here", flush=True)
    assert isinstance(sys.stdout, Refusing)


def test_a_terminal_without_the_characters_gets_escapes() -> None:
    raw = io.BytesIO()
    stream = Steady(io.TextIOWrapper(raw, encoding="ascii"))
    stream.write("loss ▁▂ é\n")
    stream.flush()
    assert raw.getvalue() == b"loss \\u2581\\u2582 \\xe9\n"


def command(script: str, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """The command line in a shell whose streams are spoiled."""
    line = [sys.executable, "-P", "-m", "llmrecipe", *words]
    return subprocess.run(["bash", "-c", script, "bash", *line], text=True, stderr=subprocess.PIPE, timeout=120, **more)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        ('"$@" >/dev/full', 2, "Error: the output cannot be written: No space left on device\n"),
        ('"$@" >&-', 0, ""),
        ('"$@" | true; exit ${PIPESTATUS[0]}', 0, ""),
    ],
)
def test_a_verb_that_only_prints_says_when_it_cannot(script: str, code: int, said: str) -> None:
    done = command(script, "list", "schedule", "--json")
    assert (done.returncode, done.stderr) == (code, said)


def test_sighup_is_asked_for_and_nohup_is_obeyed() -> None:
    """Whatever this process itself was started under."""
    seen: list[int] = []
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with handled_by(lambda number, frame: seen.append(number)):
            signal.raise_signal(signal.SIGHUP)
        assert seen == [signal.SIGHUP]
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with handled_by(lambda number, frame: seen.append(-number)):
            signal.raise_signal(signal.SIGHUP)
        assert seen == [signal.SIGHUP]
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", sorted(file_lock.UNSUPPORTED))
def test_a_file_system_without_locks_is_no_other_process(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(handle: Any, how: int) -> None:
        raise OSError(number, "not supported")

    monkeypatch.setattr("fcntl.flock", flock)
    path = tmp_path / "new" / "lock"
    file_lock.hold(path, "busy").close()
    assert not file_lock.is_held(path)
    path.write_text(f"process {os.getppid()} since then\n")  # it lives
    assert file_lock.is_held(path)
    with pytest.raises(RunError, match=r"busy \(process \d+ since then\); wait"):
        file_lock.hold(path, "busy", "; wait")
    path.write_text("process 99999999999 since then\n")
    assert not file_lock.is_held(path)


def test_a_lock_that_fails_otherwise_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(handle: Any, how: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(RunError, match="cannot be locked: Input/output error"):
        file_lock.hold(tmp_path / "lock", "busy")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be locked for writing: Not a directory"):
        file_lock.hold(tmp_path / "file" / "in" / "lock", "busy")


BROKEN = [
    b"",
    b"{",
    b"\xff\xfe{}",
    b"[1]",
    b"null",
    b'{"a": ' + b"9" * 5000 + b"}",
    b"[" * 200 + b"]" * 200,
    b"[" * 10**6,
    b"\x00",
]


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
def test_a_damaged_json_file_is_one_message_with_its_place(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_bytes(content)
    with pytest.raises(RunError) as found:
        read_json(path, "run", "write it again")
    text = str(found.value)
    assert text.startswith(f"run: {path}: ") and text.endswith("; write it again") and len(text) < len(str(path)) + 400


def test_json_of_the_allowed_depth_is_read() -> None:
    assert parse_json("[" * 128 + "]" * 128) and parse_json('{"a": [1, {"b": []}]}') == {"a": [1, {"b": []}]}
    with pytest.raises(ValueError, match="deeper than 128"):
        parse_json("[" * 129 + "]" * 129)


def test_errors_of_other_libraries_get_a_place_and_keep_their_reason() -> None:
    for error, reason in [
        (KeyError("weight"), "'weight' is missing"),
        (RuntimeError(), "RuntimeError"),
        (OSError(2, "No"), "No"),
    ]:
        with pytest.raises(RunError, match=f"^here: {reason}; do this$"), reading("here", "do this"):
            raise error
    with pytest.raises(RunError, match=r"^mine$"), reading("here"):
        raise RunError("mine")
    assert "memory is not enough" in str(as_user_error(MemoryError()))
    for full in (
        "CUDA out of memory. Tried to allocate 2 GiB",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate",
    ):
        assert "memory is not enough" in str(as_user_error(RuntimeError(full)))
    assert str(as_user_error(PermissionError(13, "Permission denied", "/x"))) == "/x: Permission denied"
    assert as_user_error(ZeroDivisionError()) is None


def test_a_library_that_cannot_be_imported_is_named_by_its_first_cause() -> None:
    """A module of this package that is missing is a bug; one of a library is not, and lazy imports hide which."""
    try:
        try:
            raise ModuleNotFoundError("No module named 'resource'", name="resource")
        except ModuleNotFoundError as first:
            raise ModuleNotFoundError("Could not import module 'hub_kernels'.") from first
    except ModuleNotFoundError as error:
        said = str(as_user_error(error))
    assert "resource: No module named 'resource'" in said and "llmrecipe doctor" in said and "hub_kernels" not in said
    assert as_user_error(ModuleNotFoundError("No module named 'llmrecipe.x'", name="llmrecipe.x")) is None


def test_waiting_for_a_background_thread_is_said_on_stderr_and_only_where_it_lasts(capsys: pytest.CaptureFixture[str]) -> None:
    go_on = threading.Event()
    slow = Background(lambda: go_on.wait(10))
    threading.Timer(0.12, go_on.set).start()
    assert slow.value("hashing the weights", every=0.05) is True
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("hashing the weights: 0 s so far\n")
    assert Background(lambda: 3).value("hashing the weights") == 3 and capsys.readouterr().err == ""


def test_something_that_lasts_is_said_on_stderr_until_it_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [0]
    with lasting("scoring", lambda: f"{rows[0]} rows"):
        pass
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("llmrecipe.core.console.EVERY", 0.05)
    with contextlib.suppress(RunError), lasting("scoring", lambda: f"{rows[0]} rows"):
        rows[0] = 3
        time.sleep(0.12)
        raise RunError("it ended")
    shown = capsys.readouterr()
    assert shown.out == "" and set(shown.err.splitlines()) == {"scoring: 0 s so far, 3 rows"}
    time.sleep(0.1)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "1")
    with lasting("scoring"):
        time.sleep(0.12)
    assert capsys.readouterr().err == ""


def test_verbs_print_no_text_of_others_as_it_is() -> None:
    """Paths, notes and names go through `say`, which escapes what a terminal would obey."""
    raw = []
    for path in sorted((PACKAGE / "cli").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            if named and any(isinstance(part, ast.JoinedStr) for part in node.args) and path.stem != "app":
                raw += [f"{path.name}:{node.lineno}" for part in node.args if "message_text" not in ast.unparse(part)]
    assert not raw
