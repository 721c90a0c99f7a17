"""Completion in real shells, on a terminal: what stands on the line after Tab was pressed."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 120.0
"""Longest wait; a machine that is busy takes seconds for one key."""
Press = Callable[[str], list[str]]
SHELLS = {
    "bash": (
        ["bash", "--norc", "--noprofile", "-i"],
        "bind 'set bell-style none'; eval \"$(_LLMRECIPE_COMPLETE=source_bash llmrecipe)\"",
    ),
    "zsh": (
        ["zsh", "-f", "-i"],
        'bindkey -e; unsetopt beep; autoload -Uz compinit; compinit -u -D; eval "$(_LLMRECIPE_COMPLETE=source_zsh llmrecipe)"',
    ),
    "fish": (
        ["fish", "--no-config", "-i"],
        "env _LLMRECIPE_COMPLETE=source_fish llmrecipe | source",
    ),
}
"""Shell -> how it is started without its owner's settings, and what gives it the completion."""


@pytest.fixture(scope="module", params=SHELLS)
def press(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Press]:
    """A function that types keys into a shell with the completion of the package, and returns the words of its line then."""
    name = request.param
    if shutil.which(name) is None:
        pytest.skip(f"there is no {name} here")
    command, setup = SHELLS[name]
    folder = tmp_path_factory.mktemp(name)
    for run in ("runs/one", "runs/old/two"):
        (folder / run).mkdir(parents=True)
        (folder / run / "status.json").write_text("{}")
    launcher = folder / "bin" / "llmrecipe"
    launcher.parent.mkdir()
    launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m llmrecipe "$@"\n')
    launcher.chmod(0o755)
    variables = {"PATH": f"{launcher.parent}:{os.environ['PATH']}", "TERM": "dumb", "PS1": "> ", "INPUTRC": "/dev/null"}
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        own = {**os.environ, **variables, "PYTHONPATH": str(ROOT), "HOME": str(folder), "XDG_DATA_HOME": str(folder)}
        os.execvpe(command[0], command, own)

    def wait_for(pattern: str) -> re.Match[str]:
        seen, end = "", time.monotonic() + SECONDS
        while (found := re.search(pattern, seen)) is None:
            assert time.monotonic() < end, f"{pattern} is not in {seen!r}"
            if select.select([terminal], [], [], 0.1)[0]:
                seen += os.read(terminal, 1 << 16).decode(errors="replace")
        return found

    def typed(keys: str) -> list[str]:
        # Ctrl-A goes to the start of the line: what was completed becomes the words that are printed.
        os.write(terminal, f"{keys}\x01printf '<%s>' \x05; echo \"=end\"=\n".encode())
        return re.findall(r"<([^<>]*)>", wait_for(r"((?:<[^<>]*>)+)=end=")[1])

    os.write(terminal, f'{setup}; echo "=rea""dy="\n'.encode())
    wait_for("=ready=")
    try:
        yield typed
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(terminal)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("llmrecipe tra\t", ["train"]),
        ("llmrecipe train recipe=dpo_lo\t", ["train", "recipe=dpo_lora"]),
        ("llmrecipe train data.max_le\t64", ["train", "data.max_length=64"]),
        ("llmrecipe train model.dtype=bf\t", ["train", "model.dtype=bfloat16"]),
        ("llmrecipe train resume=runs/on\t", ["train", "resume=runs/one"]),
        ("llmrecipe eval runs/ol\t", ["eval", "runs/old/two"]),
    ],
)
def test_tab(press: Press, keys: str, words: list[str]) -> None:
    assert press(keys) == ["llmrecipe", *words]
