"""Export of a run in any of the formats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmrecipe.core import registry
from llmrecipe.core.errors import RunError, UserError
from llmrecipe.interop.export_card import name_base, write_card
from llmrecipe.interop.export_options import FORMATS, ExportOptions
from llmrecipe.interop.gguf.gguf_export import export_gguf
from llmrecipe.interop.merge_adapters import open_combination
from llmrecipe.interop.merged import Exported, export_merged, serving_notes
from llmrecipe.interop.peft.exporter import export_adapter_hub, export_peft
from llmrecipe.interop.sentence_transformers_folder import export_sentence_transformers
from llmrecipe.interop.vllm_lora import export_vllm_lora
from llmrecipe.models.checkpoint_path import run_folder
from llmrecipe.runs import delta


def export_run(
    run: str | Path,
    options: ExportOptions,
    out: str | Path | None = None,
    bound: float | None = None,
    rights: Mapping[str, bool] | None = None,
) -> Exported:
    """Write a run in one format, with its options; arguments as in `merged.export_merged`.

    Raises:
        UserError: the options do not fit the run or the format, or what was written is not what the run computes.
    """
    ranks = rank_options(run, options.rank) if options.rank is not None else None
    loaded = None
    if options.add or options.weight != 1.0:
        loaded = open_combination([(str(run), options.weight), *options.add.items()], options.merge, rights)
    if options.to == "merged":
        done = export_merged(run, out, dtype=options.dtype, bound=bound, options=ranks, loaded=loaded, rights=rights)
        done.notes.extend(serving_notes(done.path))
    elif options.to == "vllm-lora":
        done = export_vllm_lora(run, out, base=options.base, bound=bound, options=ranks, loaded=loaded, rights=rights)
    elif options.to == "gguf":
        done = export_gguf(
            run, out, dtype=options.dtype, bound=bound, converter=options.converter, options=ranks, loaded=loaded, rights=rights
        )
    elif options.to == "sentence_transformers":
        if loaded is not None:
            raise UserError("--add: a text encoder is exported alone; --to merged takes several runs")
        done = export_sentence_transformers(run, out, dtype=options.dtype, bound=bound, rights=rights)
    elif options.to == "adapter_hub":
        done = export_adapter_hub(run, out, bound=bound, loaded=loaded, rights=rights)
    elif options.to == "peft":
        uniform, as_lora = options.uniform, options.as_lora
        done = export_peft(run, out, bound=bound, uniform=uniform, as_lora=as_lora, options=ranks, loaded=loaded, rights=rights)
    else:
        raise RunError(f"there is no format '{options.to}' (allowed: {', '.join(FORMATS)})")
    options.write(done.path)
    done.notes.extend(name_base(done.path, options.base))
    write_card(done.path, str(run), options)
    return done


def rank_options(run: str | Path, rank: int) -> dict[str, dict[str, Any]]:
    """Return the option of `--rank` for every wrapper of the run that was trained for several ranks.

    Raises:
        UserError: the run has none.
    """
    folder = run_folder(str(run))
    layers = delta.read_stack(folder).layers if folder is not None and (folder / delta.STACK_FILE).is_file() else []
    found = {
        name: {"rank": rank}
        for layer in layers
        for name, mapping in layer.wrappers.items()
        if "rank" in registry.load_class("stack", mapping["kind"]).adjustable
    }
    if not found:
        raise UserError(
            f"--rank: nothing in {run} was trained for several ranks; dylora is the method that can be cut afterwards"
        )
    return found
