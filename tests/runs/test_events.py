"""events.jsonl: one JSON object a line, each step once after a resume, no secrets; and what a person sees."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from llmrecipe.core.console import number, sparkline
from llmrecipe.core.errors import RecipeError, RunError
from llmrecipe.runs import tracker
from llmrecipe.runs.events import Events, last_step, read_events
from llmrecipe.runs.progress_display import Lines, Panel, display


def test_every_event_is_one_json_object_a_line(tmp_path):
    events = Events(tmp_path, live="off")
    events.step(step=1, loss=torch.tensor(2.5), lr=1e-4, grad_norm=np.float32(0.5), tokens=10)
    events.evaluation(step=1, **{"eval/loss": 2.0})
    events.sample(step=1, prompt="a\nb", answer="ü")
    events.save(step=1, path="checkpoints/step-000001")
    events.warning("careful")
    lines = (tmp_path / "events.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"event": "step", "step": 1, "loss": 2.5, "lr": 1e-4, "grad_norm": 0.5, "tokens": 10},
        {"event": "evaluation", "step": 1, "eval/loss": 2.0},
        {"event": "sample", "step": 1, "prompt": "a\nb", "answer": "ü"},
        {"event": "save", "step": 1, "path": "checkpoints/step-000001"},
        {"event": "warning", "step": 1, "message": "careful"},
    ]
    events.close()
    events.close()


def test_lines_are_on_disk_before_the_run_ends_and_numbers_json_lacks_are_null(tmp_path):
    events = Events(tmp_path, live="off")
    events.step(step=1, loss=float("nan"), grad_norm=float("inf"))
    assert read_events(tmp_path) == [{"event": "step", "step": 1, "loss": None, "grad_norm": None}]
    assert "NaN" not in (tmp_path / "events.jsonl").read_text()
    events.close()


def test_resume_leaves_each_step_once(tmp_path):
    events = Events(tmp_path, live="off")
    for step in range(1, 6):
        events.step(step=step, loss=float(step))
    events.close()
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"event": "step", "st')  # the process was killed while it wrote
    assert len(read_events(tmp_path)) == 5
    events = Events(tmp_path, live="off")
    events.resume(3)
    for step in range(4, 7):
        events.step(step=step, loss=10.0 * step)
    events.close()
    assert [(e["step"], e["loss"]) for e in read_events(tmp_path, "step")] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
        (5, 50),
        (6, 60),
    ]


def test_a_damaged_line_in_the_middle_is_named_and_left_out(tmp_path, caplog):
    (tmp_path / "events.jsonl").write_text('{"event": "step", "step": 1}\nrubbish\n{"event": "step", "step": 2}\n')
    assert [e["step"] for e in read_events(tmp_path)] == [1, 2]
    assert "events.jsonl:2: this line is not an event; it is left out" in caplog.text
    with pytest.raises(RunError, match=r"has no events\.jsonl"):
        read_events(tmp_path / "nowhere")


ODD = (
    '{"event": "step", "step": -1}',
    '{"event": "step", "step": 1' + "0" * 400 + ', "loss": 1}',
    '{"event": "step", "step": 2, "loss": 1' + "0" * 400 + "}",
    '{"event": "evaluation", "step": 2, "eval/loss": NaN}',
    '{"event": "evaluation", "step": 2, "eval/loss": -1e999}',
    '{"event": "warning", "step": 2}',
    '{"event": "warning", "step": 2, "message": {"a": 1}}',
    '{"event": "sample", "step": 2, "prompt": "a"}',
    '{"event": "save", "step": 2, "path": null}',
)
"""Lines that no run writes: a reader would stop on them."""


@pytest.mark.parametrize("line", ODD)
def test_a_line_with_odd_values_is_set_aside(line: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = '{"event": "step", "step": 1, "loss": 2.5}'
    (tmp_path / "events.jsonl").write_text(f"{whole}\n{line}\n")
    assert read_events(tmp_path) == [json.loads(whole)] and "events.jsonl:2: this line is not an event" in caplog.text
    events = Events(tmp_path, live="on")
    events.resume(step=1, lines=2)
    events.close()
    assert (tmp_path / "events.damaged").read_text() == f"{line}\n"
    assert [e["event"] for e in read_events(tmp_path)] == ["step", "warning"]


def test_a_metric_that_is_no_number_is_not_drawn(tmp_path: Path) -> None:
    lines = ['{"event": "step", "step": 1, "loss": "x"}\n', '{"event": "step", "step": 2, "loss": 1.5}\n']
    (tmp_path / "events.jsonl").write_text("".join(lines))
    events = Events(tmp_path, live="on")
    events.resume(step=2, lines=2)
    assert isinstance(events.screen, Panel) and events.screen.losses == [1.5]
    events.close()


def test_processes_that_do_not_report_write_nothing(tmp_path):
    events = Events(None, trackers=["tensorboard"])
    events.step(step=1, loss=1.0)
    events.resume(1)
    events.close()
    assert list(tmp_path.iterdir()) == []


def test_a_planted_token_is_in_no_event(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "planted-token-value-1234")
    events = Events(tmp_path, live="off")
    events.warning("cannot reach https://host/x with planted-token-value-1234; hf_abcdefghijklmnopqrst api_key=zzz is text")
    events.close()
    text = (tmp_path / "events.jsonl").read_text()
    assert "planted" not in text
    assert read_events(tmp_path)[0]["message"] == (
        "cannot reach https://host/x with <redacted>; hf_abcdefghijklmnopqrst api_key=zzz is text"
    )


def test_a_full_disk_while_reporting_is_a_clear_error(tmp_path):
    events = Events(tmp_path, live="off")
    events._file.close()
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    events._file = open("/dev/full", "a")  # noqa: SIM115
    with pytest.raises(RunError, match=r"cannot write .*events\.jsonl: No space left"):
        events.step(step=1, loss=1.0)
    events._file = None
    events.close()


def test_plain_lines_are_throttled_but_first_last_and_the_rest_are_shown():
    stream = io.StringIO()
    lines = Lines(steps=50, stream=stream, seconds=3600)
    for step in range(1, 51):
        lines.show({"event": "step", "step": step, "loss": 1.23456, "lr": 2e-5, "tokens": 12345, "tokens_per_s": 12345.6})
    lines.show({"event": "evaluation", "step": 50, "eval/loss": 2.0})
    lines.show({"event": "save", "step": 50, "path": "checkpoints/step-000050"})
    lines.show({"event": "warning", "step": 50, "message": "late"})
    lines.show({"event": "step", "step": 3, "loss": 1.0}, replay=True)
    assert stream.getvalue().splitlines() == [
        "step 1/50  loss 1.235  lr 2.00e-05  tokens_per_s 12,346",
        "step 50/50  loss 1.235  lr 2.00e-05  tokens_per_s 12,346",
        "step 50/50  evaluation: eval/loss 2",
        "step 50/50  saved checkpoints/step-000050",
        "step 50/50  warning: late",
    ]


def test_a_step_shows_the_metrics_that_were_chosen_and_all_where_there_are_none_of_them():
    def text(event: dict[str, object], *metrics: str) -> str:
        lines = Lines(None, stream := io.StringIO(), metrics=metrics)
        lines.show({"step": 1, **event})
        return stream.getvalue().strip()

    step = {"event": "step", "loss": 1.0, "lr": 0.1, "grad_norm": 2.0, "rewards/margins": 3.0, "logps/chosen": -1.0}
    assert text(step, "rewards/margins") == "step 1  loss 1  lr 0.1  rewards/margins 3"
    assert text(step, "all") == "step 1  loss 1  lr 0.1  grad_norm 2  rewards/margins 3  logps/chosen -1"
    scores = {"event": "evaluation", "test/f1": 0.5, "test/f1/low": 0.25, "test/f1/high": 0.75, "test/rows": 8}
    assert text(scores, "f1") == "step 1  evaluation: test/f1 0.5 [0.25, 0.75]"
    assert text(scores) == "step 1  evaluation: test/f1 0.5 [0.25, 0.75]  test/rows 8", "it has none of them"
    assert text({"event": "check", "kl": 0}) == "step 1  check: kl 0"


def test_live_display_only_when_a_person_watches(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    pipe, terminal = io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True
    assert isinstance(display("auto", 3, pipe), Lines)
    assert isinstance(display("off", 3, terminal), Lines)
    live = display("auto", 3, terminal)
    assert isinstance(live, Panel)
    live.close()
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(display("auto", 3, terminal), Lines)


def test_live_panel_shows_progress_curve_metrics_and_messages():
    stream = io.StringIO()
    panel = Panel(4, stream)
    for step, loss in ((1, 4.0), (2, 2.0)):
        panel.show({"event": "step", "step": step, "loss": loss, "lr": 1e-4})
    panel.show({"event": "evaluation", "step": 2, "eval/loss": 3.21})
    panel.show({"event": "warning", "step": 2, "message": "[careful]"})
    panel.close()
    text = stream.getvalue()
    for part in ("2/4", "█▁", "4 -> 2", "eval/loss", "3.21", "warning: [careful]"):
        assert part in text, part


def test_sparkline_and_numbers():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([1.0, 1.0]) == "▁▁" and sparkline([]) == ""
    assert len(sparkline(list(range(1000)), width=40)) == 40
    assert [number(v) for v in (None, 0, 3, 12345, 0.5, 1e-5, 123456.7, "x")] == [
        "-", "0", "3", "12,345", "0.5", "1.00e-05", "123,457", "x",
    ]  # fmt: skip


def test_trackers_get_numbers_of_steps_and_evaluations(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setenv("WANDB_API_KEY", "abcdef")
    fake = types.ModuleType("trackio")
    fake.init = lambda **kw: calls.append(("init", kw))
    fake.log = lambda numbers, step: calls.append((step, numbers))
    fake.finish = lambda: calls.append("finish")
    monkeypatch.setitem(sys.modules, "trackio", fake)
    monkeypatch.setattr(tracker, "is_installed", lambda name: True)
    run = tmp_path / "sft" / "now"
    run.mkdir(parents=True)
    events = Events(run, live="off", trackers=["trackio"], config={"key": "${oc.env:A_KEY}", "note": "abcdef", "seed": 1})
    events.step(step=1, loss=2.0, note="text")
    events.evaluation(step=1, **{"eval/loss": 3.0})
    events.warning("not a number")
    events.close()
    assert calls == [
        ("init", {"project": "sft", "name": "now", "config": {"key": "${oc.env:A_KEY}", "note": "<redacted>", "seed": 1}}),
        (1, {"train/loss": 2.0}),
        (1, {"eval/loss": 3.0}),
        "finish",
    ]


def test_a_tracker_that_is_absent_or_misspelt_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(tracker, "is_installed", lambda name: False)
    with pytest.raises(RunError, match=r"wandb is not installed \(wandb\): pip install 'llmrecipe\[wandb\]'"):
        Events(tmp_path, live="off", trackers=["wandb"])
    with pytest.raises(RecipeError, match="did you mean 'mlflow'"):
        tracker.check_trackers(["mlfow"])


@pytest.mark.parametrize("samples", [0, 3, 400])
def test_the_last_step_is_found_behind_any_number_of_long_samples(tmp_path, samples):
    assert last_step(tmp_path) is None
    events = Events(tmp_path, live="off")
    events.sample(step=0, prompt="p", answer="a")
    assert last_step(tmp_path) is None
    for step in (1, 2):
        events.step(step=step, loss=1.0)
    for _ in range(samples):
        events.sample(step=2, prompt="p", answer="a" * 1000)
    events.close()
    assert last_step(tmp_path) == 2
