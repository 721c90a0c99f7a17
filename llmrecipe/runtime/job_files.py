"""Job files of the engines that start a training on other machines: an sbatch script, a SkyPilot task, a Kubernetes JobSet.

Each is one template (`assets/launch`) filled for one job. The command in it starts the run or continues it from its newest
checkpoint, so an engine that starts it again after a preemption needs nothing else. Secrets are named and never written: the
engine's own means hand their values over.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from string import Template
from typing import Any

import yaml

from llmrecipe.core.errors import UserError, did_you_mean
from llmrecipe.core.paths import ASSETS
from llmrecipe.core.redact import redact_text
from llmrecipe.runtime.distributed_launch import PORT

NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
"""A job's name: what a host name may be, short enough for the names Kubernetes makes of it."""
VARIABLE = re.compile(r"[A-Za-z_]\w*")
PLAIN = re.compile(r"[\w.,:;=/@%+()~^*!&|\[\]-]*")
"""A value that stands in a line of sbatch's options, which no shell reads."""


@dataclass(frozen=True)
class Job:
    """One training on the machines of an engine."""

    name: str
    words: tuple[str, ...]
    """The recipe and its overrides, without `run.dir` and `resume`."""
    nodes: int
    nproc: int
    """Processes on each machine."""
    gpus: int = 0
    """GPUs of each machine."""
    gpu: str | None = None
    """Their type, where the engine needs it."""
    cpus: int | None = None
    image: str | None = None
    variables: tuple[str, ...] = ()
    """Names of environment variables whose values the job gets without their being in the file."""
    workdir: str | None = None
    checkpoints: str | None = None
    """Folder that outlives the job, as the job sees it; the run directory is a folder of the job's name in it."""
    volume: str | None = None
    """What is mounted there: a persistent volume claim, a bucket or a volume of SkyPilot."""
    restarts: int = 3
    """How often a job that was stopped is started again."""
    setup: str | None = None
    """Shell command before the training."""
    options: dict[str, str] = field(default_factory=dict)
    """The engine's own options."""

    def command(self, engine: str, folder: str) -> list[str]:
        """Return the command that starts the run, or continues it, on one machine.

        Args:
            folder: the checkpoint folder.
        """
        place = [f"run.dir={PurePosixPath(folder) / self.name}", "resume=auto"]
        return ["llmrecipe", "launch", *self.words, *place, "--nproc", str(self.nproc), "--rendezvous", engine]


@dataclass(frozen=True)
class JobEngine:
    """An engine that jobs are written for."""

    write: Callable[[Job], str]
    suffix: str
    client: tuple[str, ...]
    """Its command that takes a file."""
    options: tuple[str, ...]
    """Options that a user may give; none listed: any that its template does not give."""

    def submit(self, job: Job, path: str) -> list[str]:
        """Return the command that hands a file to the engine's client."""
        secrets = [w for name in job.variables for w in ("--secret", name)] if self.client[0] == "sky" else []
        return [*self.client, *secrets, path]


def write_job(engine: str, job: Job) -> str:
    """Return the job file of a training.

    Raises:
        UserError: there is no such engine, the job lacks what the engine needs or has what it cannot do, or a secret would be
            written.
    """
    if engine not in ENGINES:
        raise UserError(f"--to: must be one of {', '.join(ENGINES)}; got '{engine}'{did_you_mean(engine, ENGINES)}")
    _check(engine, job)
    text = ENGINES[engine].write(job)
    if redact_text(text) != text:
        raise UserError(
            f"--to {engine}: the value of a secret would be written into the job file; name its variable instead, with --env "
            "NAME and in the recipe ${oc.env:NAME}"
        )
    return text


def _check(engine: str, job: Job) -> None:
    if NAME.fullmatch(job.name) is None:
        raise UserError(
            f"--name: '{job.name}' cannot name a job: it has at most 40 small letters, digits and dashes, begins with a letter "
            "and does not end with a dash"
        )
    for name in job.variables:
        if VARIABLE.fullmatch(name) is None:
            raise UserError(
                f"--env: must be the name of a variable; its value is never written and is set where the job is submitted; "
                f"got '{redact_text(name)}'"
            )
    known = ENGINES[engine].options
    for key, value in job.options.items():
        if known and key not in known:
            raise UserError(f"--set {key}: of {engine} may be set: {', '.join(known)}{did_you_mean(key, known)}")
        if known and not value:
            raise UserError(f"--set {key}: must be {key}=VALUE")
    if job.gpus and job.nproc != job.gpus:
        raise UserError(
            f"--nproc {job.nproc}: each GPU has one process, and --gpus gives {job.gpus} to each machine; leave one out"
        )


