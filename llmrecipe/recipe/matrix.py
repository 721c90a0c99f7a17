"""Stages written once and run for many values.

    method:
      matrix: {method: {lora: {optim: {lr: 2e-3}}, bitfit: {}}, seed: [0, 1]}
      recipe: "${matrix:method}"
      seed: "${matrix:seed}"

makes the stages method-lora-0, method-lora-1, method-bitfit-0 and method-bitfit-1. An axis is a list of values, or a mapping of
values to keys of a stage that are added for that value. `${matrix:axis}` is the value; where it is the whole text the value
keeps its type. A list item `${stage:method}` becomes one item for each of these stages; in any other text it is the one with
the values of the stage that names it, which has the same axes and may have more.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmrecipe.core.errors import did_you_mean
from llmrecipe.recipe.content_key import REFERENCE
from llmrecipe.recipe.yaml_file import KeyPath, dotted

MOST = 10_000
"""Most stages of one `matrix`."""
AXIS = re.compile(r"\$\{\s*matrix:\s*([A-Za-z_][\w-]*)\s*\}")
"""How a stage names its value on an axis: `${matrix:x}`."""
Mistake = tuple[KeyPath, str]
Values = dict[str, str]
"""Axis -> value of one stage, as text."""


@dataclass
class Expanded:
    """Stages with every `matrix` written out."""

    bodies: dict[str, Any] = field(default_factory=dict)
    """Stage -> its body."""
    written: dict[str, str] = field(default_factory=dict)
    """Stage -> its key in the recipe."""
    mistakes: list[Mistake] = field(default_factory=list)


def expand(section: Mapping[str, Any]) -> Expanded:
    """Write out every stage that has `matrix`, one for each combination of its axes, the last axis fastest.

    Args:
        section: the recipe's `stages`.
    """
    found = Expanded()
    members: dict[str, dict[str, Values]] = {}
    values: dict[str, Values] = {}
    for key, body in section.items():
        name, at = str(key), ("stages", str(key))
        made: dict[str, tuple[Any, Values]]
        if not isinstance(body, Mapping) or "matrix" not in body:
            made = {name: (body, {})}
        else:
            wrong = _wrong(body["matrix"], (*at, "matrix"))
            found.mistakes += wrong
            made = {} if wrong else _combinations(name, body)
            members[name] = {stage: chosen for stage, (_, chosen) in made.items()}
            if len(made) < (0 if wrong else _size(body["matrix"])):
                text = f"{dotted((*at, 'matrix'))}: two of its values make the same name; names keep letters, digits, _ and -"
                found.mistakes.append(((*at, "matrix"), text))
        for stage, (single, chosen) in made.items():
            axes = list(body["matrix"]) if isinstance(body, Mapping) and "matrix" in body else []
            found.mistakes += _unknown(single, axes, at)
            found.bodies[stage] = single
            found.written[stage] = name
            values[stage] = chosen
    for stage, body in found.bodies.items():
        found.bodies[stage] = _gathered(body, members, values[stage])
        found.mistakes += _several(found.bodies[stage], members, ("stages", found.written[stage]))
    return found


def _wrong(matrix: object, at: KeyPath) -> list[Mistake]:
    """Return what is wrong with the form of a `matrix`."""
    if not isinstance(matrix, Mapping) or not matrix:
        return [(at, f"{dotted(at)}: must be a mapping such as {{seed: [0, 1, 2]}}; got {matrix!r}")]
    wrong: list[Mistake] = []
    for axis, values in matrix.items():
        key = (*at, str(axis))
        if isinstance(values, Mapping):
            wrong += [
                ((*key, str(v)), f"{dotted((*key, str(v)))}: must be keys of a stage such as {{steps: 20}}; got {own!r}")
                for v, own in values.items()
                if not isinstance(own, Mapping)
            ]
        elif not isinstance(values, list) or any(isinstance(v, list | Mapping) or v is None for v in values):
            wrong.append(
                (key, f"{dotted(key)}: must be a list of values or a mapping value -> keys of a stage; got {values!r}")
            )
    if not wrong and (size := _size(matrix)) > MOST:
        wrong.append((at, f"{dotted(at)}: it makes {size:,} stages; at most {MOST:,} are made"))
    return wrong


def _size(matrix: Mapping[str, Any]) -> int:
    size = 1
    for values in matrix.values():
        size *= len(values)
    return size


def _combinations(name: str, body: Mapping[str, Any]) -> dict[str, tuple[dict[str, Any], Values]]:
    matrix = body["matrix"]
    made = {}
    for values in itertools.product(*matrix.values()):
        chosen = dict(zip(map(str, matrix), values, strict=True))
        single = {k: v for k, v in body.items() if k != "matrix"}
        for axis, value in chosen.items():
            if isinstance(matrix[axis], Mapping):
                single = _merged(single, matrix[axis][value])
        label = "-".join(re.sub(r"[^\w-]", "_", str(v)) for v in values)
        made[f"{name}-{label}"] = _filled(single, chosen), {axis: str(value) for axis, value in chosen.items()}
    return made


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two bodies: mappings key by key, lists (`with`) concatenated, for anything else the second one."""
    return {**below, **{k: _both(below[k], v) if k in below else v for k, v in above.items()}}


