"""Starting N processes of one command, through torch's elastic launcher used as a library.

Arguments travel as a list from this process to the workers', never through a shell, so spaces, quotes, `=` and newlines arrive
as they were given.
"""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmrecipe.core.errors import Interrupted, UserError

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

PORT = 29400
"""Port at which machine 0 listens, where nothing else names one; torchrun has the same."""


@dataclass(frozen=True)
class Cluster:
    """How many machines take part, and which one this is."""

    nodes: int = 1
    node: int = 0
    """This machine, from 0."""
    master: str = f"127.0.0.1:{PORT}"
    """HOST:PORT of machine 0; used when there are several."""

    def check(self, nproc: int) -> None:
        """Refuse numbers that make no sense.

        Raises:
            UserError: naming them.
        """
        if nproc < 1 or self.nodes < 1 or not 0 <= self.node < self.nodes:
            raise UserError(f"launch: impossible: {nproc} processes on machine {self.node} of {self.nodes}")
        host, _, port = self.master.rpartition(":")
        if self.nodes > 1 and not (host and port.isdecimal() and 0 < int(port) < 1 << 16):
            raise UserError(f"launch: --master: must be HOST:PORT, with a port from 1 to 65535; got '{self.master}'")


def launch(args: Sequence[str], nproc: int, cluster: Cluster = Cluster(), program: Sequence[str] | None = None) -> int:
    """Run a command on N processes and wait; return the exit code of the worker that failed first, or 0.

    Args:
        args: the command's arguments.
        nproc: processes on this machine.
        program: the program to run; default `python -m llmrecipe`.

    Raises:
        UserError: the machines could not connect to each other, the port is in use, or the numbers make no sense.
        Interrupted: a signal stopped the run; the workers were given time to write a checkpoint.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    config = launch_config(nproc, cluster)
    _share_cores(nproc)
    command = list(program or (sys.executable, "-P", "-m", "llmrecipe"))
    try:
        elastic_launch(config, command[0])(*command[1:], *args)
    except ChildFailedError as error:
        first = min(error.failures.values(), key=lambda f: f.timestamp)
        # A negative code is the signal that ended the worker: 128 + number, as shells say it.
        return 128 - first.exitcode if first.exitcode < 0 else first.exitcode
    except SignalException as error:
        raise Interrupted(f"stopped by {error.sigval.name}; the workers were signalled to write a checkpoint") from error
    except (RendezvousError, DistError) as error:
        ports = "--master HOST:PORT; PET_MASTER_PORT under --rendezvous kubernetes"
        raise no_meeting("launch", cluster.master, ports, error) from error
    return 0


def no_meeting(who: str, place: str, ports: str, error: Exception) -> UserError:
    """Return the error that says why processes could not meet.

    Args:
        who: what the message begins with.
        place: HOST:PORT at which one of them listens.
        ports: what names another port.
    """
    # The first line says what happened; torch may add its own frames.
    text = (str(error).splitlines() or [type(error).__name__])[0]
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        return UserError(
            f"{who}: {place} is in use by another program, perhaps a training that still runs there; end it, or give every "
            f"machine another port ({ports})"
        )
    return UserError(f"{who}: the processes could not connect to each other at {place}: {text}")


def launch_config(nproc: int, cluster: Cluster) -> LaunchConfig:
    """Return the settings of torch's launcher for one machine of a cluster: those that torchrun makes of its arguments.

    Raises:
        UserError: the numbers make no sense.
    """
    from torch.distributed.launcher.api import LaunchConfig

    cluster.check(nproc)
    one = cluster.nodes == 1
    return LaunchConfig(
        min_nodes=cluster.nodes,
        max_nodes=cluster.nodes,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex if one else "llmrecipe",
        # A free port where there is one machine; with several, machine 0 listens at the given one.
        rdzv_backend="c10d" if one else "static",
        rdzv_endpoint="localhost:0" if one else cluster.master,
        rdzv_configs={} if one else {"rank": cluster.node},
        local_addr="localhost" if one else None,
        max_restarts=0,
        shutdown_timeout=300,
    )


def _share_cores(nproc: int) -> None:
    """Give each worker its share of the cores this process may use: workers on the same cores would wait for each other."""
    if nproc > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc)))
