"""Opening a finished run in Python or for an export: its base model with every stack of its chain on top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from llmrecipe.core.foreign import read_json
from llmrecipe.interop.multi_adapter import open_adapters
from llmrecipe.interop.run_plugins import open_plugins_of
from llmrecipe.interop.verify_logits import HEADS, adapter_head
from llmrecipe.models.checkpoint_path import finished_run, is_adapter
from llmrecipe.recipe.schema import ModelSection, TokenizerSection
from llmrecipe.runs import delta
from llmrecipe.runs.checksums import verify
from llmrecipe.runs.open_model import LoadedModel, open_model
from llmrecipe.runtime.caller_state import kept_for_caller


class HasPath(Protocol):
    """Anything with a folder, such as a `RunDir`."""

    @property
    def path(self) -> Path:
        """Return the folder."""


RunLike = str | Path | HasPath


@kept_for_caller()
def load(
    run: RunLike | Sequence[RunLike],
    *,
    device: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> tuple[Any, Any]:
    """Load the model and tokenizer of a finished run, ready for `model.generate` and `model(input_ids=...)`.

    The random generators of the calling program stay as they were.

    A list of runs on one base gives their adapters side by side: `model.use(name)` switches, and
    `model(input_ids=..., adapters=[a name a row])` mixes them in a batch (see `interop.multi_adapter.Adapters`).

    Args:
        run: a run directory, its `final` folder, a PEFT adapter folder, anything with a `path` (`run.dir`), or a list of them.
        device: where to put the model; default: a GPU where there is one.
        dtype: of the frozen weights: `float32`, `bfloat16`, `float16`, or `auto`: float32 on a CPU, else the checkpoint's own.
        trust_remote_code: run Python code that comes with the base model.
        allow_pickle: read pickle weights of the base model.

    Returns:
        (model, tokenizer); the model is in evaluation mode and nothing in it trains.

    Raises:
        RunError: the folder holds no finished run.
        ModelError: the base model is gone or is another one, or runs of a list stand on different bases.
    """
    found: Any
    rights = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = torch.device(where).type
    if isinstance(run, list | tuple):
        found = open_adapters([str(getattr(one, "path", one)) for one in run], dtype=dtype, rights=rights, device=kind)
    else:
        found = open_run(str(getattr(run, "path", run)), dtype=dtype, rights=rights, device=kind)
    model, tokenizer = (found if isinstance(run, list | tuple) else found.model), found.tokenizer
    model.to(where)
    model.requires_grad_(False)
    return model.eval(), tokenizer


def open_run(
    path: str,
    *,
    dtype: str = "auto",
    options: dict[str, dict[str, Any]] | None = None,
    rights: Mapping[str, bool] | None = None,
    device: str = "cpu",
) -> LoadedModel:
    """Load a finished run's model with its stacks mounted, for the head it was trained with.

    Args:
        device: kind of the device it will compute on, which decides what `dtype: auto` means.
        options: wrapper name -> options that may differ on a finished run (see `Wrapper.adjustable`).
        rights: what the person who opens it allows its base (see `recipe.rights`).

    Raises:
        RunError: the folder holds no finished run.
    """
    open_plugins_of(path)
    section = ModelSection.model_validate({"path": path, "dtype": dtype, **(rights or {})})
    if is_adapter(path):
        return open_model(section, TokenizerSection(), head=adapter_head(Path(path)), device=device)
    return open_model(section, TokenizerSection(), head=head_of(finished_run(path)), options=options, device=device)


def head_of(folder: Path) -> str:
    """Return the head a finished run was trained with."""
    if (folder / delta.STACK_FILE).is_file():
        return delta.read_stack(folder).head
    verify(folder, lambda name: name == "model/config.json")
    config = read_json(folder / "model" / "config.json", "model.path", "copy the run again")
    named = config.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else ""
    return next((head for ending, head in HEADS if name.endswith(ending)), "causal")