# --- Slurm --------------------------------------------------------------------------------------------------------


class _Script(Template):
    """A shell script with `%%{name}` where a value goes, so that the shell's own `$` needs no escape."""

    delimiter = "%%"


def _slurm(job: Job) -> str:
    if job.volume is not None:
        raise UserError("--volume: Slurm mounts nothing; --checkpoints names a folder on a file system that all machines share")
    command = job.command("slurm", job.checkpoints or "runs")
    values = {
        "name": job.name,
        "nodes": job.nodes,
        "options": "\n".join(_sbatch_options(job)),
        "variables": "\n".join([f': "${{{name}:?is not set where the job is submitted}}"' for name in job.variables]),
        "setup": "\n".join([*([f"cd -- {shlex.quote(job.workdir)} || exit 2"] if job.workdir else []), *_lines(job.setup)]),
        "step": " ".join(_step_options(job)),
        "command": shlex.join(command),
        "restarts": job.restarts,
    }
    text = _Script((ASSETS / "launch" / "slurm.sh").read_text(encoding="utf-8")).substitute(values)
    # A value that is not given leaves no blank of its own.
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" +\\\n", r" \\\n", text))


def _lines(text: str | None) -> list[str]:
    return [] if text is None else [text]


def _sbatch_options(job: Job) -> list[str]:
    """Return the `#SBATCH` lines that only some jobs have; the template has the rest."""
    found = {}
    if job.gpus:
        found["gpus-per-node"] = f"{job.gpu}:{job.gpus}" if job.gpu else str(job.gpus)
    if job.cpus is not None:
        found["cpus-per-task"] = str(job.cpus)
    own = ("job-name", "nodes", "ntasks-per-node", "output", "open-mode", "requeue", "signal", *found)
    for key, value in job.options.items():
        if re.fullmatch(r"[a-z][a-z0-9-]+", key) is None or PLAIN.fullmatch(value) is None:
            raise UserError(f"--set {key}={value}: must be a long option of sbatch and a value without blanks and quotes")
        if key in own:
            raise UserError(f"--set {key}: the job file gives --{key} already; use the option of `llmrecipe launch`")
        found[key] = value
    if any(PLAIN.fullmatch(value) is None for value in found.values()):
        raise UserError(f"--gpus: '{job.gpu}' cannot be the type of a GPU")
    return [f"#SBATCH --{key}={value}" if value else f"#SBATCH --{key}" for key, value in found.items()]


def _step_options(job: Job) -> list[str]:
    """Return the options of srun that only some jobs have. A step does not inherit the cores of its job."""
    cores = [f"--cpus-per-task={job.cpus}"] if job.cpus is not None else []
    if job.image is None:
        return cores
    mounts = ['"$PWD:$PWD"']
    if job.checkpoints is not None and job.checkpoints.startswith("/"):
        mounts.append(shlex.quote(f"{job.checkpoints}:{job.checkpoints}"))
    inside = [f"--container-image={shlex.quote(job.image)}", f"--container-mounts={','.join(mounts)}"]
    return [*cores, *inside, '--container-workdir="$PWD"']


# --- SkyPilot and Kubernetes ---------------------------------------------------------------------------------------


def _filled(name: str, values: dict[str, Any]) -> Any:  # noqa: ANN401 (whatever the template holds)
    """Return a YAML template with values in the place of its `$names`; what is None or empty is left out."""
    return _fill(yaml.safe_load((ASSETS / "launch" / name).read_text(encoding="utf-8")), values)


