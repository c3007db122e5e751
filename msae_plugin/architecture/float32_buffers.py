"""Small tensors that must keep their precision when the weights are bf16.

SAELens casts every tensor of a checkpoint to the dtype of its config while it reads, before the SAE
sees it, and `Module.to(dtype)` casts every buffer. A bf16 threshold misfires: its step near 3 is
0.016. Hence two means: buffers named here are given back their float32 values after a cast, and a
checkpoint carries for each of them what a cast to bf16 would lose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from typing_extensions import Self, override

REMAINDER_SUFFIX = "_bf16_remainder"
# 24 bits of float32 mantissa are three times the 8 of bf16.
_N_REMAINDERS = 2


class KeepsFloat32(nn.Module):
    """A module whose tensors named in `exact_tensor_names` never fall below float32.

    Integer tensors named there come back as integers from a checkpoint that was read as floats.
    """

    exact_tensor_names: tuple[str, ...] = ()

    def register_exact(self, **tensors: torch.Tensor) -> None:
        """Register buffers whose precision is kept."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.exact_tensor_names = (*self.exact_tensor_names, *tensors)

    @override
    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        # Detached: a cast replaces the data of a parameter, not the parameter.
        before = {name: getattr(self, name).detach() for name in self.exact_tensor_names}
        super()._apply(fn, recurse)
        for name, original in before.items():
            now: torch.Tensor = getattr(self, name)
            if now.is_floating_point() and now.dtype.itemsize < torch.float32.itemsize:
                now.data = original.to(device=now.device, dtype=torch.float32)
        return self

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        """Called by SAELens before it writes an SAE."""
        add_remainders(state_dict, exact_dtypes(self))

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """Called by SAELens when it has read one."""
        restore_exact(state_dict, exact_dtypes(self))


def exact_dtypes(module: nn.Module) -> dict[str, torch.dtype]:
    """State-dict names of all exact tensors below a module, with the dtype each must have."""
    found: dict[str, torch.dtype] = {}
    for prefix, child in module.named_modules():
        if isinstance(child, KeepsFloat32):
            for name in child.exact_tensor_names:
                tensor: torch.Tensor = getattr(child, name)
                dtype = tensor.dtype if not tensor.is_floating_point() else torch.float32
                found[f"{prefix}.{name}" if prefix else name] = dtype
    return found


def add_remainders(state_dict: dict[str, Any], names: Mapping[str, torch.dtype]) -> None:
    """Add, for each named tensor, the two bf16 summands that a cast to bf16 would lose.

    `<name>_bf16_remainder` has shape (2, *shape of name). Names absent from the state dict are
    skipped.
    """
    for name in names:
        if name not in state_dict:
            continue
        rest = state_dict[name].detach().to(torch.float32)
        rest = rest - rest.to(torch.bfloat16).to(torch.float32)
        summands: list[torch.Tensor] = []
        for _ in range(_N_REMAINDERS):
            summands.append(rest.to(torch.bfloat16))
            rest = rest - summands[-1].to(torch.float32)
        state_dict[name + REMAINDER_SUFFIX] = torch.stack(summands).to(torch.float32)


def restore_exact(state_dict: dict[str, Any], names: Mapping[str, torch.dtype]) -> None:
    """Undo the cast that reading a checkpoint applied to the named tensors.

    Remainders are consumed, tensors get the dtypes of `names`.
    """
    for name, dtype in names.items():
        remainder = state_dict.pop(name + REMAINDER_SUFFIX, None)
        if name not in state_dict:
            continue
        value: torch.Tensor = state_dict[name]
        if value.dtype == torch.bfloat16 and remainder is not None:
            value = value.to(torch.float32) + remainder.to(torch.float32).sum(dim=0)
        if not dtype.is_floating_point:
            value = value.round().to(dtype)
        elif value.dtype != torch.float64:  # which is more exact than float32, not less
            value = value.to(dtype)
        state_dict[name] = value
