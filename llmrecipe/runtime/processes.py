"""Where a run computes: device, processes, data-parallel wrapping, reductions. The only file that imports accelerate.

One process needs nothing but this interface; several are started by `launch` (or torchrun), which sets RANK, WORLD_SIZE and
MASTER_ADDR. What accelerate made of these is compared with what was requested, because it can silently run N independent
training runs instead of one.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from llmrecipe.core.errors import LlmRecipeError, RecipeError
from llmrecipe.recipe.sharding_rules import GATHERED, PLAIN, shard_size
from llmrecipe.runtime.distributed_launch import no_meeting

T = TypeVar("T")

if TYPE_CHECKING:
    from llmrecipe.recipe.schema import RuntimeSection

PATIENCE = timedelta(minutes=30)
"""How long a collective waits for a slow rank before the run is stopped."""

HOST_GROUPS = {"cuda": "cuda:nccl,cpu:gloo"}
"""Device -> backends of a process group that reduces numbers of the host on the host."""

GRACE = 0.2
"""Seconds that threads of the process group get to drop their tensors before it is destroyed."""
KERNELS_KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "16"}
"""How many compiled kernels oneDNN and torch's layer above it keep on a CPU; read at the first low-precision product.

Each kernel belongs to one shape, and packed rows have a new length at every step: the 1024 that are kept by default add up to
hundreds of megabytes, while a kernel of an earlier step is hardly ever wanted again. 64 hold all shapes of one step.
"""


@dataclass
class Runtime:
    """One process of a run."""

    device: torch.device
    world: int
    """Number of processes that train together."""
    rank: int
    accelerator: Any = None
    shard: str = PLAIN
    """What the processes divide among themselves (`runtime.shard`)."""
    replicas: int = 1
    """Groups of processes that each hold everything once."""
    shards: int = 1
    """Processes of a group."""
    offload: bool = False
    """Whether the parts of a process rest in the memory of the machine."""

    @property
    def in_step(self) -> bool:
        """Return whether every process has to make the same forward passes, because each of them gathers parameters."""
        return self.shard in GATHERED

    @property
    def is_main(self) -> bool:
        """Return whether this process writes files and prints."""
        return self.rank == 0

    @classmethod
    def start(cls, section: RuntimeSection) -> Runtime:
        """Set threads, determinism and device, and join the other processes.

        Raises:
            RecipeError: the device does not exist, the processes started are not `runtime.processes`, or one process is to
                divide what it trains.
            UserError: they could not connect to each other, or the port of the first one is in use.
            LlmRecipeError: accelerate did not join the processes.
        """
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != section.processes:
            raise RecipeError(
                f"runtime.processes: the recipe expects {section.processes} and {started} were started; "
                f"use `llmrecipe launch --nproc {section.processes if section.processes > 1 else started} ...`, which sets both"
            )
        if started == 1 and section.shard != PLAIN:
            raise RecipeError(
                f"runtime.shard: {section.shard} divides a training over processes and one was started; "
                "use `llmrecipe launch --nproc N ...`, or runtime.shard=none"
            )
        if section.threads is not None:
            torch.set_num_threads(section.threads)
        if section.deterministic:
            # cuBLAS reads this before its first call; the other kernels obey the flag.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        for name, size in KERNELS_KEPT.items():
            os.environ.setdefault(name, size)
        kind = pick_device(section.device)
        if started == 1:
            return cls(torch.device(kind, 0) if kind == "cuda" else torch.device(kind), 1, 0)
        return cls._join(kind, started, section)

    @classmethod
    def _join(cls, kind: str, started: int, section: RuntimeSection) -> Runtime:
        from accelerate import Accelerator, InitProcessGroupKwargs

        backend = {"backend": HOST_GROUPS[kind]} if kind in HOST_GROUPS else {}
        joined = InitProcessGroupKwargs(timeout=PATIENCE, **backend)
        # Without cpu=True accelerate silently runs N separate training runs on a machine that has no GPU.
        try:
            accelerator = Accelerator(cpu=kind == "cpu", gradient_accumulation_steps=1, kwargs_handlers=[joined])
        except (dist.DistError, ValueError) as error:
            _forget_accelerate()
            place = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
            raise no_meeting("runtime.processes", place, "MASTER_PORT", error) from error
        got = accelerator.num_processes
        if got != started or not dist.is_initialized() or dist.get_world_size() != started:
            raise LlmRecipeError(f"{started} processes were started and accelerate joined {got}; nothing would be synchronised")
        place, rank = accelerator.device, accelerator.process_index
        offload = section.offload == "cpu"
        return cls(place, got, rank, accelerator, section.shard, section.dp_replicate, shard_size(section), offload)

    # --- model ----------------------------------------------------------------------------------------------------

    def prepare(self, module: nn.Module, unused: bool = False, blocks: Sequence[nn.Module] = ()) -> nn.Module:
        """Return the module wrapped so that its backward pass averages gradients over processes; itself for one process.

        A module that trains nothing by gradient is returned unchanged, one that is divided already as well.

        Args:
            unused: whether a trained tensor may have no gradient on some process, or on any. Finding these costs a traversal
                of the graph in every step.
            blocks: modules that are computed one after the other; each is gathered by itself where parameters are divided.
        """
        if self.world == 1 or not any(p.requires_grad for p in module.parameters()):
            return module
        if self.in_step:
            if not _sharding().groups_of(module):
                mesh = _sharding().mesh_of(self.device.type, self.replicas, self.shards)
                _sharding().shard_module(module, blocks, mesh, self.shard == "zero3", unused, self.offload)
            return module
        ddp = nn.parallel.DistributedDataParallel
        # Buffers are equal by construction (the option that says so has another name since torch 2.13).
        known = inspect.signature(ddp).parameters
        buffers: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
        return ddp(
            module,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            **buffers,
            gradient_as_bucket_view=True,
            find_unused_parameters=unused,
        )

    def optimizer(
        self, build: Callable[[list[dict[str, Any]]], torch.optim.Optimizer], groups: list[dict[str, Any]]
    ) -> torch.optim.Optimizer:
        """Return the optimizer of some groups of parameters, its states divided among the processes where that is wanted."""
        if self.shard != "zero1":
            return build(groups)
        made: torch.optim.Optimizer = _sharding().Partitioned(groups, build)
        return made

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
        """Clip the norm of the gradients of some parameters; return the norm before clipping, a scalar on their device."""
        if self.in_step:
            return _sharding().clip_norm(parameters, limit, self.sum, self.replicas)
        return nn.utils.clip_grad_norm_(parameters, limit)

    def gathered(self, module: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which this process may call the module, or a part of it, without the other processes."""
        if not self.in_step or not _sharding().groups_of(module):
            return contextlib.nullcontext()
        return _sharding().gathered(module, self.shard == "zero3")

    def whole(self, model: nn.Module, names: set[str], write: bool = False) -> AbstractContextManager[None]:
        """Return a context in which the parameters of some names are whole, on the CPU, where this process divides them.

        Every process enters it, and none may run the model inside. Only the main process has the whole tensors.

        Args:
            write: every process has them, and what is written into them is divided again on exit.
        """
        if not self.in_step:
            return contextlib.nullcontext()
        return _sharding().whole_tensors(model, names, write or self.is_main, write)

    def write_parts(self, folder: Path | None, tensors: dict[str, Tensor]) -> None:
        """Write divided tensors to a folder, each process its own parts; every process calls it.

        Args:
            folder: the main process names it.
        """
        place = self.broadcast_json(str(folder))
        _sharding().write_parts(Path(place), tensors)
        self.barrier()

    def read_parts(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Read what any number of processes wrote by `write_parts` into tensors of this process, whole or divided."""
        if tensors:
            _sharding().read_parts(folder, tensors)

    def passes(self, own: int) -> int:
        """Return how many forward passes this process has to make for `own` of its own: those of the process with most."""
        return int(self.maximum(torch.tensor([own]))) if self.in_step else own

    def sync(self, module: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Return the context of one micro-batch: gradients are averaged over processes only in the last one of a step.

        Divided gradients are averaged in each, since no process has room for those of all parameters.
        """
        return contextlib.nullcontext() if last else self.no_sync(module)

    def no_sync(self, module: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which backward passes add to this process's gradients only."""
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return module.no_sync()
        return contextlib.nullcontext()

    # --- collectives ----------------------------------------------------------------------------------------------

    def _meeting_place(self, own: torch.device) -> torch.device:
        """Return where a tensor is reduced: numbers of the host stay there, so that they do not wait for the device."""
        on_host = own.type == "cpu" and self.device.type in ("cpu", *HOST_GROUPS)
        return own if on_host else self.device

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over processes, in the tensor's own dtype; the argument is not changed."""
        if self.world == 1:
            return tensor
        total = tensor.detach().to(self._meeting_place(tensor.device), copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def maximum(self, tensor: Tensor) -> Tensor:
        """Return the largest value over processes, elementwise; the argument is not changed."""
        if self.world == 1:
            return tensor
        largest = tensor.detach().to(self._meeting_place(tensor.device), copy=True)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.to(tensor.device)

    def gather_rows(self, values: Tensor) -> tuple[Tensor, int]:
        """Join tensors (R, ...) of all processes by rank; R may differ, and gradients of every process flow back.

        Every process must call it and back-propagate through what it returns, or none.

        Returns:
            The joined tensor, and the row where this process's own values begin.
        """
        if self.world == 1:
            return values, 0
        counts = torch.zeros(self.world, dtype=torch.int64, device=values.device)
        counts[self.rank] = values.shape[0]
        sizes = self.sum(counts).tolist()
        start = sum(sizes[: self.rank])
        return _Gathered.apply(values, sizes, start), start

    def broadcast_json(self, value: T) -> T:
        """Return the main process's JSON value on every process."""
        if self.world == 1:
            return value
        received: T = json.loads(self._broadcast(json.dumps(value).encode() if self.is_main else b"", 0))
        return received

    def gather_json(self, value: T) -> list[T]:
        """Return every process's JSON value, by rank, on every process."""
        if self.world == 1:
            return [value]
        own = json.dumps(value).encode()
        return [json.loads(self._broadcast(own if rank == self.rank else b"", rank)) for rank in range(self.world)]

    def _broadcast(self, content: bytes, source: int) -> bytes:
        # Bytes of JSON rather than torch's object collectives, which pickle.
        place = self._meeting_place(torch.device("cpu"))
        size = torch.tensor([len(content)], dtype=torch.int64, device=place)
        dist.broadcast(size, source)
        data = torch.zeros(int(size), dtype=torch.uint8, device=place)
        if source == self.rank:
            data.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        dist.broadcast(data, source)
        return bytes(data.cpu().numpy())

    def sent(self, tensor: Tensor | None, source: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Return the tensor of process `source` on every process, where each knows its dtype and shape."""
        value = torch.empty(shape, dtype=dtype, device=self.device)
        if tensor is not None and source == self.rank:
            value.copy_(tensor)
        if self.world > 1 and value.numel():
            dist.broadcast(value, source)
        return value

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group; may be called twice, and after an error on one rank."""
        if self.accelerator is not None:
            self.accelerator = None
            if dist.is_initialized():
                # The destructor of a gloo group joins gloo's threads while it holds the interpreter lock, and one of them may
                # wait for that lock to drop its last tensor: a process that hangs at exit, about one in ten. One more
                # reference keeps the destructor from running; the operating system closes the sockets.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))
                # And a thread that waits for that lock while the interpreter shuts down is killed in the middle of a
                # destructor, which aborts the process: let them drop what they hold while the lock is free.
                time.sleep(GRACE)
                dist.destroy_process_group()
            _forget_accelerate()


class _OwnRows(FunctionCtx):
    own: slice


class _Gathered(torch.autograd.Function):
    """Rows of all processes; the gradient of a process's own rows is the sum of what all processes send back to them."""

    @staticmethod
    def forward(ctx: _OwnRows, values: Tensor, sizes: list[int], start: int) -> Tensor:
        """Join values (R, ...) of every process; shorter ones are filled up for the transport."""
        ctx.own = slice(start, start + values.shape[0])
        padded = values.new_zeros(max(sizes), *values.shape[1:])
        padded[: values.shape[0]] = values
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: _OwnRows, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Add up the gradients of all processes and return those of the own rows."""
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.own], None, None


def _forget_accelerate() -> None:
    """Drop what accelerate keeps in the process, so that the next run in it starts clean."""
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=False)
    PartialState._reset_state()


def _sharding() -> ModuleType:
    """Return the module that divides a training; importing what it needs takes seconds."""
    from llmrecipe.runtime import sharding

    return sharding


def pick_device(wanted: str) -> str:
    """Return the device to run on; `auto` picks the best one available.

    Raises:
        RecipeError: the device named does not exist on this machine.
    """
    present = ["cpu"]
    if torch.backends.mps.is_available():
        present.insert(0, "mps")
    if torch.cuda.is_available():
        present.insert(0, "cuda")
    if wanted == "auto":
        return present[0]
    if wanted not in present:
        raise RecipeError(f"runtime.device: this machine has no '{wanted}' (it has {', '.join(present)})")
    return wanted
