"""The README's table of methods, generated from the registry."""

from __future__ import annotations

from pathlib import Path

from llmrecipe.core import registry

BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"
GROUPS = (("objective", "Objectives"), ("stack", "Wrappers"))


def methods_table() -> str:
    """Return a Markdown table with one row per method, by family, with a description and its paper."""
    lines: list[str] = []
    for group, title in GROUPS:
        lines += [f"**{title}**", "", "| family | name | what it is | paper |", "| --- | --- | --- | --- |"]
        specs = sorted((registry.spec(group, name) for name in registry.names(group)), key=lambda s: (s.family, s.name))
        for spec in specs:
            papers = ", ".join(f"[{p}](https://arxiv.org/abs/{p})" for p in spec.papers[:2])
            summary = spec.summary.partition(": ")
            text = (summary[0] if summary[1] else spec.summary).rstrip(".").replace("|", "\\|")
            lines.append(f"| {spec.family} | `{spec.name}` | {text} | {papers} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def refresh(readme: Path) -> bool:
    """Put the current table between the README's markers; return True when it changed."""
    text = readme.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    new = f"{head}{BEGIN}\n{methods_table()}\n{END}{tail}"
    if new != text:
        readme.write_text(new, encoding="utf-8")
    return new != text


if __name__ == "__main__":
    refresh(Path("README.md"))
