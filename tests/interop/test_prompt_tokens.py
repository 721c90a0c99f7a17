"""Prompt tuning as tokens: a plain Transformers folder, and a text that begins with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.interop.merged import export_merged
from llmrecipe.methods.additive._engines.virtual_tokens import virtual_rows
from llmrecipe.methods.additive.prompt_tuning import PromptTuning
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.models.checkpoint_path import TINY
from tests.interop.saved_runs import VOCABULARY, base_folder, saved_run

IDS = torch.tensor([[5, 9, 3, 60, 7, 700, 2]])
P = 3


def prompt(**more: object) -> PromptTuning:
    return PromptTuning(name="prompt", num_virtual_tokens=P, **more)


def reloaded(folder: Path, head: str = "CausalLM") -> nn.Module:
    import transformers

    return getattr(transformers, f"AutoModelFor{head}").from_pretrained(folder).eval()


def told(folder: Path) -> dict:
    return json.loads((folder / "prompt.json").read_text())


def in_front(folder: Path) -> Tensor:
    return torch.cat((torch.tensor([told(folder)["ids"]]), IDS), 1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_a_text_that_begins_with_the_tokens_gives_the_logits_of_the_run(tmp_path: Path, family: str, tied: bool) -> None:
    """Also where positions are learned (GPT-2) and where the family scales its embeddings (Gemma)."""
    model = saved_run(tmp_path / "run", base_folder(tmp_path, family, tie_word_embeddings=tied), prompt())
    wanted, rows = model(input_ids=IDS).logits, virtual_rows(model, "prompt")[1].embeddings
    folder = export_merged(tmp_path / "run").path
    got = reloaded(folder)
    ids = told(folder)["ids"]
    assert ids == list(range(VOCABULARY, VOCABULARY + P))
    torch.testing.assert_close(got.get_input_embeddings()(torch.tensor(ids)), rows, atol=1e-6, rtol=1e-6)
    logits = got(input_ids=in_front(folder)).logits[:, P:]
    torch.testing.assert_close(logits[..., :VOCABULARY], wanted, atol=1e-4, rtol=1e-4)
    # The new words never win, and without them the folder is the base.
    assert (logits[..., VOCABULARY:].amax(-1) < logits.amax(-1)).all()
    torch.testing.assert_close(
        got(input_ids=IDS).logits[..., :VOCABULARY], reloaded(tmp_path / f"base-{family}")(input_ids=IDS).logits,
        atol=1e-4, rtol=1e-4,
    )  # fmt: skip


def test_the_tokenizer_spells_the_prompt_and_the_chat_template_begins_with_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    saved_run(tmp_path / "run", "tiny", prompt())
    done = export_merged(tmp_path / "run")
    tokenizer, found = AutoTokenizer.from_pretrained(done.path), told(done.path)
    assert found["text"] == "<prompt_0><prompt_1><prompt_2>"
    assert tokenizer(found["text"], add_special_tokens=False)["input_ids"] == found["ids"]
    turns = [{"role": "user", "content": "Hi"}]
    ids = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    plain = AutoTokenizer.from_pretrained(TINY).apply_chat_template(turns, return_dict=True)["input_ids"]
    assert list(ids) == found["ids"] + list(plain)
    golden = json.loads((done.path / "golden.json").read_text())
    assert golden["prompt_ids"][:P] == found["ids"]
    assert not set(golden["answer_ids"]) & set(found["ids"])
    assert any("chat template" in note for note in done.notes)


def test_it_folds_beside_another_method_and_below_a_second_export(tmp_path: Path) -> None:
    """LoRA on embedding and head under the prompt; then the folder is the base of another prompt with words of its own."""
    lora = Lora(name="lora", target="embed + attn.q + head")
    model = saved_run(tmp_path / "run", base_folder(tmp_path), lora, prompt())
    wanted = model(input_ids=IDS).logits
    folder = export_merged(tmp_path / "run").path
    got = reloaded(folder)(input_ids=in_front(folder)).logits[:, P:, :VOCABULARY]
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    saved_run(tmp_path / "next", folder, prompt())
    assert told(export_merged(tmp_path / "next").path)["text"] == "<prompt_3><prompt_4><prompt_5>"


def test_a_classifier_reads_the_tokens_too(tmp_path: Path) -> None:
    labels = ["no", "yes", "maybe"]
    model = saved_run(tmp_path / "run", base_folder(tmp_path), prompt(), head="classification", labels=labels)
    wanted = model(input_ids=IDS).logits
    folder = export_merged(tmp_path / "run").path
    got = reloaded(folder, "SequenceClassification")(input_ids=in_front(folder)).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def t5_folder(root: Path) -> Path:
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(root / "base-t5")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(root / "base-t5")
    return root / "base-t5"


def test_what_has_no_spelling_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    base = base_folder(tmp_path)
    saved_run(tmp_path / "behind", base, prompt(position="after_bos"))
    saved_run(tmp_path / "two", base, prompt(), PromptTuning(name="more", num_virtual_tokens=2))
    saved_run(tmp_path / "tied", t5_folder(tmp_path), prompt(), head="seq2seq")
    for run, why in (("behind", "after a document's first token"), ("two", "only one prompt"), ("tied", "is tied")):
        with pytest.raises(ModelError, match=why):
            export_merged(tmp_path / run)
        assert not (tmp_path / run / "merged").exists()
