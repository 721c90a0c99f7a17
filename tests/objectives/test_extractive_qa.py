"""Extractive answers: the stock head's loss and gradients, windows, characters, the best span, SQuAD's scores, whole runs."""

from __future__ import annotations

import json
import random
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from llmrecipe.core.errors import DataError, ModelError, RecipeError
from llmrecipe.core.registry import PACKAGE
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.encoder import Encoder, Item
from llmrecipe.data.tokenize.passage_rows import NO_PASSAGE, encode_passages, window_starts
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.role_models import Roles
from llmrecipe.evaluation.evaluate_model import evaluate_path
from llmrecipe.interop.load_run import open_run
from llmrecipe.interop.merged import export_merged
from llmrecipe.interop.peft.exporter import export_peft
from llmrecipe.methods._base.stack import Stack
from llmrecipe.objectives.finetuning._engines.answer_spans import (
    SpanAnswer,
    answer_scores,
    best_spans,
    best_threshold,
    span_loss,
)
from llmrecipe.objectives.finetuning.extractive_qa import ExtractiveQa, pieces_of, windows_of
from llmrecipe.recipe.data_section import DataSection
from llmrecipe.training.dry_run import check
from tests.objectives.harness import passage
from tests.support import shared
from tests.tiny import Tokenizer, tiny_span_model
from tests.trainings import events, resumes_to_the_bit, train_recipe

TINY = str(PACKAGE / "assets" / "tiny")
LENGTHS = (4, 9, 2, 6)


