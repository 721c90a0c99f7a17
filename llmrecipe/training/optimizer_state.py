"""The optimizer state and random generators of a checkpoint, as tensors and JSON."""

from __future__ import annotations

import base64
import random
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llmrecipe.core.errors import RunError
from llmrecipe.core.foreign import stored_count, stored_number
from llmrecipe.models.sharded import is_sharded, whole, write_whole
from llmrecipe.training.state_layout import StateLayouts

if TYPE_CHECKING:
    from llmrecipe.runtime.processes import Runtime

WORDS = 624
"""Words of a Mersenne Twister."""
SEPARATOR = "//"
"""Separates a parameter's name and the name of its state."""


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of an optimizer whose groups carry `names` as (tensors, JSON), by parameter name.

    Tensors of any kind are kept as they are: 8-bit states and their scales, code books, 0-d step counters. A tensor that
    several parameters share (a code book) is stored once and named in `shared`.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    shared: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                full = f"{name}{SEPARATOR}{key}"
                if not isinstance(value, Tensor):
                    values.setdefault(name, {})[key] = value
                    continue
                if is_sharded(value):
                    tensors[full] = value.detach()
                    continue
                place = (value.data_ptr(), value.dtype, tuple(value.shape), tuple(value.stride()))
                first = seen.setdefault(place, full) if value.numel() else full
                if first == full:
                    tensors[full] = value.detach()
                else:
                    shared[full] = first
    # Rates and decays are not state: the recipe and the schedule give them at any step.
    groups = [list(g["names"]) for g in optimizer.param_groups]
    return tensors, {"class": class_of(optimizer), "groups": groups, "values": values, "shared": shared}


def gathered_state(optimizer: torch.optim.Optimizer, runtime: Runtime) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return `optimizer_state` with what the processes divide joined; every process calls it.

    Divided tensors are gathered on every process, one after the other; of states that belong to one process each, the main
    process gets all.
    """
    tensors, facts = optimizer_state(optimizer)
    if runtime.in_step:
        tensors = _gathered(tensors, runtime.is_main)
    if runtime.shard != "zero1":
        return tensors, facts
    layouts: list[dict[str, Any]] = runtime.gather_json(
        {n: [str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in tensors.items()}
    )
    joined: dict[str, Tensor] = {}
    for source, layout in enumerate(layouts):
        for name, (dtype, shape) in layout.items():
            value = runtime.sent(tensors.get(name), source, getattr(torch, dtype), tuple(shape))
            if runtime.is_main:
                joined[name] = value.cpu()
    for other in runtime.gather_json({"values": facts["values"], "shared": facts["shared"]}):
        facts["values"] |= other["values"]
        facts["shared"] |= other["shared"]
    return joined, facts


def _gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Join divided tensors one after the other; the processes that do not keep them hold one at a time."""
    joined = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if keep:
            joined[name] = value.cpu() if is_sharded(tensor) else tensor
    return joined


