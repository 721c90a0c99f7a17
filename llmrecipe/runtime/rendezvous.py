"""Where the machines of one training find each other: from the variables of an engine that started them, or from a hostfile."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

from llmrecipe.core.errors import UserError, did_you_mean
from llmrecipe.runtime.distributed_launch import PORT, Cluster

Environment = Mapping[str, str]
BRACKETS = re.compile(r"\[(\d+)[^]]*\]")
"""Numbers of a Slurm node list, `[001-004,007]`; the first of them is kept."""
HOST = re.compile(r"(?P<host>[^\s#=]+)(\s+slots=(?P<slots>[1-9]\d*))?\s*(#.*)?")
"""One line of a hostfile."""


def cluster_of(engine: str, environment: Environment | None = None) -> Cluster:
    """Return the machines of a job from the variables its engine sets on each of them.

    Args:
        engine: one of `READERS`.
        environment: default: that of this process.

    Raises:
        UserError: there is no such engine, a variable is missing or wrong, or a machine has several launchers.
    """
    if engine not in READERS:
        raise UserError(f"--rendezvous: must be one of {', '.join(READERS)}; got '{engine}'{did_you_mean(engine, READERS)}")
    found = READERS[engine](os.environ if environment is None else environment)
    if not 0 <= found.node < found.nodes:
        raise UserError(f"--rendezvous {engine}: impossible: machine {found.node} of {found.nodes}")
    return found


def _slurm(environment: Environment) -> Cluster:
    """Read a Slurm job step: its first node is machine 0, and its port comes from the job's number."""
    local = _number(environment, "slurm", "SLURM_LOCALID", default=0)
    if local:
        raise UserError(
            f"--rendezvous slurm: SLURM_LOCALID={local}: several launchers run on one machine; start one on each with "
            "srun --ntasks-per-node=1, it starts the processes of the machine"
        )
    names = _text(environment, "slurm", "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    job = _number(environment, "slurm", "SLURM_JOB_ID", "SLURM_JOBID")
    return Cluster(
        _number(environment, "slurm", "SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES", "SLURM_NNODES"),
        _number(environment, "slurm", "SLURM_NODEID"),
        f"{first_node(names)}:{20000 + job % 10000}",
    )


def first_node(names: str) -> str:
    """Return the first node of a Slurm node list.

    Examples:
        >>> first_node("gpu[003-005,010],cpu1"), first_node("login"), first_node("rack[1-2]n[07,09]")
        ('gpu003', 'login', 'rack1n07')
    """
    return BRACKETS.sub(r"\1", names).partition(",")[0]


def _skypilot(environment: Environment) -> Cluster:
    """Read a SkyPilot task: the addresses of its nodes, one a line, the first of them machine 0."""
    addresses = _text(environment, "skypilot", "SKYPILOT_NODE_IPS").split()
    return Cluster(
        _number(environment, "skypilot", "SKYPILOT_NUM_NODES", default=len(addresses)),
        _number(environment, "skypilot", "SKYPILOT_NODE_RANK"),
        f"{_bracketed(addresses[0])}:{PORT}",
    )


def _kubernetes(environment: Environment) -> Cluster:
    """Read the variables of torchrun, as a TrainJob sets them; the index of an indexed Job numbers the machine otherwise."""
    host = _text(environment, "kubernetes", "PET_MASTER_ADDR")
    return Cluster(
        _number(environment, "kubernetes", "PET_NNODES"),
        _number(environment, "kubernetes", "PET_NODE_RANK", "JOB_COMPLETION_INDEX"),
        f"{_bracketed(host)}:{_number(environment, 'kubernetes', 'PET_MASTER_PORT', default=PORT)}",
    )


READERS: dict[str, Callable[[Environment], Cluster]] = {"slurm": _slurm, "skypilot": _skypilot, "kubernetes": _kubernetes}
"""Engine -> what reads its variables."""


def _text(environment: Environment, engine: str, *names: str) -> str:
    """Return the first variable that is set; the names are tried in order."""
    found = next((environment[name].strip() for name in names if environment.get(name, "").strip()), None)
    if found is None:
        raise UserError(f"--rendezvous {engine}: {' or '.join(names)} is not set; {engine} sets it where it starts a command")
    return found


def _number(environment: Environment, engine: str, *names: str, default: int | None = None) -> int:
    if default is not None and not any(environment.get(name, "").strip() for name in names):
        return default
    text = _text(environment, engine, *names)
    if not text.isdecimal():
        raise UserError(f"--rendezvous {engine}: {names[0]} must be a whole number; got '{text}'")
    return int(text)


def _bracketed(host: str) -> str:
    """Return a host as it stands before a port: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def read_hostfile(path: Path, node: int | None = None) -> tuple[Cluster, int | None]:
    """Return the machines of a hostfile and the number of processes on each of them, None where it names none.

    A line is `HOST` or `HOST slots=N`; the first is machine 0.

    Args:
        node: which machine this is; default: the one whose name or address is this machine's.

    Raises:
        UserError: the file cannot be read, is wrong, or names this machine not at all or twice.
    """
    hosts = _hosts(path)
    slots = set(hosts.values())
    if len(slots) > 1:
        raise UserError(
            f"--hostfile: {path}: every machine runs the same number of processes; give all of them the same slots="
        )
    names = list(hosts)
    if node is None:
        node = _own(names, path)
    return Cluster(len(names), node, f"{_bracketed(names[0])}:{PORT}"), slots.pop()


def _hosts(path: Path) -> dict[str, int | None]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hostfile: {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    hosts: dict[str, int | None] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = HOST.fullmatch(line.strip())
        if found is None:
            raise UserError(f"--hostfile: {path}:{number}: a line is HOST or HOST slots=N; got '{line.strip()}'")
        if found["host"] in hosts:
            raise UserError(f"--hostfile: {path}:{number}: {found['host']} is named twice")
        hosts[found["host"]] = int(found["slots"]) if found["slots"] else None
    if not hosts:
        raise UserError(f"--hostfile: {path} names no machine; a line is HOST or HOST slots=N")
    return hosts


def _own(names: list[str], path: Path) -> int:
    """Return which of some hosts is this machine."""
    here = {socket.gethostname(), socket.gethostname().partition(".")[0], socket.getfqdn(), *_addresses(socket.gethostname())}
    found = [i for i, name in enumerate(names) if name in here or here & _addresses(name)]
    if len(found) != 1:
        what = "none of them" if not found else f"{len(found)} of them"
        raise UserError(f"--hostfile: {path}: this machine is {socket.gethostname()}, and {what} is it; say which with --node")
    return found[0]


def _addresses(host: str) -> set[str]:
    try:
        return {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return set()
