"""`llmrecipe export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmrecipe.cli.arguments import Json, Quiet, Verbose
from llmrecipe.cli.completion import complete_run
from llmrecipe.core.console import lasting, print_json, say, say_progress

PANEL = "Use"
ORDER = 4


def verb(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", autocompletion=complete_run, help="A run directory.", show_default=False)
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="merged: a Transformers folder; peft, vllm-lora, adapter_hub: adapter folders; gguf: for llama.cpp, Ollama; "
            "sentence_transformers: an encoder.",
        ),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write; default: RUN/<format>.")] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Dtype of merged weights; auto keeps that of the base; gguf: also q8_0.")
    ] = "auto",
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Rank of a method trained for several (dylora).")] = None,
    as_: Annotated[str | None, typer.Option("--as", help="lora: write AdaLoRA as plain LoRA.")] = None,
    uniform: Annotated[
        bool, typer.Option("--uniform", help="One rank and scale for servers that ignore patterns (vLLM).")
    ] = False,
    converter: Annotated[
        str | None,
        typer.Option("--converter", metavar="FILE", help="llama.cpp's convert_hf_to_gguf.py; default: the one on the PATH."),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="OWNER/NAME", help="Hub id of the base model, where the run knows a folder.")
    ] = None,
    bound: Annotated[
        float | None,
        typer.Option("--bound", min=0.0, help="Largest logit difference that passes, as a share of the largest logit."),
    ] = None,
    add: Annotated[
        list[str] | None, typer.Option("--add", metavar="RUN=WEIGHT", help="Add another run or PEFT folder on the same base.")
    ] = None,
    weight: Annotated[float, typer.Option("--weight", help="Weight of the run itself with --add.")] = 1.0,
    combine: Annotated[
        str,
        typer.Option("--combine", help="How: cat, the exact sum, or another of `llmrecipe list merge_method`."),
    ] = "cat",
    density: Annotated[float | None, typer.Option("--density", help="Share of entries TIES, DARE and pruning keep.")] = None,
    sign: Annotated[str, typer.Option("--sign", help="How TIES elects a sign: total or frequency.")] = "total",
    seed: Annotated[int, typer.Option("--seed", help="Seed of DARE's draws.")] = 0,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[WORD]...",
            help="model.trust_remote_code=true, model.allow_pickle=true; combine.OPTION=VALUE for the options of --combine.",
            show_default=False,
        ),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Export a run; the written folder is loaded again and must give the run's logits before this says done."""
    from llmrecipe.cli.early_checks import finished
    from llmrecipe.core.errors import UserError
    from llmrecipe.interop.export_options import ExportOptions
    from llmrecipe.interop.merge_options import MergeConfig
    from llmrecipe.interop.run_plugins import open_plugins_of
    from llmrecipe.runs.durable import share_as_folder

    if as_ not in (None, "lora"):
        raise UserError(f"--as: there is no '{as_}' (allowed: lora)")
    if base is not None:
        from llmrecipe.interop.export_card import check_hub_id

        check_hub_id("--base", base)
    rights, more = _words(words or [])
    added = [_weighted(text) for text in add or []]
    names = [str(run), *(path for path, _ in added)]
    for name in names:
        open_plugins_of(name)
    others = {str(Path(path).resolve()): share for path, share in added}
    options = ExportOptions(
        to,
        dtype,
        rank,
        as_ == "lora",
        uniform,
        converter,
        base,
        weight,
        others,
        MergeConfig(combine, density, sign, seed, more),
    )
    options.check(str(run))
    for name in names:
        finished(name)
    from llmrecipe.interop.export_run import export_run

    with lasting(f"exporting {run}"):
        done = export_run(run, options, out, bound, rights)
    share_as_folder(done.path)
    if as_json:
        print_json(done.facts())
        return
    for note in done.notes:
        say_progress(note)
    say_progress(f"proven: {done.difference}")
    say(f"done: {done.path}")


def _words(words: list[str]) -> tuple[dict[str, bool], dict[str, Any]]:
    """Return the rights that the arguments grant, and the options of the merge method.

    Raises:
        UserError: an argument that is neither.
    """
    from llmrecipe.core.errors import UserError
    from llmrecipe.recipe.overrides import parse_overrides
    from llmrecipe.recipe.rights import KEYS

    rights, options = {}, {}
    for word in parse_overrides(words):
        if word.key in KEYS and isinstance(word.value, bool):
            rights[word.key[1]] = word.value
        elif len(word.key) == 2 and word.key[0] == "combine":
            options[str(word.key[1])] = word.value
        else:
            allowed = ", ".join(f"{'.'.join(key)}=true" for key in KEYS)
            raise UserError(
                f"'{word.text}': a run is exported as it is; the words that count here are {allowed}, and combine.OPTION=VALUE "
                "for the options of --combine"
            )
    return rights, options


def _weighted(text: str) -> tuple[str, float]:
    """Parse `RUN=0.5` into (RUN, 0.5).

    Raises:
        UserError: there is no weight, or it is no number.
    """
    from llmrecipe.core.errors import UserError

    path, _, weight = text.rpartition("=")
    try:
        value = float(weight) if path else None
    except ValueError:
        value = None
    if value is None:
        raise UserError(f"--add {text}: write RUN=WEIGHT, for example --add runs/other=0.5")
    return path, value
