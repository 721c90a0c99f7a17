"""32k tokens of an 8B model in 80 GB: LoRA in bf16 on all linear layers, by the estimate of `check`, without a weight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmrecipe.recipe.compose import compose
from llmrecipe.training.dry_run import check, examine

TOKENS, LAYERS, WIDTH = 32768, 32, 4096
LARGE = {
    "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": 14336, "num_hidden_layers": LAYERS,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "max_position_embeddings": 131072, "tie_word_embeddings": "false",
}  # fmt: skip
"""Sizes of Llama-3-8B."""
CARD = 80 * 10**9


def words(folder: Path, form: str, **sizes: int) -> list[str]:
    """Overrides of `sft_lora` for one row of 32k tokens."""
    rows = folder / "long.jsonl"
    row = {"prompt": "count", "completion": " ".join(str(i % 7) for i in range(2 * TOKENS))}
    rows.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return [
        "model.init=random", *(f"model.config.{name}={value}" for name, value in (LARGE | sizes).items()),
        "model.dtype=bfloat16", f"data.path={rows}", "data.validation=null", f"data.max_length={TOKENS}",
        "data.truncation=keep_start", "stack.lora.r=16", "stack.lora.target=attn.q|k|v|o + mlp.gate|up|down",
        "batch.size=1", "batch.micro=1", "steps=1", "eval.load_best=false", "log.live=off",
        f"model.gradient_checkpointing={form}",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_row_of_32k_tokens_of_8b_is_estimated_to_fit(tmp_path: Path) -> None:
    found = check("sft_lora", words(tmp_path, "true"))
    memory = found.memory
    assert found.tokens_per_step == TOKENS and not memory.unpredicted
    # Inputs of 32 blocks in bf16 wait for the backward pass, beside 8.0e9 weights of two bytes.
    assert memory.activations > LAYERS * TOKENS * WIDTH * 2 and memory.weights > 16 * 10**9
    assert memory.total < CARD / 2


def test_a_row_longer_than_a_micro_batch_counts_whole_by_the_formulas_too(tmp_path: Path) -> None:
    """A micro-batch of at most 8 tokens that reads a row of 60 holds what one of at most 60 does."""
    rows = [{"prompt": "a b c", "completion": "d " * 25}] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"data.path={tmp_path / 'rows.jsonl'}", "batch.size=1"]
    short, whole = (
        examine(compose("sft_lora", [*words, f"batch.tokens={tokens}"]), follow=False).memory for tokens in (8, 4096)
    )
    assert short.activations == whole.activations > 0 and short.logits == whole.logits
