"""Masked multimodal language modelling: parity with VisualBERT and UNITER's formula, views of a row, layouts, whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForMaskedLM, VisualBertConfig, VisualBertForPreTraining

from llmrecipe.core.errors import RecipeError
from llmrecipe.data.collate import FeatureVectors, Sequence, pack, pad
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.role_models import Roles
from llmrecipe.evaluation.evaluate_model import evaluate_path
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models import task_heads
from llmrecipe.models.heads.feature_head import FeatureHead
from llmrecipe.models.sinusoids import sinusoids
from llmrecipe.objectives.feature_inputs import vectors_of, views_of
from llmrecipe.objectives.pretraining.mmlm import Mmlm
from tests.objectives.harness import document
from tests.pictures import held_picture, held_vectors, save_rows
from tests.tiny import Tokenizer, tiny_masked_model
from tests.trainings import curve, events, resumes_to_the_bit, train_recipe

WIDTH = 6


def row(number: int, length: int, count: int, width: int = WIDTH) -> dict[str, Any]:
    return {**document(number, length), "features": held_vectors(number, count, width)}


ROWS = [row(0, 9, 3), row(1, 5, 4), row(2, 12, 1)]


def roles_of(objective: Mmlm, family: str = "bert", packing: bool = False, **more: Any) -> Roles:
    model = tiny_masked_model(family, **more)
    objective.prepare_model(model, 3)
    with torch.no_grad():
        for parameter in model.task_head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    return Roles(Engine(model.double()), Stack([]), Tokenizer(), torch.device("cpu"), packing)


def test_one_stream_is_visual_berts() -> None:
    """Copied weights, float64: the same logits of hidden tokens, of which position and segment are the picture's own."""
    config = VisualBertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        visual_embedding_dim=WIDTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    stock = VisualBertForPreTraining(config).double().eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.normal_(std=0.2)
    objective = Mmlm(features="frame", feature_width=WIDTH)
    roles = roles_of(objective)
    state = {name.replace("visual_bert.", "bert."): value for name, value in stock.state_dict().items()}
    own = roles.model.state_dict()
    with torch.no_grad():
        for name, value in own.items():
            if name in state:
                value.copy_(state[name])
        head, e = roles.model.task_head["features"], "bert.embeddings."
        head.projection.weight.copy_(state[f"{e}visual_projection.weight"])
        # The backbone adds position 0 and segment 1 of the text to every input; VisualBERT has tables of its own.
        shift = state[f"{e}visual_position_embeddings.weight"][0] + state[f"{e}visual_token_type_embeddings.weight"][1]
        shift = shift - state[f"{e}position_embeddings.weight"][0] - state[f"{e}token_type_embeddings.weight"][1]
        head.projection.bias.copy_(state[f"{e}visual_projection.bias"] + shift)
        head.position.weight.zero_()
    copied = [name for name in own if name in state]
    assert len(copied) > 30
    for one in ROWS:
        batch = objective.collate([one], roles)
        logprobs = roles.policy(batch)["logprobs"]
        slots, length = one["features"].slots, len(one["ids"])
        features = torch.from_numpy(one["features"].load()).double()[None]
        out = stock(
            input_ids=batch.input_ids[:, slots:], attention_mask=torch.ones(1, length), visual_embeds=features,
            visual_attention_mask=torch.ones(1, slots), visual_token_type_ids=torch.ones(1, slots, dtype=torch.long),
        )  # fmt: skip
        wanted = out.prediction_logits[0].log_softmax(-1)[batch.source - slots, batch.target]
        torch.testing.assert_close(logprobs, wanted, atol=1e-10, rtol=0)


def test_the_three_forms_are_their_formulas() -> None:
    """float64: W f + b + S [s(row); s(column)], W f + b + S s(number), and UNITER's normed sum of region and box."""
    torch.manual_seed(0)
    places = torch.tensor([[0, 0], [1, 3], [2, 1]])
    values = torch.randn(3, 10, dtype=torch.float64)
    for form in ("patch", "frame", "region"):
        head = FeatureHead(form, 10, 8).double()
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter)
        w, b = head.projection.weight, head.projection.bias
        if form == "region":
            one = F.layer_norm(values[:, :3] @ w.T + b, (8,), head.norms[0].weight, head.norms[0].bias)
            two = values[:, 3:] @ head.box.weight.T + head.box.bias
            both = one + F.layer_norm(two, (8,), head.norms[1].weight, head.norms[1].bias) + head.kind
            wanted = F.layer_norm(both, (8,), head.norms[2].weight, head.norms[2].bias)
        else:
            waves = sinusoids(places[:, 0], 8)
            if form == "patch":
                waves = torch.cat((sinusoids(places[:, 0], 4), sinusoids(places[:, 1], 4)), -1)
            wanted = values @ w.T + b + waves.double() @ head.position.weight.T
        torch.testing.assert_close(head(values, places), wanted, atol=1e-12, rtol=0)


