"""One self-contained page from a template of `assets/report`: no address outside of it, nothing of a run is markup.

Jinja escapes every value. The page's own style and script are the only ones a browser accepts: its content security policy
names them by hash, so that not even text that had escaped the escaping would run.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from llmrecipe.core.console import number
from llmrecipe.core.errors import RunError
from llmrecipe.core.paths import ASSETS

FOLDER = ASSETS / "report"
STYLE, SCRIPT = "style.css", "script.js"


@functools.cache
def templates() -> Environment:
    """Return the templates; every value is escaped, and a name without a value is an error."""
    found = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    found.filters["number"] = number
    return found


def render(template: str, title: str, live: bool = False, **values: Any) -> str:  # noqa: ANN401
    """Return a page.

    Args:
        template: file in `assets/report`.
        title: of the window and of the page.
        live: the page is served and follows a running training.
    """
    style, script = own_text(STYLE), own_text(SCRIPT)
    return templates().get_template(template).render(
        title=title, live=live, style=Markup(style), script=Markup(script), policy=policy(live), **values
    )  # fmt: skip


def policy(live: bool = False) -> str:
    """Return the content security policy: nothing from anywhere but the page's own style and script, by hash.

    Args:
        live: the page may also read itself again from where it was served.
    """
    sources = {"default-src": "'none'", "style-src": _hash(own_text(STYLE)), "script-src": _hash(own_text(SCRIPT))}
    if live:
        sources["connect-src"] = "'self'"
    sources |= {"base-uri": "'none'", "form-action": "'none'"}
    return "; ".join(f"{name} {value}" for name, value in sources.items())


def write_drawn(verb: str, path: Path, text: str) -> None:
    """Write a page or a card to where a verb was to put it.

    Raises:
        RunError: the file cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{verb}: cannot write {path}: {error.strerror or error}") from error


@functools.cache
def own_text(name: str) -> str:
    """Return the text of a file of the page."""
    return (FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
