"""Samples, recipe, data and verification on a run's page, several runs on one page, and a page that follows a run."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from llmrecipe.cli.app import run_command
from llmrecipe.core.errors import RunError
from llmrecipe.runs.events import Events
from llmrecipe.runs.report.page import run_page
from llmrecipe.runs.report.recipe_view import marked_lines, recipe_view
from llmrecipe.runs.report.render import policy
from llmrecipe.runs.report.samples import sampled_prompts
from llmrecipe.runs.report.serve import ReportServer
from llmrecipe.runs.report.several import SECTIONS, several_page
from llmrecipe.runs.run_record import read_run, read_runs
from llmrecipe.runs.verified import VERIFIED, keep_verified
from tests.pages import Element, charts, checked, read_page
from tests.runs.report.test_page import EVIL, HEADINGS, make_run


def cells(table: Element) -> list[list[str]]:
    return [[c.text() for c in row.children if isinstance(c, Element)] for row in table.all("tr")]


def sample(step: int, prompt: str, answer: str, **facts: Any) -> dict[str, Any]:
    return {"event": "sample", "step": step, "prompt": prompt, "answer": answer, **facts}


def test_samples_of_a_prompt_are_its_first_and_its_newest_answer() -> None:
    events = [
        sample(0, "a", "a0", reference="A"), sample(0, "b", "b0"), sample(0, "a", "again0"),
        sample(5, "a", "a5", reference="A"), sample(5, "b", "b5"), sample(5, "a", "again5"),
        sample(9, "a", "a9", reference="A", reward=0.5), sample(9, "new", "n9"),
    ]  # fmt: skip
    found = sampled_prompts(events)
    assert [(s.prompt, [(step, text) for step, text, _ in s.answers], s.between) for s in found] == [
        ("a", [(0, "a0"), (9, "a9")], 1),
        ("b", [(0, "b0"), (5, "b5")], 0),
        ("a", [(0, "again0"), (5, "again5")], 0),
        ("new", [(9, "n9")], 0),
    ]
    assert found[0].reference == "A" and found[0].answers[1][2] == [("reward", "0.5")] and found[1].reference == ""


def test_answers_before_and_after_are_side_by_side(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lines = [json.dumps(sample(0, EVIL, "before it", reference="R")), json.dumps(sample(4, "once", "new"))]
    events = (run / "events.jsonl").read_text()
    (run / "events.jsonl").write_text("\n".join(lines) + "\n" + events)
    page = checked(run_page(run), HEADINGS)
    first, second = page.one("section", id="samples").all("article")
    assert [h.text() for h in first.all("h4")] == ["Before (step 0)", "After (step 4)"], "the newest sample has no reference"
    assert [p.text() for p in first.all("p", class_="text")] == [EVIL, "before it", '"><img src=x onerror=alert(2)>']
    assert [h.text() for h in second.all("h4")] == ["Answer (step 4)"]


def test_what_was_set_for_a_run_is_marked(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"optim": {"lr": 1e-4, "kind": "adamw"}, "stack": {"lora": {"r": 8}}, "seed": 0})
    record, text = read_run(run), "optim:\n  lr: 0.0001\n  kind: adamw\nstack:\n  lora:\n    r: 8\nseed: 0\n"
    known = {"recipe": {"set": {"optim.lr": "override optim.lr=1e-4", "stack.lora": "mine.yaml:3"}}}
    view = recipe_view(record, known, text, "")
    assert view.changes == [
        ["key", "value", "set by"],
        ["optim.lr", "0.0001", "override optim.lr=1e-4"],
        ["stack.lora.r", "8", "mine.yaml:3"],
    ]
    assert [line for line, marked in view.lines if marked] == ["  lr: 0.0001", "  lora:", "    r: 8"]
    older = recipe_view(
        record, {}, text, "llmrecipe train recipe=x 'seed=0' run.dir=y\nllmrecipe train resume=y optim.lr=1e-4\n"
    )
    assert [row[0] for row in older.changes] == ["key", "optim.lr", "seed"], "without a record the overrides count"
    assert recipe_view(record, {"recipe": {"set": {}}}, text, "").changes == []


def test_lines_below_a_key_belong_to_it_whatever_its_form() -> None:
    text = 'a:\n  "b.c": 1\nlist:\n- x\n- y: 2\nafter: |\n  a: text\n'
    assert [m for _, m in marked_lines(text, {"list": ""})] == [False, False, True, True, True, False, False]
    assert [m for _, m in marked_lines(text, {"a": ""})][:2] == [True, True]


def test_a_run_that_goes_on_from_another_shows_what_differs_from_it(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", {"objective": {"kind": "sft"}, "seed": 0, "model": {"path": "tiny"}})
    second = make_run(tmp_path / "second", {"objective": {"kind": "dpo"}, "seed": 0, "model": {"path": str(first)}})
    rows = recipe_view(read_run(second), {}, "", "").parent
    assert rows == [
        ["key", f"in {first}", "here"],
        ["model.path", "tiny", str(first)],
        ["objective.kind", "sft", "dpo"],
    ]
    assert recipe_view(read_run(first), {}, "", "").parent == []
    assert "Against the run that this one goes on from" in run_page(second)


def test_the_data_audit_is_the_report_of_the_start(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    report = json.loads((run / "report.json").read_text())
    report["data"] |= {"source": EVIL, "dropped": {"too long": 1}, "first": {"too long": "a.jsonl:3"}, "trained": 617}
    (run / "report.json").write_text(json.dumps(report))
    text = checked(run_page(run), HEADINGS).one("section", id="data").text()
    assert EVIL in text and "10 read, 9 kept, 1 dropped (10.0%)" in text and "1 x too long, first at a.jsonl:3" in text
    assert "1234, longest row 0, trained 617 (50%)" in text


def test_what_verify_found_is_in_the_outcome(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "final").mkdir()
    assert f"not yet: llmrecipe verify {run}" in read_page(run_page(run)).one("section", id="outcome").text()
    line = {
        "check": "packing",
        "result": "ok",
        "compared": "packed with padded",
        "difference": 1e-7,
        "bound": 1e-5,
        "reason": "",
    }
    keep_verified(run, [line, {**line, "check": "resume", "result": "failed", "reason": EVIL}, line])
    section = checked(run_page(run), HEADINGS).one("section", id="outcome")
    assert "1 failed, 2 ok; at step None, 20" in section.text()
    rows = cells(section.one("details", **{"data-name": "verified"}).one("table"))
    assert rows[2] == ["resume", "failed", "1.00e-07", "1.00e-05", f"packed with padded: {EVIL}"]
    (run / VERIFIED).write_text("{")
    with pytest.raises(RunError, match="what was verified cannot be read"):
        run_page(run)


def test_verify_keeps_what_it_found_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from llmrecipe.cli import verify
    from llmrecipe.evaluation.verify.verify_subject import CheckResult

    run = make_run(tmp_path / "run")
    monkeypatch.setattr(verify, "check_results", lambda *_: iter([CheckResult("packing", "ok", "rows", 0.0, 1.0)]))
    assert run_command(["verify", str(run), "seed=1"]) == 0 and not (run / VERIFIED).exists(), (
        "of another recipe than the run's"
    )
    assert run_command(["verify", "dpo_lora"]) == 0
    assert run_command(["verify", str(run)]) == 0
    (line,) = json.loads((run / VERIFIED).read_text())["lines"]
    assert (line["check"], line["result"], line["bound"]) == ("packing", "ok", 1.0)


# --- several runs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    first = make_run(tmp_path / "first", {"optim": {"lr": 1e-4}, "model": {"path": "tiny"}})
    second = make_run(tmp_path / "<i>second", {"optim": {"lr": 2e-4}, "model": {"path": "tiny"}}, "failed")
    return [str(first), str(second)]


def test_several_runs_share_charts_and_differ_by_colour(two: list[str], tmp_path: Path) -> None:
    page = checked(several_page(read_runs(two)), [heading for _, heading in SECTIONS])
    drawn = charts(page)
    assert set(drawn["loss"]) == {f"{r} {s}" for r in ("first", "<i>second") for s in ("train", "evaluation", "test")}
    assert drawn["loss"]["<i>second train"] == [[1, 0.69], [3, 0.5], [4, 0.25]]
    figure = next(f for f in page.all("figure") if f.one("figcaption").all("b")[0].text() == "loss")
    legend = [(li.attributes["class"], bool(li.all("path", class_="dashed"))) for li in figure.all("li")]
    assert legend == [("s1", False), ("s1", True), ("s1", True), ("s2", False), ("s2", True), ("s2", True)]
    rows = cells(page.one("section", id="outcome").one("table"))
    assert rows[1][:7] == ["first", "done", "eval/loss", "0.7", "0.3", "4", "0.31 [0.29, 0.33]"]
    assert rows[2][:2] == ["<i>second", "failed"] and rows[1][8:10] == ["400", "8 s"]
    assert cells(page.one("section", id="differences").one("table"))[1:] == [["optim.lr", "0.0001", "0.0002"]]
    groups = page.one("section", id="curves")
    assert [h.text() for h in groups.all("h3")] == ["Loss", "Scores", "Rewards", "Speed", "Memory"]


def test_compare_writes_the_page(two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "both.html"
    assert run_command(["compare", *two, "--out", str(out), "-m", "eval/loss"]) == 0
    assert f"report: {out}" in capsys.readouterr().out
    assert list(charts(read_page(out.read_text()))) == ["loss"]
    assert run_command(["compare", *two, "--out", str(tmp_path / "missing" / "x.html")]) == 2
    assert "compare: cannot write" in capsys.readouterr().err


# --- served -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ReportServer]:
    with ReportServer(make_run(tmp_path / "run")) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: ReportServer, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
    reply = connection.getresponse()
    found = reply.status, reply.read().decode(), reply.headers
    connection.close()
    return found


def test_a_served_page_follows_the_run(served: ReportServer) -> None:
    status, text, headers = ask(served)
    page = checked(text, HEADINGS)
    assert status == 200 and "data-live" in page.one("body").attributes and "connect-src 'self'" in policy(live=True)
    assert headers["Content-Security-Policy"].startswith(policy(live=True)) and headers["Cache-Control"] == "no-store"
    assert ask(served, If_None_Match=headers["ETag"])[:2] == (304, "")
    events = Events(served.run, live="off")
    events.step(step=5, loss=0.125, tokens=500, tokens_per_s=50.0)
    events.close()
    status, text, later = ask(served, If_None_Match=headers["ETag"])
    assert status == 200 and later["ETag"] != headers["ETag"]
    assert charts(read_page(text))["loss"]["train"][-1] == [5, 0.125]
    assert ask(served, method="HEAD")[:2] == (200, "")


def test_a_served_page_is_for_this_machine_and_one_run_alone(served: ReportServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert served.server_address[0] == "127.0.0.1"
    assert ask(served, Host="evil.example")[0] == 421
    assert ask(served, Host=f"localhost:{served.server_port}")[0] == 200
    for path in ("/../status.json", "/recipe.yaml", "/?x=1"):
        assert ask(served, path)[0] == 404
    assert ask(served, method="POST")[0] == 501
    with pytest.raises(RunError, match=r"--port: cannot serve at 127\.0\.0\.1:\d+: .*; --port 0 takes a free one"):
        ReportServer(served.run, served.server_port)
    (served.run / "status.json").write_text("{")
    status, text, _ = ask(served)
    assert status == 503 and "the state of the run cannot be read" in text


def test_what_live_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    assert run_command(["report", str(run), "--live", "--out", "x.html"]) == 2
    assert "--out and --card write a file and --live serves a page; give one of them" in capsys.readouterr().err
    assert run_command(["report", str(tmp_path / "ru"), "--live"]) == 2
    assert "is not a run directory" in capsys.readouterr().err


# --- a card -----------------------------------------------------------------------------------------------------------


def test_a_card_is_one_safe_picture_of_the_outcome(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, card = make_run(tmp_path / "<b>run"), tmp_path / "card.svg"
    report = json.loads((run / "report.json").read_text())
    (run / "report.json").write_text(json.dumps({**report, "recipe": {"name": EVIL, "set": {}}}))
    assert run_command(["report", str(run), "--card", str(card)]) == 0
    assert capsys.readouterr().out.endswith(f"report: {run}/report.html\ncard: {card}\n") and (run / "report.html").is_file()
    text = card.read_text()
    picture = ElementTree.fromstring(text)
    lines = ["".join(element.itertext()) for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert lines[:2] == [EVIL, "eval/loss 0.7 → 0.3, better by 0.4, test 0.31"]
    assert any(line.endswith("test 0.31 [0.29, 0.33]") for line in lines[2:]), "the interval stands in the legend"
    assert "train 0.69 → 0.25" in lines and "Cost400 tokens, 14 MB at the peak" in lines
    assert "<script" not in text and "href" not in text and text.count("http") == 1, "the name space alone"
    (run / "events.jsonl").write_text("")
    assert run_command(["report", str(run), "--card", str(card)]) == 0
    assert "done, step 0 of 4" in ElementTree.fromstring(card.read_text()).attrib["aria-label"], "nothing measured, no chart"
    assert run_command(["report", str(run), "--card", str(tmp_path / "missing" / "card.svg")]) == 2
    assert "report: cannot write" in capsys.readouterr().err
