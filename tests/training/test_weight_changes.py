"""How far training moved each place: against float64 by hand, over every method, and without a trace in the model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.additive.prompt_tuning import PromptTuning
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.runs.report.page import run_page
from llmrecipe.training.weight_changes import SAMPLE, WEIGHTS, StartValues, change_tables, sampled
from tests.contract import ANY, build, run_steps
from tests.pages import read_page
from tests.tiny import tiny_model
from tests.trainings import resume, stop_after, train_recipe

FAST = ("lora", "dora", "bitfit", "ia3", "prefix_tuning", "fishmask", "adapter")


def test_a_merged_change_is_its_norm_over_that_of_the_weight() -> None:
    model = tiny_model()
    stack = Stack([Lora(name="lora", r=2, alpha=6.0, target="attn.q|v")])
    stack.attach(model)
    start = StartValues(model, own=True)
    assert change_tables(model, stack, start) == {}, "B is zero: nothing has moved"
    wanted = {}
    for path, module, _, hook in all_hooks(model):
        hook.B.data.normal_()
        product = 3.0 * hook.B.double() @ hook.A.double()
        wanted[path] = float(product.detach().norm() / module.weight.detach().double().norm())
    table = change_tables(model, stack, start)[WEIGHTS]
    assert list(table["rows"]) == ["0", "1"] and set(table["rows"]["0"]) == {"self_attn.q_proj", "self_attn.v_proj"}
    for path, size in wanted.items():
        layer, _, place = path.removeprefix("model.layers.").partition(".")
        assert table["rows"][layer][place] == pytest.approx(size, rel=1e-5)


def test_what_trained_in_place_is_compared_with_its_sample() -> None:
    model = tiny_model()
    start = StartValues(model, own=True)
    up, norm, head = model.model.layers[1].mlp.up_proj.weight, model.model.norm.weight, model.lm_head.weight
    with torch.no_grad():
        up.mul_(1.25)
        norm[0] += 3.0
        head.mul_(0.5)
    table = change_tables(model, Stack([]), start)[WEIGHTS]
    before = norm.clone().double()
    before[0] -= 3.0
    assert table["rows"] == {"1": {"mlp.up_proj": pytest.approx(0.25, rel=1e-5)}}
    assert table["outside"] == {"model.norm": pytest.approx(3.0 / float(before.norm())), "lm_head": pytest.approx(0.5)}


def test_a_large_tensor_is_sampled_without_a_trace_in_the_generator() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    large = torch.arange(10_000.0).reshape(100, 100).t()
    found = sampled(large)
    assert torch.equal(torch.rand(1), wanted)
    assert len(found) == SAMPLE and torch.equal(found, sampled(large)) and len(found.unique() % 100) > 50
    assert torch.equal(sampled(large[:2]), large[:2].reshape(-1)), "a small one is kept whole"


def test_what_cannot_be_merged_is_the_change_of_its_own_tensors() -> None:
    model = tiny_model()
    stack = Stack([PromptTuning(name="prompt", num_virtual_tokens=4, init="normal")])
    stack.attach(model)
    start, later = StartValues(model, own=True), StartValues(model, own=False)
    own = [p for _, _, _, hook in all_hooks(model) for p in hook.parameters()]
    assert own
    with torch.no_grad():
        for parameter in own:
            parameter.add_(0.5)
    (table,) = change_tables(model, stack, start).values()
    assert list(table["outside"].values()) == [pytest.approx(0.5, rel=1e-4)]
    assert change_tables(model, stack, later) == {}, "what was added began elsewhere"


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in FAST else pytest.mark.slow) for k in ANY])
def test_every_method_has_a_picture_and_measuring_leaves_no_trace(kind: str) -> None:
    subject = build(kind)
    start = StartValues(subject.model, own=True)
    run_steps(subject, 2)
    change_tables(subject.model, subject.stack, start)  # writes the last update of what trains in place, as a forward pass does
    before = {n: t.clone() for n, t in subject.model.state_dict().items()}
    tables = change_tables(subject.model, subject.stack, start)
    after = subject.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(t, after[n]) for n, t in before.items())
    assert set(subject.stack.structures(subject.model)) == {w.name for w in subject.stack}, "it can be saved afterwards"
    sizes = [size for t in tables.values() for row in (*t["rows"].values(), t["outside"]) for size in row.values()]
    assert sizes and all(math.isfinite(size) and size > 0 for size in sizes)


@pytest.mark.slow
def test_a_run_and_its_resume_keep_the_picture_for_the_report(tmp_path: Path) -> None:
    words = ["steps=4", "data.limit=32", "batch.size=4", "eval.at_start=false", "save.every=2"]
    train_recipe(tmp_path / "whole", "sft_lora", *words)
    stop_after(2, tmp_path / "parts", "sft_lora", *words)
    resume(tmp_path / "parts")
    whole, parts = (json.loads((tmp_path / name / "report.json").read_text())["changes"] for name in ("whole", "parts"))
    assert whole == parts and whole[WEIGHTS]["rows"]
    page = read_page(run_page(tmp_path / "whole"))
    table = page.one("section", id="choices").all("table", class_="map")[0]
    assert table.one("caption").text().startswith(WEIGHTS)
    sizes = [size for row in whole[WEIGHTS]["rows"].values() for size in row.values()]
    assert len([td for td in table.all("td") if td.attributes.get("title")]) == len(sizes)
