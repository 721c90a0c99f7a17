"""Image classification: parity with ViT and ResNet of Transformers, what trains, whole runs, a folder that others open."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, ResNetConfig, ViTConfig, ViTImageProcessorPil

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.core.registry import PACKAGE
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.role_models import Roles
from llmrecipe.interop.load_run import open_run
from llmrecipe.interop.merged import export_merged
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.selective.bitfit import Bitfit
from llmrecipe.models.image_processor import load_processor, places
from llmrecipe.models.native import NativeConfig
from llmrecipe.objectives.finetuning.image_classification import ImageClassification
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.schema import ModelSection, ProcessorSection
from tests.pictures import held_picture, save_picture, save_rows
from tests.trainings import curve, events, resumes_to_the_bit, train_recipe

SHAPES: dict[str, Any] = {
    "vit": ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4,
        num_labels=3, hidden_dropout_prob=0.0,
    ),
    "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3),
}  # fmt: skip


def model_of(kind: str) -> Any:
    """A random model in float64, batch normalization with statistics of its own."""
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(copy.deepcopy(SHAPES[kind]))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model.double()


def case(kind: str, **options: Any) -> tuple[ImageClassification, Roles, list[dict[str, Any]]]:
    roles = Roles(Engine(model_of(kind)), Stack([]), None, torch.device("cpu"), packing=False)
    rows = [{"row": i, "features": held_picture(i), "label": i % 3} for i in range(5)]
    return ImageClassification(**options), roles, rows


@pytest.mark.parametrize("kind", SHAPES)
def test_loss_and_gradients_are_those_of_transformers(kind: str) -> None:
    """In float64, the class's own loss on the same pictures: the mean of the labels' negative log-likelihoods."""
    objective, roles, rows = case(kind)
    roles.engine.train()
    batch = objective.collate(rows, roles)
    (objective.loss(batch, roles).total / objective.weight(batch)).backward()
    stock = model_of(kind).eval()
    pixels = torch.stack([torch.from_numpy(row["features"].load()) for row in rows]).double()
    out = stock(pixel_values=pixels, labels=torch.tensor([row["label"] for row in rows]))
    out.loss.backward()
    assert float(objective.loss(batch, roles).total.detach()) / 5 == pytest.approx(float(out.loss.detach()), abs=1e-12)
    own = dict(roles.model.named_parameters())
    for name, parameter in stock.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0
        torch.testing.assert_close(own[name].grad, parameter.grad, atol=1e-12, rtol=0)


def test_batch_normalization_keeps_its_statistics_so_no_picture_depends_on_another() -> None:
    """In training mode: the loss of five is the sum of five losses, and no buffer has moved."""
    objective, roles, rows = case("resnet")
    before = {name: value.clone() for name, value in roles.model.named_buffers()}
    roles.engine.train()
    whole, *parts = [
        float(objective.loss(objective.collate(part, roles), roles).total.detach()) for part in (rows, *([row] for row in rows))
    ]
    assert whole == pytest.approx(sum(parts), abs=1e-12)
    assert before and all(torch.equal(value, before[name]) for name, value in roles.model.named_buffers())


@pytest.mark.parametrize("kind", SHAPES)
def test_what_trains(kind: str) -> None:
    """Everything, the biases and a new head, or the head alone."""
    model = model_of(kind)
    Stack([]).attach(model)
    assert all(p.requires_grad for p in model.parameters())
    ImageClassification(head_only=True).prepare_model(model, 0)
    Stack([]).attach(model)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names == {n for n, _ in model.named_parameters() if n.startswith("classifier.")} and names
    model = model_of(kind)
    model.new_heads = ("classifier",)
    stack = Stack([Bitfit(name="bitfit")])
    stack.attach(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    biases = sum(p.numel() for n, p in model_of(kind).named_parameters() if n.endswith("bias") and "classifier" not in n)
    head = sum(p.numel() for n, p in trained.items() if n.startswith("classifier."))
    assert sum(p.numel() for p in trained.values()) == biases + head and biases and head


def test_the_head_alone_and_a_stack_that_trains_more_do_not_go_together() -> None:
    recipe = compose("image_classification", ["objective.head_only=true", "stack=[bitfit]"]).recipe
    with pytest.raises(RecipeError, match=r"objective.head_only: the stack \[bitfit\] trains more"):
        ImageClassification(head_only=True).check(recipe, None)


def test_places_of_a_picture() -> None:
    """A class token and a patch of 4 x 4 each; a state for 32 x 32 pixels of a convolution; a frame for a vector."""
    assert places(SHAPES["vit"], (3, 8, 12)) == 1 + 2 * 3
    assert places(SHAPES["resnet"], (3, 224, 224)) == 49
    assert places(SHAPES["vit"], (17, 5)) == 17


def processor(config: Any = None, section: ModelSection | None = None, **values: Any) -> Any:
    given = section or ModelSection(init="random", config={"model_type": "llmrecipe_native"})
    return load_processor(given, ProcessorSection(**values), config or NativeConfig(kind="vision", image_size=8))


def test_the_processor_is_the_recipes_the_models_or_one_of_the_models_size(tmp_path: Path) -> None:
    """Numbers equal Transformers' own, in this order of preference; grey models get grey pictures."""
    from PIL import Image

    picture = Image.open(save_picture(tmp_path / "a.png", 3, side=20))
    wanted = ViTImageProcessorPil(size={"height": 8, "width": 8})(picture, return_tensors="np")["pixel_values"][0]
    assert np.array_equal(processor()(picture), wanted)
    saved = tmp_path / "model"
    ViTImageProcessorPil(size={"height": 4, "width": 4}, image_mean=[0.0] * 3, image_std=[1.0] * 3).save_pretrained(saved)
    NativeConfig(kind="vision", image_size=4).save_pretrained(saved)
    own = processor(section=ModelSection(path=str(saved)))
    assert own(picture).shape == (3, 4, 4) and own(picture).min() >= 0
    bigger = load_processor(
        ModelSection(path=str(saved)), ProcessorSection(config={"size": {"height": 6, "width": 6}}), NativeConfig()
    )
    assert bigger(picture).shape == (3, 6, 6) and bigger.fingerprint != own.fingerprint
    grey = processor(NativeConfig(kind="vision", image_size=8, num_channels=1))
    assert grey.mode == "L" and grey(picture.convert("L")).shape == (1, 8, 8)
    blank = ModelSection(init="random", config={"model_type": "vit"})
    for values, key in (({"sise": 3}, "processor.config.sise"), ({"image_processor_type": "ViTImageProcesor"}, "did you mean")):
        with pytest.raises(ModelError, match=key):
            load_processor(blank, ProcessorSection(config=values), SHAPES["vit"])


