"""Which recipes may divide their training over processes (`runtime.shard`), from what each component declares.

Nothing trains under a value of `runtime.shard` unless its kind declares that it does (`shards`), so that whatever no test has
shown right is refused before a weight is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmrecipe.core import registry

if TYPE_CHECKING:
    from llmrecipe.recipe.schema import Recipe, RuntimeSection

UNPROVED = "no test has shown that it trains there what one process trains"
PLAIN = "none"
GATHERED = ("zero2", "zero3")
"""Values under which a process holds a part of each parameter and gathers the rest for a pass."""
SPLIT = {
    "tp": "tensor parallelism has not been shown right by a run on several GPUs",
    "cp": "context parallelism drops the mask of packed rows without a word, so documents would read each other",
}
"""Sizes that must be 1 -> why."""

Found = tuple[tuple[str, ...], str]


def sharding_mistakes(recipe: Recipe) -> Iterator[Found]:
    """Yield (key, what is wrong) for a division of the training that is impossible, or that no test has shown right."""
    section = recipe.runtime
    yield from mesh_mistakes(section)
    if section.shard == PLAIN:
        return
    parts = [("objective", recipe.objective), ("optim", recipe.optim), *(("stack", entry) for entry in recipe.stack.values())]
    places = [("objective",), ("optim",), *(("stack", name) for name in recipe.stack)]
    for place, (group, entry) in zip(places, parts, strict=True):
        spec = registry.spec(group, str(entry["kind"]))
        if text := refusal(spec, section.shard):
            yield place, text
        if section.shard in GATHERED:
            for option, values in dict(spec.facts.get("whole_options") or {}).items():
                if (value := entry.get(option)) in values:
                    yield (*place, option), f"{value} is refused under runtime.shard={section.shard}: {values[value]}"
    if section.shard in GATHERED and recipe.model.compile == "blocks":
        yield (
            ("model", "compile"),
            f"a compiled graph has not been shown right under runtime.shard={section.shard}; leave it out",
        )


def refusal(spec: registry.Spec, shard: str) -> str | None:
    """Return why a component does not train under a value of `runtime.shard`; None where it does."""
    known = tuple(spec.facts.get("shards") or ())
    if shard == PLAIN or shard in known:
        return None
    reason = str(spec.facts.get("unsharded") or UNPROVED)
    allowed = " or ".join([f"runtime.shard={name}" for name in (PLAIN, *known)])
    return f"{spec.name} is refused under runtime.shard={shard}: {reason}; use {allowed}"


def mesh_mistakes(section: RuntimeSection) -> Iterator[Found]:
    """Yield what is wrong with the sizes of the mesh of processes and with the library that divides."""
    for key, reason in SPLIT.items():
        if getattr(section, key) > 1:
            yield ("runtime", key), f"must be 1; got {getattr(section, key)}: {reason}"
    if section.backend == "deepspeed":
        yield (
            ("runtime", "backend"),
            "deepspeed is refused: no run has shown its results right here; with runtime.backend=torch its stages 1, 2 and 3 "
            "are runtime.shard=zero1, zero2 and zero3 (for its other keys: llmrecipe docs clusters)",
        )
    replicas, size = section.dp_replicate, section.dp_shard
    given = ", ".join(f"{key}={value}" for key, value in sizes(section).items())
    product = replicas * (size or 1) * section.tp * section.cp
    if size is not None and product != section.processes:
        yield (
            ("runtime", "dp_shard"),
            f"the sizes of the mesh ({given}) make {product} processes, and runtime.processes is {section.processes}; "
            "the product must be their number (`llmrecipe launch --nproc N` sets it)",
        )
    elif section.processes % product:
        yield (
            ("runtime", "dp_replicate"),
            f"the {section.processes} of runtime.processes cannot be divided into the sizes of the mesh ({given}); "
            "their number must be a multiple of the product (`llmrecipe launch --nproc N` sets it)",
        )
    if section.shard not in GATHERED and replicas > 1:
        yield (
            ("runtime", "dp_replicate"),
            f"groups that each hold everything are for runtime.shard=zero2 or zero3; got {replicas} with "
            f"runtime.shard={section.shard}",
        )
    if section.shard not in GATHERED and section.state_dict == "sharded":
        yield (
            ("runtime", "state_dict"),
            "sharded is for runtime.shard=zero2 or zero3, under which each process holds a part of every tensor; got "
            f"sharded with runtime.shard={section.shard}",
        )
    if section.shard not in GATHERED and section.offload != "none":
        yield (
            ("runtime", "offload"),
            "parts of parameters, gradients and states rest in the machine's memory under runtime.shard=zero2 or zero3, all of "
            f"them or none; got {section.offload} with runtime.shard={section.shard} (stack=[nf4, lora] with "
            "optim=paged_adamw_32bit moves the optimizer's state alone)",
        )
    if section.shard == PLAIN and size is not None and size > 1:
        yield ("runtime", "dp_shard"), "nothing is divided under runtime.shard=none; set runtime.shard, or leave it out"


def sizes(section: RuntimeSection) -> dict[str, int]:
    """Return the size of each dimension of the mesh that is given, in the order of its dimensions."""
    found = {"dp_replicate": section.dp_replicate, "dp_shard": section.dp_shard, "cp": section.cp, "tp": section.tp}
    return {key: value for key, value in found.items() if value is not None}


def shard_size(section: RuntimeSection) -> int:
    """Return how many processes divide what `runtime.shard` names."""
    return section.dp_shard or max(1, section.processes // (section.dp_replicate * section.tp * section.cp))
