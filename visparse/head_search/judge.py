"""Judge: how far the model's frames or pictures, or what a vision transformer gives, go from the dense ones.

Latents would be cheaper, but the same error in them costs more or less in what people see: allocations by the error of
latents had half of it and a worse PSNR.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from visparse.head_search.work import WorkFile
from visparse.plan import SparsePlan


class OutputJudge:
    """Runs a pipeline under plans; what was judged before is in the work file, and is not run again."""

    def __init__(
        self,
        pipe: Any,
        generate: Callable[[int], Any],
        prompts: int,
        work: WorkFile,
        *,
        deadline: float | None = None,
        before_run: Callable[[str], None] = lambda label: None,
    ) -> None:
        """Prepare, and run nothing yet.

        Args:
            pipe: a diffusers pipeline or a model without steps, dense.
            generate: function (prompt) -> what the pipeline returns, decoded, in [0, 1]; or a tensor.
            prompts: how many of the calibration prompts.
            work: keeps what was judged.
            deadline: on `time.perf_counter`; no plan is begun after it. None: none.
            before_run: told what is run.
        """
        self.pipe, self.generate, self.prompts, self.work = pipe, generate, prompts, work
        self.deadline, self.before_run = deadline, before_run
        self._dense: list[Tensor] = []

    def error(self, plan: SparsePlan, label: str) -> float | None:
        """Root mean square error of the output, mean over prompts; None where the time is over.

        Args:
            plan: to be judged.
            label: for whoever watches.
        """
        found = self.errors(plan, label)
        return None if found is None else sum(found) / len(found)

    def errors(self, plan: SparsePlan, label: str) -> tuple[float, ...] | None:
        """Root mean square error of the output for each prompt; None where the time is over.

        Args:
            plan: to be judged.
            label: for whoever watches.
        """
        import visparse

        key = f"output errors of {digest(plan)}"
        if key in self.work.facts:
            return tuple(self.work.facts[key])
        if self.deadline is not None and time.perf_counter() > self.deadline:
            return None
        if not self._dense:
            self.before_run("dense")
            self._dense = [_output(self.generate(prompt)) for prompt in range(self.prompts)]
        self.before_run(label)
        with visparse.sparsify(self.pipe, plan):
            made = [_output(self.generate(prompt)) for prompt in range(self.prompts)]
        self.work.note({key: [float((a - b).square().mean().sqrt()) for a, b in zip(made, self._dense, strict=True)]})
        return tuple(self.work.facts[key])


def digest(plan: SparsePlan) -> str:
    """A short name of what a plan does; its own name, notes and figures do not count."""
    fields = {key: value for key, value in plan.to_dict().items() if key not in ("name", "notes", "measured")}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def _output(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output.float().cpu()
    made = output.frames if hasattr(output, "frames") else output.images
    return torch.as_tensor(made).float().cpu()
