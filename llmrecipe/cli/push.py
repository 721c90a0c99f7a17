"""`llmrecipe push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmrecipe.cli.arguments import Json, Quiet, Verbose
from llmrecipe.cli.completion import complete_run
from llmrecipe.core.console import console, print_json, say

PANEL = "Use"
ORDER = 5


def verb(
    place: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_EXPORT", autocompletion=complete_run, help="A folder that `export` wrote, or a run that holds one."
        ),
    ],
    repo: Annotated[str, typer.Option("--repo", metavar="OWNER/NAME", help="Repository on the hub; made where there is none.")],
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it; without this it is private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go, and push nothing.")] = False,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="OWNER/NAME", help="Hub id of the base model."),
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="Licence, such as apache-2.0; default: that of the base.")
    ] = None,
    message: Annotated[str, typer.Option("--message", help="Message of the commit.")] = "Push by llmrecipe",
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Push an export to the Hugging Face hub, with its model card; private unless --public.

    The token is HF_TOKEN, or that of `hf auth login`.
    """
    from llmrecipe.interop.push_folder import exported_folder, prepare_upload, push

    folder = exported_folder(place)
    upload = prepare_upload(folder, repo, not public, base, licence)
    address = None if dry_run else push(upload, message)
    if as_json:
        facts = {"repo": repo, "private": upload.private, "files": upload.sizes(), "card": upload.card(), "notes": upload.notes}
        print_json({**facts, "url": address})
        return
    for note in upload.notes:
        say(f"note: {note}")
    if address is not None:
        say(f"done: {address} ({'private' if upload.private else 'public'}, {len(upload.files)} files)")
        return
    from rich.table import Table

    table = Table("file", "bytes", box=None, header_style="bold")
    for name, size in upload.sizes().items():
        table.add_row(name, f"{size:,}")
    out = console()
    out.print(f"would go from {folder} to {repo} ({'private' if upload.private else 'public'}):", soft_wrap=True)
    out.print(table)
    say(f"\n{upload.card()}")
