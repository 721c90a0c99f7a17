"""GGUF export: Transformers reads the file back with the logits and tokens of the run; Ollama prompts it as it was trained."""

from __future__ import annotations

import json
import shlex
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe.cli.app import run_command as command
from llmrecipe.core import registry
from llmrecipe.core.errors import ModelError, UserError
from llmrecipe.data.tokenize.chat_templates import Template, template_of
from llmrecipe.evaluation.verify.golden_prompt import compare_golden
from llmrecipe.interop.export_card import card_text
from llmrecipe.interop.export_options import ExportOptions
from llmrecipe.interop.gguf import converter, gguf_export
from llmrecipe.interop.gguf.architecture import as_stored, refuse_family
from llmrecipe.interop.gguf.cutting import as_llama_cpp, bos_added, cuts_of, probe_prompts
from llmrecipe.interop.gguf.gguf_export import create_command, export_gguf, probes
from llmrecipe.interop.gguf.ollama import CONVERSATIONS, turns_of
from llmrecipe.interop.gguf.token_tables import token_tables_of
from llmrecipe.interop.gguf.writer import write_gguf
from llmrecipe.interop.merged import export_merged
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.models.checkpoint_path import TINY
from tests.interop.saved_runs import base_folder, saved_run
from tests.interop.tokenizers_for_gguf import KINDS
from tests.support import shared
from tests.tiny import tiny_model

gguf: Any = pytest.importorskip("gguf")


def read_back(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32).eval()
    where = {} if (folder / "tokenizer.json").exists() else {"gguf_file": "model.gguf"}
    return model, AutoTokenizer.from_pretrained(folder, **where)


def merged_back(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)


def assert_same(folder: Path, merged: Path) -> None:
    """Logits and tokens of the file are those of the merged folder."""
    (found, cuts), (wanted, own) = read_back(folder), merged_back(merged)
    ids = torch.tensor([[5, 9, 3, 60, 7, 300, 2, 41]])
    assert torch.equal(found(input_ids=ids).logits, wanted(input_ids=ids).logits)
    for text in probes(own):
        assert cuts(text, add_special_tokens=False)["input_ids"] == own(text, add_special_tokens=False)["input_ids"]
    assert cuts("The hen is brown.")["input_ids"] == own("The hen is brown.")["input_ids"]
    assert (cuts.bos_token, cuts.eos_token) == (own.bos_token, own.eos_token)
    if own.chat_template:
        turns = [{"role": r, "content": c} for r, c in CONVERSATIONS[-1]]
        assert cuts.apply_chat_template(turns, tokenize=False) == own.apply_chat_template(turns, tokenize=False)


def test_transformers_reads_the_embedded_model_back_and_ollama_prompts_it_as_it_was_trained(tmp_path: Path) -> None:
    saved_run(tmp_path / "run", "tiny", Lora(name="lora", target="attn.q"))
    done = export_gguf(tmp_path / "run", dtype="float32")
    assert done.difference.largest == 0.0 and done.path == tmp_path / "run" / "gguf"
    assert_same(done.path, export_merged(tmp_path / "run", dtype="float32").path)
    assert (done.path / "Modelfile").read_text() == (
        "FROM ./model.gguf\n"
        'TEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}<|system|>{{ .Content }}<eos>'
        '{{ else if eq .Role "user" }}<|user|>{{ .Content }}<eos>'
        '{{ else if eq .Role "assistant" }}<|assistant|>{{ .Content }}<eos>{{ end }}{{ end }}<|assistant|>"""\n'
        'PARAMETER stop "<eos>"\n'
        "PARAMETER num_ctx 512\n"
    )
    golden = json.loads((done.path / "golden.json").read_text())
    model, tokenizer = read_back(done.path)
    out = model.generate(torch.tensor([golden["prompt_ids"]]), max_new_tokens=24, do_sample=False)
    assert out[0, len(golden["prompt_ids"]) :].tolist() == golden["answer_ids"]
    assert "{% generation" not in tokenizer.chat_template


def test_a_real_model_with_sentencepiece_is_read_back(tmp_path: Path) -> None:
    base = shared("models", "stories260k")
    saved_run(tmp_path / "run", base, Lora(name="lora", target="attn.q"))
    done = export_gguf(tmp_path / "run")
    assert_same(done.path, export_merged(tmp_path / "run").path)
    assert 'TEMPLATE """{{ .Prompt }}"""' in (done.path / "Modelfile").read_text()
    # The reader of Transformers builds another tokenizer of these pieces.
    assert any("the tokenizer is saved next to the file" in note for note in done.notes)
    compare_golden(done.path)
    assert "from_pretrained('.')" in card_text({}, "", "gguf", ".", own_tokenizer=True)


FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", {}),
    ("mistral", {}),
    ("llama", {"tie_word_embeddings": True}),
]
BEYOND: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3", {"head_dim": 16}, "head_dim"),
    ("llama", {"attention_bias": True, "mlp_bias": True}, "attention_bias, mlp_bias"),
    (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
            }
        },
        "rope_parameters",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("family", "more"), FAMILIES)
def test_families_are_read_back(tmp_path: Path, family: str, more: dict[str, Any]) -> None:
    saved_run(tmp_path / "run", base_folder(tmp_path, family, **more), Lora(name="lora", target="attn.q"))
    assert_same(export_gguf(tmp_path / "run").path, export_merged(tmp_path / "run").path)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "more", "named"), BEYOND)
def test_what_the_reader_of_transformers_leaves_out_is_named(
    tmp_path: Path, family: str, more: dict[str, Any], named: str
) -> None:
    saved_run(tmp_path / "run", base_folder(tmp_path, family, **more), Lora(name="lora", target="attn.q"))
    done = export_gguf(tmp_path / "run")
    assert done.difference.largest == 0.0
    assert any(note.startswith(f"Transformers takes no {named} from a GGUF file") for note in done.notes)


def test_scaled_frequencies_are_divisors_of_the_plain_ones(tmp_path: Path) -> None:
    """Low frequencies are divided by the factor and high ones left alone, as Llama 3.1 scales them."""
    saved_run(tmp_path / "run", base_folder(tmp_path, "llama", **BEYOND[2][1]), Lora(name="lora", target="attn.q"))
    done = export_gguf(tmp_path / "run")
    (divisors,) = (t.data for t in gguf.GGUFReader(done.path / "model.gguf").tensors if t.name == "rope_freqs.weight")
    assert divisors[0] == 1.0 and divisors[-1] == pytest.approx(8.0) and (divisors[1:] >= divisors[:-1]).all()


def test_rows_of_q_and_k_go_in_pairs() -> None:
    """Two heads of width 4: (0, 2), (1, 3) are rotated together in Transformers; in the file they are neighbours."""

    class Config:
        num_attention_heads, num_key_value_heads = 2, 1

    rows: Any = torch.arange(8.0)[:, None]
    config: Any = Config()
    assert as_stored("blk.0.attn_q.weight", rows, config, "llama").flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert as_stored("blk.0.attn_k.bias", torch.arange(4.0), config, "llama").tolist() == [0, 2, 1, 3]
    assert torch.equal(as_stored("blk.0.attn_v.weight", rows, config, "llama"), rows)
    assert torch.equal(as_stored("blk.0.attn_q.weight", rows, config, "qwen2"), rows)


