"""GGUF files in llama.cpp itself: it takes them, cuts text as the run does, computes its numbers and gives its answers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe.data.tokenize.call_tokenizer import call_tokenizer
from llmrecipe.data.tokenize.chat_templates import prompt_ids, set_template, turn_end_tokens
from llmrecipe.engine.generation import generate
from llmrecipe.engine.sampling import Sampling
from llmrecipe.evaluation.chat import Chat
from llmrecipe.interop.gguf.cutting import as_llama_cpp, cuts_of
from llmrecipe.interop.gguf.gguf_export import export_gguf
from llmrecipe.interop.gguf.ollama import CONVERSATIONS
from llmrecipe.interop.gguf.writer import write_gguf
from llmrecipe.interop.merged import export_merged
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.models.checkpoint_path import TINY
from llmrecipe.models.vocabulary import add_tokens
from tests.interop.llama_cpp import llama_cpp
from tests.interop.saved_runs import base_folder, saved_run
from tests.interop.tokenizers_for_gguf import KINDS, corpus
from tests.support import shared
from tests.tiny import tiny_model

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
pytestmark = pytest.mark.slow

TEXTS = (
    "The hen lives in the barn.", "Tom has 12 apples; he buys 345 more!\nHow many?", "na\u00efve \u00fcber \u6f22\u5b57", "",
    " ", "   a", "a   b", "a \n b", "\n\n\n", "\t\tx\t", "x  \n\n  y", "trailing  ", "1234567890 3.14159 1,000", "12ab34",
    "\u00bd \u00b2 \u0663\u0664", "\U0001f600\U0001f469\u200d\U0001f467\U0001f1e9\U0001f1ea", "\ufb01 \u2167",
    "don't I'll WE'VE it\u2019s", "<eos>", "<bos>hi<eos>there <|user|> x", "</s> <s>", "<unk>", "<0x0A>", "\u2581a\u2581b",
    "\u0120hello", "snake_case CamelCase", "http://x.y/z?a=b&c=d",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0e44\u0e17\u0e22",
    "zero\u200bwidth\u00a0nbsp\u3000wide", "\r\n\r\nx\r", "!!!???...---", "a" * 50, "ab " * 20, "\ufeffbom", "[PAD5]",
)  # fmt: skip
COMPOSED = "e\u0301 a\u0308 n\u0303"
PARTS = ["a", "b", " ", "  ", "   ", "\n", "1", "23", "\u00e9", "\u6f22", "\U0001f600", "'", "'s", ".", ",", "\t", "The", "hen"]
PARTS += ["_", "-", " x", "\r", "\n\n", "foo"]
ANSWER = 24
WIDE = {"max_position_embeddings": 256}
"""llama.cpp's shortest context."""
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("", {}),
    "stories260k": ("", {}),
    "llama tied, scaled": ("llama", {"tie_word_embeddings": True, "head_dim": 16, "rope_parameters": LLAMA3}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"head_dim": 16}),
    "qwen2": ("qwen2", {"rope_parameters": LINEAR}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
}