def divided_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Return `optimizer_state` with the divided tensors, and their dtypes in the facts, apart from the others.

    Returns:
        The tensors of which this process holds a part, all others, the facts.
    """
    tensors, facts = optimizer_state(optimizer)
    parts = {name: tensor for name, tensor in tensors.items() if is_sharded(tensor)}
    facts["parts"] = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in parts.items()}
    return parts, {name: tensor for name, tensor in tensors.items() if name not in parts}, facts


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    read_parts: Callable[[dict[str, Tensor]], None] | None = None,
) -> None:
    """Load a saved state into a freshly built optimizer, bit for bit, on the devices of its parameters.

    Args:
        read_parts: reads the tensors of `facts["parts"]` into those it is given, by name.

    Raises:
        RunError: the optimizer, its groups or its parameters are not the ones that were saved.
    """
    if facts["class"] != class_of(optimizer):
        raise RunError(f"the checkpoint holds the state of {facts['class']}, the recipe has {class_of(optimizer)}")
    ours, theirs = [list(g["names"]) for g in optimizer.param_groups], facts["groups"]
    if ours != theirs:
        differ = sorted({n for g in ours for n in g} ^ {n for g in theirs for n in g})
        what = f"they differ in {', '.join(differ[:5])}" if differ else "the same parameters are grouped in another way"
        raise RunError(f"the checkpoint's optimizer steps other parameters than this recipe: {what}")
    everything = {**tensors, **{name: tensors[first] for name, first in facts["shared"].items()}}
    by_name: dict[str, dict[str, Any]] = {}
    for full, tensor in everything.items():
        name, _, key = full.rpartition(SEPARATOR)
        by_name.setdefault(name, {})[key] = tensor
    for name, values in facts["values"].items():
        by_name.setdefault(name, {}).update(values)
    wanted: dict[str, dict[str, str]] = {}
    for full, dtype in facts.get("parts", {}).items():
        name, _, key = full.rpartition(SEPARATOR)
        wanted.setdefault(name, {})[key] = dtype
    names = {id(p): name for g in optimizer.param_groups for name, p in zip(g["names"], g["params"], strict=True)}
    # Where each process steps some of the tensors, the one that steps its own has no others in its groups.
    stepping = getattr(optimizer, "optim", optimizer)
    allocate: Any = getattr(stepping, "init_state", None)
    layouts = StateLayouts(stepping)
    parts: dict[str, Tensor] = {}
    for index, group in enumerate(stepping.param_groups):
        for position, parameter in enumerate(group["params"]):
            name = names[id(parameter)]
            if name in by_name:
                if allocate is not None:
                    # bitsandbytes allocates its own buffers (paged memory, shared code books); those are filled.
                    allocate(group, parameter, index, position)
                layouts.check(index, parameter, by_name[name], wanted.get(name, {}))
                _restore_parameter(stepping, group, parameter, by_name[name])
            for key, dtype in wanted.get(name, {}).items():
                part = torch.empty_like(parameter, dtype=getattr(torch, dtype), requires_grad=False)
                stepping.state[parameter][key] = parts[f"{name}{SEPARATOR}{key}"] = part
    if read_parts is not None:
        read_parts(parts)


def class_of(optimizer: torch.optim.Optimizer) -> str:
    """Return the name of the class that makes the steps."""
    return type(getattr(optimizer, "optim", optimizer)).__name__


def _restore_parameter(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: Tensor, saved: Mapping[str, Any]
) -> None:
    state = optimizer.state[parameter]
    for key, value in saved.items():
        if not isinstance(value, Tensor):
            state[key] = (
                None if value is None else value if isinstance(value, bool) else stored_number(value, f"the state {key}")
            )
        elif is_sharded(parameter) and value.shape == parameter.shape:
            state[key] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
            write_whole(state[key], value)
        elif isinstance(state.get(key), Tensor) and state[key].shape == value.shape and state[key].dtype == value.dtype:
            state[key].copy_(value)
        else:
            # torch keeps its step counters on the CPU unless a fused kernel needs them on the parameter's device.
            on_cpu = value.ndim == 0 and not group.get("fused")
            state[key] = value.clone() if on_cpu else value.to(parameter.device, copy=True)


def random_state(generators: Mapping[str, torch.Generator | np.random.Generator] | None = None) -> dict[str, Any]:
    """Return the state of every random generator as JSON: Python's, NumPy's, torch's on CPU and GPUs, and the named ones."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [kind, _text(np.asarray(keys)), int(position), int(has_gauss), float(cached)],
        "torch": _text(torch.get_rng_state().numpy()),
        "cuda": [_text(s.numpy()) for s in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
        "generators": {},
    }
    if state["cuda"]:
        state["cuda_place"] = torch.cuda.current_device()
    for name, generator in (generators or {}).items():
        if isinstance(generator, torch.Generator):
            state["generators"][name] = _text(generator.get_state().numpy())
        else:
            state["generators"][name] = _plain(generator.bit_generator.state)
    return state


def restore_random_state(
    state: Mapping[str, Any], generators: Mapping[str, torch.Generator | np.random.Generator] | None = None
) -> None:
    """Restore every random generator to the state that `random_state` returned.

    Raises:
        RunError: a named generator is not in the saved state.
        ValueError: a state is none of its generator; libraries raise other errors.
    """
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    if stored_count(position, "NumPy's place") > WORDS:  # it would read memory behind its words
        raise ValueError(f"NumPy's place is {position}, and its generator has {WORDS} words")
    np.random.set_state((kind, _array(keys, np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] and torch.cuda.is_available():
        states = [_bytes(s) for s in state["cuda"]]
        torch.cuda.set_rng_state_all(states[: torch.cuda.device_count()])
        # Of its GPUs a process computes on one, which another division over machines may give another number.
        place = stored_count(state.get("cuda_place", torch.cuda.current_device()), "the GPU's number")
        if place < len(states):
            torch.cuda.set_rng_state(states[place])
    for name, generator in (generators or {}).items():
        if name not in state["generators"]:
            raise RunError(f"the checkpoint holds no state of the random generator '{name}'")
        saved = state["generators"][name]
        if isinstance(generator, torch.Generator):
            generator.set_state(_bytes(saved))
        else:
            generator.bit_generator.state = saved


def _text(array: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _array(text: str, dtype: type[np.generic]) -> np.ndarray[Any, Any]:
    return np.frombuffer(base64.b64decode(text), dtype=dtype).copy()


def _bytes(text: str) -> Tensor:
    return torch.from_numpy(_array(text, np.uint8))


def _plain(value: object) -> object:
    """Convert NumPy's state with its arrays and numbers to JSON values."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value
