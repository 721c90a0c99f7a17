"""Model FLOPs utilisation: the work of a step counted by hand, written where the peak is known and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmrecipe.data.collate import Sequence, pack, pad
from llmrecipe.training import model_flops
from llmrecipe.training.model_flops import ModelFlops, peak_of
from tests.trainings import events, train_recipe

SHORT = ["steps=2", "batch.size=2", "data.limit=4", "eval.at_start=false", "data.validation=0", "log.mfu=measure"]


def test_pairs_of_queries_and_keys_by_hand() -> None:
    # Documents of 3 and 2 tokens: causal queries see 1 + 2 + 3 and 1 + 2 keys, bidirectional ones 9 and 4.
    documents = [Sequence([5, 6, 7], [0, 1, 1]), Sequence([8, 9], [0, 1])]
    for batch in (pack(documents), pad(documents, 0)):
        causal = ModelFlops(weights=10, trained=4, pairs=8, causal=True, peak=1.0, source="measured")
        assert causal.step([batch]) == 5 * (4 * 10 + 2 * 4) + 3 * 8 * 9
        both = ModelFlops(weights=10, trained=4, pairs=8, causal=False, peak=1.0, source="measured")
        assert both.step([batch, batch]) == 2 * (5 * (4 * 10 + 2 * 4) + 3 * 8 * 13)
    child = [Sequence([5, 6], [0, 0]), Sequence([7], [1], parent=0)]
    assert ModelFlops(0, 0, 1, True, 1.0, "measured").step([pack(child)]) == 3 * 6


def test_events_have_the_share_of_a_measured_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_flops, "matmul_rate", lambda device: 1e9)
    run = train_recipe(tmp_path, "sft", *SHORT)
    assert run.flops is not None and run.flops.peak == 1e9
    config = run.model.config
    # q and o are square, k and v a third as tall; three matrices of the feed-forward; the head, which is the embedding.
    d, f = config.hidden_size, config.intermediate_size
    assert run.flops.weights == run.flops.trained == 4 * (2 * d * d + 2 * d * d // 3 + 3 * d * f) + config.vocab_size * d
    assert run.flops.pairs == 4 * d * config.num_hidden_layers
    check = next(e for e in events(tmp_path, "check") if "peak_flops" in e)
    assert (check["peak_flops"], check["peak_flops_source"]) == (1e9, "measured")
    for event in events(tmp_path):
        seconds = 1.0 / event["tokens_per_s"]  # of one token; the work of a token is at least that of its products
        assert event["mfu"] > 6 * run.flops.weights / (seconds * 1e9) * 0.99


def test_of_an_adapter_its_own_weights_train(tmp_path: Path) -> None:
    run = train_recipe(tmp_path, "sft_lora", *SHORT)
    assert run.flops is not None
    assert run.flops.trained == sum(p.numel() for p in run.model.parameters() if p.requires_grad) < run.flops.weights


@pytest.mark.parametrize(("recipe", "words"), [("sft", ["log.mfu=auto"]), ("mezo", [])])
def test_what_is_not_known_is_not_written(recipe: str, words: list[str], tmp_path: Path) -> None:
    run = train_recipe(tmp_path, recipe, *SHORT, *words)
    assert run.flops is None
    assert not any("mfu" in e or "peak_flops" in e for kind in ("step", "check") for e in events(tmp_path, kind))


def test_peaks_of_known_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, peak in (("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L40S", 362e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_of(torch.device("cuda"), "bfloat16", False) == (peak, "data sheet")
        assert peak_of(torch.device("cuda"), "float32", False) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card 9000")
    assert peak_of(torch.device("cuda"), "auto", False) is None
