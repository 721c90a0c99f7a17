"""Other 4-bit codes than the base's for a weight, where a method chose them together with its own tensors (LoftQ).

The base's codes stay as they are: the new ones belong to a hook that stands in their place while the host runs. So they are
saved with the method, and the base is back as soon as the method is disabled.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.methods._engines.quantized import bits_of, dense_weight
from llmrecipe.models.hooks.hook import Hook, all_hooks, hooks_of
from llmrecipe.models.hooks.host import add_hook, remove_hook

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

    from llmrecipe.models.site import Site

SCALE_BLOCK = 256
"""Scales that share one scale of their own under double quantization."""


class Requantized(Hook):
    """W_hat -> another W_hat of the same format: n / 2 bytes of codes and their scales. Starts as the host's own.

    Scales are held as bytes, which no change of the model's dtype rounds: those of the scales (double quantization only) and
    their mean, in float32, then one a block, in 8 bits or float32.
    """

    # Below every other weight hook, as what it gives is the weight they see.
    order = -4
    codes: Tensor
    scales: Tensor

    def __init__(self, module: nn.Module):
        super().__init__()
        weight: Any = module.weight
        state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
        self.levels = weight.quant_type if state is None else state.quant_type
        self.nested = weight.compress_statistics if state is None else state.nested
        self.block = weight.blocksize if state is None else state.blocksize
        self.shape = torch.Size((int(module.out_features), int(module.in_features)))  # type: ignore[arg-type]
        self.blocks = -(-self.shape.numel() // self.block)
        # In a list: the host is this hook's parent, not its child.
        self.host = [module]
        size = self._outer_bytes() + self.blocks * (1 if self.nested else 4)
        self.register_buffer("codes", torch.empty((self.shape.numel() + 1) // 2, dtype=torch.uint8, device=weight.device))
        self.register_buffer("scales", torch.empty(size, dtype=torch.uint8, device=weight.device))
        if state is not None:
            self._take(weight.data, state)

    def _outer_bytes(self) -> int:
        return 4 * (-(-self.blocks // SCALE_BLOCK) + 1) if self.nested else 0

    @torch.no_grad()
    def quantize(self, weight: Tensor) -> None:
        """Set the codes nearest to a weight (out, in), in the host's format."""
        from bitsandbytes.functional import quantize_4bit

        wanted = weight.to(self.codes.device, torch.float32).contiguous()
        self._take(*quantize_4bit(wanted, blocksize=self.block, compress_statistics=self.nested, quant_type=self.levels))

    def _take(self, packed: Tensor, state: QuantState) -> None:
        inner = [state.state2.absmax, state.offset.reshape(1)] if self.nested else []
        parts = [t.contiguous().view(torch.uint8) for t in (*inner, state.absmax)]
        self.codes.copy_(packed.contiguous().view(torch.uint8).flatten())
        self.scales.copy_(torch.cat(parts))

    def _state(self, dtype: torch.dtype) -> QuantState:
        """Return what the library needs to read the codes."""
        from bitsandbytes.functional import QuantState

        device, outer = str(self.codes.device), self._outer_bytes()
        options = {"shape": self.shape, "blocksize": self.block, "quant_type": self.levels, "dtype": dtype}
        options["code"] = _levels(self.levels, self.block, device)
        own = self.scales[outer:]
        if not self.nested:
            return QuantState(own.view(torch.float32), **options)
        inner = self.scales[:outer].view(torch.float32)
        second = QuantState(inner[:-1], code=_dynamic_map(device), blocksize=SCALE_BLOCK, dtype=torch.float32)
        return QuantState(own, offset=inner[-1], state2=second, **options)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight (out, in) the codes represent, dequantized in float32, cast once (default: host's dtype)."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.codes[:, None], self._state(torch.float32)).to(dtype or self._dtype())

    def _dtype(self) -> torch.dtype:
        host: Any = self.host[0]
        if bits_of(host) is None:
            return host.weight.dtype
        return (getattr(host.weight, "quant_state", None) or host.quant_state).dtype

    def weight(self, value: Tensor) -> Tensor:
        """Return the codes of this hook in place of W_hat, or their weight where the host was dequantized."""
        if bits_of(self.host[0]) is None:
            return self._stored(self.host[0])
        from bitsandbytes.nn import Params4bit

        packed = self.codes.view(value.dtype).view(value.shape)
        return Params4bit(packed, quant_state=self._state(self._dtype()), blocksize=self.block, bnb_quantized=True)

    def _stored(self, module: nn.Module) -> Tensor:
        full = self.dense()
        return full.t().contiguous() if type(module).__name__ == "Conv1D" else full

    def merge(self, module: nn.Module) -> None:
        """Set W <- the weight of these codes.

        Raises:
            ModelError: the host is quantized, in other codes.
        """
        if bits_of(module) is not None:
            raise ModelError("the base is quantized in other codes than the method's; dequantize the model first (export does)")
        module.weight.data = self._stored(module)


@functools.cache
def _levels(kind: str, block: int, device: str) -> Tensor:
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type(kind, device=device, blocksize=block)


@functools.cache
def _dynamic_map(device: str) -> Tensor:
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map().to(device)


def assign_codes(sites: list[Site], owner: str, option: str) -> None:
    """Assign codes of its own to every 4-bit layer of some sites, initially the base's.

    Args:
        owner: the wrapper.
        option: its option that requires them, for the message.

    Raises:
        ModelError: a layer is quantized otherwise.
    """
    for site in {id(site.module): site for site in sites}.values():
        if bits_of(site.module) != 4:
            raise ModelError(f"stack.{owner}.{option}: {site.path} is not in 4 bits; only codes of nf4 can be chosen again")
        add_hook(site.module, f"{owner}__codes", Requantized(site.module), owner)


def stored_weight(module: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """Return the weight (out, in) that a linear layer's codes represent, the newly chosen or its own (see `dense_weight`)."""
    for hook in reversed(hooks_of(module, "weight", active=True)):
        if isinstance(hook, Requantized):
            return hook.dense(dtype)
    return dense_weight(module, dtype)


@torch.no_grad()
def finalize_codes(model: nn.Module) -> None:
    """Write the weight of the codes chosen for it into every dequantized layer, before anything is added to it."""
    for _, module, name, hook in [place for place in all_hooks(model) if isinstance(place[3], Requantized)]:
        hook.merge(module)
        remove_hook(module, name)
