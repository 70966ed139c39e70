"""The transformer and its text encoder in training: which weights go to which optimizer, and the state on disk."""

import copy
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from transformers import UMT5EncoderModel
from weights import Weights


class Trainer(Weights):
    """Model and text encoder: Muon for the matrices of the blocks, AdamW for the rest."""

    def __init__(self, model: WanTransformer3DModel, text: UMT5EncoderModel, rate: float) -> None:
        self.model, self.text = model, text
        named = list(model.named_parameters())
        matrices = [p for n, p in named if n.startswith("blocks") and p.ndim == 2]
        chosen = {id(p) for p in matrices}
        rest = [p for _, p in named if id(p) not in chosen] + list(text.parameters())
        cuda = matrices[0].is_cuda
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=cuda),
        ]
        super().__init__(matrices + rest, optimizers, rate=rate, keep=0.9985)

    def averaged_model(self) -> WanTransformer3DModel:
        """A frozen copy of the model with the averaged weights."""
        self.swap_average()
        model = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.swap_average()
        return model

    def save(self, path: Path) -> None:
        """Write everything that a later call needs to go on."""
        state = {
            "model": self.model.state_dict(),
            "text": self.text.state_dict(),
            "average": self.average,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "steps": self.steps,
        }
        torch.save(state, path)

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        state = torch.load(path, map_location=self.average[0].device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.text.load_state_dict(state["text"])
        for a, b in zip(self.average, state["average"], strict=True):
            a.copy_(b)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.steps = state["steps"]
