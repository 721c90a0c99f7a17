"""Output of `check` for one training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmrecipe.core.console import console

if TYPE_CHECKING:
    from llmrecipe.training.dry_run import Findings


def show_findings(found: Findings) -> None:
    """Print what a recipe would do."""
    from rich.table import Table

    out = console()
    tokens = "unknown" if found.tokens_per_step is None else str(found.tokens_per_step)
    size = f"{found.steps} steps, {found.rows} rows, {tokens} tokens a step"
    out.print(f"{found.recipe}: {found.objective}, {size}")
    names = [f"{w['name']} ({w['kind']}, {w['stage'].lower()})" for w in found.stack]
    out.print("stack: " + (" -> ".join(names) or "none, every weight trains"))
    for line in found.hybrids:
        out.print(line, soft_wrap=True)
    added = f", added: {found.added:,}" if found.added else ""
    out.print(f"parameters: {found.parameters:,}{added}; trained: {trained_text(found)}")
    if found.groups:
        table = Table(*found.groups[0], box=None, header_style="bold")
        for row in found.groups:
            table.add_row(*(f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()))
        out.print(table)
    out.print(f"memory (MB): {memory_text(found)}")
    out.print("memory of a device (MB) when N devices divide the training (runtime.shard):")
    table = Table(*found.devices_mb[0], box=None, header_style="bold")
    for row in found.devices_mb:
        table.add_row(*(f"{value:,g}" for value in row.values()))
    out.print(table)
    out.print(f"saved: {found.delta_bytes / 2**20:.1f} MB of learned tensors a checkpoint")
    if found.seconds is None:
        out.print("time: unknown; it depends on rows or answers that do not exist yet")
    else:
        out.print(f"time: about {found.seconds:.0f} s at this machine's float32 matmul rate, plus evaluation")
    for warning in found.warnings:
        out.print(f"warning: {warning}")
    for note in found.notes:
        out.print(f"note: {note}")


def trained_text(found: Findings) -> str:
    """Return how many numbers train; unknown where a method has yet to choose them and has no budget."""
    if not found.trained and found.memory.undecided:
        return f"unknown until {', '.join(found.memory.undecided)} has chosen"
    return f"{found.trained:,} ({found.trained / max(found.parameters, 1):.2%} of the base)"


def memory_text(found: Findings) -> str:
    """Return the parts of the memory in MB; parts that nothing can tell before the run are unknown."""
    unknown = found.memory.unknown()
    if not unknown:
        return ", ".join(f"{name} {size:g}" for name, size in found.memory_mb.items())
    known = {name: size for name, size in found.memory_mb.items() if name not in (*unknown, "total")}
    parts = [f"{name} {known[name]:g}" if name in known else f"{name} unknown" for name in found.memory_mb if name != "total"]
    return f"{', '.join(parts)}, total at least {sum(known.values()):g}"
