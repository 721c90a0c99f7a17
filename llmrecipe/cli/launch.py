"""`llmrecipe launch`."""

from __future__ import annotations

from typing import Annotated

import typer

from llmrecipe.cli.arguments import Words, need_recipe, sort_words

PANEL = "Train"
ORDER = 3


def verb(
    words: Words = None,
    nproc: Annotated[int, typer.Option("--nproc", "-n", help="Processes on this machine, one per GPU.", min=1)] = 2,
    nodes: Annotated[int, typer.Option("--nodes", help="Machines that train together.", min=1)] = 1,
    node: Annotated[int, typer.Option("--node", help="Which machine this is, from 0.", min=0)] = 0,
    master: Annotated[str, typer.Option("--master", help="HOST:PORT of machine 0.")] = "127.0.0.1:29400",
) -> int:
    """Train on several processes or machines: the same recipe and overrides as `train`."""
    request = sort_words(words)
    if request.resume is None:
        recipe = need_recipe(request, "launch")
        from llmrecipe.cli.early_checks import composed

        # A mistake in the recipe is reported once, here, and not by every worker.
        composed(recipe, [*request.overrides, *_processes(request.overrides, nproc * nodes)])
    from llmrecipe.runtime.distributed_launch import Cluster, launch

    args = ["train", *(words or []), *_processes(request.overrides, nproc * nodes)]
    return launch(args, nproc, Cluster(nodes, node, master))


def _processes(overrides: list[str], world: int) -> list[str]:
    """Return the override that sets the number of processes, unless the user gave one."""
    return [] if any(w.startswith("runtime.processes=") for w in overrides) else [f"runtime.processes={world}"]
