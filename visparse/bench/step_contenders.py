"""What `visparse bench step` compares: ways to compute a denoiser's self-attention, each put on and taken off again."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import visparse
from visparse.adapter import find_adapter
from visparse.bench.models import Architecture, everything
from visparse.bench.step_compensated import trials
from visparse.handle import Handle
from visparse.intercept import routed
from visparse.plan import SparsePlan

Attention = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]
JUDGE = "dense cuDNN"  # what ratios are against
DEFAULT = "dense default"
_REMOVED = "attention removed"
_EVERYTHING = "density-1"
_FA3_MODULES = ("fa3_fwd_interface", "flash_attn_interface")


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to compute self-attention.

    Args:
        name: as in the table.
        kind: `"dense"`, `"removed"` or `"visparse"`.
        what: which kernel it is, in words.
        attention: function (q, k, v, scale) of [batch, tokens, heads, channels] in place of the model's own; None: the
            model's own, or `plan`.
        plan: what visparse runs.
        exact: whether it must give the dense result.
        absent: why it cannot run here; None where it can.
        without: name of the contender with the same selection and nothing that stands in for the rest; None where
            there is none.
    """

    name: str
    kind: str
    what: str
    attention: Attention | None = None
    plan: SparsePlan | None = None
    exact: bool = False
    absent: str | None = None
    without: str | None = None

    @property
    def measures(self) -> bool:
        """Whether its first step is dense and measures what the others reuse."""
        return self.plan is not None and self.plan.measures

    @property
    def counted(self) -> bool:
        """Whether visparse counts its calls in compiled code too."""
        return self.plan is not None and self.plan.is_compensated


def contenders(model: Architecture, device: torch.device, names: Sequence[str] = ()) -> list[Contender]:
    """The contenders for a model, in the order in which they run: what the others are judged by comes first.

    Args:
        model: what they run on.
        device: where.
        names: parts of names: only contenders with one of them, and those that they are judged by; none of them where
            no contender has one. Empty: all, with compensations only where the model says so.
    """
    every = _plain(model, device)
    if names or model.compensated:
        every += _compensated(model, device)
    asked = {one.name for one in every if any(name in one.name for name in names)}
    if not names or not asked:
        return [] if names else every
    judge = next(one for one in every if one.name == JUDGE)
    judges = {_REMOVED, JUDGE if judge.absent is None else DEFAULT, _EVERYTHING}
    judges |= {one.without for one in every if one.name in asked and one.without is not None}
    return [one for one in every if one.name in asked | judges]


def check_names(names: Sequence[str], models: Sequence[Architecture], device: torch.device) -> None:
    """Refuse a part of a name that no contender has.

    Raises:
        ValueError: lists the names.
    """
    for name in names:
        if not any(contenders(model, device, [name]) for model in models):
            known = dict.fromkeys(
                one.name for model in models for one in [*_plain(model, device), *_compensated(model, device)]
            )
            raise ValueError(f"plan: no contender has {name!r} in its name (names: {', '.join(known)})")


def _plain(model: Architecture, device: torch.device) -> list[Contender]:
    """All contenders without selectors and compensations."""
    cuda = None if device.type == "cuda" else "needs CUDA"
    fa3, text = (None, cuda) if cuda else load_fa3()
    return [
        Contender(name=_REMOVED, kind="removed", what="gives the values back", attention=_values),
        Contender(
            name=JUDGE,
            kind="dense",
            what="SDPA, cuDNN alone allowed",
            attention=_cudnn,
            exact=True,
            absent=cuda,
        ),
        Contender(name=_EVERYTHING, kind="visparse", what="block lists of all pairs", plan=everything(), exact=True),
        *(Contender(name=plan.name, kind="visparse", what="block lists", plan=plan) for plan in model.plans()),
        Contender(name=DEFAULT, kind="dense", what="the model untouched", exact=True),
        Contender(
            name="dense FA3",
            kind="dense",
            what="FlashAttention-3" if fa3 is None else f"FlashAttention-3, {text}",
            attention=fa3,
            exact=True,
            absent=text if fa3 is None else None,
        ),
    ]


def _compensated(model: Architecture, device: torch.device) -> list[Contender]:
    """Contenders with selectors and compensations."""
    return [
        Contender(
            name=one.plan.name,
            kind="visparse",
            what=one.what,
            plan=one.plan,
            absent=one.absent,
            without=one.without,
        )
        for one in trials(model, device)
    ]


@contextmanager
def installed(contender: Contender, model: nn.Module, padding: int) -> Iterator[Handle | None]:
    """Put a contender on a denoiser, and take it off at the end.

    Args:
        contender: what to put on.
        model: a diffusers denoiser.
        padding: how many keys at the end of each joint sequence the model's mask hides.

    Returns:
        Gives visparse's handle, or None where visparse does not serve the contender.
    """
    if contender.plan is not None:
        with visparse.sparsify(model, contender.plan, strict=True) as handle:
            yield handle
        return
    adapter = find_adapter(model)
    layers = [] if contender.attention is None or adapter is None else list(adapter.layers(model).values())
    before = [layer.processor for layer in layers]
    try:
        for layer, processor in zip(layers, before, strict=True):
            layer.processor = routed(processor, Replaced(contender.attention, padding))  # type: ignore[arg-type]
        yield None
    finally:
        for layer, processor in zip(layers, before, strict=True):
            layer.processor = processor


class Replaced:
    """A route (see `visparse.intercept.Route`) to another function; hidden keys are cut off instead of masked."""

    def __init__(self, attention: Attention, padding: int) -> None:
        """Serve every call by `attention`, without the last `padding` keys."""
        self.function, self.padding = attention, padding

    def attention(self, call: dict[str, Any], dense: Callable[[], Tensor], heads_first: bool) -> Tensor:
        """Serve one call."""
        q, k, v = (call[name].transpose(1, 2) if heads_first else call[name] for name in ("query", "key", "value"))
        if call.get("attn_mask") is not None and self.function is not _values:
            k, v = k[:, : k.shape[1] - self.padding], v[:, : v.shape[1] - self.padding]
        out = self.function(q, k, v, call.get("scale"))
        return out.transpose(1, 2) if heads_first else out


def _values(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    return v


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


@cache
def load_fa3() -> tuple[Attention | None, str]:
    """FlashAttention-3 where it is installed, and its module's name; else None, and why it cannot be used."""
    name = next((name for name in _FA3_MODULES if importlib.util.find_spec(name) is not None), None)
    if name is None:
        return None, f"neither {' nor '.join(_FA3_MODULES)} is installed"
    try:
        forward = importlib.import_module(name).flash_attn_func
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        return None, f"{name} cannot be imported: {error}"

    def run(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out = forward(q.contiguous(), k.contiguous(), v.contiguous(), softmax_scale=scale)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    # One operator, so that torch.compile sees no inside of it.
    schema = "(Tensor q, Tensor k, Tensor v, float scale) -> Tensor"
    operator = torch.library.custom_op("visparse_bench::fa3", run, mutates_args=(), schema=schema)
    operator.register_fake(lambda q, k, v, scale: q.new_empty(q.shape))

    def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        result: Tensor = operator(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)
        return result

    return attention, name
