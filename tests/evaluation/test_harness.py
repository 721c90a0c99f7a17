"""Tasks of lm-evaluation-harness: equal to the harness called directly, adapters mounted, results kept and compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe.cli import eval as verb
from llmrecipe.core.errors import RunError, UserError
from llmrecipe.data.collate import Sequence
from llmrecipe.evaluation import harness
from llmrecipe.evaluation.evaluate_model import open_subject
from llmrecipe.models.tiny import FOLDER
from llmrecipe.runs.run_record import TASK_SCORES, read_runs, read_task_scores
from tests.trainings import train_recipe

WORDS = [("open", "closed", "cake"), ("big", "small", "sheep"), ("sweet", "bitter", "the"), ("hot", "cold", "barn")]
TASK = """task: opposites
dataset_path: json
dataset_kwargs: {{data_files: {{test: {0}/rows.jsonl, train: {0}/rows.jsonl}}}}
output_type: multiple_choice
test_split: test
fewshot_split: train
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with one task of four questions."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"q": f"The day was not {a}, it was", "choices": [b, c], "gold": 0} for a, b, c in WORDS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "opposites.yaml").write_text(TASK.format(folder), encoding="utf-8")
    return folder


def scores(acc: float) -> dict[str, Any]:
    return {"metrics": {"acc": acc}, "errors": {"acc": 0.1}, "shots": 0, "limit": None, "rows": 4}


def direct(model: Any, task: Path, **options: Any) -> dict[str, float]:
    """What the harness says without us."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    out = lm_eval.simple_evaluate(model=model, tasks=["opposites"], task_manager=TaskManager(include_path=str(task)), **options)
    return {k.removesuffix(",none"): v for k, v in out["results"]["opposites"].items() if k.endswith(",none")}


def same(found: dict[str, Any], wanted: dict[str, float]) -> None:
    """Metrics and standard errors agree."""
    mine = {**found["metrics"], **{f"{name}_stderr": value for name, value in found["errors"].items()}}
    assert mine == pytest.approx(wanted)


@pytest.mark.parametrize("options", [{}, {"shots": 2}, {"limit": 3}], ids=str)
def test_a_model_scores_what_the_harness_scores_directly(options: dict[str, int], task: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'llmrecipe[eval]'")
    theirs = {{"shots": "num_fewshot"}.get(k, k): v for k, v in options.items()}
    wanted = direct("hf", task, model_args=f"pretrained={FOLDER},dtype=float32", device="cpu", batch_size=2, **theirs)
    found = harness.score_tasks("tiny", [], ["opposites"], include=task, **options)["opposites"]
    same(found, wanted)
    assert (found["shots"], found["limit"], found["rows"]) == (
        options.get("shots", 0),
        options.get("limit"),
        options.get("limit", 4),
    )


@pytest.mark.parametrize("options", [{}, {"shots": 2}], ids=str)
def test_a_run_is_scored_with_its_adapters_and_keeps_the_scores(options: dict[str, int], task: Path, tmp_path: Path) -> None:
    """Equal to the merged model, whose likelihoods a rate of 0.05 has moved; with examples before the question, too."""
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'llmrecipe[eval]'")
    from lm_eval.models.huggingface import HFLM

    from llmrecipe.interop.load_run import load

    run = tmp_path / "run"
    train_recipe(run, "sft_lora", "steps=2", "optim.lr=0.05", "data.limit=16", "eval.batches=1")
    model, tokenizer = load(run)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu")
    wanted = direct(theirs, task, num_fewshot=options.get("shots"))
    same(harness.score_tasks(str(run), [], ["opposites"], include=task, **options)["opposites"], wanted)
    kept = read_task_scores(run)["opposites"]
    assert (kept["metrics"]["acc"], kept["shots"]) == (wanted["acc"], options.get("shots", 0))


@pytest.mark.parametrize("recipe", ["prompt_tuning", "prefix_tuning"])
def test_virtual_tokens_move_no_position_of_the_harness(recipe: str, tmp_path: Path) -> None:
    """Log-likelihoods of continuations of unlike lengths, in one batch, are those of the run's own engine."""
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'llmrecipe[eval]'")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    run = tmp_path / "run"
    train_recipe(run, recipe, "steps=2", "optim.lr=0.05", "data.limit=16", "eval.batches=1")
    subject = open_subject(str(run), [])
    tokenizer, engine = subject.loaded.tokenizer, subject.roles.engine
    pairs = [("The day was", " open"), ("The", " hen sat in the old barn"), ("It was not big, it was", " small and cold")]
    wanted = []
    for context, text in pairs:
        start, ids = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (context, context + text))
        row = Sequence(ids, [0] * len(start) + [1] * (len(ids) - len(start)), prompt=len(start))
        with torch.no_grad():
            wanted.append(float(engine(subject.roles.layout([row], [0]))["logprobs"].sum()))
    model = HFLM(pretrained=subject.loaded.model, tokenizer=tokenizer, device="cpu", batch_size=3, add_bos_token=False)
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    assert [score for score, _ in model.loglikelihood(requests)] == pytest.approx(wanted, rel=1e-4)


def test_an_unknown_task_is_refused_with_the_nearest(task: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'llmrecipe[eval]'")
    with pytest.raises(UserError, match=r"no task 'oposites'.*opposites"):
        harness.score_tasks("tiny", [], ["oposites"], include=task)


def test_without_the_harness_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "is_installed", lambda name: False)
    with pytest.raises(UserError, match=r"pip install 'llmrecipe\[eval\]'"):
        verb.verb("tiny", tasks="hellaswag")


@pytest.mark.parametrize("option", [{"shots": 1}, {"limit": 2}, {"include": Path()}], ids=str)
def test_options_of_tasks_are_refused_without_tasks(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(UserError, match=f"--{name}: belongs to --tasks"):
        verb.verb("tiny", **option)


def test_scores_of_several_calls_are_kept_and_compared(tmp_path: Path) -> None:
    for name, acc in (("a", 0.25), ("b", 0.5)):
        run = tmp_path / name
        run.mkdir()
        (run / "status.json").write_text('{"status": "done"}', encoding="utf-8")
        (run / "recipe.yaml").write_text("steps: 1\n", encoding="utf-8")
        harness.write_task_scores(run, {"one": scores(acc), "two": scores(0.0)})
        harness.write_task_scores(run, {"two": scores(acc + 0.1)})
    facts = [record.facts() for record in read_runs([str(tmp_path / name) for name in "ab"])]
    assert [(f["one/acc"], f["two/acc"]) for f in facts] == [(0.25, pytest.approx(0.35)), (0.5, pytest.approx(0.6))]
    (tmp_path / "a" / TASK_SCORES).write_text("{", encoding="utf-8")
    with pytest.raises(RunError, match=r"tasks.json: not valid JSON.*score the tasks again"):
        read_task_scores(tmp_path / "a")


@pytest.mark.parametrize("more", [{"tasks": ","}, {"tasks": "a", "by": "x"}, {"tasks": "a", "split": "test"}], ids=str)
def test_tasks_without_a_name_or_with_rows_of_a_recipe_are_refused(more: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"--tasks: (name at least one|the rows and splits)"):
        verb.verb("tiny", **more)  # type: ignore[arg-type]
