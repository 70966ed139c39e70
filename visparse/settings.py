"""Settings: how a plan is run."""

from __future__ import annotations

from dataclasses import dataclass

from visparse.errors import nearest


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a plan is run.

    Attributes:
        impl: implementation of `visparse_kernels.attend`; a name other than "auto" never falls back.
        block_q, block_k: block sizes in slots; None: what the kernels prefer on the device.
        order: token order: "auto", a name that `compile_lists` knows, or a tile.
        strict: raise where a layer or call cannot be served, instead of running it dense with a recorded reason.
        timing: measure time in attention on CUDA too, which waits for the device at each call. On CPU it is always on.
    """

    impl: str = "auto"
    block_q: int | None = None
    block_k: int | None = None
    order: str | tuple[int, int, int] = "auto"
    strict: bool = False
    timing: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked before there is a grid."""
        from visparse.order import NAMES  # here, so that `import visparse` stays light
        from visparse_kernels.env import IMPLS

        known = ("auto", *IMPLS)
        if self.impl not in known:
            raise ValueError(
                f"impl must be one of {', '.join(known)}, got {self.impl!r}{nearest(str(self.impl), known)}"
            )
        for name, unit in (("block_q", 1), ("block_k", 32)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1 or value % unit):
                raise ValueError(
                    f"{name} must be a positive multiple of {unit}, or None for the default; got {value!r}"
                )
        for name in ("strict", "timing"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if isinstance(self.order, list):  # as JSON has it
            object.__setattr__(self, "order", tuple(self.order))
        tile = (
            isinstance(self.order, tuple) and len(self.order) == 3 and all(type(n) is int and n > 0 for n in self.order)
        )
        if self.order not in NAMES and not tile:
            raise ValueError(
                f"order must be one of {', '.join(NAMES)}, or a tile such as (4, 8, 8), got {self.order!r}"
                f"{nearest(str(self.order), NAMES)}"
            )
