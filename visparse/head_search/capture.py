"""Capture: runs a model dense, and hands every attention call at calibration steps to the scorer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visparse.adapter import find_denoisers, unwrapped
from visparse.compensation.call import Call
from visparse.head_search.score import Scorer
from visparse.head_search.spans import Spans
from visparse.head_search.work import WorkFile
from visparse.layout import Layout
from visparse.presets import dense as dense_plan
from visparse.route import LayerRoute, _key_bias
from visparse.router import Router
from visparse.rules import ModelFingerprint
from visparse.session import Session, session_of
from visparse.settings import Settings
from visparse.steps import Clock, SchedulerSteps


class OutOfTimeError(Exception):
    """The time for the search is over; what was scored so far stays."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What happens at which step of a run.

    Attributes:
        total: steps of a run.
        measure: steps at which foveal candidates are measured.
        judge: steps at which all candidates are scored.
    """

    total: int
    measure: frozenset[int] = frozenset()
    judge: frozenset[int] = frozenset()


class Watch:
    """What all denoisers of one pipeline share during a capture.

    Attributes:
        calibration: what happens when.
        scorer: what scores; None: time is measured, and nothing is scored.
        prompt: number of the present run.
        step: set by whoever calls a bare denoiser; None: the pipeline tells.
        deadline: on `time.perf_counter`; None: none.
        tick: called at every new step.
        layout: of the last call.
        denoiser_seconds: of all calls but those at the first step of a run of several.
        attention: time of the layers' attention in these calls.
        batch: sequences of the last call of a layer.
        reasons: layer -> why it could not be scored.
        scoring_seconds: time that scoring took.
    """

    def __init__(self, calibration: Calibration, scorer: Scorer | None, work: WorkFile | None) -> None:
        """Begin with nothing seen."""
        self.calibration, self.scorer, self.work = calibration, scorer, work
        self.prompt = 0
        self.step: int | None = None
        self.deadline: float | None = None
        self.tick: Callable[[], None] = lambda: None
        self.layout: Layout | None = None
        self.denoiser_seconds = self.scoring_seconds = 0.0
        self.attention, self.batch = Spans(), 1
        self.reasons: dict[int, str] = {}

    def timed(self, step: int) -> bool:
        """Whether calls at a step count for the share of attention."""
        return self.scorer is None and (step > 0 or self.calibration.total == 1)


class CaptureRouter(Router):
    """A router whose layers all run dense and are scored."""

    def __init__(self, model: ModelFingerprint, clock: Clock, watch: Watch, name: str) -> None:
        """Serve one denoiser.

        Args:
            model: its shape.
            clock: of the pipeline.
            watch: what its denoisers share.
            name: of the denoiser in the pipeline.
        """
        super().__init__(dense_plan(), model, Settings(timing=True), clock)
        self.watch, self.name = watch, name
        self.routes: list[LayerRoute] = [ScoreRoute(self, layer) for layer in range(model.layers)]
        self.projections: list[Tensor | None] = [None] * model.layers
        self.at, self._calls = 0, 0
        self._seen: int | None = None
        self._started: float | None = None

    @property
    def branch(self) -> str:
        """The pass of guidance, and the denoiser, as text."""
        name = self.clock.branch
        return f"{self.name}:{self._calls if name is None else name}"

    def begin(self, layout: Layout, timestep: object, device: torch.device) -> None:
        """A call of the denoiser begins; see `Router.begin`."""
        watch = self.watch
        if watch.deadline is not None and time.perf_counter() > watch.deadline:
            raise OutOfTimeError
        if watch.step is None:
            self.clock.tick(timestep)
            self.at = self.clock.step or 0
        else:
            self.at = watch.step
        new = self.at != self._seen
        self._calls = 0 if new else self._calls + 1
        self._seen = self.at
        if new:
            watch.tick()
        self.layout = watch.layout = layout
        self._started = self.now(device) if watch.timed(self.at) else None
        self._device = device

    def end(self, completed: bool) -> None:
        """The call is over; see `Router.end`."""
        if self._started is not None:
            self.watch.denoiser_seconds += (self.now(self._device) or 0.0) - self._started

    def restart(self) -> None:
        """A new run begins."""
        self._seen = None
        self.clock.end_run()


class ScoreRoute(LayerRoute):
    """The route of one layer: the model's own attention, watched."""

    router: CaptureRouter

    def attention(self, call: dict[str, Any], dense: Callable[[], Tensor], heads_first: bool) -> Tensor:
        """Serve one call."""
        router, watch, q = self.router, self.router.watch, call["query"]
        watch.batch = len(q)
        if watch.timed(router.at):
            return watch.attention.time(dense, q.device)
        out = dense()
        calibration, scorer = watch.calibration, watch.scorer
        measured, judged = router.at in calibration.measure, router.at in calibration.judge
        if scorer is None or watch.work is None or router.layout is None or not (measured or judged):
            return out
        reason = self._obstacle(call, router.layout.tokens, heads_first)
        if reason is not None:
            watch.reasons[self.layer] = reason
            return out
        started = router.now(q.device) or 0.0
        q, k, v = (call[name].transpose(1, 2) if heads_first else call[name] for name in ("query", "key", "value"))
        if not all(bool(torch.isfinite(x.sum(dtype=torch.float32))) for x in (q, k, v)):
            raise ValueError(f"attention layer {self.layer}: NaN or infinity in q, k or v; nothing can be scored")
        bias = _key_bias(call.get("attn_mask"))
        for row in range(len(q)):
            own = bias if bias is None or len(bias) == 1 else bias[row : row + 1]
            one = Call(q[row : row + 1], k[row : row + 1], v[row : row + 1], own, call.get("scale"))
            key = (watch.prompt, router.at, router.branch, row, self.layer)
            place = (router.branch, row, self.layer)
            if judged and key not in watch.work.scores:
                watch.work.score(key, scorer.judge(place, one, router.layout, router.projections[self.layer]))
            if measured:
                scorer.measure(place, one, router.layout)
        watch.scoring_seconds += (router.now(q.device) or 0.0) - started
        return out