def _both(below: object, above: object) -> object:
    if isinstance(below, Mapping) and isinstance(above, Mapping):
        return _merged(below, above)
    return [*below, *above] if isinstance(below, list) and isinstance(above, list) else above


def _filled(body: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return a body with the values of its axes filled in."""
    return {k: _filled_in(v, chosen) for k, v in body.items()}


def _filled_in(value: object, chosen: Mapping[str, Any]) -> object:
    if isinstance(value, Mapping):
        return _filled(value, chosen)
    if isinstance(value, list):
        return [_filled_in(v, chosen) for v in value]
    if not isinstance(value, str):
        return value
    whole = AXIS.fullmatch(value)
    if whole and whole[1] in chosen:
        return chosen[whole[1]]
    return AXIS.sub(lambda m: str(chosen.get(m[1], m[0])), value)


def _unknown(value: object, axes: list[str], at: KeyPath) -> list[Mistake]:
    """Return a mistake for each axis that is named but does not exist."""
    if isinstance(value, Mapping):
        return [m for k, v in value.items() for m in _unknown(v, axes, (*at, str(k)))]
    if isinstance(value, list):
        return [m for v in value for m in _unknown(v, axes, at)]
    named = AXIS.findall(value) if isinstance(value, str) else []
    has = f"the axes are {', '.join(axes)}" if axes else "this stage has no `matrix`"
    return [(at, f"{dotted(at)}: ${{matrix:{n}}}: there is no axis '{n}'{did_you_mean(n, axes)}; {has}") for n in named]


def _gathered(value: object, members: Mapping[str, Mapping[str, Values]], chosen: Values) -> object:
    """Return a body in which `${stage:x}` of an expanded stage x is all its stages (a list item), or one of them."""
    if isinstance(value, Mapping):
        return {k: _gathered(v, members, chosen) for k, v in value.items()}
    if isinstance(value, str):
        return REFERENCE.sub(lambda m: f"${{stage:{_alike(members.get(m[1], {}), chosen) or m[1]}}}", value)
    if not isinstance(value, list):
        return value
    items: list[object] = []
    for item in value:
        whole = REFERENCE.fullmatch(item) if isinstance(item, str) else None
        if whole and whole[1] in members:
            items += [f"${{stage:{stage}}}" for stage in members[whole[1]]]
        else:
            items.append(_gathered(item, members, chosen))
    return items


def _alike(members: Mapping[str, Values], chosen: Values) -> str | None:
    """Return the stage that has the given values on all of its axes."""
    return next((stage for stage, values in members.items() if values.items() <= chosen.items()), None)


def _several(value: object, members: Mapping[str, Mapping[str, Values]], at: KeyPath) -> list[Mistake]:
    """Return a mistake for each text that names an expanded stage and not one of its stages."""
    if isinstance(value, Mapping):
        return [m for k, v in value.items() for m in _several(v, members, (*at, str(k)))]
    if isinstance(value, list):
        return [m for v in value for m in _several(v, members, at)]
    named = [n for n in REFERENCE.findall(value) if members.get(n)] if isinstance(value, str) else []
    return [
        (
            at,
            f"{dotted(at)}: ${{stage:{n}}} is one of {len(members[n])} stages here; name one ({next(iter(members[n]))}, ...), "
            f"or give this stage the axes of '{n}' ({', '.join(next(iter(members[n].values())))}) and a value of it on each",
        )
        for n in named
    ]
