"""A training pass of the native transformer beside the family of Transformers that computes the same function, in turn.

    python -m tests.benchmarks.native_families [--rounds 9] [--families llama bert ...]

Both sides have the same shape (width 128, 4 layers, 4 heads, 1,024 tokens of vocabulary, 4 rows of 128 tokens; ViT: 8 images of
65 places), sdpa attention, float32, one thread, and run forward, cross-entropy and backward as their own classes do. Rounds
alternate which side goes first; times are CPU-seconds of this process, the ratio is the median over rounds of native / family:
below 1 the native transformer is faster. `tests/models/test_native_families.py` proves that the functions are equal.
Results go to tests/benchmarks/results/native_families.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from llmrecipe.models import native
from tests.benchmarks.stamp import line, stamp

RESULTS = Path(__file__).resolve().parent / "results"
SIZES: dict[str, Any] = {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4}
SHAPE = SIZES | {"num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0, "tie_word_embeddings": False}
GROUPED = SHAPE | {"num_key_value_heads": 2}
PLAIN = {"norm": "layernorm", "gated": False, "bias": True, "positions": "learned"}
BERT = PLAIN | {"kind": "encoder", "pre_norm": False, "embed_norm": True, "type_vocab_size": 2, "hidden_act": "gelu"}
START = {"decoder_start_token_id": 0}
TIED = {"tie_word_embeddings": True}
T5 = {"kind": "encoder_decoder", "positions": "relative", "gated": False, "hidden_act": "relu", **START}
IMAGE = {"image_size": 32, "patch_size": 4, "num_channels": 3}
EXPERTS = {"num_experts_per_tok": 2}

Sides = dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]]
FAMILIES: Sides = {
    "llama": ("CausalLM", GROUPED, "LlamaForCausalLM", GROUPED),
    "qwen3": ("CausalLM", GROUPED | {"qk_norm": True, "head_dim": 32}, "Qwen3ForCausalLM", GROUPED | {"head_dim": 32}),
    "mixtral": (
        "CausalLM", GROUPED | EXPERTS | {"num_experts": 8}, "MixtralForCausalLM",
        GROUPED | EXPERTS | {"num_local_experts": 8, "output_router_logits": True},
    ),
    "gpt2": (
        "CausalLM", SHAPE | PLAIN | TIED | {"hidden_act": "gelu_new"}, "GPT2LMHeadModel",
        {"vocab_size": 1024, "n_embd": 128, "n_inner": 352, "n_layer": 4, "n_head": 4, "n_positions": 128},
    ),
    "bert": ("MaskedLM", SHAPE | BERT | TIED, "BertForMaskedLM", SHAPE | TIED),
    "t5": (
        "Seq2SeqLM", SHAPE | T5 | TIED, "T5ForConditionalGeneration",
        {"vocab_size": 1024, "d_model": 128, "d_kv": 32, "d_ff": 352, "num_layers": 4, "num_heads": 4} | START,
    ),
    "vit": (
        "ImageClassification", SHAPE | PLAIN | IMAGE | {"kind": "vision", "hidden_act": "gelu", "num_labels": 10},
        "ViTForImageClassification",
        {k: v for k, v in SHAPE.items() if k not in ("vocab_size", "pad_token_id")} | IMAGE | {"num_labels": 10},
    ),
}  # fmt: skip
DROPOUT = ("dropout_rate", "hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop")


def sides_of(name: str) -> tuple[nn.Module, nn.Module]:
    """The two models, in training mode without dropout."""
    head, own, cls, config = FAMILIES[name]
    torch.manual_seed(0)
    ours = getattr(native, f"NativeFor{head}")(native.NativeConfig(**own))
    family = getattr(transformers, cls)
    settings = family.config_class(**config)
    for key in DROPOUT:
        if hasattr(settings, key):
            setattr(settings, key, 0.0)
    return ours.train(), family(settings).train()


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    """Rows without padding, and labels."""
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        pixels = torch.randn(8, 3, 32, 32, generator=generator)
        return {"pixel_values": pixels, "labels": torch.randint(0, 10, (8,), generator=generator)}
    ids = torch.randint(1, 1024, (4, 128), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def seconds(model: nn.Module, inputs: dict[str, torch.Tensor], passes: int) -> float:
    """CPU-seconds of some training passes."""
    began = time.process_time()
    for _ in range(passes):
        model.zero_grad(set_to_none=True)
        model(**inputs).loss.backward()
    return time.process_time() - began


def compare(name: str, rounds: int, passes: int, clock: Callable[..., float] = seconds) -> tuple[float, float, float]:
    """(milliseconds of a native pass, of a pass of the family, median ratio)."""
    sides, inputs = sides_of(name), inputs_of(name)
    for model in sides:
        clock(model, inputs, 2)
    found: list[tuple[float, float]] = []
    for index in range(rounds):
        first = index % 2
        times = {side: clock(sides[side], inputs, passes) for side in (first, 1 - first)}
        found.append((times[0], times[1]))
    own, theirs = (1000 * statistics.median(pair[i] for pair in found) / passes for i in (0, 1))
    return own, theirs, statistics.median(a / b for a, b in found)


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "Forward, loss and backward on the same shape; one thread, float32, sdpa, median of "
        f"{options.rounds} rounds of {options.passes} passes in turn.",
        "",
        "| family | native, CPU ms a pass | family, CPU ms a pass | native / family |",
        "|---|---|---|---|",
    ]
    for name in options.families:
        own, theirs, ratio = compare(name, options.rounds, options.passes)
        lines.append(f"| {name} | {own:.1f} | {theirs:.1f} | {ratio:.2f}x |")
        print(lines[-1], flush=True)
    text = "\n".join([*lines, "", line(stamp("native_families"))])
    (RESULTS / "native_families.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