def test_patches_and_their_places() -> None:
    picture = torch.arange(2 * 4 * 6.0).view(2, 4, 6)
    found = vectors_of(picture, 2)
    assert found.places.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    for vector, (r, c) in zip(found.values, found.places.tolist(), strict=True):
        assert torch.equal(vector, picture[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].flatten())


def slots_in(batch: Any) -> list[list[float]]:
    """What stands in each place of a batch: [1, first number of a feature], [0, id]; padding left out."""
    ids, mask = batch.input_ids.flatten(), batch.attention_mask
    held = {int(i): float(v[0]) for i, v in zip(batch.slots.index, batch.slots.values, strict=True)}
    real = range(len(ids)) if mask is None else [int(i) for i in mask.flatten().nonzero()]
    return [[1.0, held[i]] if i in held else [0.0, float(ids[i])] for i in real]


def test_features_come_before_their_text_and_take_no_position_of_it() -> None:
    """Packed and padded hold the same places; a sequence without features stays as it is; targets are the text's own."""
    one = FeatureVectors(torch.tensor([[1.5], [2.5]]), torch.tensor([[0, 0], [1, 0]]))
    sequences = [Sequence([7, 8, 9], [0, 1, 1], features=one), Sequence([4, 5], [0, 1])]
    wanted = [[1, 1.5], [1, 2.5], [0, 7], [0, 8], [0, 9], [0, 4], [0, 5]]
    packed, padded = pack(sequences), pad(sequences, 0)
    for batch in (packed, padded):
        assert slots_in(batch) == wanted and batch.tokens == 7 and batch.target.tolist() == [8, 9, 5]
        assert batch.slots is not None and batch.slots.sequence.tolist() == [0, 0]
        assert [int(batch.input_ids.flatten()[i]) for i in batch.last] == [9, 5]
        assert [int(batch.input_ids.flatten()[i]) for i in batch.source] == [7, 8, 4]
    assert packed.position_ids.tolist() == [[0, 0, 0, 1, 2, 0, 1]]
    assert padded.position_ids.tolist() == [[0, 0, 0, 1, 2], [0, 1, 0, 0, 0]]
    assert [s.length for s in packed.layout.segments] == [5, 2]


def test_the_loss_is_on_hidden_text_and_features_reach_it() -> None:
    """No target is a feature; the gradient of the loss with respect to each feature's input is not zero."""
    objective = Mmlm(features="frame", feature_width=WIDTH, prob=0.3)
    roles = roles_of(objective, "llmrecipe_native", packing=True)
    batch = objective.collate(ROWS, roles)
    assert batch.slots is not None and not set(batch.source.tolist()) & set(batch.slots.index.tolist())
    seen: list[Tensor] = []
    head = roles.engine.head_of(task_heads.FEATURES)
    head.register_forward_hook(lambda _m, _i, out: (out.retain_grad(), seen.append(out))[1])
    objective.loss(batch, roles).total.backward()
    assert len(seen) == 1 and bool((seen[0].grad.abs().sum(-1) > 0).all())


def test_an_evaluation_reads_each_row_with_its_own_features_with_none_and_with_others() -> None:
    """Metrics of each view equal those of the rows laid out by hand; the same tokens are hidden in all three."""
    objective = Mmlm(features="frame", feature_width=WIDTH, prob=0.3)
    roles = roles_of(objective)
    views = objective.evaluation_rows(ROWS, [0, 1, 2])
    found = objective.evaluate(objective.collate(views, roles), roles)
    by_hand = {
        "": ROWS,
        "/removed": [{k: v for k, v in one.items() if k != "features"} for one in ROWS],
        "/shuffled": [{**one, "features": ROWS[(i + 1) % 3]["features"]} for i, one in enumerate(ROWS)],
    }
    for name, rows in by_hand.items():
        batch = objective.collate(rows, roles)
        logprobs = roles.policy(batch)["logprobs"]
        assert float(found[f"nll{name}"][0]) == pytest.approx(-float(logprobs.sum().detach()), abs=1e-9)
        assert found[f"nll{name}"][1] == batch.target.numel()
    sums = {name: float(value) / count for name, (value, count) in found.items() if count}
    gains = objective.finish_evaluation(sums, {})
    assert gains == {f"gain/{view}": sums[f"nll/{view}"] - sums["nll"] for view in ("removed", "shuffled")}
    assert float(found["loss"][0]) == pytest.approx(float(found["nll"][0]))