SMALL = [
    "steps=4", "batch.size=8", "batch.micro=5", "data.limit=64", "eval.batches=1", "eval.every=null",
    "model.config={model_type: llmrecipe_native, kind: vision, image_size: 32, patch_size: 8, hidden_size: 16, "
    "num_hidden_layers: 1, num_attention_heads: 2, positions: learned, norm: layernorm, gated: false, bias: true}",
]  # fmt: skip


def test_a_run_leaves_a_folder_that_transformers_opens_and_goes_on_to_the_bit(tmp_path: Path) -> None:
    """Processor and model from the folder alone give the logits of the run; the learned weights do not depend on a stop."""
    from PIL import Image

    run = resumes_to_the_bit(tmp_path, "image_classification", SMALL, 2)
    assert len(curve(tmp_path / "whole")) == 4
    folder = tmp_path / "whole" / "final" / "model"
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    prepared = AutoImageProcessor.from_pretrained(folder, backend="pil")
    rows = pa.ipc.open_file(str(PACKAGE / "assets" / "data" / "pictures" / "valid.arrow")).read_all().slice(0, 4).to_pylist()
    pictures = [Image.open(io.BytesIO(row["image"])) for row in rows]
    with torch.no_grad():
        logits = model(**prepared(pictures, return_tensors="pt")).logits
        batch = run.objective.collate([run.validation[i] for i in range(4)], run.roles)
        run.roles.engine.eval()
        torch.testing.assert_close(run.roles.policy(batch, want="scores")["scores"], logits, atol=1e-6, rtol=0)
    assert [model.config.id2label[i] for i in range(4)] == ["ball", "box", "hat", "kite"]
    assert events(tmp_path / "whole", "evaluation")[-1]["eval/macro_f1"] <= 1.0


