"""The processes of a pipeline's stages: how one is started, what it may use of the machine, and signals for all of them."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llmrecipe.core.console import say
from llmrecipe.recipe.pipeline_plan import Planned
from llmrecipe.recipe.rights import words_of
from llmrecipe.recipe.step_spec import StepComposition

_screen = threading.Lock()


@dataclass
class Child:
    """One stage that is running."""

    environment: dict[str, str] = field(default_factory=dict)
    """What it is told of the machine, on top of this process's environment."""
    slots: tuple[int, ...] = (0,)
    """Its places among the stages that run at once."""
    process: subprocess.Popen[str] | None = None
    signal: int | None = None

    def send(self, number: int) -> None:
        """Ask it to stop, also where its process is only being started."""
        self.signal = number
        if self.process is not None:
            self.process.send_signal(number)


@dataclass
class Children:
    """The stages that are running at once."""

    machine: Machine
    running: dict[str, Child] = field(default_factory=dict)
    signal: int | None = None
    """The signal that asked the pipeline to stop."""

    def forward(self, number: int, frame: Any) -> None:
        """Pass a signal on; a second Ctrl-C makes the stages stop at once, as it does in a run of its own."""
        self.signal = number
        self._send(number)

    def stop(self) -> None:
        """Ask every running stage to write a checkpoint and end, unless a signal has done so already."""
        if self.signal is None:
            self._send(signal.SIGTERM)

    def _send(self, number: int) -> None:
        for child in list(self.running.values()):
            child.send(number)

    def place(self, planned: Planned) -> Child | None:
        """A place for one more stage; None where it has to wait for others to end."""
        taken = {slot for child in self.running.values() for slot in child.slots}
        free = [slot for slot in range(self.machine.slots) if slot not in taken]
        wanted = self.machine.needed(processes_of(planned))
        if len(free) < wanted:
            return None
        slots = tuple(free[:wanted])
        return Child(self.machine.environment(slots), slots)


@dataclass(frozen=True)
class Machine:
    """What stages that run at once share.

    Each of the places has its own GPUs where there are enough of them (`devices`), and its share of the cores: a stage alone
    uses the machine as a training of its own does.
    """

    slots: int
    devices: tuple[str, ...]
    cores: int

    @classmethod
    def here(cls, slots: int) -> Machine:
        """This machine with so many places."""
        import torch

        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        count = torch.cuda.device_count()
        devices = tuple(named.split(","))[:count] if named else tuple(map(str, range(count)))
        return cls(slots, devices, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)

    def devices_of(self, slot: int) -> tuple[str, ...]:
        """GPUs of one place; with fewer GPUs than places several places share one."""
        if len(self.devices) < self.slots:
            return self.devices[slot % len(self.devices) :][:1] if self.devices else ()
        size = len(self.devices) // self.slots
        return self.devices[slot * size : (slot + 1) * size]

    def needed(self, processes: int) -> int:
        """Places that a stage of several processes takes."""
        size = max(1, len(self.devices) // self.slots)
        return min(self.slots, -(-processes // size))

    def environment(self, slots: tuple[int, ...]) -> dict[str, str]:
        """Variables that keep a stage to its places."""
        if self.slots == 1:
            return {}
        threads = max(1, self.cores * len(slots) // self.slots)
        asked = os.environ.get("OMP_NUM_THREADS", "")
        found = {"OMP_NUM_THREADS": str(min(threads, int(asked)) if asked.isdigit() else threads)}
        devices = [d for slot in slots for d in self.devices_of(slot)]
        return {**found, "CUDA_VISIBLE_DEVICES": ",".join(dict.fromkeys(devices))} if devices else found


def processes_of(planned: Planned) -> int:
    """Processes a stage is launched on."""
    composition = planned.composition
    return 1 if isinstance(composition, StepComposition) else composition.recipe.runtime.processes


def command_of(planned: Planned, continued: bool) -> list[str]:
    """The words after `llmrecipe` that run a stage."""
    fresh = [*planned.words, f"run.dir={planned.dir}"]
    if isinstance(planned.composition, StepComposition):
        # A step is continued by its own words: it knows from its journals what it has done.
        return ["step", planned.composition.kind, *fresh, "log.live=off"]
    # What is resumed gives no rights: those of the stage are given again.
    again = [f"resume={planned.dir}", *words_of(planned.composition.recipe.model)]
    what = again if continued else [f"recipe={planned.stage.what}", *fresh]
    processes = processes_of(planned)
    verb = ["train"] if processes == 1 else ["launch", "--nproc", str(processes)]
    return [*verb, *what, "log.live=off"]


def execute(child: Child, planned: Planned, continued: bool, enough: Callable[[], bool] | None = None) -> int:
    """Start a stage's process, show its lines, wait for its end; returns its exit code.

    Args:
        enough: asked at each line; True asks the stage to write a checkpoint and end.
    """
    words = command_of(planned, continued)
    say_of(planned.name, shlex.join(["llmrecipe", *words]))
    process = child.process = subprocess.Popen(
        # -P: nothing is imported from the working folder.
        [sys.executable, "-P", "-m", "llmrecipe", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1", **child.environment},
        # A terminal sends Ctrl-C to a whole group. In a session of its own the stage gets it once, from here.
        start_new_session=True,
    )
    try:
        if child.signal is not None:  # it came while the process was being started
            process.send_signal(child.signal)
        assert process.stdout is not None
        for line in process.stdout:
            say_of(planned.name, line.rstrip("\n"))
            if enough is not None and child.signal is None and enough():
                child.send(signal.SIGTERM)
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def say_of(stage: str, line: str) -> None:
    """Print one line of a stage; lines of stages that run at once never mix."""
    with _screen:
        say(f"[{stage}] {line}")
