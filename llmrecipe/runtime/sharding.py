"""Division of a training over processes: parameters and gradients by torch's fully_shard, optimizer states by its
ZeroRedundancyOptimizer.

    zero1   DistributedDataParallel, and whole states handed out to the processes, the largest first to the least loaded
    zero2   fully_shard: rows of every parameter, gradient and state are divided; gathered parameters stay for the backward pass
    zero3   the same, and gathered parameters are freed after each block's forward pass

With `dp_replicate` groups, each group of `dp_shard` processes divides everything among its own, and gradients are averaged over
the groups. Gradients are reduced in float32. With `offload` the parts rest in the memory of the machine, where the optimizer's
states are and its step is made; blocks are gathered on the device.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer

from llmrecipe.core.errors import RecipeError, RunError
from llmrecipe.data.transfer import exact_float
from llmrecipe.models.sharded import is_sharded, local, whole, write_whole


def mesh_of(device: str, replicas: int, size: int) -> DeviceMesh:
    """Return the mesh of the processes: one dimension of `size`, or (replicas, size) where there are several groups."""
    if replicas == 1:
        return init_device_mesh(device, (size,), mesh_dim_names=("dp_shard",))
    return init_device_mesh(device, (replicas, size), mesh_dim_names=("dp_replicate", "dp_shard"))


def shard_module(
    module: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh, free: bool, unused: bool, offload: bool = False
) -> None:
    """Divide the parameters of a module in place, those of each block as one group and the rest as another.

    Args:
        blocks: modules that are computed one after the other.
        free: whether gathered parameters are freed after the forward pass, to be gathered again for the backward pass.
        unused: whether a trained tensor may have no gradient on some process; it then counts as zero there.
        offload: whether each process keeps its parts of parameters and gradients in the machine's memory, and steps them there.

    Raises:
        RecipeError: trained tensors are not all float32.
    """
    kinds = {p.dtype for p in module.parameters() if p.requires_grad}
    if kinds - {torch.float32}:
        named = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise RecipeError(f"runtime.shard: what trains is divided in float32, and this stack trains tensors in {named}")
    for parameter in module.parameters():
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    place = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    for part in [*blocks, module]:
        fully_shard(part, mesh=mesh, reshard_after_forward=free, mp_policy=policy, offload_policy=place)
    root: Any = module
    # The first forward pass would make the module it starts at the root; a part may be called before the whole.
    root._get_fsdp_state()._lazy_init()
    root.set_reduce_scatter_unused_params(unused)
    module.register_forward_hook(_free_after_reading)


def _free_after_reading(module: nn.Module, *_: object) -> None:
    """Free what a forward pass without gradients has gathered, since no backward pass will."""
    if not torch.is_grad_enabled() and not getattr(module, "_stays_gathered", False):
        free_gathered(module)


def groups_of(module: nn.Module) -> list[Any]:
    """Return the divided modules inside a module."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def free_gathered(module: nn.Module) -> None:
    """Leave every process with its own parts alone."""
    for part in groups_of(module):
        part.reshard()


@contextlib.contextmanager
def gathered(module: nn.Module, free: bool) -> Iterator[None]:
    """Keep all parameters of a divided module gathered inside the context, so that each process may call it as it likes.

    Args:
        free: what was given to `shard_module`.
    """
    root: Any = module
    root.set_reshard_after_forward(False)
    root._stays_gathered = True
    try:
        for part in groups_of(module):
            part.unshard()
        yield
    finally:
        root._stays_gathered = False
        root.set_reshard_after_forward(free)
        free_gathered(module)


@contextlib.contextmanager
def whole_tensors(model: nn.Module, names: set[str], here: bool, write: bool = False) -> Iterator[None]:
    """Put whole copies, on the CPU, in the place of divided parameters inside the context.

    Every process enters it with the same names, and none of them may send or run the model inside.

    Args:
        here: whether this process gets the copies; the others take part in gathering them.
        write: whether their values are divided again on exit; needs the copies on every process.
    """
    places = _places(model, names)
    copies: list[tuple[nn.Parameter, nn.Parameter]] = []
    for parameter, owners in places:
        value = whole(parameter.detach())
        if not here:
            continue
        copy = nn.Parameter(value.to("cpu", copy=True), requires_grad=parameter.requires_grad)
        copies.append((parameter, copy))
        for owner, name in owners:
            owner._parameters[name] = copy
    try:
        yield
        if write:
            for parameter, copy in copies:
                write_whole(parameter, copy.detach())
    finally:
        for parameter, owners in places:
            for owner, name in owners:
                owner._parameters[name] = parameter


def _places(model: nn.Module, names: set[str]) -> list[tuple[nn.Parameter, list[tuple[nn.Module, str]]]]:
    """Return each divided parameter of some names with the modules that have it, in the order of the model."""
    wanted = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if n in names and is_sharded(p)}
    found: dict[int, tuple[nn.Parameter, list[tuple[nn.Module, str]]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in wanted:
                found.setdefault(id(parameter), (parameter, []))[1].append((module, name))
    return list(found.values())


@torch.no_grad()
def clip_norm(parameters: Sequence[nn.Parameter], limit: float, add_up: Callable[[Tensor], Tensor], replicas: int) -> Tensor:
    """Clip the norm of gradients of which each process holds a part; return the norm before clipping, a scalar on their device.

    Args:
        add_up: sums a tensor over all processes.
        replicas: how many processes hold the same part.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    parts, plain = [local(g) for g in grads if is_sharded(g)], [g for g in grads if not is_sharded(g)]
    place = local(grads[0]).device
    none = torch.zeros((), dtype=exact_float(place), device=place)
    squares = [sum((g.to(none.dtype).square().sum() for g in some), none) for some in (parts, plain)]
    norm = (add_up(squares[0].reshape(1)).reshape(()) / replicas + squares[1]).sqrt()
    factor = torch.where(norm > limit, limit / (norm + 1e-6), 1.0)
    for grad in (*parts, *plain):
        grad.mul_(factor)
    return norm


def write_parts(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write divided tensors, each process its own parts in a safetensors file of its own; every process calls it.

    Raises:
        OSError: a process cannot write.
        RunError: something else is wrong on a process.
    """
    with _first_failure("written"):
        dcp.save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def read_parts(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read what `write_parts` wrote into tensors that are whole or divided in any way; no other process takes part.

    Raises:
        OSError: a file cannot be read.
        RunError: the files hold other tensors.
    """
    with _first_failure("read"), warnings.catch_warnings():
        # That one process reads alone is meant.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


@contextlib.contextmanager
def _first_failure(done: str) -> Iterator[None]:
    """Raise the error of the process that failed first in place of torch's collection, which is no Exception."""
    try:
        yield
    except CheckpointException as error:
        failures = [failure for failure, _ in error.failures.values()]
        cause = next((failure for failure in failures if isinstance(failure, OSError)), failures[0])
        if isinstance(cause, OSError):
            raise cause from None
        raise RunError(f"the divided state of the optimizer cannot be {done}: {cause}") from error


class Partitioned(ZeroRedundancyOptimizer):
    """An optimizer that steps some of the tensors on each process, whole ones, and sends their new values.

    `param_groups` has all tensors, `state` the states of this process's own.
    """

    def __init__(self, groups: list[dict[str, Any]], build: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]):
        made: Any = lambda own, **_: build(own)  # noqa: E731
        super().__init__(groups, optimizer_class=made)
        self.state = self.optim.state