def texts(tokenizer: Any, count: int) -> list[str]:
    """The texts above, and random ones with the tokenizer's own special and added tokens inside."""
    rng = random.Random(3)
    own = [token.content for token in tokenizer.added_tokens_decoder.values()]
    drawn = ["".join(rng.choice([*PARTS, *own, *own]) for _ in range(rng.randint(1, 9))) for _ in range(count)]
    return [*TEXTS, *own, *drawn]


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_the_run_computes(name: str, tmp_path: Path) -> None:
    """Tokens, log-probabilities and greedy answers, of raw text and of conversations."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    family, more = MODELS[name]
    if name == "stories260k":
        base = shared("models", name)
    else:
        base = base_folder(tmp_path, family, **WIDE, **more) if family else name
    saved_run(tmp_path / "run", base, Lora(name="lora", target="attn.q"))
    merged = export_merged(tmp_path / "run", dtype="float32").path
    file = export_gguf(tmp_path / "run", dtype="float32").path / "model.gguf"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged).eval(), AutoTokenizer.from_pretrained(merged)
    chat = Chat.open([str(merged)], [], Sampling(max_new_tokens=ANSWER))
    story = " ".join(TEXTS[:3])
    ids = call_tokenizer(tokenizer, f"{story} {story}")["input_ids"][:100]
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    size = wanted.shape[-1]
    full = next(n for n in ids[1:] if str(tokenizer.decode([n])).isascii())
    with llama_cpp(file) as served:
        ends = {str(tokenizer.convert_ids_to_tokens(number)) for number in turn_end_tokens(tokenizer)}
        assert ends <= served.ends()
        for length in (1, 2, 5, 13, 34, len(ids)):
            found = served.logprobs(ids[:length], size, full)
            assert (found - wanted[length - 1]).abs().max() < 1e-4
        stops = set(tokenizer.convert_tokens_to_ids(list(served.ends())))
        for conversation in CONVERSATIONS:
            turns = [{"role": role, "content": text} for role, text in conversation]
            prompt = prompt_ids(tokenizer, turns)
            assert served.ids(served.rendered(turns), True) == prompt
            own = generate(chat.loaded.model, tokenizer, [prompt], chat.sampling)[0]
            # llama.cpp also ends at tokens that it knows for ends by their text.
            own = own[: next((place + 1 for place, token in enumerate(own) if token in stops), len(own))]
            assert served.greedy(prompt, ANSWER) == own
            text, count, why = served.answer(turns, ANSWER)
            assert (count, why) == (len(prompt), "stop" if own[-1] in stops else "length")
            if "\ufffd" not in (written := str(tokenizer.decode(own, skip_special_tokens=True))):
                assert text.strip() == written.strip()
            if own[-1] not in stops - set(turn_end_tokens(tokenizer)):
                chat.turns = turns[:-1]
                assert chat.answer(turns[-1]["content"], remember=False) == written.strip()
        assert not served.complaints()
        for text in texts(tokenizer, 60):
            for special in (False, True):
                assert served.ids(text, special) == call_tokenizer(tokenizer, text, add_special_tokens=special)["input_ids"]


@pytest.mark.parametrize("name", KINDS)
def test_llama_cpp_cuts_as_its_rules_say_and_prompts_as_the_tokenizer_does(name: str, tmp_path: Path) -> None:
    """Raw text goes by `cutting.as_llama_cpp`; conversations have the tokens of the run, whatever the template starts with."""
    tokenizer = KINDS[name]()
    model: Any = tiny_model("llama", vocab_size=len(tokenizer) + 5, num_hidden_layers=1, **WIDE)
    model.save_pretrained(tmp_path)
    tables = write_gguf(tmp_path, tmp_path / "model.gguf", model.config, tokenizer, "F32", "x")
    rules, own = as_llama_cpp(tokenizer, tables.space_first if tables.model == "llama" else None), cuts_of(tokenizer)
    with llama_cpp(tmp_path / "model.gguf") as served:
        assert not served.complaints()
        for text in [*texts(tokenizer, 150), COMPOSED, *corpus()[:50]]:
            assert served.ids(text) == rules(text)
        for conversation in CONVERSATIONS:
            turns = [{"role": role, "content": text} for role, text in conversation]
            wanted = prompt_ids(tokenizer, turns)
            assert served.ids(served.rendered(turns), True) == wanted
            assert served.answer(turns, 1)[1] == len(wanted)
        differing = [text for text in TEXTS if own(text) != rules(text)]
        assert bool(differing) == any("some other texts otherwise" in note for note in tables.notes), differing


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_llama_cpp_reads_every_type_of_matrix(family: str, kind: str, tmp_path: Path) -> None:
    """llama.cpp rounds the other factor of a product to the type of the weights, so the numbers agree to that type."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = base_folder(tmp_path, family, hidden_size=64, intermediate_size=96, **WIDE)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(TINY)
    write_gguf(base, tmp_path / "model.gguf", model.config, tokenizer, kind, "x")
    ids = tokenizer(" ".join(TEXTS[:3]))["input_ids"]
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    full = next(n for n in ids[1:] if str(tokenizer.decode([n])).isascii())
    with llama_cpp(tmp_path / "model.gguf") as served:
        found = served.logprobs(ids, len(wanted), full)
        assert not served.complaints()
    assert (found - wanted).abs().max() < {"F16": 2e-2, "BF16": 0.1, "Q8_0": 0.1}[kind]


@pytest.mark.parametrize("name", ["plain", "alpaca"])
@pytest.mark.parametrize("kind", ["gpt-2", "prepending", "metaspace"])
def test_llama_cpp_renders_the_built_in_templates(kind: str, name: str, tmp_path: Path) -> None:
    tokenizer = KINDS[kind]()
    add_tokens(tokenizer, ["<|im_start|>", "<|im_end|>"])
    set_template(tokenizer, name)
    model: Any = tiny_model("llama", vocab_size=len(tokenizer), num_hidden_layers=1, **WIDE)
    model.save_pretrained(tmp_path)
    write_gguf(tmp_path, tmp_path / "model.gguf", model.config, tokenizer, "F32", "x")
    with llama_cpp(tmp_path / "model.gguf") as served:
        for conversation in CONVERSATIONS:
            turns = [{"role": role, "content": text} for role, text in conversation]
            assert served.ids(served.rendered(turns), True) == prompt_ids(tokenizer, turns)
        ends = {str(tokenizer.convert_ids_to_tokens(number)) for number in turn_end_tokens(tokenizer)}
        assert ends <= served.ends()
        assert not served.complaints()
