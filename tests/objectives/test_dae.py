"""Denoising autoencoding: loss and gradients of Transformers' own labels, noise by address, metrics, refusals, outliers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.data import prepare
from llmrecipe.engine.role_models import Roles
from llmrecipe.interop.load_run import open_run
from llmrecipe.methods._base.stack import Stack
from llmrecipe.objectives.pretraining.dae import Dae
from llmrecipe.recipe.data_section import DataSection
from llmrecipe.training.dry_run import check
from tests.data.toys import byte_tokenizer
from tests.objectives.test_encoder_decoder import pair_model
from tests.tiny import Tokenizer, roles_for, tiny_masked_model, tiny_model
from tests.trainings import QUIET, resumes_to_the_bit

FORMS: dict[str, dict[str, Any]] = {
    "bart": {},
    "t5": {"form": "t5", "noise_density": 0.3},
    "noises": {"mask_tokens": 0.2, "delete": 0.2, "insert": 0.1, "rotate": 0.5, "replace_length": -1},
    "fairseq": {"compat": "fairseq", "rotate": 0.5},
    "corrupted": {"loss_on": "corrupted"},
}


class Sentinels(Tokenizer):
    """With the sentinels 50 to 59."""

    def get_vocab(self) -> dict[str, int]:
        return {**super().get_vocab(), **{f"<extra_id_{i}>": 50 + i for i in range(10)}}


def row(number: int, length: int, epoch: int | None = 0) -> dict[str, Any]:
    """A document of two-token words and sentences of four tokens between two special tokens."""
    draws = np.random.default_rng(number)
    inner = range(length - 2)
    found = {
        "row": number,
        "ids": [1, *(int(i) for i in draws.integers(3, 50, size=length - 2)), 2],
        "words": [-1, *(i // 2 for i in inner), -1],
        "sentences": [-1, *(i // 4 for i in inner), -1],
        "outlier": None,
    }
    return found if epoch is None else {**found, "epoch": epoch}


ROWS = [row(number, length) for number, length in enumerate((19, 5, 12))]


def roles_of(model: Any, packing: bool = False) -> Roles:
    roles = roles_for(model, Stack([]), packing)
    roles.tokenizer = Sentinels()
    return roles


def compare(model: Any, loss: Any, labels_loss: Tensor, count: int, bound: float) -> None:
    """A loss and its gradients = those of a mean over `count` labels."""
    wanted = torch.autograd.grad(labels_loss, list(model.parameters()), allow_unused=True)
    model.zero_grad()
    (loss.total / count).backward()
    torch.testing.assert_close(loss.total.detach() / count, labels_loss.detach().double(), atol=bound, rtol=bound)
    assert max(float(g.abs().max()) for g in wanted if g is not None) > 1e-3
    for (name, parameter), gradient in zip(model.named_parameters(), wanted, strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, atol=bound, rtol=bound, msg=f"gradient of {name}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["t5", "bart", "native"])
def test_loss_and_gradients_are_those_of_labels_in_transformers(family: str, form: str) -> None:
    model, objective = pair_model(family).double(), Dae(**FORMS[form])
    roles = roles_of(model)
    noised = [objective.noised_row(one, roles, "seq2seq") for one in ROWS]
    assert any(one.noised for one in noised)
    targets = [
        [token if form != "corrupted" or kind is False else -100 for token, kind in zip(one.target, one.copied, strict=True)]
        for one in noised
    ]
    width, longest = max(len(one.source) for one in noised), max(map(len, targets))
    ids = torch.tensor([one.source + [0] * (width - len(one.source)) for one in noised])
    mask = torch.tensor([[1] * len(one.source) + [0] * (width - len(one.source)) for one in noised])
    labels = torch.tensor([one + [-100] * (longest - len(one)) for one in targets])
    # What the decoder reads is the whole target, also where not all of it is in the loss.
    whole = torch.tensor([one.target + [-100] * (longest - len(one.target)) for one in noised])
    shifted = model.prepare_decoder_input_ids_from_labels(whole)
    batch = objective.collate(ROWS, roles)
    count = sum(token != -100 for one in targets for token in one)
    assert objective.weight(batch) == count
    wanted = model(input_ids=ids, attention_mask=mask, labels=labels, decoder_input_ids=shifted).loss
    # The native class computes its loss in float32.
    compare(model, objective.loss(batch, roles), wanted, count, 1e-6 if family == "native" else 1e-11)


@pytest.mark.parametrize("form", ["bart", "t5", "corrupted"])
def test_a_decoder_continues_the_noised_text(form: str) -> None:
    """Packed and padded rows = Transformers' loss over each text by itself, on the target alone."""
    model, objective = tiny_model().double(), Dae(**FORMS[form])
    total, count = torch.zeros((), dtype=torch.float64), 0
    for one in (objective.noised_row(row, roles_of(model), "causal") for row in ROWS):
        target, kinds = one.target[one.lead :], one.copied[one.lead :]
        assert target[0] != 1 and target[-1] == 2 and one.source[-1] == 2
        labels = [t if form != "corrupted" or kind is False else -100 for t, kind in zip(target, kinds, strict=True)]
        logits = model(torch.tensor([one.source + target])).logits[0, len(one.source) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="sum")
        count += sum(label != -100 for label in labels)
    for packing in (True, False):
        roles = roles_of(model, packing)
        batch = objective.collate(ROWS, roles)
        assert objective.weight(batch) == count
        torch.testing.assert_close(objective.loss(batch, roles).total, total, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss_on", ["all", "corrupted"])
def test_an_encoder_predicts_each_token_at_its_place(loss_on: str) -> None:
    model = tiny_masked_model("bert").double()
    objective = Dae(loss_on=loss_on, mask_tokens=0.4)
    for packing in (False, True):
        roles = roles_of(model, packing)
        total, count = torch.zeros((), dtype=torch.float64), 0
        for one in ROWS:
            noised = objective.noised_row(one, roles, "masked")
            assert len(noised.source) == len(noised.target) == len(one["ids"]) and noised.target == one["ids"]
            labels = [
                t if kind is False or (kind and loss_on == "all") else -100
                for t, kind in zip(noised.target, noised.copied, strict=True)
            ]
            logits = model(torch.tensor([noised.source])).logits[0]
            total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="sum")
            count += sum(label != -100 for label in labels)
        batch = objective.collate(ROWS, roles)
        assert objective.weight(batch) == count
        torch.testing.assert_close(objective.loss(batch, roles).total, total, rtol=1e-7, atol=1e-7)


