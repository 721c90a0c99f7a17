"""Which files below a folder are recipes, and in which order."""

from __future__ import annotations

from pathlib import Path

from llmrecipe.recipe.recipe_paths import lookup, recipes_in


def test_recipes_are_the_yaml_files_outside_of_presets_and_hidden_places(tmp_path: Path) -> None:
    files = (
        "b.yaml", "a/z.yml", "a/deep/er/c.v2.yaml", "a-b/d.yaml", "base.yaml",
        "model/tiny.yaml", "a/data/rows.yaml", ".git/x.yaml", "a/.hidden.yaml", "a/notes.yml.txt", "a/readme.ymml",
    )  # fmt: skip
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "folder.yaml").mkdir()
    found = recipes_in(tmp_path)
    assert list(found.items()) == [
        ("a/deep/er/c.v2", tmp_path / "a/deep/er/c.v2.yaml"), ("a/z", tmp_path / "a/z.yml"), ("a-b/d", tmp_path / "a-b/d.yaml"),
        ("b", tmp_path / "b.yaml"), ("base", tmp_path / "base.yaml"),
    ]  # fmt: skip
    assert lookup("c.v2", [tmp_path]) == tmp_path / "a/deep/er/c.v2.yaml"
    assert lookup("tiny", [tmp_path]) is None


def test_a_new_file_is_found_at_once(tmp_path: Path) -> None:
    assert recipes_in(tmp_path) == {}
    (tmp_path / "new.yaml").write_text("{}")
    assert recipes_in(tmp_path) == {"new": tmp_path / "new.yaml"}
