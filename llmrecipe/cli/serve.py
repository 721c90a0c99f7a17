"""`llmrecipe serve`."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from llmrecipe.cli.arguments import Json, Quiet, Verbose, Words, runs_and_overrides
from llmrecipe.cli.completion import complete_run
from llmrecipe.core.console import print_json, say
from llmrecipe.core.errors import UserError
from llmrecipe.core.listening import LOOPBACK, LOOPBACK_NAMES, listen

PANEL = "Use"
ORDER = 3
NEEDS = ("starlette", "uvicorn")


def verb(
    path: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            autocompletion=complete_run,
            help="A run directory, a model folder, a hub name or `tiny`; several runs of one base are models to choose from.",
        ),
    ],
    words: Words = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; another than this machine needs --key-env.")
    ] = LOOPBACK,
    port: Annotated[int, typer.Option("--port", help="0 takes a free one.", min=0, max=65535)] = 8000,
    key_env: Annotated[
        str | None, typer.Option("--key-env", metavar="NAME", help="Environment variable with the key that clients must send.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens of one answer.")] = 1024,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Longest time of a request in seconds.")] = 300.0,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Requests answered or waiting at once.")] = 16,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Serve a run to clients of the OpenAI API, for trying it out: chat completions, completions, models, streaming.

    Prompts take the template the run was trained with. Requests are answered one after the other, until Ctrl-C.
    """
    from llmrecipe.cli.early_checks import answerers
    from llmrecipe.core.lazy import is_installed

    if missing := [name for name in NEEDS if not is_installed(name)]:
        raise UserError(f"serve: needs {' and '.join(missing)}: pip install 'llmrecipe[serve]'")
    key = _key(key_env)
    if key is None and host not in LOOPBACK_NAMES:
        raise UserError(f"--host {host}: whoever reaches this address could use the model; name a key: --key-env NAME")
    more, overrides = runs_and_overrides(words)
    answerers([path, *more], overrides)
    with listen(host, port) as opened:
        from llmrecipe.engine.sampling import Sampling
        from llmrecipe.evaluation.chat import Chat
        from llmrecipe.evaluation.serving.app import Api
        from llmrecipe.evaluation.serving.served_model import Limits, ServedModel
        from llmrecipe.evaluation.serving.server import ApiServer

        model = ServedModel(Chat.open([path, *more], overrides, Sampling()), path)
        limits = Limits(tokens=max_new_tokens, seconds=timeout, requests=concurrency)
        url = f"http://{f'[{host}]' if ':' in host else host}:{opened.getsockname()[1]}/v1"

        def started() -> None:
            if as_json:
                print_json({"url": url, "models": model.names})
                sys.stdout.flush()
            else:
                say(f"serving {', '.join(model.names)} at {url} (Ctrl-C ends it)")

        hosts = LOOPBACK_NAMES if host in LOOPBACK_NAMES else None
        ApiServer(Api(model, limits, key, hosts), opened, started).serve_until_stopped()


def _key(key_env: str | None) -> str | None:
    """Return the key that clients must send.

    Raises:
        UserError: its variable is not set.
    """
    if key_env is None:
        return None
    from llmrecipe.core.redact import name_variable

    name_variable(key_env)
    key = os.environ.get(key_env, "").strip()
    if not key:
        raise UserError(f"--key-env {key_env}: the environment variable {key_env} is not set")
    return key
