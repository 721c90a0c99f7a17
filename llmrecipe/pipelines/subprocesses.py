"""The processes of a pipeline's stages: starting them, their worker slots on the machine, and signals for all of them."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType

from llmrecipe.core.console import say_progress
from llmrecipe.core.printable import printable
from llmrecipe.core.verbosity import progress_stream
from llmrecipe.recipe.pipeline_plan import Planned
from llmrecipe.recipe.rights import rights_words
from llmrecipe.recipe.step_spec import StepComposition

_screen = threading.Lock()


@dataclass
class Child:
    """One running stage."""

    environment: dict[str, str] = field(default_factory=dict)
    """Child-process environment, added to this process's environment."""
    slots: tuple[int, ...] = (0,)
    """Its worker slots."""
    process: subprocess.Popen[str] | None = None
    signal: int | None = None

    def send(self, number: int) -> None:
        """Send it a signal, also while its process is being started."""
        self.signal = number
        if self.process is not None:
            self.process.send_signal(number)


@dataclass
class Children:
    """The stages that run at once."""

    machine: Machine
    running: dict[str, Child] = field(default_factory=dict)
    signal: int | None = None
    """The signal that stops the pipeline."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while slots are reserved by one of several threads that each run stages."""

    def forward(self, number: int, frame: FrameType | None) -> None:
        """Forward a signal to the stages; a second Ctrl-C stops them at once, as it does in a single run."""
        self.signal = number
        self._send(number)

    def stop(self) -> None:
        """Make every running stage write a checkpoint and end, unless a signal has done so already."""
        if self.signal is None:
            self._send(signal.SIGTERM)

    def _send(self, number: int) -> None:
        for child in list(self.running.values()):
            child.send(number)

    def place(self, planned: Planned) -> Child | None:
        """Reserve worker slots for one more stage; return None where it has to wait for others to end."""
        taken = {slot for child in self.running.values() for slot in child.slots}
        free = [slot for slot in range(self.machine.slots) if slot not in taken]
        wanted = self.machine.needed(processes_of(planned))
        if len(free) < wanted:
            return None
        slots = tuple(free[:wanted])
        return Child(self.machine.environment(slots), slots)


@dataclass(frozen=True)
class Machine:
    """The worker slots of a machine, shared by the stages that run at once.

    Each slot has its own GPUs where there are enough of them (`devices`), and its share of the cores: a stage that runs alone
    uses the machine as a single training does.
    """

    slots: int
    devices: tuple[str, ...]
    cores: int

    @classmethod
    def here(cls, slots: int) -> Machine:
        """Return this machine with a number of worker slots."""
        import torch

        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        count = torch.cuda.device_count()
        devices = tuple(named.split(","))[:count] if named else tuple(map(str, range(count)))
        return cls(slots, devices, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)

    def devices_of(self, slot: int) -> tuple[str, ...]:
        """Return the GPUs of one slot; with fewer GPUs than slots, several slots share one."""
        if len(self.devices) < self.slots:
            return self.devices[slot % len(self.devices) :][:1] if self.devices else ()
        size = len(self.devices) // self.slots
        return self.devices[slot * size : (slot + 1) * size]

    def needed(self, processes: int) -> int:
        """Return the number of slots that a stage of several processes takes."""
        size = max(1, len(self.devices) // self.slots)
        return min(self.slots, -(-processes // size))

    def environment(self, slots: tuple[int, ...]) -> dict[str, str]:
        """Return the environment variables that restrict a stage to its slots."""
        if self.slots == 1:
            return {}
        threads = max(1, self.cores * len(slots) // self.slots)
        requested = os.environ.get("OMP_NUM_THREADS", "")
        found = {"OMP_NUM_THREADS": str(min(threads, int(requested)) if requested.isdigit() else threads)}
        devices = [d for slot in slots for d in self.devices_of(slot)]
        return {**found, "CUDA_VISIBLE_DEVICES": ",".join(dict.fromkeys(devices))} if devices else found


def processes_of(planned: Planned) -> int:
    """Return the number of processes of a stage."""
    composition = planned.composition
    return 1 if isinstance(composition, StepComposition) else composition.recipe.runtime.processes


def command_of(planned: Planned, continued: bool) -> list[str]:
    """Return the arguments of `llmrecipe` that run a stage."""
    fresh = [*planned.words, f"run.dir={planned.dir}"]
    if isinstance(planned.composition, StepComposition):
        # A step is resumed by the same arguments: its journals hold what it has done.
        return ["step", planned.composition.kind, *fresh, "log.live=off"]
    # A resumed run grants no rights: those of the stage are given again.
    again = [f"resume={planned.dir}", *rights_words(planned.composition.recipe.model)]
    what = again if continued else [f"recipe={planned.stage.what}", *fresh]
    processes = processes_of(planned)
    verb = ["train"] if processes == 1 else ["launch", "--nproc", str(processes)]
    return [*verb, *what, "log.live=off"]


def execute(child: Child, planned: Planned, continued: bool, enough: Callable[[], bool] | None = None) -> int:
    """Start a stage's process, show its lines, wait for its end, and return its exit code.

    Args:
        enough: called at each line; True makes the stage write a checkpoint and end.
    """
    words = command_of(planned, continued)
    say_progress(f"[{planned.name}] {shlex.join(['llmrecipe', *words])}")
    process = child.process = subprocess.Popen(
        # -P: import nothing from the working folder.
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
    """Print one line of a stage, which itself leaves out what is not to be shown; lines of concurrent stages never mix."""
    with _screen:
        print(printable(f"[{stage}] {line}"), file=progress_stream() or sys.stderr, flush=True)