def test_noise_follows_seed_epoch_and_row_and_leaves_special_tokens() -> None:
    for options in FORMS.values():
        objective, roles = Dae(**options), roles_of(tiny_model())

        def sources(epoch: int | None, objective: Dae = objective, roles: Roles = roles) -> list[list[int]]:
            return [objective.noised_row(row(n, 30, epoch), roles, "seq2seq").source for n in range(6)]

        first = sources(0)
        assert first == sources(0) and first != sources(1) and first != sources(None) and sources(None) == sources(None)
        roles.seed = 1
        assert first != sources(0)
        assert all(source[0] == 1 and source[-1] == 2 for source in first)


@pytest.mark.parametrize("form", ["bart", "t5"])
def test_metrics_are_counts_of_the_targets(form: str) -> None:
    """A head that always says token 7: accuracies are the shares of sevens among what was removed and what was not."""
    model, objective = pair_model("native").double(), Dae(**FORMS[form])
    roles = roles_of(model)
    rows = [row(number, 40) for number in range(8)]
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight.zero_()
        head.bias = torch.nn.Parameter(torch.zeros(len(head.weight), dtype=torch.float64))
        head.bias[7] = 1.0
    found = objective.loss(objective.collate(rows, roles), roles).metrics
    noised = [objective.noised_row(one, roles, "seq2seq") for one in rows]
    pairs = [pair for one in noised for pair in zip(one.target, one.copied, strict=True)]
    for name, kind in (("corrupted", False), ("copied", True)):
        own = [token for token, copied in pairs if copied is kind]
        assert found[f"accuracy/{name}"] == (sum(token == 7 for token in own), len(own))
    assert found["noised"] == (sum(one.noised for one in noised), 8 * 38)
    assert 0.1 < found["noised"][0] / found["noised"][1] < 0.5
    assert found["nll"][1] == len(pairs) and found["exact"] == (0, 8)
    if form == "t5":
        assert found["accuracy/copied"][1] == 0


def test_the_score_of_a_row_is_its_mean_loss_and_ranks_outliers() -> None:
    model, objective = pair_model("native").double(), Dae()
    roles = roles_of(model)
    rows = [{**row(number, 10 + number, None), "outlier": number % 2 == 0} for number in range(6)]
    rows[5]["outlier"] = None
    found = objective.collect(objective.collate(rows, roles), roles)
    for number, one in enumerate(rows):
        batch = objective.collate([one], roles)
        mean = float(objective.loss(batch, roles).total.detach()) / objective.weight(batch)
        assert float(found["score"][number]) == pytest.approx(mean, abs=1e-9)
    assert found["outlier"][:5].tolist() == [1, 0, 1, 0, 1] and bool(found["outlier"][5].isnan())
    above = [float(a > b) for a in found["score"][[0, 2, 4]] for b in found["score"][[1, 3]]]
    assert objective.finish_evaluation({}, found) == {"outlier/auc": pytest.approx(sum(above) / 6)}
    unknown = {"score": found["score"][:1], "outlier": found["outlier"][5:]}
    assert objective.finish_evaluation({}, unknown) == {}