@contextmanager
def captured(target: Any, watch: Watch) -> Iterator[list[CaptureRouter]]:
    """Lead every attention layer of a pipeline or denoiser through a watch; all of it comes off at the end.

    Args:
        target: a diffusers pipeline or a denoiser.
        watch: what to do with the calls.

    Yields:
        The routers, one for each denoiser.

    Raises:
        ValueError: the target is sparsified, has no denoiser that visparse knows, or no layer that can be served.
    """
    clock = Clock(lambda step, total, sigmas: 0, SchedulerSteps(None if isinstance(target, nn.Module) else target))
    sessions: list[Session] = []
    for name, (module, adapter) in find_denoisers(target).items():
        if session_of(module) is not None:
            raise ValueError("target: wanted a model that runs dense, this one is sparsified; call visparse.restore")
        model = unwrapped(module)
        router = CaptureRouter(adapter.fingerprint(model), clock, watch, name)
        router.projections = [projection_of(layer, router.model) for layer in adapter.layers(model).values()]
        sessions.append(Session(module, adapter, router))
    try:
        for session in sessions:
            session.install()
        yield [session.router for session in sessions]  # type: ignore[misc]
    finally:
        for session in sessions:
            session.uninstall()


def projection_of(attention: Any, model: ModelFingerprint) -> Tensor | None:
    """Weights [out, H * D] of the output projection of an attention module; None where it has no plain one.

    Args:
        attention: the module.
        model: its shape.
    """
    found = getattr(attention, "to_out", None) or _timm_projection(attention)
    if isinstance(found, (nn.ModuleList, nn.Sequential)) and len(found):
        found = found[0]
    weight = getattr(found, "weight", None)
    plain = isinstance(weight, Tensor) and weight.is_floating_point() and weight.element_size() >= 2
    return weight.detach() if plain and weight.shape[-1:] == (model.heads * model.head_dim,) else None  # type: ignore


def _timm_projection(attention: Any) -> Any:
    """timm's output projection, where neither a norm nor a gate lies before it."""
    parts = getattr(attention, "norm", None), getattr(attention, "gate", None)
    plain = all(part is None or isinstance(part, nn.Identity) for part in parts)
    return getattr(attention, "proj", None) if plain else None


def run_pipeline(pipe: Any, arguments: Mapping[str, Any], steps: int, seed: int, *, decode: bool = False) -> Any:
    """Run a pipeline once.

    Args:
        pipe: a diffusers pipeline.
        arguments: of its call, besides the steps, the generator and the kind of output.
        steps: denoiser steps.
        seed: of the CPU generator.
        decode: whether frames or pictures are wanted, as NumPy arrays in [0, 1]; else latents where the pipeline can
            leave decoding out.

    Returns:
        What the pipeline returned.
    """
    import inspect

    known = inspect.signature(type(pipe).__call__).parameters
    unknown = [name for name in arguments if name not in known]
    if unknown:
        raise ValueError(f"{unknown[0]}: {type(pipe).__name__} takes no such argument; it takes {', '.join(known)}")
    more: dict[str, Any] = {"output_type": "np" if decode else "latent"} if "output_type" in known else {}
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipe(**arguments, **more, num_inference_steps=steps, generator=generator)


def run_denoiser(model: nn.Module, inputs: Iterable[Mapping[str, Any]], watch: Watch) -> None:
    """Call a bare denoiser once for each step.

    Args:
        model: the denoiser.
        inputs: keyword arguments of each step's call, or a list of them where guidance makes several.
        watch: told the step.
    """
    with torch.no_grad():
        for step, arguments in enumerate(inputs):
            watch.step = step
            for one in arguments if isinstance(arguments, (list, tuple)) else [arguments]:
                model(**one)