def test_eight_bits_a_weight_are_within_half_a_step(tmp_path: Path) -> None:
    saved_run(tmp_path / "run", "tiny", Lora(name="lora", target="attn.q"), dtype="float32")
    done = export_gguf(tmp_path / "run", dtype="q8_0")
    model, _ = merged_back(export_merged(tmp_path / "run").path)
    wanted = dict(model.named_parameters())["model.layers.0.mlp.down_proj.weight"].detach()
    tensors = {t.name: t for t in gguf.GGUFReader(done.path / "model.gguf").tensors}
    down = tensors["blk.0.ffn_down.weight"]
    assert down.tensor_type == gguf.GGMLQuantizationType.Q8_0
    assert tensors["blk.0.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    found = torch.from_numpy(gguf.quants.dequantize(down.data, down.tensor_type))
    step = wanted.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
    # The scale is float16: eleven bits.
    bound = 0.5 * step + wanted.unflatten(-1, (-1, 32)).abs() * 2.0**-11
    assert ((found - wanted).unflatten(-1, (-1, 32)).abs() <= bound * 1.001).all()
    assert 0.0 < done.difference.largest <= 0.05 * done.difference.scale


@pytest.mark.parametrize(
    ("family", "more", "words"),
    [
        ("gpt2", {}, "GPT2LMHeadModel is none of the classes written here"),
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu"),
        ("mistral", {"sliding_window": 8}, "last 8 tokens alone"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rotary frequencies are scaled by 'dynamic'",
        ),
        ("qwen2", BEYOND[2][1], "scaled by 'llama3' in its architecture llama, and not in qwen2"),
        ("qwen3", BEYOND[2][1], "scaled by 'llama3' in its architecture llama, and not in qwen3"),
        ("qwen3", {"attention_bias": True}, "its attention has biases"),
        ("qwen2", {"head_dim": 16}, "do not add up to hidden_size"),
    ],
)
def test_a_family_without_a_counterpart_is_refused(tmp_path: Path, family: str, more: dict[str, Any], words: str) -> None:
    from tests.tiny import tiny_config

    config = tiny_config(family, **more)
    name = {"gpt2": "GPT2LMHeadModel"}.get(family, f"{family.capitalize()}ForCausalLM")
    with pytest.raises(ModelError, match=words) as refusal:
        refuse_family(name, config)
    assert "--converter" in str(refusal.value)


def test_a_classifier_is_refused_before_it_is_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_run(tmp_path / "run", base_folder(tmp_path), Lora(name="lora"), head="classification", labels=["a", "b"])
    monkeypatch.setattr(gguf_export, "export_merged", lambda *_, **__: pytest.fail("merged"))
    with pytest.raises(ModelError, match="LlamaForSequenceClassification does not continue a text"):
        export_gguf(tmp_path / "run")
    assert not (tmp_path / "run" / "gguf").exists()


def tokenizer_with(change: Any) -> Any:
    """The embedded tokenizer with its JSON changed."""
    parts = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    change(parts)
    return tokenizer_of(parts)


def tokenizer_of(parts: Any) -> Any:
    """A tokenizer of its JSON."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.update(normalizer={"type": "Lowercase"}), "changes text before cutting it"),
        (lambda p: p.update(pre_tokenizer={"type": "Whitespace"}), "a pattern that is none of gpt-2, smollm"),
        (lambda p: p["model"].update(ignore_merges=True), "do not go together"),
    ],
)
def test_a_tokenizer_without_a_counterpart_is_refused(change: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        token_tables_of(tokenizer_with(change), 931)


def pieces(merges: list[list[str]]) -> Any:
    """A SentencePiece-like tokenizer of the letters a and b."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    known = ["<unk>", "\u2581", "a", "b", "ab", "aba", "ba", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {text: place for place, text in enumerate(known)}
    steps = [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ]
    parts = {
        "version": "1.0", "truncation": None, "padding": None, "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "byte_fallback": True, "unk_token": "<unk>"},
    }  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)), unk_token="<unk>")


def test_merges_become_scores_of_their_unions_where_they_can() -> None:
    """ab before ba before aba: 0, -1, -2, and letters after all of them; a pair that is no merge has no such scores."""
    tables = token_tables_of(pieces([["a", "b"], ["b", "a"], ["ab", "a"], ["a", "ba"]]), 263)
    assert tables.scores == [0.0, -3.0, -3.0, -3.0, 0.0, -2.0, -1.0, *[0.0] * 256]
    assert tables.kinds == [2, *[1] * 6, *[6] * 256] and tables.space_first
    with pytest.raises(ModelError, match="its merges are not those that scores"):
        token_tables_of(pieces([["a", "b"], ["b", "a"], ["ab", "a"]]), 263)


@pytest.mark.parametrize(
    ("kind", "space_first", "lead", "bos", "alike"),
    [
        ("prepending inst", True, "", True, True),
        ("prepending chatml", True, "", False, True),
        ("metaspace", True, "", False, False),
        ("metaspace inst", False, "", False, False),
        ("metaspace chatml", False, "", False, False),
        ("metaspace headers", False, " ", False, False),
        ("metaspace never", False, "", False, True),
    ],
)
def test_conversations_decide_where_a_file_puts_spaces(kind: str, space_first: bool, lead: str, bos: bool, alike: bool) -> None:
    """Metaspace puts a space at the start of a text and after special tokens none; llama.cpp does both or neither."""
    tokenizer = KINDS[kind]()
    tables = token_tables_of(tokenizer, len(tokenizer))
    assert (tables.space_first, tables.lead, bos_added(tokenizer)) == (space_first, lead, bos)
    assert (tables.notes == []) == alike
    rules, own = as_llama_cpp(tokenizer, space_first), cuts_of(tokenizer)
    assert [rules(lead + text) for text in probe_prompts(tokenizer)] == [own(text) for text in probe_prompts(tokenizer)]