def roles_of(model: Any, packing: bool = True, tokens: int | None = None) -> Roles:
    return Roles(Engine(model), Stack([]), Tokenizer(), torch.device("cpu"), packing=packing, micro_tokens=tokens)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_loss_and_gradients_are_those_of_the_stock_head(family: str, packing: bool) -> None:
    """In float64, against the class's own loss of each window alone: the mean over the windows of rows of unequal length."""
    model: Any = tiny_span_model(family).double()
    rows = [passage(i, length) for i, length in enumerate(LENGTHS)]
    if family == "bert":
        rows = [{**row, "type_ids": [int(a >= 0) for a in row["begins"]]} for row in rows]
    objective, roles = ExtractiveQa(), roles_of(model, packing)
    batch = objective.collate(rows, roles)
    loss = objective.loss(batch, roles).total / objective.weight(batch)
    loss.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    windows = [w for row in rows for w in windows_of(row)]
    assert objective.weight(batch) == len(windows) > len(rows)
    theirs = torch.zeros((), dtype=torch.float64)
    for w in windows:
        inputs = {"input_ids": torch.tensor([w["ids"]])}
        if "type_ids" in w:
            inputs["token_type_ids"] = torch.tensor([w["type_ids"]])
        places = {"start_positions": torch.tensor([w["starts"]]), "end_positions": torch.tensor([w["stops"]])}
        theirs = theirs + model(**inputs, **places).loss / len(windows)
    theirs.backward()
    assert float(loss.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, atol=1e-8, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_padding_has_no_share_in_the_softmax() -> None:
    """By hand: s = (log 1, log 3), e = (log 1, log 1) of two tokens, and a third that is padding."""
    three = torch.log(torch.tensor([[[1.0, 1.0], [3.0, 1.0], [7.0, 9.0]]]))
    real = torch.tensor([[True, True, False]])
    found = span_loss(three, real, torch.tensor([1]), torch.tensor([0]))
    assert float(found) == pytest.approx(-0.5 * float(torch.log(torch.tensor(3 / 4)) + torch.log(torch.tensor(1 / 2))))


def test_windows_of_a_large_passage_are_shared_out_without_changing_the_step() -> None:
    row = passage(2, 9)
    assert len(row["windows"]) == 3 and len(row["ids"]) == 36
    pieces = list(pieces_of(row, 24))
    assert [len(p["ids"]) for p in pieces] == [24, 12] and next(pieces_of(row, 36)) is row
    objective, model = ExtractiveQa(), tiny_span_model().double()
    (whole,) = next(objective.batches([[row]], roles_of(model)))
    parts = next(objective.batches([[row]], roles_of(model, tokens=24)))
    assert [objective.weight(p) for p in (whole, *parts)] == [3.0, 2.0, 1.0]
    totals = [float(objective.loss(p, roles_of(model)).total.detach()) for p in (whole, *parts)]
    assert totals[0] == pytest.approx(totals[1] + totals[2], rel=1e-9)


@pytest.mark.parametrize(("family", "packing"), [("llama", True), ("llama", False), ("bert", False)])
def test_an_evaluation_reads_no_more_tokens_at_once_than_a_micro_batch(family: str, packing: bool) -> None:
    """A question of many windows is scored over all of them, two by two, with the numbers of one pass over them all."""
    model: Any = tiny_span_model(family).double()
    rows = [passage(0, 4), passage(1, 17), passage(2, 9)]
    if family == "bert":
        rows = [{**row, "type_ids": [int(a >= 0) for a in row["begins"]]} for row in rows]
    longest = max(len(w["ids"]) for row in rows for w in windows_of(row))
    objective, most = ExtractiveQa(null_threshold=0.0), 2 * longest
    sizes: list[int] = []
    model.base_model.register_forward_pre_hook(
        lambda module, given, named: sizes.append((given[0] if given else named["input_ids"]).numel()), with_kwargs=True
    )

    def scored(tokens: int | None) -> tuple[dict[str, Any], dict[str, torch.Tensor], int]:
        sizes.clear()
        roles = roles_of(model, packing, tokens)
        batch = objective.collate(rows, roles)
        with roles.evaluating(), torch.no_grad():
            return objective.evaluate(batch, roles), objective.collect(batch, roles), max(sizes)

    (values, tensors, whole), (found, gathered, part) = scored(None), scored(most)
    assert part <= most < whole
    assert {n: float(a) / b for n, (a, b) in found.items()} == pytest.approx({n: float(a) / b for n, (a, b) in values.items()})
    for name, tensor in tensors.items():
        torch.testing.assert_close(gathered[name], tensor, atol=1e-9, rtol=1e-6)


# --- windows and characters -------------------------------------------------------------------------------------------


def encoded(path: str, row: dict[str, Any], length: int, stride: int | None = None, **data: Any) -> dict[str, Any]:
    """The token row of a question with its passage."""
    section = DataSection(path="x", max_length=length, **data)
    encoder = Encoder(AutoTokenizer.from_pretrained(path), "all", section, stride)
    item = Item(0, "here:1", row)
    encode_passages(encoder, [item], Report())
    if item.bad is not None:
        raise item.bad
    (done,) = item.done
    return {name: value for name, value in done.items() if value is not None}


FOREIGN = "Ida 🐔 lives in Köln. Ö is ö, naïve café: 日本 — and 👩‍🌾 in Ümläut, öfter “quoted”."


def asked(context: str, answer: str) -> dict[str, Any]:
    return {"question": " Where?", "context": context, "answers": {"text": [answer], "answer_start": [context.index(answer)]}}


@pytest.mark.parametrize("name", ["tiny", "stories260k"])
@pytest.mark.parametrize("answer", ["Köln", "🐔", "naïve café", "日本", "👩‍🌾", "Ümläut, öfter", "Ida", "“quoted”."])
def test_places_stand_for_the_answers_characters(name: str, answer: str) -> None:
    """Characters of several bytes are several tokens: the text between the first and the last one is the answer again."""
    row = encoded(TINY if name == "tiny" else str(shared("models", name)), asked(FOREIGN, answer), 200)
    (window,) = windows_of(row)
    text = FOREIGN[window["begins"][window["starts"]] : window["ends"][window["stops"]]]
    assert text.strip() == answer
    assert window["nulls"] == len(window["ids"]) - 1 == row["windows"][0] - 1


@pytest.mark.skipif(
    Version(version("tokenizers")) < Version("0.23.3"), reason="tokenizers before 0.23.3 leaves out windows of a second text"
)
@pytest.mark.parametrize("stride", [5, 9, None, 100])
def test_windows_are_the_tokenizers_own(stride: int | None) -> None:
    """The same as its `only_second` truncation with the overlap that is left, save the end token of this package."""
    context = " ".join(f"The hen number {i} is red." for i in range(9))
    length = 30
    row = encoded(TINY, asked(context, "number 5 is"), length, stride)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    before = len(tokenizer("Where?", "a")["input_ids"]) - 1
    room = length - 1 - before
    step = room // 2 if stride is None else min(stride, room)
    stock = tokenizer(
        "Where?", context, truncation="only_second", max_length=length - 1, stride=room - step,
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    found = list(windows_of(row))
    assert [w["ids"][:-1] for w in found] == stock["input_ids"] and {w["ids"][-1] for w in found} == {tokenizer.eos_token_id}
    assert len(found) == len(window_starts(len(tokenizer(context, add_special_tokens=False)["input_ids"]), room, stride)) > 2
    for n, window in enumerate(found):
        shown = [i for i, side in enumerate(stock.sequence_ids(n)) if side == 1]
        spans = list(zip(window["begins"], window["ends"], strict=True))
        assert [spans[i] for i in shown] == [tuple(stock["offset_mapping"][n][i]) for i in shown]
        assert all(a == -1 for i, a in enumerate(window["begins"]) if i not in shown)
        whole = "number 5 is" in context[window["begins"][shown[0]] : window["ends"][shown[-1]]]
        text = context[window["begins"][window["starts"]] : window["ends"][window["stops"]]].strip()
        assert (text == "number 5 is") is whole and (window["starts"] == window["nulls"]) is not whole


def test_what_cannot_be_read_says_why() -> None:
    row = asked("The hen lives in Oslo.", "Oslo")
    with pytest.raises(BadRow, match=NO_PASSAGE):
        encoded(TINY, row, 4)
    with pytest.raises(BadRow, match=r"longer than data\.max_length"):
        encoded(TINY, row, 9, truncation="drop")
    for policy in ("keep_start", "truncate_prompt_left"):
        with pytest.raises(DataError, match=rf"here:1: data\.truncation={policy} has no meaning for passages.*use auto"):
            encoded(TINY, row, 9, truncation=policy)
    with pytest.raises(BadRow, match="the answer has no token"):
        encoded(TINY, {**row, "answers": {"text": [""], "answer_start": [3]}}, 40)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_the_best_span_is_the_best_of_all() -> None:
    """Against every i <= j < i + 4 of windows of chance scores; a window without a place to begin has none."""
    torch.manual_seed(0)
    scores, inside = torch.randn(6, 11, 2), torch.rand(6, 11) < 0.7
    inside[5] = False
    found, i, j = best_spans(scores, inside, 4)
    for w in range(5):
        every = {
            (a, b): float(scores[w, a, 0] + scores[w, b, 1])
            for a in range(11) for b in range(a, min(a + 4, 11)) if inside[w, a] and inside[w, b]
        }  # fmt: skip
        assert (int(i[w]), int(j[w])) == max(every, key=every.get) and float(found[w]) == pytest.approx(max(every.values()))
    assert float(found[5]) == -float("inf")


def test_an_answer_is_the_best_of_all_windows_and_no_answer_the_least_null() -> None:
    """By hand: the second window has the better span; no answer scores 1 and 4, so its odds are 1 - 5."""
    row = {**passage(1, 3), "answers": '["w1"]'}
    assert len(row["windows"]) == 2
    batch = ExtractiveQa().collate([row], roles_of(tiny_span_model()))
    scores = torch.zeros(2, 6, 2)
    scores[0, 2, 0], scores[0, 3, 1], scores[1, 3, 0], scores[1, 3, 1] = 1.0, 1.5, 2.0, 3.0
    scores[0, 5], scores[1, 5] = 0.5, 2.0  # the end token
    scores[1, 0] = 9.0  # the question is no part of the passage
    assert ExtractiveQa().answers(batch, scores) == [SpanAnswer("w1", -4.0)]
    assert ExtractiveQa(max_answer=1).answers(batch, scores) == [SpanAnswer("w1", -4.0)]
    found = SpanAnswer("w1", -4.0)
    assert [found.given(t) for t in (None, 0.0, -4.0, -4.5)] == ["w1", "w1", "w1", ""]


def test_scores_of_answers_are_those_of_a_library_on_the_same_predictions() -> None:
    """Exact match and F1 by torchmetrics 1.9.0 (`functional.text.squad`), in per cent."""
    measured = [
        ("The red hen.", ["red hen", "hen"], 100.0, 100.0),
        ("in Oslo, Norway", ["Oslo", "Norway"], 0.0, 50.0),
        ("", ["hen"], 0.0, 0.0),
        ("a café au lait", ["Café au lait!"], 100.0, 100.0),
        ("Köln", ["Bonn", "Köln am Rhein"], 0.0, 50.0),
        ("hen hen fox", ["hen fox fox"], 0.0, 66.66667175292969),
    ]
    for prediction, answers, exact, f1 in measured:
        assert answer_scores(prediction, answers) == (pytest.approx(exact / 100), pytest.approx(f1 / 100))
    assert answer_scores("", []) == (1.0, 1.0) and answer_scores("hen", []) == (0.0, 0.0) == answer_scores("", ["hen"])


def test_the_best_threshold_is_the_best_of_all() -> None:
    chance = random.Random(0)
    for _ in range(30):
        odds = [float(chance.randint(-3, 3)) for _ in range(8)]
        span, none = ([chance.choice((0.0, 0.5, 1.0)) for _ in range(8)] for _ in range(2))
        value, threshold = best_threshold(*map(torch.tensor, (odds, span, none)))

        def mean(t: float, o: list[float] = odds, s: list[float] = span, n: list[float] = none) -> float:
            return sum(b if a > t else c for a, b, c in zip(o, n, s, strict=True)) / 8

        assert value == pytest.approx(max(mean(t) for t in (-9.0, *odds))) == pytest.approx(mean(threshold))


# --- runs -------------------------------------------------------------------------------------------------------------

SMALL = ["steps=4", "batch.size=8", "data.limit=64", "eval.batches=2", "data.max_length=16", "data.stride=4", "stack=[lora]"]


def unanswerable(folder: Path, every: int = 3) -> list[str]:
    """The built-in passages, each third question with no answer in its passage."""
    for split in ("train", "valid"):
        lines = (PACKAGE / "assets" / "data" / "passages" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        for row in rows[::every]:
            row |= {"question": "Who sings?", "answers": {"text": [], "answer_start": []}}
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [f"data.path={folder}"]


def test_a_run_with_windows_and_unanswered_questions_resumes_and_is_scored_again(tmp_path: Path) -> None:
    """Four steps and two and two; `eval` reads questions one at a time and gives the run's own scores, with intervals."""
    words = [*SMALL, *unanswerable(tmp_path), "objective.null_threshold=0.0", "eval.load_best=false"]
    run = resumes_to_the_bit(tmp_path, "extractive_qa", words, 2)
    assert max(len(row["windows"]) for row in run.data) > 1
    first, last = events(tmp_path / "whole", "evaluation")[0], events(tmp_path / "whole", "evaluation")[-1]
    assert last["eval/loss"] < first["eval/loss"]
    found = evaluate_path(str(tmp_path / "whole"), ["data.cache=false", "eval.bootstrap=20"])
    for name in ("loss", "exact_match", "f1", "best_f1", "has_answer/f1", "no_answer/exact_match"):
        assert found[name] == pytest.approx(last[f"eval/{name}"], rel=1e-5), name
        assert found[f"{name}/low"] <= found[name] <= found[f"{name}/high"]
    assert found["best_f1"] >= found["f1"]
    always = evaluate_path(str(tmp_path / "whole"), ["data.cache=false", "objective.null_threshold=-1e9", "eval.bootstrap=0"])
    assert (always["no_answer/exact_match"], always["has_answer/f1"]) == (1.0, 0.0)


def test_a_run_leaves_folders_that_transformers_and_peft_open(tmp_path: Path) -> None:
    train_recipe(tmp_path / "run", "extractive_qa", *SMALL, "eval.at_start=false")
    loaded = open_run(str(tmp_path / "run"))
    ids = torch.tensor([[1, 9, 20, 31, 42, 2]])
    with torch.no_grad():
        wanted = loaded.model.eval()(input_ids=ids)
        export_merged(tmp_path / "run", tmp_path / "merged")
        plain = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "merged").float().eval()
        export_peft(tmp_path / "run", tmp_path / "peft")
        assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["task_type"] == "QUESTION_ANS"
        found = plain(input_ids=ids)
    scale = float(wanted.start_logits.abs().max())
    for side in ("start_logits", "end_logits"):
        assert float((getattr(found, side) - getattr(wanted, side)).abs().max()) < 0.03 * scale  # stored in bfloat16


def test_what_no_span_head_can_do_is_refused_before_weights_load(tmp_path: Path) -> None:
    wanted = r"objective\.null_threshold: 214 training questions have no answer.*objective\.null_threshold=0\.0"
    with pytest.raises(RecipeError, match=wanted):
        check("extractive_qa", unanswerable(tmp_path))
    shape = "model.config={model_type: t5, vocab_size: 931, d_model: 16, num_layers: 1}"
    with pytest.raises(ModelError, match="needs a model that marks spans, but 't5' offers: "):
        check("extractive_qa", ["model.init=random", "model.path=tiny", shape])
