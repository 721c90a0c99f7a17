"""NaN and infinities are no option values: every number of every component and section refuses them, at every depth."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError

from llmrecipe.cli.app import run_command
from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.schema import Recipe
from llmrecipe.recipe.section import Section
from llmrecipe.recipe.validate import build_component

BAD = (math.inf, -math.inf, math.nan)


def holding(annotation: Any, bad: float) -> Iterator[Any]:
    """Values of a type with `bad` at each place where a float may stand."""
    origin = get_origin(annotation)
    if annotation is float:
        yield bad
    elif origin is Annotated:
        yield from holding(get_args(annotation)[0], bad)
    elif origin in (Union, types.UnionType):
        for branch in get_args(annotation):
            yield from holding(branch, bad)
    elif origin in (list, tuple, set):
        parts = [a for a in get_args(annotation) if a is not Ellipsis]
        for place, part in enumerate(parts):
            rest = [1.0 if p is float else None for p in parts]
            yield from ([*rest[:place], value, *rest[place + 1 :]] for value in holding(part, bad))
    elif origin is dict:
        yield from ({"x": value} for value in holding(get_args(annotation)[1], bad))
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield from ({field.alias or name: value} for value in holding(field.annotation, bad))


def sections(model: type[BaseModel] = Recipe) -> Iterator[type[BaseModel]]:
    """The recipe and every model below it."""
    yield model
    for field in model.model_fields.values():
        for part in (field.annotation, *get_args(field.annotation)):
            for inner in (part, *get_args(part)):
                for kind in (inner, *get_args(inner)):
                    if isinstance(kind, type) and issubclass(kind, Section):
                        yield from sections(kind)


SPECS = [registry.spec(group, name) for group in registry.groups() for name in registry.names(group)]
MODELS = {
    **{model.__name__: model for model in sections()},
    **{f"{s.group}-{s.name}": s.schema_model for s in SPECS},
}


def refused(model: Any, name: str, value: Any, python: bool) -> bool:
    """Whether a model complains of this field."""
    try:
        model(**{name: value}) if python else model.model_validate_json(json.dumps({name: value}))
    except ValidationError as error:
        return any(detail["loc"][:1] == (name,) for detail in error.errors())
    return False


def test_the_walk_reaches_sections_and_components() -> None:
    having = {n: [v for f in m.model_fields.values() for v in holding(f.annotation, 0.0)] for n, m in MODELS.items()}
    wanted = {"Recipe", "RangeSection", "DataSection", "EvalSection", "ModelSection"}
    wanted |= {"optim-adamw", "stack-lora", "objective-dpo"}
    assert wanted <= {name for name, values in having.items() if values}


@pytest.mark.parametrize("name", MODELS)
def test_every_float_refuses_what_is_not_finite(name: str) -> None:
    model = MODELS[name]
    for key, field in model.model_fields.items():
        for bad in BAD:
            for value in holding(field.annotation, bad):
                assert refused(model, field.alias or key, value, python=False), f"{name}.{key} takes {value}"


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.group}-{s.name}")
def test_constructors_refuse_it_too(spec: registry.Spec) -> None:
    cls = registry.load_class(spec.group, spec.name)
    for key, option in spec.options.items():
        for bad in BAD:
            for value in holding(option.annotation, bad):
                given = tuple(value) if "tuple" in option.type_text and isinstance(value, list) else value
                assert refused(cls, key, given, python=True), f"{spec.name}({key}={given})"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.lr=inf", "optim.lr: must be a finite number; got Infinity [override optim.lr=inf]"),
        ("optim.lr=1e999", "optim.lr: must be a finite number; got Infinity"),
        ("stack.lora.alpha=-inf", "stack.lora.alpha: must be a finite number; got -Infinity"),
        ("epochs=nan", "epochs: must be a finite number; got NaN"),
        ("stack.lora.r=inf", "stack.lora.r: must be a whole number; got Infinity"),
        ("data.path={a: 1.0, b: inf}", "data.path.b: must be a finite number; got Infinity"),
        ("+model.config.rope_theta=inf", "model.config.rope_theta: must be a finite number; got Infinity"),
        ("search.space.optim.lr={low: 1e-4, high: inf}", "search.space.optim.lr.high: must be a finite number; got Infinity"),
        ("search.space.optim.lr=[1e-4, nan]", "search.space.optim.lr.1: must be a finite number; got NaN"),
    ],
)
def test_the_message_names_the_place(word: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        compose("sft_lora", [word])
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_component_on_its_own() -> None:
    with pytest.raises(RecipeError, match=r"optim\.lr: must be a finite number; got NaN"):
        build_component("optim", {"kind": "adamw", "lr": math.nan}, "optim")


@pytest.mark.parametrize("verb", ["check", "train"])
def test_the_verbs_end_with_code_two(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([verb, "recipe=sft_lora", "optim.lr=inf"]) == 2
    assert "optim.lr: must be a finite number" in capsys.readouterr().err
