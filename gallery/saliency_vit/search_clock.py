"""How long the saliency ViT takes, dense or by a plan: eager, or as a CUDA graph, in which launches cost nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from search_judge import installed
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from vit import SaliencyViT

from visparse import SparsePlan
from visparse.session import session_of

_REPEATS = 7
_SECONDS = 1.5  # a measurement of time takes about so long at most
_AHEAD = 20_000_000  # GPU cycles of waiting, about 10 ms: all of a call should be queued when they end
_MOST_AHEAD = 100  # times these
_DENSE = {"schema": 1, "name": "dense", "patterns": {"dense": {"name": "dense"}}, "default": "dense"}
_SDPA = F.scaled_dot_product_attention


@dataclass(frozen=True)
class Times:
    """Milliseconds for one picture.

    Attributes:
        whole: of the backbone.
        attention: of its attention. On a CPU it is timed layer by layer. On a GPU a dense call's is that of its kernels
            (`attention_seconds`), and a sparse call's is the whole less what a dense call takes besides attention.
    """

    whole: float
    attention: float

    @property
    def besides(self) -> float:
        """What is not attention."""
        return self.whole - self.attention


def times(
    model: SaliencyViT, batch: Tensor, plan: SparsePlan | None, dense: Times | None = None, *, graph: bool = False
) -> Times:
    """Measure a plan; medians of several calls.

    Args:
        model: dense.
        batch: [B, 3, side, side].
        plan: of the backbone; None: dense.
        dense: times of the dense model, measured alike; on a GPU a plan needs them.
        graph: time replays of a CUDA graph of the call instead of calls.

    Raises:
        ValueError: a graph is wanted on a CPU, or a plan on a GPU comes without the times of the dense model.
        RuntimeError: see `whole_seconds` and `attention_seconds`.
    """
    on_gpu = batch.device.type == "cuda"
    if graph and not on_gpu:
        raise ValueError(f"graph: wanted pictures on a CUDA device, got {batch.device}; leave it out there")
    if plan is not None and dense is None and on_gpu:
        raise ValueError("dense: wanted the times of the dense model, from which a plan's attention follows on a GPU")
    with nullcontext() if plan is None else installed(model, plan):
        whole = 1000 * whole_seconds(model, batch, graph=graph) / len(batch)
    if on_gpu and dense is not None:
        return Times(whole, whole - dense.besides)
    seconds = attention_seconds(model, batch) if on_gpu else _by_layers(model, batch, plan)
    return Times(whole, 1000 * seconds / len(batch))


def whole_seconds(model: SaliencyViT, batch: Tensor, *, graph: bool = False) -> float:
    """Median seconds of a call of the backbone as it is now.

    Args:
        model: dense, or with a plan on its backbone.
        batch: [B, 3, side, side].
        graph: of a replay of a CUDA graph of the call.

    Raises:
        RuntimeError: a replay does not give exactly what the call gives.
    """
    if not graph:
        return _median(lambda: model.features(batch), batch.device)
    with captured(lambda: model.features(batch), batch.device) as replay:
        return _median(replay, batch.device)


@contextmanager
def captured(call: Callable[[], Tensor], device: torch.device) -> Iterator[Callable[[], None]]:
    """Capture a call as a CUDA graph, which is freed at the end.

    Args:
        call: works on the same tensors each time.
        device: where it runs.

    Yields:
        What replays the graph.

    Raises:
        RuntimeError: a replay does not give exactly what the call gives.
    """
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        wanted = call()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                out = call()
            graph.replay()
            check_replay(out, wanted)
            del wanted
            yield graph.replay
            torch.cuda.synchronize()
        finally:
            graph.reset()


def check_replay(got: Tensor, wanted: Tensor) -> None:
    """Compare what a replay and a call gave.

    Raises:
        RuntimeError: they are not the same to the last bit.
    """
    if not torch.equal(got, wanted):
        most = float((got.float() - wanted.float()).abs().max())
        raise RuntimeError(
            f"graph: a replay differs from the call by up to {most:.3g}, so its time is not that of the same work; "
            "time this plan without --graph"
        )


def attention_seconds(model: SaliencyViT, batch: Tensor) -> float:
    """Median seconds of all attention kernels of a dense call on a GPU.

    Events lie around each attention of a call. The GPU is kept waiting until the whole call is queued, so that no gap
    between launches comes between two events.

    Args:
        model: dense.
        batch: [B, 3, side, side] on a GPU.

    Raises:
        RuntimeError: the call cannot be queued as a whole, since it waits for the GPU or has too many kernels.
    """
    found: list[float] = []
    ahead = 1
    with torch.cuda.device(batch.device):
        model.features(batch)
        while len(found) < _REPEATS:
            torch.cuda.synchronize()
            torch.cuda._sleep(ahead * _AHEAD)
            awake = torch.cuda.Event()
            awake.record()
            with Marked() as marked:
                model.features(batch)
            late = awake.query()
            torch.cuda.synchronize()
            if not late:
                found.append(marked.seconds)
            elif ahead > _MOST_AHEAD:
                raise RuntimeError("attention: a call could not be queued before its first kernel ran; is it compiled?")
            else:
                ahead *= 2
    return statistics.median(found)


class Marked(TorchFunctionMode):
    """Puts CUDA events around each call of dense attention."""

    def __init__(self) -> None:
        super().__init__()
        self._pairs: list[tuple[Any, Any]] = []

    def __torch_function__(
        self, function: Callable, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is not _SDPA:
            return function(*args, **(kwargs or {}))
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        out = function(*args, **(kwargs or {}))
        end.record()
        self._pairs.append((begin, end))
        return out

    @property
    def seconds(self) -> float:
        """Between the events, once the device has come past them."""
        return sum(begin.elapsed_time(end) for begin, end in self._pairs) / 1000


def _by_layers(model: SaliencyViT, batch: Tensor, plan: SparsePlan | None) -> float:
    """Median seconds of attention, layer by layer on a CPU."""
    with installed(model, plan or SparsePlan.from_dict(_DENSE), timing=True):
        routes = session_of(model.backbone).router.routes  # type: ignore[union-attr]

        def attention() -> float:
            before = sum(route.stats.sparse_seconds + route.stats.dense_seconds for route in routes)
            model.features(batch)
            return sum(route.stats.sparse_seconds + route.stats.dense_seconds for route in routes) - before

        return _median(attention, batch.device)


def _median(run: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a call after two that do not count; what it returns counts instead where that is a number."""
    run(), run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    found: list[float] = []
    begun = time.perf_counter()
    while len(found) < _REPEATS and (len(found) < 3 or time.perf_counter() - begun < _SECONDS):
        started = time.perf_counter()
        own = run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(own if isinstance(own, float) else time.perf_counter() - started)
    return statistics.median(found)
