"""A language-model head that an objective leaves uncalled: no wrapper selects from it or trains its biases."""

from __future__ import annotations

from pathlib import Path

from transformers import BertConfig, BertForMaskedLM

from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods._engines.biases import every_bias
from llmrecipe.methods.selective._engines.sparse_method import base_weights
from llmrecipe.models.excluded import without_language_head
from llmrecipe.models.load import load_model
from llmrecipe.recipe.schema import ModelSection
from tests.tiny import tiny_masked_model


def test_a_head_that_is_not_called_lends_neither_weights_nor_biases_to_the_wrappers() -> None:
    """BERT's decoder shares its matrix with the embedding, which stays, at the embedding alone."""
    shape = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForMaskedLM(BertConfig(**shape))
    head = {id(module) for module in model.cls.modules()}
    embedding = "bert.embeddings.word_embeddings.weight"
    before = base_weights(model)
    assert {id(module) for module, _ in before[embedding].owners} & head
    assert any(name.startswith("cls.") for name in before)
    assert any(id(module) in head for module, _ in every_bias(model))

    without_language_head(model)
    after = base_weights(model)
    assert set(before) - set(after) == {name for name in before if name.startswith("cls.")}
    assert [module for module, _ in after[embedding].owners] == [model.bert.embeddings.word_embeddings]
    assert not any(id(module) in head for module, _ in every_bias(model))


def test_a_head_that_the_checkpoint_lacks_is_no_task_head_once_it_is_excluded(tmp_path: Path) -> None:
    """An encoder stored alone, such as all-MiniLM-L6-v2, read for its states: its new head neither trains nor is saved."""
    tiny_masked_model("bert").base_model.save_pretrained(tmp_path)
    model = load_model(ModelSection(path=str(tmp_path)), rows_head="states")
    head = {name for name, _ in model.named_parameters() if name.startswith("cls.")}
    assert head and head <= Stack([]).trainable(model), "until an objective excludes it"
    assert {name.partition(".")[0] for name in model.new_heads} == {"cls"}
    without_language_head(model)
    trained = Stack([]).trainable(model)
    assert not head & trained and "bert.embeddings.word_embeddings.weight" in trained
    assert not head & Stack([]).delta(model).keys()
