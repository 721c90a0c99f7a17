"""Every pretraining objective on every kind of native model: it trains, or says before weights are read why it cannot."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from llmrecipe.core import registry
from llmrecipe.core.errors import UserError
from tests.trainings import events, train_recipe

KINDS = ("decoder", "encoder", "encoder_decoder")
SMALL = [
    "++model.config.hidden_size=16", "++model.config.num_hidden_layers=1", "++model.config.positions=learned",
    "++model.config.num_attention_heads=2", "++model.config.num_key_value_heads=2", "++model.config.intermediate_size=16",
    "++model.config.max_position_embeddings=160", "++model.config.type_vocab_size=2", "++model.config.decoder_start_token_id=2",
    "data.limit=8", "epochs=null", "steps=1", "batch.size=4", "eval.at_start=false", "eval.batches=1", "eval.load_best=false",
    "save.end=false",
]  # fmt: skip
TRAINS = {
    "caclm": ("decoder", "encoder_decoder"),
    "clip": ("decoder", "encoder"),
    "clm": ("decoder",),
    "contrastive": ("decoder", "encoder"),
    "dae": KINDS,
    "mlm": ("encoder",),
    "mmlm": ("encoder",),
    "nsp": ("encoder",),
}
OWN = {
    "clm": ["model=native", "tokenizer.path=tiny"],
    "caclm": ["model=native", "tokenizer.path=tiny"],
    "dae": ["data.max_length=64"],
}
"""Words beside those that all share."""
NOISE = {"encoder": ["objective.mask_tokens=0.3", "objective.mask_ratio=0", "objective.permute_sentences=0"]}
"""What an encoder can undo at the place of each token."""


def test_every_pretraining_objective_is_here() -> None:
    known = {n for n in registry.names("objective") if registry.spec("objective", n).family == "pretraining"}
    assert set(TRAINS) == known


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TRAINS)
def test_it_trains_or_is_refused(name: str, kind: str, tmp_path: Path) -> None:
    words = [*OWN.get(name, []), *SMALL, f"++model.config.kind={kind}"]
    words += NOISE.get(kind, []) if name == "dae" else []
    if kind in TRAINS[name]:
        train_recipe(tmp_path / "run", name, *words)
        assert math.isfinite(events(tmp_path / "run")[0]["loss"])
        return
    with pytest.raises(UserError) as caught:
        train_recipe(tmp_path / "run", name, *words)
    print(name, kind, str(caught.value)[:300])
    assert not (tmp_path / "run" / "events.jsonl").exists() or not events(tmp_path / "run")
