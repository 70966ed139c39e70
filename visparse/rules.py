"""Parts of a plan: the model that it was made for, and the rules of its assignment."""

from __future__ import annotations

from dataclasses import dataclass

from visparse.ranges import Selector, parse_selector


@dataclass(frozen=True, kw_only=True)
class ModelFingerprint:
    """The shape of the model that a plan was made for.

    Attributes:
        model_class: name of the denoiser's class.
        layers: number of attention layers that can be made sparse.
        heads: heads per layer.
        head_dim: channels per head.
    """

    model_class: str
    layers: int
    heads: int
    head_dim: int

    def check(self, model: ModelFingerprint) -> None:
        """Refuse a model of another shape.

        Args:
            model: fingerprint of the model at hand.

        Raises:
            ValueError: names the first difference.
        """
        for name, text in (
            ("model_class", "model class"),
            ("layers", "layers"),
            ("heads", "heads"),
            ("head_dim", "head_dim"),
        ):
            mine, other = getattr(self, name), getattr(model, name)
            if mine != other:
                raise ValueError(
                    f"the plan was made for another model: {text} {mine!r}, this model has {other!r}; "
                    "use a plan made for this model, or a preset"
                )


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One line of a plan's assignment: the pattern of some heads, in some layers, at some steps.

    Attributes:
        pattern: a name in the plan's table of patterns.
        layers, heads, steps: selectors, see `visparse.ranges.parse_selector`.
    """

    pattern: str
    layers: Selector = "all"
    heads: Selector = "all"
    steps: Selector = "all"

    def __post_init__(self) -> None:
        """Bring the selectors into normal form."""
        for name in ("layers", "heads", "steps"):
            object.__setattr__(self, name, parse_selector(getattr(self, name), f"a rule's {name}"))