def test_another_rows_picture_is_one_that_differs() -> None:
    same = [{"row": i, "features": held_picture(0 if i < 4 else 9)} for i in range(6)]
    shuffled = [list(views_of(same, i))[-1]["features"].key for i in range(6)]
    assert all(key != one["features"].key for key, one in zip(shuffled, same, strict=True))


def data_of(rows: list[dict[str, Any]]) -> Any:
    class Data(list):  # type: ignore[type-arg]
        def shapes(self) -> set[tuple[int, ...]]:
            return {one["features"].shape for one in self}

    return Data(rows)


@pytest.mark.parametrize(
    ("options", "rows", "message"),
    [
        ({}, ROWS, "objective.features: patch does not fit rows whose files hold vectors"),
        ({"features": "frame"}, [{"features": held_picture(0)}], "hold pictures; set objective.features=patch"),
        ({"patch": 3}, [{"features": held_picture(0)}], "8 x 8 pixels cannot be cut into patches of 3 x 3"),
        ({"features": "frame"}, [row(0, 5, 2), row(1, 5, 2, width=7)], "have the widths 6, 7"),
        ({"features": "frame", "feature_width": 5}, ROWS, "have the widths 6"),
        ({"features": "region"}, ROWS, "region needs vectors with their boxes"),
        ({"features": "frame", "target_words": "attribute"}, ROWS, "there are rows without any"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Mmlm(**options).check(None, data_of(rows))


SMALL = [
    "steps=4", "batch.size=6", "batch.micro=4", "data.limit=24", "eval.batches=1", "eval.every=null",
    "model.config={model_type: llmrecipe_native, kind: encoder, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2}",
]  # fmt: skip


def test_a_run_goes_on_to_the_bit_and_eval_finds_its_head(tmp_path: Path) -> None:
    """The head of features is part of what is saved, and the encoder is a folder that Transformers opens."""
    run = resumes_to_the_bit(tmp_path, "mmlm", SMALL, 2)
    assert len(curve(tmp_path / "whole")) == 4
    kept = events(tmp_path / "whole", "evaluation")[-1]
    again = evaluate_path(str(tmp_path / "whole"), ["eval.batches=1", "data.cache=false"])
    names = ("loss", "nll/removed", "nll/shuffled", "accuracy", "gain/removed", "gain/shuffled")
    assert [again[name] for name in names] == pytest.approx([kept[f"eval/{name}"] for name in names], abs=1e-6)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "whole" / "final" / "model")
    state = run.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_files_of_frames_and_of_regions_train(tmp_path: Path) -> None:
    """Sounds of other lengths, and regions with their boxes."""
    draws = np.random.default_rng(0)
    for i in range(6):
        np.save(tmp_path / f"{i}.npy", draws.normal(size=(2 + i, 5)))
        np.savez(tmp_path / f"{i}.npz", features=draws.normal(size=(1 + i, 5)), boxes=draws.uniform(size=(1 + i, 4)))
    for form, suffix in (("frame", "npy"), ("region", "npz")):
        folder = tmp_path / form
        rows = [{"features": f"{i}.{suffix}", "text": f"sound {i}"} for i in range(6)]
        save_rows(folder, "train", rows)
        for i in range(6):
            (folder / f"{i}.{suffix}").write_bytes((tmp_path / f"{i}.{suffix}").read_bytes())
        words = [f"data.path={folder}", f"objective.features={form}", "objective.target_words=any", "steps=2", "data.limit=6"]
        run = train_recipe(tmp_path / f"run_{form}", "mmlm", *SMALL[1:3], SMALL[-1], *words)
        assert run.model.task_head["features"].width == (5 if form == "frame" else 12)
        assert len(curve(tmp_path / f"run_{form}")) == 2


def test_a_row_whose_tokens_are_all_special_has_nothing_to_predict() -> None:
    """An attribute that the tokenizer does not know, in a row of an evaluation."""
    objective = Mmlm(features="frame", feature_width=WIDTH, target_words="attribute", prob=1.0)
    roles = roles_of(objective)
    known = {**ROWS[0], "attribute": [0, 1, *[0] * (len(ROWS[0]["ids"]) - 2)]}
    unknown = {**ROWS[1], "attribute": [1, *[0] * (len(ROWS[1]["ids"]) - 1)]}
    batch = objective.collate([unknown, known], roles)
    assert batch.target.tolist() == [known["ids"][1]] and batch.sequence.tolist() == [1]
