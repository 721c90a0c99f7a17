"""Names and paths stay in their folder, and rights of models that are opened on the way come from the user alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmrecipe.core.errors import DataError, RecipeError, RunError
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.pipeline_plan import plan

OUTSIDE = ["..", "../x", "a/b", "/tmp/x", "a\\\\b", ".", " ", "x" * 300]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_run_stays_in_its_root(name: str) -> None:
    with pytest.raises(RecipeError, match=r"run.name: must be a name of one folder, without / and"):
        compose("sft_lora", [f'run.name="{name}"'])


def test_a_run_may_have_any_name_of_one_folder() -> None:
    for name in ("it's", "über 2", "a.b", "..x", "2026-01-01"):
        assert compose("sft_lora", [f'run.name="{name}"']).recipe.run.name == name


@pytest.mark.parametrize("name", ["../x", "a/b", ".."])
def test_a_stage_stays_in_its_pipeline(name: str, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump({"stages": {name: {"recipe": "sft_lora"}}}))
    with pytest.raises(RecipeError, match="a stage's name is letters, digits"):
        plan(compose(path))


@pytest.mark.parametrize("file", ["../secret.safetensors", "/tmp/x.safetensors", "in/x.safetensors", "link.safetensors"])
def test_a_layer_is_in_the_folder_of_its_stack(file: str, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    from llmrecipe.runs.delta import read_stack

    save_file({}, str(tmp_path / "secret.safetensors"))
    folder = tmp_path / "final"
    folder.mkdir()
    (folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    layer: dict[str, Any] = {"wrappers": {}, "structures": {}, "file": file}
    (folder / "stack.yaml").write_text(yaml.safe_dump({"base": {}, "layers": [layer]}))
    with pytest.raises(RunError, match="is outside of its folder"):
        read_stack(folder)


@pytest.mark.parametrize("image", ["../secret.png", "/etc/hostname", "link.png"])
def test_a_picture_is_in_the_folder_of_its_rows(image: str, tmp_path: Path) -> None:
    from llmrecipe.data.formats.bad_row import BadRow
    from llmrecipe.data.formats.data_format import Conversion
    from llmrecipe.data.row_formats.image_text import ImageText

    (tmp_path / "secret.png").write_bytes(b"x")
    folder = tmp_path / "rows"
    (folder / "in").mkdir(parents=True)
    (folder / "in" / "own.png").write_bytes(b"x")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(BadRow, match="outside of the folder of its rows"):
        ImageText().convert({"image": image, "text": "t"}, Conversion("multimodal", base=folder))
    (row,) = ImageText().convert({"image": "in/../in/own.png", "text": "t"}, Conversion("multimodal", base=folder))
    assert row["features"] == str((folder / "in" / "own.png").resolve())
    with pytest.raises(BadRow, match="in no folder"):
        ImageText().convert({"image": "in/own.png", "text": "t"}, Conversion("multimodal", base=None))


JUDGE = "{judge: {judge: {kind: local, path: x, trust_remote_code: true}, constitution: assistant}}"


def test_a_judge_gets_the_rights_of_the_users_recipe_and_not_those_of_a_run(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"defaults: [/ppo, _self_]\nobjective: {{reward: {JUDGE}}}\n")
    ran = compose(mine)
    assert ran.mapping["objective"]["reward"]["judge"]["judge"]["trust_remote_code"] is True
    run = tmp_path / "run"
    run.mkdir()
    (run / "status.json").write_text("{}")
    (run / "recipe.yaml").write_text(mine.read_text())
    opened = compose(run / "recipe.yaml")
    assert opened.mapping["objective"]["reward"]["judge"]["judge"]["trust_remote_code"] is False
    assert any("objective.reward.judge.judge.trust_remote_code: ignored" in note for note in opened.notes)
    word = "objective.reward.judge.judge.trust_remote_code=true"
    assert compose(run / "recipe.yaml", [word]).mapping["objective"]["reward"]["judge"]["judge"]["trust_remote_code"] is True


def test_a_local_judge_opens_its_model_with_the_rights_it_was_given(tmp_path: Path) -> None:
    """A model with code of its own and one of pickles are refused without, and opened with the right."""
    import torch

    from llmrecipe.core.errors import UserError
    from llmrecipe.feedback.judges.local import Local
    from llmrecipe.models.checkpoint_path import TINY

    model = tmp_path / "model"
    model.mkdir()
    for path in TINY.iterdir():
        if path.suffix != ".safetensors":
            (model / path.name).write_bytes(path.read_bytes())
    from safetensors.torch import load_file

    torch.save(load_file(TINY / "model.safetensors"), model / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"allow_pickle|safetensors"):
        Local(path=str(model)).roles  # noqa: B018
    assert Local(path=str(model), allow_pickle=True).roles.model is not None


def test_label_and_leaderboard_hand_rights_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from llmrecipe.cli.label import answers_of
    from llmrecipe.pipelines.steps import run_step
    from llmrecipe.pipelines.steps.leaderboard import Leaderboard

    seen: list[Any] = []
    monkeypatch.setattr(run_step, "run_step", lambda composition: seen.append(composition.mapping) or composition.frame.run)
    with pytest.raises(AttributeError):
        answers_of("tiny", "builtin:prompts", tmp_path, 2, 1.0, 8, 0, ["model.trust_remote_code=true"])
    assert seen[0]["words"] == ["model.trust_remote_code=true"]
    opened: list[Any] = []

    def open_subject(path: str, words: list[str]) -> Any:
        opened.append((path, words))
        raise DataError("far enough")

    monkeypatch.setattr("llmrecipe.evaluation.evaluate_model.open_subject", open_subject)
    board = Leaderboard(runs=["r"], against="a", prompts="p", reward={}, words=["model.allow_pickle=true"])
    with pytest.raises(DataError):
        board._head_to_head(0)
    assert opened == [("a", ["model.allow_pickle=true"])]


def test_a_plugin_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmrecipe.core import registry

    for name in ("", ".", "no.such", "math", "..x"):
        with pytest.raises(RecipeError, match="plugins: "):
            registry.add_plugin(name)
    (tmp_path / "broken_one").mkdir()
    (tmp_path / "broken_one" / "__init__.py").write_text("raise OSError('cannot')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RecipeError, match="plugins: broken_one cannot be imported: cannot"):
        registry._import("broken_one")
    assert json.dumps(registry.plugins()) == json.dumps([])
