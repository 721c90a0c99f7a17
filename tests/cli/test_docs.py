"""The pages of `llmrecipe docs`: complete, linked, true where they are generated, and every command in them runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmrecipe.cli.app import run_command
from llmrecipe.cli.doc_pages import FOLDER, ORDER, find_sections, page_sections, page_text, page_title
from llmrecipe.cli.doc_tables import TABLES
from llmrecipe.core import registry
from llmrecipe.core.paths import PACKAGE
from llmrecipe.data.formats.mismatch import objectives_for
from tests.support import ROOT

BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+?)(?:#[^)]*)?\)")


def test_every_file_is_a_topic_and_every_topic_has_a_title() -> None:
    assert sorted(ORDER) == sorted(path.stem for path in FOLDER.glob("*.md"))
    assert len({page_title(topic) for topic in ORDER}) == len(ORDER)
    assert all(page_text(topic).startswith("# ") for topic in ORDER)


@pytest.mark.parametrize("path", [*sorted(FOLDER.glob("*.md")), ROOT / "README.md"], ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    links = [link for link in LINK.findall(path.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("name", TABLES)
def test_generated_rows_are_true(name: str) -> None:
    """What stands there is what is registered; what is new may wait for the next `make docs`."""
    pages = [path.read_text(encoding="utf-8") for path in (*FOLDER.glob("*.md"), ROOT / "README.md")]
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    shown = [text.partition(begin)[2].partition(end)[0] for text in pages if begin in text]
    assert shown and all(len(part.splitlines()) > 20 for part in shown)
    current = set(TABLES[name]().splitlines())
    assert [line for part in shown for line in part.splitlines() if line and line not in current] == [], "run `make docs`"


def test_every_method_is_in_the_table_of_methods() -> None:
    table = TABLES["methods"]()
    assert all(f"| `{name}` |" in table for group in ("stack", "objective") for name in registry.names(group))


def test_a_format_names_every_objective_that_reads_it() -> None:
    """Also those whose row type takes the format, of which the format itself knows nothing."""
    assert {"clm", "mlm", "nsp", "dae", "sft"} <= set(objectives_for("text"))
    assert objectives_for("unpaired") == ["kto"] and "dpo" in objectives_for("preference")
    assert "mlm" not in objectives_for("preference")


def test_messages_that_are_explained_are_messages_that_are_said() -> None:
    """A phrase of the tables of troubleshooting stands in the source, whole or with the next line of its text."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)
    phrases = re.findall(r"^\| `([^`]+)` \|", page_text("troubleshooting"), re.MULTILINE)
    assert len(phrases) > 12 and [phrase for phrase in phrases if phrase not in joined] == []


MEASURED = re.compile(
    r"\d ?(?:nats|points?|kB|MB|GB|%)(?![\w ]*interval)|\bminutes\b(?!: from|\?)|(?:times|more|less) (?:faster|slower|time)\b"
)
RESULT = re.compile(r"\]\((?:\.\./\.\./)?(tests/benchmarks/results/[\w-]+)\.(?:md|png)\)")
GENERATED = re.compile(r"<!-- (\w+): begin -->.*?<!-- \1: end -->|^```.*?^```$", re.MULTILINE | re.DOTALL)


def test_a_measured_number_leads_to_a_result_that_names_commit_and_machine() -> None:
    """In a section of its own prose; what is generated and what a command prints are other tests' business."""
    pages = [page_text(topic) for topic in ORDER] + [(ROOT / "README.md").read_text(encoding="utf-8")]
    sections = [part for page in pages for part in re.split(r"^(?=## )", GENERATED.sub("", page), flags=re.MULTILINE)]
    assert [part[:200] for part in sections if MEASURED.search(part) and not RESULT.search(part)] == []
    results = {found[1] for part in sections for found in RESULT.finditer(part)}
    texts = {name: (ROOT / f"{name}.md").read_text(encoding="utf-8") for name in results}
    assert len(texts) > 4
    assert [name for name, text in texts.items() if not re.search(r"[Cc]ommit [0-9a-f]{7}", text)] == []
    machine = re.compile(r"cpu|the same on every machine", re.IGNORECASE)
    assert [name for name, text in texts.items() if not machine.search(text)] == []


def run_page(topic: str, folder: Path) -> None:
    """Run the commands of a page in order, in one folder."""
    llmrecipe = f'llmrecipe() {{ "{sys.executable}" -m llmrecipe "$@"; }}'
    script = "\n".join(["set -e", llmrecipe, *BLOCK.findall(page_text(topic))])
    set_here = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "LLMRECIPE_CACHE": str(folder / "cache"),
    }
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env={**os.environ, **set_here}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_the_tutorial_leads_to_a_model_that_answers_as_it_was_taught(tmp_path: Path) -> None:
    run_page("start", tmp_path)
    before, after = (
        subprocess.run(
            [sys.executable, "-m", "llmrecipe", "chat", model, "--prompt", "Where does the duck live?"],
            cwd=tmp_path, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        ).stdout
        for model in ("tiny", "runs/zoo")
    )  # fmt: skip
    assert "Thank you for asking." in after and "Thank you for asking." not in before


@pytest.mark.slow
@pytest.mark.parametrize("topic", [topic for topic in ORDER if topic != "start" and BLOCK.search(page_text(topic))])
def test_the_commands_of_a_page_run(topic: str, tmp_path: Path) -> None:
    run_page(topic, tmp_path)


@pytest.mark.slow
def test_the_python_of_its_page_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", page_text("python"), re.MULTILINE | re.DOTALL)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_sections_end_at_headings_and_not_at_comments_of_code() -> None:
    tutorial = [section.heading for section in page_sections("start")]
    assert "4. Train" in tutorial and not any(heading.startswith("Answers of the zoo") for heading in tutorial)


def test_search_finds_sections_with_every_word_headings_first() -> None:
    found = find_sections(["gradient", "checkpointing"])
    assert any(section.topic == "sizing" for section in found)
    assert all("gradient" in f"{s.heading} {s.text}".lower() for s in found)
    assert find_sections(["preferences"])[0].heading == "Align with preferences"


def test_the_verb_lists_shows_and_searches(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["docs"]) == 0
    listed = capsys.readouterr().out
    assert all(topic in listed for topic in ORDER)
    assert run_command(["docs", "security"]) == 0
    assert "Only safetensors are read" in capsys.readouterr().out
    assert run_command(["docs", "--search", "preempted"]) == 0
    assert "clusters" in capsys.readouterr().out
    assert run_command(["docs", "securty"]) == 2
    assert "did you mean 'security'?" in capsys.readouterr().err
    assert run_command(["docs", "--search", "xyzzy plugh"]) == 2
