"""Parts of a plan: the model that it was made for, and the rules of its assignment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from visparse.errors import check_keys
from visparse.ranges import Selector, parse_selector


@dataclass(frozen=True, kw_only=True)
class ModelFingerprint:
    """The shape of the model that a plan was made for.

    Attributes:
        model_class: name of the denoiser's class.
        layers: number of attention layers that can be made sparse.
        heads: heads per layer.
        head_dim: channels per head.

    Raises:
        ValueError: a value that is not one of those.
    """

    model_class: str
    layers: int
    heads: int
    head_dim: int

    def __post_init__(self) -> None:
        """Check the values."""
        if not isinstance(self.model_class, str) or not self.model_class:
            raise ValueError(f"model: model_class must be the name of a class, got {self.model_class!r}")
        for name in ("layers", "heads", "head_dim"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"model: {name} must be an int of at least 1, got {value!r}")

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

    @classmethod
    def from_dict(cls, entry: object, where: str) -> Rule:
        """Read a rule of a plan's assignment.

        Args:
            entry: the JSON form, or a rule.
            where: what holds it, for error texts.

        Returns:
            The rule; the entry itself where it is one.

        Raises:
            ValueError: an unknown or missing key, or a value that does not fit.
        """
        if isinstance(entry, Rule):
            return entry
        if not isinstance(entry, Mapping):
            raise ValueError(
                f"{where} must be a JSON object such as {{'pattern': 'near', 'heads': [0]}}, got {entry!r}"
            )
        check_keys(entry, cls.__dataclass_fields__, where)
        if "pattern" not in entry:
            raise ValueError(f"{where}: the key 'pattern' is missing")
        try:
            return cls(**entry)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