def test_a_file_whose_prompts_llama_cpp_would_cut_otherwise_is_refused() -> None:
    """A token that takes the white space after it: llama.cpp knows no such token."""
    from tokenizers import AddedToken

    tokenizer = KINDS["gpt-2"]()
    tokenizer.add_tokens([AddedToken("<R>", rstrip=True, special=True, normalized=False)])
    assert any("'a <R> b'" in note for note in token_tables_of(tokenizer, len(tokenizer)).notes)
    tokenizer.chat_template = "{% for m in messages %}<R> {{ m['content'] }}{% endfor %}<R>"
    with pytest.raises(ModelError, match=r"llama\.cpp would cut the prompt '<R> What is it"):
        token_tables_of(tokenizer, len(tokenizer))


def test_a_tokenizer_without_some_bytes_is_refused() -> None:
    tokenizer = pieces([["a", "b"]])
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    del parts["model"]["vocab"]["<0xFF>"]
    with pytest.raises(ModelError, match="no token for some of the 256 bytes"):
        token_tables_of(tokenizer_of(parts), 262)


def fields(folder: Path) -> dict[str, Any]:
    """Settings of the tokenizer in a file."""
    found = gguf.GGUFReader(folder / "model.gguf").fields
    return {name.removeprefix("tokenizer."): f.contents() for name, f in found.items() if name.startswith("tokenizer.")}


def test_a_file_of_raw_text_is_prompted_raw_and_its_end_tokens_are_all_there(tmp_path: Path) -> None:
    """llama.cpp takes ChatML where a file has no template; end tokens of the generation settings are in the file, too."""
    from transformers import GenerationConfig

    tokenizer = KINDS["prepending"]()
    model: Any = tiny_model("llama", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=[2, 5, 7]).save_pretrained(tmp_path)
    write_gguf(tmp_path, tmp_path / "model.gguf", model.config, tokenizer, "F32", "x")
    found = fields(tmp_path)
    raw = Template("raw", found["chat_template"], True, {"bos_token": "<s>"})
    assert (
        raw.render([{"role": "user", "content": "One."}, {"role": "assistant", "content": "Two."}], prompt=True)
        == "<s>One.\nTwo."
    )
    ends = [found[f"ggml.{kind}_token_id"] for kind in ("eos", "eot", "eom")]
    assert ends == [2, 5, 7] and found["ggml.add_bos_token"] and not found["ggml.add_eos_token"]


CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
START = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
DEFAULT = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
COUNTED = "{% for m in messages %}[{{ loop.index }}]{{ m['content'] }};{% endfor %}"


def test_a_template_of_turns_becomes_a_go_template() -> None:
    turns = turns_of(Template("own", CHATML + START, False))
    assert turns is not None and turns.system is None
    assert turns.go("").startswith(
        '{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n{{'
    )
    assert turns.go("").endswith("{{ end }}{{ end }}<|im_start|>assistant\n")
    with_default = turns_of(Template("own", DEFAULT + CHATML + START, False))
    assert with_default is not None and with_default.system == "You help."
    assert with_default.go("") == turns.go("")


@pytest.mark.parametrize("text", [COUNTED, CHATML.replace("m['content']", "m['content'] | upper") + START, "{{ 1 / 0 }}"])
def test_a_template_that_is_no_sequence_of_turns_is_not_guessed(text: str) -> None:
    assert turns_of(Template("own", text, False)) is None


@pytest.mark.parametrize("name", registry.names("chat_template"))
def test_built_in_templates_are_translated_exactly_or_not_at_all(name: str) -> None:
    text = registry.load_class("chat_template", name).text
    template = Template(name, text, True, {"bos_token": "<bos>", "eos_token": "<eos>"})
    turns = turns_of(template)
    assert name == "alpaca" or turns is not None
    if turns is not None:
        for conversation in CONVERSATIONS:
            if "system" in turns.around or conversation[0][0] != "system":
                messages = [{"role": role, "content": content} for role, content in conversation]
                assert turns.render(conversation) == template.render(messages, prompt=True)


