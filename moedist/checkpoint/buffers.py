"""Copies of tensors in host memory, so that training can go on while they are written."""

from __future__ import annotations

from typing import Mapping

import torch


class HostBuffers:
    """Host memory for copies, kept from one checkpoint to the next: making it takes longer than copying.

    On an accelerator it is pinned, and all copies are under way at once.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._buffers: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies that stay as they are until the next call."""
        self._buffers = {name: self._buffer(name, tensor) for name, tensor in tensors.items()}  # others are forgotten
        for name, tensor in tensors.items():
            self._buffers[name].copy_(tensor, non_blocking=True)
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return dict(self._buffers)

    def _buffer(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        old = self._buffers.get(name)
        if old is not None and old.shape == tensor.shape and old.dtype == tensor.dtype:
            return old
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._device.type not in ("cpu", "mps"))
