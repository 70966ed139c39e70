"""Weights in training: one step of their optimizers, and their running averages, which are what is kept."""

from collections.abc import Sequence

import torch
from parallel import average_gradients


class Weights:
    """Parameters, the optimizers that share them out, and their running averages.

    Args:
        parameters: all that are trained.
        optimizers: together they hold every parameter once.
        rate: learning rate before the schedule.
        keep: share of the averages that a step keeps, after a warm-up.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        rate: float,
        keep: float,
    ) -> None:
        self.parameters, self.optimizers = list(parameters), list(optimizers)
        self.rate, self.keep, self.steps = rate, keep, 0
        self.average = [p.detach().clone() for p in self.parameters]

    def step(self, loss: torch.Tensor, factor: float) -> torch.Tensor:
        """One step down the gradient of `loss`, at `factor` of the learning rate; returns the gradient's norm."""
        loss.backward()
        average_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        keep = min(self.keep, (self.steps + 1) / (self.steps + 10))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - keep)
        return norm

    @torch.no_grad()
    def swap_average(self) -> None:
        """Exchange the weights with their averages."""
        for p, a in zip(self.parameters, self.average, strict=True):
            p.data, a.data = a.data, p.data
