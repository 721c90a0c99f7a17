"""`llmrecipe launch`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmrecipe.cli.arguments import (
    AUTO,
    PROCESSES,
    ConfigDir,
    Json,
    Quiet,
    Verbose,
    VerbWords,
    Words,
    need_recipe,
    processes_word,
    sort_words,
)
from llmrecipe.core.errors import RecipeError

if TYPE_CHECKING:
    from llmrecipe.runtime.distributed_launch import Cluster

PANEL = "Train"
ORDER = 3

LOCAL, MANY, JOB = "Processes", "Several machines", "Job files"


def verb(
    words: Words = None,
    config_dir: ConfigDir = None,
    nproc: Annotated[
        int | None,
        typer.Option(
            "--nproc",
            "-n",
            min=1,
            rich_help_panel=LOCAL,
            help="Processes on each machine, one per GPU; default: slots of the hostfile, --gpus of a job, else 2.",
            show_default=False,
        ),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option("--nodes", min=1, rich_help_panel=MANY, help="Machines that train together.")
    ] = None,
    node: Annotated[
        int | None, typer.Option("--node", min=0, rich_help_panel=MANY, help="Which machine this is, from 0.")
    ] = None,
    master: Annotated[str | None, typer.Option("--master", rich_help_panel=MANY, help="HOST:PORT of machine 0.")] = None,
    hostfile: Annotated[
        Path | None,
        typer.Option(
            "--hostfile",
            rich_help_panel=MANY,
            help="The machines instead, a line `HOST` or `HOST slots=N` each; the same command "
            "is given on every one and finds itself in the file.",
        ),
    ] = None,
    rendezvous: Annotated[
        str | None,
        typer.Option(
            "--rendezvous",
            rich_help_panel=MANY,
            help="Read the machines from the variables of slurm, skypilot or kubernetes.",
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            rich_help_panel=JOB,
            help="Start nothing here: print the job file of slurm (sbatch), skypilot or kubernetes "
            "(JobSet), whose command starts the run or continues it from its newest checkpoint.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", rich_help_panel=JOB, help="Write the job file there.")] = None,
    submit: Annotated[
        bool,
        typer.Option("--submit", rich_help_panel=JOB, help="Write it, and hand it to sbatch, `sky jobs launch` or kubectl."),
    ] = False,
    name: Annotated[
        str | None, typer.Option("--name", rich_help_panel=JOB, help="Name of the job and of its run; default: the recipe's.")
    ] = None,
    gpus: Annotated[
        str | None, typer.Option("--gpus", rich_help_panel=JOB, help="GPUs of each machine: 8, or with their type H100:8.")
    ] = None,
    cpus: Annotated[
        int | None,
        typer.Option("--cpus", min=1, rich_help_panel=JOB, help="Cores of each machine; default: what the engine gives."),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option("--image", rich_help_panel=JOB, help="Container image (on Slurm through Pyxis); Kubernetes needs one."),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env",
            metavar="NAME",
            rich_help_panel=JOB,
            help="Variable the job gets, by name; its value is never written. Those the recipe names are added.",
        ),
    ] = None,
    workdir: Annotated[
        str | None,
        typer.Option(
            "--workdir",
            rich_help_panel=JOB,
            help="Working folder; default: where the job is submitted, on Kubernetes the image's.",
        ),
    ] = None,
    checkpoints: Annotated[
        str | None,
        typer.Option(
            "--checkpoints",
            rich_help_panel=JOB,
            help="Folder that outlives the job, as the job sees it; the run is in a folder "
            "of the job's name there. Default: runs on Slurm, else /checkpoints.",
        ),
    ] = None,
    volume: Annotated[
        str | None,
        typer.Option(
            "--volume",
            rich_help_panel=JOB,
            help="What is mounted there: a bucket (s3://NAME) or volume of SkyPilot, a persistent "
            "volume claim of Kubernetes (of several machines: ReadWriteMany).",
        ),
    ] = None,
    restarts: Annotated[
        int,
        typer.Option("--restarts", min=0, rich_help_panel=JOB, help="How often a job that was stopped is started again."),
    ] = 3,
    setup: Annotated[
        str | None,
        typer.Option(
            "--setup", rich_help_panel=JOB, help="Shell command before the training, such as `source venv/bin/activate`."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            rich_help_panel=JOB,
            help="An option of the engine: sbatch's (partition=gpu), of "
            "SkyPilot's resources (infra=aws), of Kubernetes namespace, queue, memory, secret, ...",
        ),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> int:
    """Train on several processes or machines, or write the job that does: the same recipe and overrides as `train`.

    With `resume=auto` the same command starts the run in `run.dir` and continues it, bit for bit, after a stop.
    """
    request = sort_words(words)
    job = {"name": name, "gpus": gpus, "cpus": cpus, "image": image, "env": env, "workdir": workdir, "checkpoints": checkpoints,
           "volume": volume, "setup": setup, "set": settings, "out": out, "submit": submit or None}  # fmt: skip
    if to is None:
        _refuse(job, "only a job file has it; add --to slurm, skypilot or kubernetes")
        cluster, slots = _cluster(nodes, node, master, hostfile, rendezvous)
        return _run(request, [*(["--json"] if as_json else []), *(words or [])], nproc or slots or PROCESSES, cluster)
    here = {"json": as_json or None, "node": node, "master": master, "hostfile": hostfile, "rendezvous": rendezvous}
    _refuse(here, "is for the machines themselves; a job file has what they need")
    from llmrecipe.cli.job import make_job

    return make_job(request, to, out, submit, {
        "name": name, "nproc": nproc, "nodes": nodes or 1, "gpus": gpus, "cpus": cpus, "image": image, "env": env or [],
        "workdir": workdir, "checkpoints": checkpoints, "volume": volume, "restarts": restarts, "setup": setup,
        "set": settings or [],
    })  # fmt: skip


def _refuse(given: Mapping[str, object], why: str) -> None:
    if wrong := [f"--{flag}" for flag, value in given.items() if value is not None]:
        raise RecipeError(f"launch: {', '.join(wrong)}: {why}")


def _cluster(
    nodes: int | None, node: int | None, master: str | None, hostfile: Path | None, rendezvous: str | None
) -> tuple[Cluster, int | None]:
    """Return the machines, and the number of processes of each where a hostfile names it."""
    from llmrecipe.runtime.distributed_launch import Cluster
    from llmrecipe.runtime.rendezvous import cluster_of, read_hostfile

    if rendezvous is not None:
        _refuse({"nodes": nodes, "node": node, "master": master, "hostfile": hostfile}, "--rendezvous reads it from variables")
        return cluster_of(rendezvous), None
    if hostfile is not None:
        _refuse({"nodes": nodes}, "--hostfile has the machines")
        cluster, slots = read_hostfile(hostfile, node)
        return (cluster if master is None else replace(cluster, master=master)), slots
    default = Cluster()
    return Cluster(nodes or default.nodes, node or default.node, master or default.master), None


def _run(request: VerbWords, words: list[str], nproc: int, cluster: Cluster) -> int:
    """Start the processes of this machine and wait for them."""
    processes = processes_word(request.overrides, nproc * cluster.nodes)
    if request.resume is None or request.resume == AUTO:
        from llmrecipe.cli.early_checks import begun, composed
        from llmrecipe.recipe.pipeline_plan import refuse_stages

        # A mistake in the recipe is reported once, here, and not by every worker.
        composition = composed(need_recipe(request, "launch"), [*request.overrides, *processes])
        refuse_stages(composition.mapping)
        if request.resume == AUTO and begun(composition) == "done":
            return 0
    from llmrecipe.runtime.distributed_launch import launch

    return launch(["train", *words, *processes], nproc, cluster)