def _fill(tree: object, values: dict[str, Any]) -> Any:  # noqa: ANN401
    if isinstance(tree, dict):
        made = {key: _fill(value, values) for key, value in tree.items()}
        return {key: value for key, value in made.items() if value is not None and value != {} and value != []}
    if isinstance(tree, list):
        return [_fill(value, values) for value in tree]
    return values[tree[1:]] if isinstance(tree, str) and tree.startswith("$") else tree


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks."""


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _block)


def _yaml(tree: dict[str, Any]) -> str:
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)


def _need_volume(engine: str, job: Job, what: str) -> str:
    if job.volume is None:
        raise UserError(
            f"--volume: a machine of {engine} loses its own disk when it is stopped; name {what} for the checkpoints"
        )
    return job.volume


def _folder(job: Job) -> str:
    folder = job.checkpoints or "/checkpoints"
    if not folder.startswith("/") or folder == "/":
        raise UserError(f"--checkpoints: must be an absolute path, at which --volume is mounted; got '{folder}'")
    return folder


def _skypilot(job: Job) -> str:
    if job.gpus and job.gpu is None:
        raise UserError(f"--gpus {job.gpus}: SkyPilot needs the type of the GPUs: --gpus H100:{job.gpus}")
    volume, folder = _need_volume("SkyPilot", job, "a bucket (s3://NAME) or a volume of SkyPilot"), _folder(job)
    bucket = "://" in volume
    tree = _filled(
        "skypilot.yaml",
        {
            "name": job.name,
            "workdir": job.workdir or ".",
            "nodes": job.nodes,
            "accelerators": f"{job.gpu}:{job.gpus}" if job.gpus else None,
            "cpus": None if job.cpus is None else f"{job.cpus}+",
            "image": None if job.image is None else f"docker:{job.image}",
            "restarts": job.restarts,
            "mounts": {folder: {"source": volume, "mode": "MOUNT_CACHED"}} if bucket else None,
            "volumes": None if bucket else {folder: volume},
            # One without a value must be given where the task is submitted.
            "secrets": dict.fromkeys(job.variables),
            "setup": job.setup,
            "run": shlex.join(job.command("skypilot", folder)) + "\n",
        },
    )
    tree["resources"].update({key: _typed(value) for key, value in job.options.items()})
    return _yaml(tree)


def _typed(value: str) -> str | bool | int:
    """Return a value of the command line as YAML types it."""
    if value in ("true", "false"):
        return value == "true"
    return int(value) if value.isdecimal() else value


def _kubernetes(job: Job) -> str:
    if job.image is None:
        raise UserError("--image: Kubernetes needs an image in which llmrecipe is installed")
    if job.setup is not None:
        raise UserError("--setup: an image has everything a pod needs; build it with what the command would install")
    if job.gpu is not None:
        raise UserError(f"--gpus {job.gpu}:{job.gpus}: a pod requests a number of GPUs; use --gpus {job.gpus}")
    volume, folder, options = _need_volume("Kubernetes", job, "a persistent volume claim"), _folder(job), job.options
    cpus = str(job.cpus) if job.cpus is not None else None
    amounts = {"cpu": cpus, "memory": options.get("memory")}
    secret = options.get("secret", job.name)
    torchrun = {
        "PET_NNODES": str(job.nodes),
        "PET_MASTER_ADDR": f"{job.name}-node-0-0.{job.name}",
        "PET_MASTER_PORT": str(PORT),
    }
    tree = _filled(
        "kubernetes.yaml",
        {
            "name": job.name,
            "namespace": options.get("namespace"),
            "labels": {"kueue.x-k8s.io/queue-name": options["queue"]} if "queue" in options else None,
            "service_account": options.get("service_account"),
            "priority_class": options.get("priority_class"),
            "restarts": job.restarts,
            "nodes": job.nodes,
            "port": PORT,
            "image": job.image,
            "workdir": job.workdir,
            # Kubernetes replaces `$(NAME)` in a command, and reads `$$` as a dollar.
            "command": [word.replace("$", "$$") for word in job.command("kubernetes", folder)],
            "variables": [
                *({"name": name, "value": value} for name, value in torchrun.items()),
                *({"name": n, "valueFrom": {"secretKeyRef": {"name": secret, "key": n}}} for n in job.variables),
            ],
            "requests": {key: value for key, value in amounts.items() if value is not None},
            "limits": {options.get("gpu_resource", "nvidia.com/gpu"): str(job.gpus)} if job.gpus else None,
            "checkpoints": folder,
            "volume": volume,
        },
    )
    return _yaml(tree)


SKYPILOT = (
    "infra", "cloud", "region", "zone", "instance_type", "memory", "use_spot", "disk_size", "disk_tier", "network_tier",
    "max_hourly_cost",
)  # fmt: skip
KUBERNETES = ("namespace", "queue", "service_account", "priority_class", "memory", "gpu_resource", "secret")
ENGINES = {
    "slurm": JobEngine(_slurm, ".sbatch", ("sbatch",), ()),
    "skypilot": JobEngine(_skypilot, ".yaml", ("sky", "jobs", "launch", "--yes"), SKYPILOT),
    "kubernetes": JobEngine(_kubernetes, ".yaml", ("kubectl", "create", "-f"), KUBERNETES),
}
"""Engines that jobs are written for."""
