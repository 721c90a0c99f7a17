"""The pages of `llmrecipe docs`: Markdown files inside the package, their titles, and a search over their sections."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmrecipe.core.errors import RecipeError, did_you_mean

FOLDER = Path(__file__).parent.parent / "docs"
ORDER = (
    "start",
    "recipes",
    "data",
    "tasks",
    "methods",
    "sizing",
    "clusters",
    "runs",
    "serving",
    "troubleshooting",
    "reproducibility",
    "security",
    "python",
    "plugins",
    "gallery",
    "keys",
)
"""Topics in the order in which one would read them."""


@dataclass(frozen=True)
class PageSection:
    """One section of a page."""

    topic: str
    heading: str
    text: str


def page_text(topic: str) -> str:
    """Return the Markdown of a page.

    Raises:
        RecipeError: there is no such topic.
    """
    if topic not in ORDER:
        raise RecipeError(f"docs: there is no page '{topic}'{did_you_mean(topic, ORDER)}; the pages: {', '.join(ORDER)}")
    return (FOLDER / f"{topic}.md").read_text(encoding="utf-8")


def page_title(topic: str) -> str:
    """Return the first heading of a page."""
    return page_text(topic).splitlines()[0].lstrip("# ")


def page_sections(topic: str) -> list[PageSection]:
    """Cut a page at its headings; lines inside a code block are no headings."""
    found: list[PageSection] = []
    heading, lines, code = "", list[str](), False
    for line in page_text(topic).splitlines():
        code ^= line.startswith("```")
        if line.startswith("#") and not code:
            found.append(PageSection(topic, heading, "\n".join(lines)))
            heading, lines = line.lstrip("# "), []
        else:
            lines.append(line)
    found.append(PageSection(topic, heading, "\n".join(lines)))
    return [section for section in found if section.text.strip()]


def find_sections(words: list[str]) -> list[PageSection]:
    """Return the sections that contain every word, whatever its case; those with a word in their heading first."""
    wanted = [word.lower() for word in words]
    every = [section for topic in ORDER for section in page_sections(topic)]
    found = [s for s in every if all(word in f"{s.heading}\n{s.text}".lower() for word in wanted)]
    return sorted(found, key=lambda s: not any(word in s.heading.lower() for word in wanted))
