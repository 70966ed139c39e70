"""A residual in pinned host memory, copied there and back on a stream of its own while the device computes."""

from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from visparse.compensation.residual_store import Stored, StoredFull


@dataclass(eq=False)
class StoredOnHost(Stored):
    """The residual in pinned host memory, bit for bit.

    PyTorch rounds an allocation of pinned memory up to a power of two: one layer of Wan 14B at 720p, 0.77 GB, takes
    1 GiB.

    Args:
        host: [B, N, H, D] in pinned memory.
        device: CUDA device of the outputs.
    """

    host: Tensor
    device: torch.device
    _arrived: Tensor | None = field(default=None, init=False)
    _event: torch.cuda.Event | None = field(default=None, init=False)

    def prefetch(self) -> None:
        """Start the copy to the device. It takes the memory of the full residual there until `add_to` has run."""
        if self._arrived is not None:
            return
        side = _side_stream(self.device)
        with torch.cuda.stream(side):
            self._arrived = self.host.to(self.device, non_blocking=True)
            self._event = side.record_event()

    @property
    def nbytes(self) -> int:
        """Device memory, in bytes: 0, or the full residual between `prefetch` and `add_to`."""
        return 0 if self._arrived is None else self._arrived.nbytes

    @property
    def host_nbytes(self) -> int:
        """Pinned host memory, in bytes, before PyTorch rounds it up."""
        return self.host.nbytes

    def to(self, device: torch.device | str) -> Stored:
        """Serve another device from the same host memory; on the CPU that is the full residual."""
        device = torch.device(device)
        _side_stream(self.device).synchronize()
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            return StoredOnHost(self.shape, self.dtype, self.host, torch.device("cuda", index))
        return StoredFull(self.shape, self.dtype, self.host.to(device))

    def _add_to(self, out: Tensor) -> Tensor:
        self.prefetch()
        residual, event = self._arrived, self._event
        self._arrived = self._event = None
        if residual is None or event is None:
            raise RuntimeError("prefetch started no copy; call add_to from one thread only")
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)
        residual.record_stream(current)
        return out + residual


def keep_on_host(residual: Tensor) -> StoredOnHost:
    """Start the copy of a residual to pinned host memory.

    Args:
        residual: [B, N, H, D] on a CUDA device.
    """
    side = _side_stream(residual.device)
    host = torch.empty(residual.shape, dtype=residual.dtype, pin_memory=True)
    side.wait_stream(torch.cuda.current_stream(residual.device))
    with torch.cuda.stream(side):
        host.copy_(residual, non_blocking=True)
    residual.record_stream(side)
    return StoredOnHost(tuple(residual.shape), residual.dtype, host, residual.device)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all copies of a device: they run one after the other, so no copy is read before it is whole."""
    return torch.cuda.Stream(device)
