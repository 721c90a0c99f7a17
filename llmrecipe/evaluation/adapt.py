"""The adapter of a few examples: what a hypermodel writes for them, as a run of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import RunError, UserError
from llmrecipe.core.forward_context import Context, activate
from llmrecipe.interop.load_run import open_run
from llmrecipe.methods.additive._engines.prefix_kv import tables_of
from llmrecipe.methods.memory._engines.generated_adapter import Generator
from llmrecipe.methods.memory.hypertuning import TARGETS, Hypertuning
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.models.module_map import anatomy
from llmrecipe.objectives.examples import padded_texts
from llmrecipe.recipe.compose import Composition, compose
from llmrecipe.runtime.caller_state import kept_for_caller, one_training
from llmrecipe.training.evaluate import evaluate
from llmrecipe.training.final_folder import write_final
from llmrecipe.training.run import Run

ADAPTER = {"lora": "lora", "prefix": "prefix_tuning"}
"""Kind of adapter a hypermodel writes -> the method that holds it."""


@kept_for_caller()
@one_training()
def adapt(path: str, words: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """Write the adapter that a finished hypertuning run makes of the examples in `data.path`.

    One forward pass of the hypermodel; nothing is trained. The examples are read as in training: prompt and answer, one after
    the other, up to `objective.shot_tokens`.

    Args:
        path: the run.
        words: `data.path=FILE` with the examples, and overrides of the new run's recipe (`run.dir=...`).

    Returns:
        The folder of the new run, an ordinary run with a LoRA or a prefix, and its facts: `examples` read, their `tokens`, and
        the loss of their answers without (`loss/base`) and with the adapter (`loss`).

    Raises:
        UserError: no examples are given, or they cannot be read.
        RunError: the run has no hypermodel.
    """
    if not any(word.lstrip("+").startswith("data.path=") for word in words):
        raise UserError("adapt: give the examples, one prompt with its answer a line: data.path=FILE")
    loaded = open_run(path)
    writer = next((w for w in loaded.mounted if isinstance(w, Hypertuning)), None)
    if writer is None:
        raise RunError(f"{path}: it was not trained with stack=[hypertuning], so nothing in it writes adapters")
    source = compose(path)
    run = Run.open(_composition(path, writer, words), None)
    try:
        texts, used = _joined([row["ids"] for row in run.data], _most(source))
        with torch.no_grad():
            hypermodel = writer.hypermodel(loaded.model).eval()
            written = hypermodel(padded_texts([texts], run.roles))
        # A LoRA does nothing before it is filled, but a prefix that holds its random start does.
        with activate(Context(off=frozenset(wrapper.name for wrapper in run.stack))):
            base = evaluate(run.evaluation(), run.data)["loss"]
        facts: dict[str, Any] = {"examples": used, "tokens": len(texts), "loss/base": base}
        fill_adapter(run.model, writer, ADAPTER[writer.emit], written, gates_of(loaded.model, writer.name))
        facts["loss"] = evaluate(run.evaluation(), run.data)["loss"]
        run.events.evaluation(step=0, **facts)
        write_final(run, {"steps": 0, **facts}, {})
        run.dir.status("done", step=0)
    except BaseException as error:
        run.dir.status("failed", error=str(error) or type(error).__name__, step=0)
        raise
    finally:
        run.events.close()
        run.runtime.close()
    return run.dir.path, facts


def _composition(path: str, writer: Hypertuning, words: Sequence[str]) -> Composition:
    """Return the recipe of the new run: that of the hypertuning run, supervised on the examples, with an ordinary adapter."""
    kind, target = ADAPTER[writer.emit], writer.target or TARGETS[writer.emit]
    options: dict[str, Any] = {"target": target}
    if writer.emit == "lora":
        options |= {"r": writer.r, "alpha": writer.alpha}
    else:
        gate = "closed" if writer.prefix_gate else "open"
        options |= {"num_virtual_tokens": writer.num_virtual_tokens, "reparam": "flat", "gate_init": gate}
    own = [f"stack.{kind}.{name}={_quoted(value)}" for name, value in options.items()]
    fixed = ["objective=sft", f"stack=[{kind}]", *own, "data.validation=null", "data.test=null", "eval.test=false"]
    fixed += ["steps=1", "run.dir=null", "run.name=null"]
    given = {word.lstrip("+").partition("=")[0] for word in words}
    return compose(path, [*(word for word in fixed if word.partition("=")[0] not in given), *words])


def _quoted(value: object) -> str:
    return f"'{value}'" if isinstance(value, str) else str(value)


def _most(source: Composition) -> int:
    """Return the most tokens of examples that the hypermodel was trained on."""
    section = source.recipe.objective
    if "shot_tokens" in section:
        return int(section["shot_tokens"])
    return int(section.get("before", 0)) + int(section.get("after", 0)) or 512


def _joined(texts: Sequence[Sequence[int]], most: int) -> tuple[list[int], int]:
    """Return the tokens of the texts that fit, and how many these are; of a single one that does not fit the end is kept."""
    found: list[int] = []
    used = 0
    for text in texts:
        if len(found) + len(text) <= most:
            found += text
            used += 1
        elif not used:
            return list(text[-most:]), 1
    return found, used


@torch.no_grad()
def fill_adapter(
    model: nn.Module, writer: Hypertuning, name: str, written: Sequence[Tensor], gates: Sequence[Tensor] = ()
) -> None:
    """Put what a hypermodel has written into an ordinary LoRA or flat prefix at the same sites.

    Args:
        name: of the LoRA or prefix in the model's stack.
        written: the blocks, (1, n, w) each.
        gates: the factor of each layer, (L,), for each table of a prefix that has them.
    """
    if writer.emit == "lora":
        for index, site in enumerate(anatomy(model).at(writer.target or TARGETS["lora"])):
            hook: Any = getattr(site.module, site.name(name))
            hook.A.copy_(written[2 * index][0])
            hook.B.copy_(written[2 * index + 1][0].T)
        return
    blocks, factors = iter(written), iter(gates)
    for host in tables_of(model, name):
        for table in host.tables.values():
            held: Any = table
            held.flat.copy_(torch.cat([next(blocks)[0] for _ in range(2 * len(held.shapes))], 1))
            if hasattr(held, "gate"):
                held.gate.copy_(next(factors))


def gates_of(model: nn.Module, name: str) -> list[Tensor]:
    """Return the factors that a hypermodel's prefixes are multiplied by, for each table; none where they have no gate."""
    hooks = [hook for _, _, _, hook in all_hooks(model, name) if isinstance(hook, Generator) and hasattr(hook, "gates")]
    return [gate for hook in hooks for gate in hook.gates.values()]