def script(folder: Path, text: str) -> Path:
    path = folder / converter.SCRIPT
    path.write_text(f"#!/usr/bin/env python3\n{text}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_converter_of_llama_cpp_writes_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_run(tmp_path / "run", "tiny", Lora(name="lora", target="attn.q"))
    kept = export_gguf(tmp_path / "run", tmp_path / "kept").path / "model.gguf"
    took = f"import shutil, sys\nassert sys.argv[4:] == ['--outtype', 'bf16']\nshutil.copy({str(kept)!r}, sys.argv[3])"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    used = script(tmp_path, took)
    done = export_gguf(tmp_path / "run", tmp_path / "one")
    assert f"written by {used}" in done.notes and (done.path / "model.gguf").read_bytes() == kept.read_bytes()

    script(tmp_path, "raise SystemExit('no such tokenizer here')")
    done = export_gguf(tmp_path / "run", tmp_path / "two")
    assert any("no such tokenizer here; written by the gguf library instead" in note for note in done.notes)
    with pytest.raises(UserError, match="--converter nowhere: there is no such file"):
        export_gguf(tmp_path / "run", tmp_path / "three", converter="nowhere")


def test_a_file_of_the_converter_without_scores_is_written_anew(tmp_path: Path) -> None:
    base = shared("models", "stories260k")
    saved_run(tmp_path / "run", base, Lora(name="lora", target="attn.q"))
    wrote = """import sys
import gguf
file = gguf.GGUFWriter(sys.argv[3], "llama")
file.add_token_scores([-1000.0] * 512)
file.write_header_to_file()
file.write_kv_data_to_file()
file.write_ti_data_to_file()
file.close()"""
    done = export_gguf(tmp_path / "run", converter=str(script(tmp_path, wrote)))
    assert any("wrote no scores for the pieces" in note for note in done.notes)


def test_a_converter_that_writes_another_model_is_found_out(tmp_path: Path) -> None:
    saved_run(tmp_path / "run", "tiny", Lora(name="lora", target="attn.q"))
    saved_run(tmp_path / "other", "tiny", Lora(name="lora", target="attn.q"), seed=9)
    wrong = export_gguf(tmp_path / "other", dtype="float32").path / "model.gguf"
    path = script(tmp_path, f"import shutil, sys\nshutil.copy({str(wrong)!r}, sys.argv[3])")
    with pytest.raises(ModelError, match="the GGUF file does not compute what the run computes"):
        export_gguf(tmp_path / "run", tmp_path / "out", dtype="float32", converter=str(path))
    assert not (tmp_path / "out").exists()


def test_the_verb_writes_a_card_and_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_run(tmp_path / "run", "tiny", Lora(name="lora", target="attn.q"))
    assert command(["export", str(tmp_path / "run"), "--to", "gguf", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["largest"] == 0.0
    card = (Path(facts["path"]) / "README.md").read_text(encoding="utf-8")
    assert "library_name: gguf" in card and "gguf_file='model.gguf'" in card
    assert command(["export", str(tmp_path / "run"), "--to", "merged", "--dtype", "q8_0"]) == 2
    assert "--dtype: there is no 'q8_0'" in capsys.readouterr().err
    assert command(["export", str(tmp_path / "run"), "--to", "merged", "--converter", "x"]) == 2
    assert "--converter: belongs to --to gguf" in capsys.readouterr().err
    monkeypatch.setattr(gguf_export, "is_installed", lambda name: False)
    assert command(["export", str(tmp_path / "run"), "--to", "gguf", "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'llmrecipe[gguf]'" in capsys.readouterr().err


@pytest.mark.parametrize(("run", "name"), [("runs/zoo", "zoo"), ("runs/My Run (2)", "my-run-2"), ("runs/\u00e9", "model")])
def test_the_command_of_ollama_names_the_run(run: str, name: str, tmp_path: Path) -> None:
    words = shlex.split(create_command(tmp_path / run, tmp_path / "a b"))
    assert words == ["ollama", "create", name, "-f", str(tmp_path / "a b" / "Modelfile")]


def test_the_embedded_template_is_translated() -> None:
    from transformers import AutoTokenizer

    template = template_of(AutoTokenizer.from_pretrained(TINY))
    assert template is not None and turns_of(template) is not None


@pytest.mark.slow
def test_verify_compares_the_file_with_its_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved_run(tmp_path / "run", "tiny", Lora(name="lora", target="attn.q"))
    folder = export_gguf(tmp_path / "run", dtype="float32").path
    ExportOptions("gguf", "float32").write(folder)
    assert command(["verify", str(folder), "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)["lines"]
    assert all(line["result"] == "ok" for line in lines) and "38 tensors" in lines[0]["compared"] + lines[-2]["compared"]
    content = bytearray((folder / "model.gguf").read_bytes())
    content[-9] ^= 0x40
    (folder / "model.gguf").write_bytes(content)
    assert command(["verify", str(folder), "--json"]) == 3
