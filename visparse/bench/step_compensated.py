"""Plans with selectors and compensations, as `visparse bench step` tries them on any model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from visparse.bench.models import Architecture
from visparse.compensation import Proxies, ReuseResidual
from visparse.compensation.residual_sizes import storage_bytes
from visparse.plan import SparsePlan

_KEEP = 0.125
_BRANCHES = 2  # passes of guidance; each keeps a residual of its own
_ROOM = 0.5  # share of the device that residuals may take; weights and activations need the rest


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One plan that is tried.

    Args:
        plan: with one dense step, to measure at, where it reuses anything; else with none.
        what: what it runs, in words.
        without: name of the plan with the same selection and nothing in place of the rest; None where this is it.
        absent: why it cannot run on the device; None where it can.
    """

    plan: SparsePlan
    what: str
    without: str | None = None
    absent: str | None = None


def trials(model: Architecture, device: torch.device) -> list[Trial]:
    """The plans with selectors and compensations for one model.

    `foveal` has its parts with a fixed choice: one dense step to measure at, no refresh.

    Args:
        model: whose first window is tried with proxies.
        device: where it will run; what its memory cannot hold at the published depth is absent.
    """
    chosen = f"top-k {100 * _KEEP:.1f} %"
    pooled = f"pooled {chosen}"
    averages = ReuseResidual(storage="average-fp8", group=(2, 2, 2))
    found = [
        Trial(plan=_top_k(chosen), what="tiles chosen at a dense step"),
        Trial(plan=_top_k(f"{chosen} + proxies", proxies=Proxies()), what="chosen tiles, proxy tokens", without=chosen),
        Trial(
            plan=_top_k("foveal", proxies=Proxies(), residual=averages),
            what="chosen tiles, proxy tokens, residual as means over 8 tokens in fp8",
            without=chosen,
        ),
        Trial(
            plan=_top_k(f"{chosen} + proxies + fp8 residual", proxies=Proxies(), residual=ReuseResidual(storage="fp8")),
            what="chosen tiles, proxy tokens, residual in fp8",
            without=chosen,
            absent=_too_large(model, device),
        ),
        Trial(plan=_top_k(pooled, score="pooled"), what="tiles chosen anew at each step"),
        Trial(
            plan=_top_k(f"{pooled} + proxies", score="pooled", proxies=Proxies()),
            what="tiles chosen anew at each step, proxy tokens",
            without=pooled,
        ),
    ]
    for plan in model.plans()[: len(model.windows)][:1]:
        wide = SparsePlan(
            name=f"{plan.name} + proxies", patterns=plan.patterns, default=plan.default, proxies=Proxies()
        )
        found.append(Trial(plan=wide, what="window of whole tiles, proxy tokens", without=plan.name))
    return found


def _top_k(name: str, *, score: str = "mass_variance", **compensations: Any) -> SparsePlan:
    return SparsePlan(
        name=name,
        patterns={"chosen": {"name": "top_k", "share": _KEEP, "score": score}},  # type: ignore[dict-item]
        default="chosen",
        dense_steps=0 if score == "pooled" else 1,
        **compensations,
    )


def _too_large(model: Architecture, device: torch.device) -> str | None:
    """Why the residuals in fp8 of all published layers and both branches do not fit; None where they do."""
    if device.type != "cuda":
        return None
    layer = storage_bytes("fp8", tokens=model.tokens, heads=model.heads, head_dim=model.head_dim)
    needed = _BRANCHES * layer * sum(kind.published for kind in model.blocks)
    room = _ROOM * torch.cuda.get_device_properties(device).total_memory
    if needed <= room:
        return None
    return f"residuals of {needed / 2**30:.1f} GiB, {room / 2**30:.1f} GiB ({_ROOM:.0%} of the device) are for them"
