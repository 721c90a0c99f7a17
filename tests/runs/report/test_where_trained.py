"""Pictures of where a method trained: by layer and place, from what a run has kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmrecipe.runs.report.page import run_page
from llmrecipe.runs.report.places import place_table
from llmrecipe.runs.report.where_trained import where_trained
from tests.pages import checked
from tests.runs.report.test_page import EVIL, HEADINGS, make_run

NAMES = {
    "model.layers.0.self_attn.q_proj.lora.A": [2, 32],
    "model.layers.0.self_attn.q_proj.lora.B": [32, 2],
    "model.layers.1.mlp.experts.lora__up.A": [4, 2, 8],
    "model.layers.1.mlp.up_proj.weight": [5, 7],
    "model.layers.1.mlp.up_proj.bias": [5],
    "score.weight": [3],
}


def shown(maps: list[Any]) -> dict[str, dict[str, list[str]]]:
    return {m.title: {row.name: [cell.text for cell in row.cells] for row in m.rows} for m in maps}


def test_trained_parameters_count_at_their_place(tmp_path: Path) -> None:
    (made,) = where_trained(tmp_path, {"stack": {"lora": "lora"}, "trained": {"names": NAMES}})
    assert made.columns == ["self_attn.q_proj", "mlp.experts", "mlp.up_proj", "mlp.up_proj.bias"]
    assert shown([made])["Trained parameters"] == {"layer 0": ["128", "", "", ""], "layer 1": ["", "64", "35", "5"]}
    assert made.outside == [("score", "3")]
    assert where_trained(tmp_path, {}) == []


def test_choices_of_a_finished_run_are_numbers_by_place(tmp_path: Path) -> None:
    structures = {
        "adalora": {"scored": True, "ranks": {"model.layers.0.q": 3, "model.layers.1.q": 0}},
        "esft": {"experts": {"model.layers.1.mlp.experts": [0, 5, 7]}},
        "fishmask": {"tensors": {"lm_head.weight": {"layout": "flat", "count": 12, "idx": "ab"}}},
        "prefix": {"reparam": "flat"},
    }
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "stack.yaml").write_text(
        json.dumps({"layers": [{"structures": {"below": {"ranks": {"x": 1}}}}, {"structures": structures}]})
    )
    maps = where_trained(tmp_path, {})
    assert shown(maps) == {
        "adalora: ranks": {"layer 0": ["3"], "layer 1": ["0"]},
        "esft: experts": {"layer 1": ["3"]},
        "fishmask: tensors": {},
    }
    assert maps[2].outside == [("lm_head.weight", "12")] and (maps[0].note, maps[1].note) == ("by place", "how many")


def test_encoder_and_decoder_layers_are_rows_of_their_own() -> None:
    table = place_table({"encoder.block.0.q": 1.0, "decoder.block.0.q": 2.0, "decoder.block.0": 3.0}, "")
    assert table["rows"] == {"encoder.block 0": {"q": 1.0}, "decoder.block 0": {"q": 2.0, "block": 3.0}}


def test_the_size_of_the_change_is_the_first_picture_of_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    report = json.loads((run / "report.json").read_text())
    report["changes"] = {
        "Change of the weights": place_table({"m.0.q": 0.5, f"m.0.{EVIL}": 1.0, "m.1.q": 0.125, "head": 0.25}, "norm")
    }
    (run / "report.json").write_text(json.dumps(report))
    section = checked(run_page(run), HEADINGS).one("section", id="choices")
    first, second = section.all("table", class_="map")
    assert first.one("caption").text() == "Change of the weights: norm" and "expert" in second.one("caption").text()
    assert [(td.text(), td.attributes.get("class")) for td in first.one("tbody").all("td")] == [
        ("0.5", "h3"), ("1", "h5"), ("0.125", "h1"), ("", None),
    ]  # fmt: skip
    assert first.all("td")[2].attributes["title"] == f"layer 0, place {EVIL}: 1"
    assert "Outside of the layers: head0.25" in section.text()
