"""The texts that a tokenizer is trained on."""

from __future__ import annotations

from pathlib import Path

from llmrecipe.data.texts import parts_of, texts_of
from llmrecipe.recipe.data_section import DataSection
from tests.pictures import save_picture, save_rows


def test_texts_of_pictures_are_captions_wherever_their_folder_lies(tmp_path: Path) -> None:
    """Neither the path of a picture is text that is read, nor the words of a caption a second time."""
    save_picture(tmp_path / "a.png", 1)
    save_rows(tmp_path, "train", [{"image": "a.png", "text": "a red hat", "attributes": ["red", "hat"], "label": "hat"}])
    data = DataSection(path=str(tmp_path))
    assert list(texts_of(parts_of(data, "train"), data, "pictured_words")) == ["a red hat"]
