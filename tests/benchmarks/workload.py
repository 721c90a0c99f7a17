"""What both sides of a benchmark run on: random Llama weights of a stated shape, a word tokenizer and generated rows.

Rows are prompt and answer in a ratio of about 3:2 (`chat`) or 1:2 (`long_answers`), log-normal in length (median about 92
tokens, longest 425), so that a padded batch of 8 is half padding, as chat data is. Words follow Zipf's law inside one of a few
topics that the prompt gives away: a model can learn something, so a loss curve means something.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 8192
MEDIAN, SPREAD, SHORTEST, LONGEST = 92, 0.75, 12, 424
TOPICS = 16
ANSWER_SHARE = {"chat": 0.4, "long_answers": 2 / 3}
"""Workload -> mean share of a row that is the answer."""
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")


@dataclass(frozen=True)
class Shape:
    """A Llama with a tied head."""

    width: int
    layers: int
    heads: int
    ffn: int


SHAPES = {
    "tiny": Shape(width=64, layers=2, heads=2, ffn=128),
    "10m": Shape(width=320, layers=6, heads=5, ffn=864),
    "60m": Shape(width=640, layers=10, heads=10, ffn=2016),
}
"""`10m` has 10.06 million parameters, `60m` 60.3 million; `tiny` is for trying the harness itself."""


def build_model(folder: Path, shape: Shape, seed: int = 0) -> Path:
    """Write random weights, config and tokenizer as a Transformers folder (once)."""
    if (folder / "model.safetensors").exists():
        return folder
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.width,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def build_tokenizer(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """One word, one token; nothing is added in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def sft_rows(count: int, seed: int = 0, share: float = ANSWER_SHARE["chat"]) -> list[dict[str, str]]:
    """`prompt` and `completion`; a completion begins with a space so that the two simply join."""
    draw = Words(seed, share)
    rows = []
    for length in draw.lengths(count):
        prompt, answer = draw.split(length)
        topic = draw.topic()
        rows.append({"prompt": draw.text(topic, prompt), "completion": " " + draw.text(topic, answer)})
    return rows


def dpo_rows(count: int, seed: int = 0, share: float = ANSWER_SHARE["chat"]) -> list[dict[str, str]]:
    """`prompt`, a `chosen` answer on the prompt's topic and a `rejected` one on another, of lengths of their own."""
    draw = Words(seed, share)
    rows = []
    for length in draw.lengths(count):
        prompt, answer = draw.split(length)
        other = max(2, round(answer * draw.random.uniform(0.6, 1.4)))
        topic = draw.topic()
        wrong = (topic + 1 + draw.random.integers(TOPICS - 1)) % TOPICS
        rows.append(
            {
                "prompt": draw.text(topic, prompt),
                "chosen": " " + draw.text(topic, answer),
                "rejected": " " + draw.text(wrong, min(other, LONGEST - prompt)),
            }
        )
    return rows


def grpo_rows(count: int, seed: int = 0, share: float = ANSWER_SHARE["chat"]) -> list[dict[str, str]]:
    """`prompt` alone: those of `sft_rows`."""
    return [{"prompt": row["prompt"]} for row in sft_rows(count, seed, share)]


def even_share(text: str) -> float:
    """Share of a text's words whose number is even: a reward of answers."""
    words = text.split()
    return sum(word[-1] in "02468" for word in words) / max(1, len(words))


ROWS = {"sft": sft_rows, "dpo": dpo_rows, "grpo": grpo_rows}


def tokens_of(row: dict[str, str]) -> int:
    """Tokens of a row as a padded trainer sees them: every answer with its own copy of the prompt and its end token."""
    prompt = len(row["prompt"].split())
    return sum(prompt + len(row[answer].split()) + 1 for answer in ("completion", "chosen", "rejected") if answer in row)


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Words:
    """Seeded draws of lengths, topics and texts.

    Args:
        share: mean share of a row that is the answer.
    """

    def __init__(self, seed: int, share: float = ANSWER_SHARE["chat"]):
        self.share = share
        self.random = np.random.default_rng(seed)
        ranks = np.arange(1, VOCABULARY - len(SPECIAL) + 1)
        self.shares = (1 / ranks) / (1 / ranks).sum()
        self.orders = [np.random.default_rng(1000 + t).permutation(len(ranks)) + len(SPECIAL) for t in range(TOPICS)]

    def lengths(self, count: int) -> np.ndarray:
        """Tokens of prompt and answer together."""
        drawn = np.exp(self.random.normal(np.log(MEDIAN), SPREAD, count))
        return np.clip(np.round(drawn), SHORTEST, LONGEST).astype(int)

    def split(self, length: int) -> tuple[int, int]:
        """(prompt, answer) tokens."""
        answer = int(np.clip(round(length * self.random.normal(self.share, 0.08)), 2, length - 4))
        return length - answer, answer

    def topic(self) -> int:
        """A topic's number."""
        return int(self.random.integers(TOPICS))

    def text(self, topic: int, count: int) -> str:
        """Words of a topic."""
        return " ".join(f"w{i}" for i in self.orders[topic][self.random.choice(len(self.shares), count, p=self.shares)])
