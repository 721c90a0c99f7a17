"""What every page of a report must be, read without a browser: whole, self-contained, safe, in order, named."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "input", "link", "br", "img"}


@dataclass
class Element:
    """One element with its children; texts are strings among them."""

    tag: str
    attributes: dict[str, str | None] = field(default_factory=dict)
    children: list[Any] = field(default_factory=list)

    def text(self) -> str:
        """All text below the element, with single spaces."""
        return " ".join("".join(c if isinstance(c, str) else c.text() for c in self.children).split())

    def all(self, tag: str = "", **attributes: str) -> list[Element]:
        """Elements below this one, in the order of the page."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                wanted = not tag or child.tag == tag
                if wanted and all(child.attributes.get(k.strip("_")) == v for k, v in attributes.items()):
                    found.append(child)
                found += child.all(tag, **attributes)
        return found

    def one(self, tag: str = "", **attributes: str) -> Element:
        """The only such element."""
        (found,) = self.all(tag, **attributes)
        return found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("document")]

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute of <{tag}> is given twice"
        made = Element(tag, dict(attrs))
        self.open[-1].children.append(made)
        if tag not in VOID:
            self.open.append(made)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read_page(text: str) -> Element:
    """The page as a tree; every element is closed where it was opened."""
    reader = _Reader()
    reader.feed(text)
    assert len(reader.open) == 1, f"<{reader.open[-1].tag}> is not closed"
    return reader.open[0]


def checked(text: str, headings: list[str]) -> Element:
    """Read a page and check all that does not depend on what it shows.

    Args:
        headings: of its sections, in order.
    """
    page = read_page(text)
    _self_contained(page, text)
    _policy_names_its_own_texts(page)
    _has_a_clear_order(page, headings)
    _is_named(page)
    return page


def _self_contained(page: Element, text: str) -> None:
    assert not page.all("link") and not page.all("iframe") and not page.all("object") and not page.all("base")
    for element in page.all():
        for name, value in element.attributes.items():
            assert not name.startswith("on") and name != "style", f"<{element.tag} {name}> is code"
            assert name != "src", f"<{element.tag} src> is read from elsewhere"
            assert name != "href" or str(value).startswith("#"), value
    style = page.one("style").text()
    assert "url(" not in style and "@import" not in style and len(page.all("script")) == 1
    assert len(text.encode()) < 2_000_000


def _policy_names_its_own_texts(page: Element) -> None:
    (meta,) = [m for m in page.all("meta") if m.attributes.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.split(" ", 1) for rule in str(meta.attributes["content"]).split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    for name in ("style", "script"):
        (content,) = page.one(name).children
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[f"{name}-src"] == f"'sha256-{digest}'", name


def _has_a_clear_order(page: Element, headings: list[str]) -> None:
    assert page.one("html").attributes["lang"] == "en" and page.one("head").one("title").text() == page.one("h1").text()
    viewport = [m for m in page.all("meta") if m.attributes.get("name") == "viewport"]
    assert "width=device-width" in str(viewport[0].attributes["content"]), "a phone shows it in its own width"
    assert [h.text() for h in page.one("main").all("h2")] == headings
    levels = [int(e.tag[1]) for e in page.all() if re.fullmatch(r"h[1-6]", e.tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels)), f"a level of headings is left out: {levels}"
    ids = [e.attributes["id"] for e in page.all() if "id" in e.attributes]
    assert len(set(ids)) == len(ids), "an id occurs twice"
    links = [str(a.attributes["href"])[1:] for a in page.all("a")]
    assert set(links) <= set(ids), "a link leads nowhere"
    assert links[0] == "main", "the first stop of the keyboard skips the navigation"
    assert links[1:] == [s.attributes["id"] for s in page.one("main").all("section")]


def _is_named(page: Element) -> None:
    ids = {e.attributes["id"]: e for e in page.all() if "id" in e.attributes}
    for section in page.all("section"):
        assert ids[section.attributes["aria-labelledby"]].tag == "h2"
    for svg in page.all("svg"):
        assert svg.attributes.get("aria-hidden") == "true" or (
            svg.attributes.get("role") == "img" and len(str(svg.attributes["aria-label"])) > 10
        )
    for element in [*page.all("input"), *page.all("nav"), *(e for e in page.all() if e.attributes.get("role") == "region")]:
        assert element.attributes.get("aria-label"), f"<{element.tag}> has no name"
    for table in page.all("table"):
        assert table.one("caption").text()
        assert all(h.attributes.get("scope") in ("col", "row") and h.text() for h in table.all("th"))
    for details in page.all("details"):
        first = next(c for c in details.children if isinstance(c, Element))
        assert first.tag == "summary" and first.text() and details.attributes["data-name"]
    names = [d.attributes["data-name"] for d in page.all("details")]
    assert len(set(names)) == len(names)
    for element in page.all():
        assert int(str(element.attributes.get("tabindex", "0"))) <= 0, "the keyboard follows the order of the page"


def charts(page: Element) -> dict[str, dict[str, list[list[float]]]]:
    """What each chart shows: name -> series -> points."""
    found = {}
    for figure in page.all("figure"):
        data = json.loads(str(figure.attributes["data-chart"]))
        found[figure.one("figcaption").all("b")[0].text()] = dict(data["series"])
    return found


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colours #rrggbb: (L1 + 0.05) / (L2 + 0.05) of their relative luminances (WCAG 2.1)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)