def test_a_vit_of_transformers_under_lora_merges_into_a_folder_with_its_processor(tmp_path: Path) -> None:
    """Pretrained with other classes: the head is new, the processor is the folder's own, its size another than the default."""
    base = tmp_path / "base"
    AutoModelForImageClassification.from_config(SHAPES["vit"]).save_pretrained(base)
    ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.2] * 3).save_pretrained(base)
    words = [f"model={{path: {base}, init: pretrained, config: {{}}}}", "stack=[lora]", "stack.lora.target=attn.q|v"]
    run = train_recipe(tmp_path / "run", "image_classification", *SMALL[:-1], *words)
    assert run.data[0]["features"].shape == (3, 8, 8)
    assert run.model.new_heads == ("classifier",)
    done = export_merged(tmp_path / "run", tmp_path / "merged", loaded=open_run(str(tmp_path / "run")))
    assert done.difference.passes and done.difference.largest < 1e-5
    assert list(AutoImageProcessor.from_pretrained(tmp_path / "merged", backend="pil").image_mean) == [0.2] * 3


TRAINS: dict[str, tuple[list[str], Any]] = {
    "full": (["stack=[]"], lambda name: True),
    "bitfit": (["stack=[bitfit]"], lambda name: name.startswith("classifier.") or "bias" in name),
    "head": (["objective.head_only=true"], lambda name: name.startswith("classifier.")),
}
"""What trains -> words, and which of the model's parameters may have moved."""


@pytest.mark.parametrize("way", TRAINS)
def test_a_resnet_trains_what_the_recipe_names_and_goes_on_to_the_bit_with_its_statistics(way: str, tmp_path: Path) -> None:
    """The run's model, read again, has the running statistics of the checkpoint, and moved what the recipe names alone."""
    model_of("resnet").float().save_pretrained(tmp_path / "base")
    for i in range(8):
        save_picture(tmp_path / "data" / f"{i}.png", i)
    save_rows(tmp_path / "data", "train", [{"image": f"{i}.png", "label": i % 2} for i in range(8)])
    words = [f"model={{path: {tmp_path / 'base'}, init: pretrained, config: {{}}}}", f"data.path={tmp_path / 'data'}"]
    size, (own, may_move) = "processor.config={size: {height: 8, width: 8}}", TRAINS[way]
    run = resumes_to_the_bit(tmp_path, "image_classification", ["steps=4", "batch.size=4", *words, size, *own], 2)
    assert run.data[0]["features"].shape == (3, 8, 8)
    found = open_run(str(tmp_path / "parts")).model
    before = model_of("resnet").float()
    old, statistics = dict(before.named_parameters()), dict(before.named_buffers())
    buffers = {name: value for name, value in found.named_buffers() if name in statistics}
    assert len(buffers) == len(statistics) > 8
    assert all(torch.equal(value, statistics[name]) for name, value in buffers.items())
    # The head is new: two classes where the checkpoint has three.
    moved = {n for n, p in found.named_parameters() if n not in old or p.shape != old[n].shape or not torch.equal(p, old[n])}
    assert {name for name in moved if name.startswith("classifier.")} and all(map(may_move, moved))
    assert (len(moved) > 2) is (way != "head")


def test_pictures_of_a_size_without_positions_are_refused_before_weights_load() -> None:
    from llmrecipe.core.errors import RecipeError
    from llmrecipe.training.dry_run import check

    with pytest.raises(RecipeError, match=r"processor\.config\.size: .* 33 x 33 pixels, and this model reads 32 x 32"):
        check("image_classification", ["data.limit=8", "processor.config.size={height: 33, width: 33}"])