def test_rows_know_their_sentences_and_outliers(tmp_path: Path) -> None:
    lines = [{"text": "One two. Three!", "outlier": True}, {"text": "Four", "outlier": None}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    section = DataSection(path=str(tmp_path / "rows.jsonl"), max_length=64, cache=False)
    own = byte_tokenizer(template=None)
    first, second = prepare(section, own, "structured_text", mask="completion", split="train", seed=0)
    for number, sentence in enumerate(("One two.", "Three!")):
        assert own.decode([i for i, s in zip(first["ids"], first["sentences"], strict=True) if s == number]).strip() == sentence
    assert first["outlier"] is True and second.get("outlier") is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["objective.form=t5", "objective.delete=0.1"], r"objective\.delete: 0\.1 is not read with objective\.form=t5"),
        (["model.config.kind=encoder", "objective.form=t5"], r"objective\.form: t5: an encoder has no decoder"),
        (["model.config.kind=encoder", "objective.permute_sentences=0.5"], r"objective\.permute_sentences: moves tokens"),
        (["model.config.kind=encoder", "objective.layout=seq2seq"], r"objective\.layout: seq2seq needs an encoder-decoder"),
        (["model.config.kind=decoder", "data.path=builtin:stories", "model.config.max_position_embeddings=100"],
         r"data\.max_length: 128: a row of 78 tokens and its target take 158 of the 100 positions.*data\.max_length=49"),
        (["objective.form=t5", "data.path=builtin:stories", "objective.noise_density=0.5", "objective.mean_span=1"],
         r"rows of 78 tokens have up to 39 spans, and it has 32 sentinels.*tokenizer\.add_tokens=\[<extra_id_32>"),
        (["model.config.decoder_start_token_id=null"], r"model\.config\.decoder_start_token_id"),
        (["model.config.kind=vision"], "needs a decoder or an encoder"),
    ],
)  # fmt: skip
def test_what_cannot_be_denoised_is_refused_before_weights_are_read(words: list[str], message: str) -> None:
    with pytest.raises((RecipeError, ModelError), match=message):
        check("dae", [*QUIET, *words])


def test_a_tokenizer_without_a_mask_is_refused() -> None:
    bare: Any = SimpleNamespace(mask_token_id=None)
    with pytest.raises(ModelError, match=r"no mask token.*tokenizer\.mask_token=<mask>"):
        Dae().check_tokens("seq2seq", bare, 9)
    Dae(mask_ratio=0.0, delete=0.3).check_tokens("seq2seq", bare, 9)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["bart", "t5"])
def test_a_resumed_run_is_the_whole_one_to_the_bit_and_opens_in_transformers(form: str, tmp_path: Path) -> None:
    words = [*QUIET, "steps=4", f"objective.form={form}", "batch.size=8", "eval.at_start=false"]
    resumes_to_the_bit(tmp_path, "dae", words, 2)
    stock = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "whole" / "final" / "model").eval()
    opened = open_run(str(tmp_path / "whole"))
    assert opened.head == "seq2seq"
    ids = torch.tensor([[1, 60, 70, 2]])
    with torch.no_grad():
        found, wanted = (m(input_ids=ids, decoder_input_ids=ids).logits for m in (opened.model, stock))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_rows_of_one_length_share_a_micro_batch_where_they_are_padded() -> None:
    """Short and long texts in turn: without padding in micro-batches of two, and the same sum over the step."""
    rows = [row(number, length) for number, length in enumerate((24, 6, 24, 6))]
    model, objective = pair_model("native").double(), Dae(form="bart", mask_ratio=0.0, permute_sentences=0.0, mask_tokens=0.3)
    roles = roles_of(model)
    totals = []
    for micro in (4, 2):
        roles.micro_rows = micro
        (micros,) = list(objective.batches(iter([rows]), roles))
        totals.append(sum(float(objective.loss(batch, roles).total) for batch in micros))
    assert [batch.rows for batch in micros] == [(1, 3), (0, 2)]
    for batch in micros:
        for mask in (batch.attention_mask, batch.extra["encoder_mask"]):
            assert mask is not None and bool(mask.all()), "no padding on either side"
    assert totals[1] == pytest.approx(totals[0], rel=1e-9)
    packed = roles_of(tiny_model(), packing=True)
    packed.micro_rows = 2
    assert [batch.rows for batch in next(objective.batches(iter([rows]), packed))] == [(0, 1), (2, 3)], (
        "packed rows stay in order"
    )
