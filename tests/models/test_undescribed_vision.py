"""Image classifiers of families nobody described: no inspection that a run can do without stops it, whatever their shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageClassification

from llmrecipe.core import registry
from llmrecipe.core.errors import ModelError
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.role_models import Roles
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.models.load import load_model, skeleton
from llmrecipe.models.module_map import anatomy
from llmrecipe.models.optimizations import speed_up
from llmrecipe.objectives.finetuning.image_classification import ImageClassification
from llmrecipe.optim.optimizers.adamw import AdamW
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.schema import ModelSection
from llmrecipe.training.dry_run import check
from llmrecipe.training.memory_estimate import estimate_memory
from llmrecipe.training.model_flops import model_flops
from tests.pictures import held_picture

PLAIN = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
WINDOWS = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
FOUR = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2]}
LEVIT = {
    "image_size": 64,
    "hidden_sizes": [16, 16, 16],
    "depths": [1, 1, 1],
    "num_attention_heads": [2, 2, 2],
    "key_dim": [8] * 3,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "deit": PLAIN,
    "dinov2": {key: value for key, value in PLAIN.items() if key != "intermediate_size"},
    "swin": WINDOWS,
    "swinv2": WINDOWS,
    "hiera": {"image_size": [32, 32], "embed_dim": 16, "num_heads": [1, 1, 2, 2], "depths": [1, 1, 1, 1]},
    "segformer": FOUR,
    "pvt": {"image_size": 32, **FOUR},
    "levit": LEVIT,
    "poolformer": {"hidden_sizes": [8] * 4, "depths": [1] * 4},
    "convnext": {"image_size": 32, "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "bit": {"hidden_sizes": [128, 128], "depths": [1, 1], "embedding_size": 32},
    "regnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 8},
}
PYRAMIDS = ("swin", "segformer", "levit")
SIDES = {"levit": 64}


def section(family: str) -> ModelSection:
    return ModelSection(init="random", config={"model_type": family, **CONFIGS[family]})


def roles_of(model: Any) -> Roles:
    return Roles(Engine(model), Stack([]), None, torch.device("cpu"), packing=False)


def pictures(family: str) -> list[dict[str, Any]]:
    side = SIDES.get(family, 32)
    return [{"row": i, "features": held_picture(i, side), "label": i % 2} for i in range(3)]


@pytest.mark.parametrize("family", CONFIGS)
def test_it_is_estimated_trains_and_no_optimization_changes_its_loss(family: str) -> None:
    on_meta = skeleton(section(family), rows_head="image", labels=["a", "b"])
    on_meta.requires_grad_(True)
    estimate = estimate_memory(on_meta, Stack([]), AdamW(), 10)
    assert estimate.activations > 0 or not any(isinstance(m, torch.nn.Linear) for m in on_meta.modules())
    # Three float32 values for each of ten targets and two labels, and at most the states.
    assert estimate.logits >= 3 * 4 * 10 * 2
    objective, losses = ImageClassification(), []
    for fast in (False, True):
        model = load_model(section(family), rows_head="image", labels=["a", "b"]).requires_grad_(True)
        if fast:
            speed_up(model)
        roles = roles_of(model.eval())
        loss = objective.loss(objective.collate(pictures(family), roles), roles).total
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and all(0 < value < 100 for value in losses)
    recipe = compose("image_classification", ["log.mfu=measure"]).recipe
    model_flops(recipe, objective, roles)


@pytest.mark.parametrize("family", PYRAMIDS)
def test_a_method_that_needs_one_width_is_refused_by_a_sentence(family: str) -> None:
    model = load_model(section(family), rows_head="image", labels=["a", "b"])
    with pytest.raises(ModelError, match=rf"stack\.lora: {family}: .*stack=\[\] trains the whole model"):
        Stack([registry.load_class("stack", "lora")(name="lora")]).attach(model)
    assert not list(all_hooks(model))


def test_a_plain_encoder_keeps_its_sites() -> None:
    found = anatomy(load_model(section("deit"), rows_head="image", labels=["a", "b"]))
    assert (found.layers, found.width, found.heads, len(found.at("attn.q"))) == (2, 32, 4, 2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "perceiver"}, "'perceiver' reads pictures as inputs"),
        ({"model_type": "imagegpt", "n_embd": 32, "n_layer": 2, "n_head": 4}, "'imagegpt' reads pictures as input_ids"),
        ({"model_type": "bit", **CONFIGS["bit"], "hidden_sizes": [8, 16]}, "no bit can be built from it: num_channels"),
    ],
)
def test_what_cannot_be_built_or_fed_is_said_of_the_config(config: dict[str, Any], message: str) -> None:
    for build in (load_model, skeleton):
        with pytest.raises(ModelError, match=message):
            build(ModelSection(init="random", config=config), rows_head="image", labels=["a", "b"])


def test_a_saved_pyramid_passes_check(tmp_path: Path) -> None:
    """Headers of its weights are compared, and nothing about it is a warning."""
    config = AutoConfig.for_model("hiera", **CONFIGS["hiera"], num_labels=2)
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path)
    words = [f"model.path={tmp_path}", "model.init=pretrained", "~model.config", "tokenizer.path=tiny", "data.limit=8"]
    found = check(
        "image_classification",
        [*words, "+processor.config={size: {height: 32, width: 32}, image_processor_type: ViTImageProcessor}"],
    )
    assert found.warnings == [] and found.trained == found.parameters
