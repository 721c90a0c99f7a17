"""`runtime.shard`: sizes of the mesh, and which components are refused before anything is read."""

from __future__ import annotations

import pytest

from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError
from llmrecipe.recipe.component_card import find_cards
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.schema import RuntimeSection
from llmrecipe.recipe.sharding_rules import UNPROVED, mesh_mistakes, refusal, shard_size

SHARDS = ("zero1", "zero2", "zero3")


def wrong(**keys: object) -> list[str]:
    """The keys that are refused."""
    return [".".join(key) for key, _ in mesh_mistakes(RuntimeSection.model_validate(keys))]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, []),
        ({"shard": "zero3", "processes": 4}, []),
        ({"shard": "zero3", "processes": 4, "dp_shard": 4}, []),
        ({"shard": "zero3", "processes": 4, "dp_replicate": 2}, []),
        ({"shard": "zero2", "processes": 6, "dp_replicate": 2, "dp_shard": 3}, []),
        ({"shard": "zero3", "processes": 4, "dp_shard": 3}, ["runtime.dp_shard"]),
        ({"shard": "zero3", "processes": 4, "dp_replicate": 2, "dp_shard": 4}, ["runtime.dp_shard"]),
        ({"shard": "zero3", "processes": 3, "dp_replicate": 2}, ["runtime.dp_replicate"]),
        ({"shard": "zero3", "processes": 2, "tp": 2}, ["runtime.tp"]),
        ({"shard": "zero3", "processes": 2, "cp": 2}, ["runtime.cp"]),
        ({"processes": 4, "dp_replicate": 2}, ["runtime.dp_replicate"]),
        ({"processes": 4, "shard": "zero1", "dp_replicate": 2}, ["runtime.dp_replicate"]),
        ({"processes": 4, "dp_shard": 4}, ["runtime.dp_shard"]),
        ({"shard": "zero2", "processes": 4, "state_dict": "sharded"}, []),
        ({"shard": "zero1", "processes": 4, "state_dict": "sharded"}, ["runtime.state_dict"]),
        ({"state_dict": "sharded"}, ["runtime.state_dict"]),
        ({"shard": "zero3", "processes": 4, "offload": "cpu"}, []),
        ({"shard": "zero1", "processes": 4, "offload": "cpu"}, ["runtime.offload"]),
        ({"offload": "cpu"}, ["runtime.offload"]),
        ({"processes": 2, "shard": "zero3", "backend": "deepspeed"}, ["runtime.backend"]),
    ],
)
def test_sizes_of_the_mesh(keys: dict[str, object], expected: list[str]) -> None:
    assert wrong(**keys) == expected


def test_a_library_that_is_refused_says_what_has_its_stages() -> None:
    with pytest.raises(
        RecipeError,
        match=r"stages 1, 2 and 3 are runtime\.shard=zero1, zero2 and zero3 \(for its other keys: llmrecipe docs clusters",
    ):
        compose("sft", ["runtime.processes=2", "runtime.shard=zero3", "runtime.backend=deepspeed"])


def test_a_wrong_product_names_every_size_and_the_number_of_processes() -> None:
    with pytest.raises(RecipeError) as caught:
        compose("sft", ["runtime=hsdp", "runtime.dp_shard=3", "runtime.processes=4"])
    text = str(caught.value)
    for part in ("dp_replicate=2", "dp_shard=3", "cp=1", "tp=1", "6 processes", "runtime.processes is 4"):
        assert part in text


def test_how_many_processes_divide() -> None:
    assert shard_size(RuntimeSection(shard="zero3", processes=12, dp_replicate=3)) == 4
    assert shard_size(RuntimeSection(shard="zero3", processes=12, dp_shard=12)) == 12


@pytest.mark.parametrize(
    ("name", "shard", "replicas"),
    [("zero1", "zero1", 1), ("zero2", "zero2", 1), ("zero3", "zero3", 1), ("fsdp", "zero3", 1), ("hsdp", "zero3", 2)],
)
def test_presets_say_what_they_divide(name: str, shard: str, replicas: int) -> None:
    section = compose("sft", [f"runtime={name}", "runtime.processes=4"]).recipe.runtime
    assert (section.shard, section.dp_replicate) == (shard, replicas)
    (card,) = find_cards(name)
    assert card["group"] == "runtime" and f"runtime={name}" in card["doc"]


def test_whatever_declares_nothing_is_refused_with_the_reason() -> None:
    with pytest.raises(
        RecipeError, match=r"stack\.adalora: adalora is refused under runtime\.shard=zero3: .*runtime\.shard=none"
    ):
        compose("sft", ["stack=[adalora]", "runtime=zero3"])
    specs = [registry.spec(group, name) for group in ("stack", "objective", "optim") for name in registry.names(group)]
    for spec in specs:
        known = tuple(spec.facts.get("shards") or ())
        assert set(known) <= set(SHARDS), spec.name
        for shard in SHARDS:
            text = refusal(spec, shard)
            assert (text is None) == (shard in known)
            assert text is None or str(spec.facts.get("unsharded") or UNPROVED) in text
        assert refusal(spec, "none") is None


@pytest.mark.parametrize("shard", ["zero2", "zero3"])
@pytest.mark.parametrize(
    ("kind", "why"), [("nf4", "leaves 4-bit weights whole, or changes the codes"), ("int8", "leaves 8-bit")]
)
def test_quantized_bases_are_refused_where_parameters_are_divided(kind: str, why: str, shard: str) -> None:
    compose("sft", [f"stack=[{kind},lora]", "runtime=zero1"])
    with pytest.raises(RecipeError, match=rf"stack\.{kind}: {kind} is refused under runtime\.shard={shard}: .*{why}"):
        compose("sft", [f"stack=[{kind},lora]", f"runtime={shard}"])


@pytest.mark.parametrize("shard", ["zero2", "zero3"])
def test_an_option_that_needs_whole_weights_is_refused_where_they_are_divided(shard: str) -> None:
    compose("mezo", [f"runtime={shard}"])
    with pytest.raises(RecipeError, match=rf"mezo\.perturb: layerwise is refused under runtime\.shard={shard}: .*inplace"):
        compose("mezo", [f"runtime={shard}", "stack.mezo.perturb=layerwise"])


def test_a_compiled_model_is_refused_where_parameters_are_gathered() -> None:
    compose("sft", ["runtime=zero1", "model.compile=blocks"])
    with pytest.raises(RecipeError, match=r"model\.compile"):
        compose("sft", ["runtime=zero3", "model.compile=blocks"])
