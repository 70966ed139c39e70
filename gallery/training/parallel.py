"""One process a GPU, started by `torchrun`; one plain process works as well."""

import os
import time
from collections.abc import Iterable

import torch
import torch.distributed as dist

START = time.time()


def setup() -> tuple[torch.device, int, int]:
    """Device, rank and number of processes."""
    if not torch.cuda.is_available():
        return torch.device("cpu"), 0, 1
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    if world > 1:
        dist.init_process_group("nccl", device_id=device)
    return device, rank, world


def log(*words: object) -> None:
    """Print with the seconds since the start, from the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"[{time.time() - START:6.1f}s]", *words, flush=True)


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Average gradients over the processes, in one message."""
    if not dist.is_initialized():
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat, op=dist.ReduceOp.AVG)
    offset = 0
    for g in grads:
        g.copy_(flat[offset : offset + g.numel()].view_as(g))
        offset += g.numel()


def from_first(tensor: torch.Tensor) -> torch.Tensor:
    """The first process's values, written into `tensor`."""
    if dist.is_initialized():
        dist.broadcast(tensor, 0)
    return tensor


def same_clock(seconds: float, device: torch.device) -> float:
    """The first process's seconds, so that all stop at the same step."""
    if not dist.is_initialized():
        return seconds
    return float(from_first(torch.tensor([seconds], device=device)))


def finish() -> None:
    """Wait for the other processes and end."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
