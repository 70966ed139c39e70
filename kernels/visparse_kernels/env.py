"""The two environment variables that visparse_kernels reads; nothing else in the package reads one."""

import os

IMPLS = ("reference", "cpu", "triton", "gluon")


def impl_from_env() -> str:
    """Return the implementation that VISPARSE_IMPL asks for.

    Returns:
        ``"auto"`` where it is not set, else ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton", "gluon"``.

    Raises:
        ValueError: it is set to something else.
    """
    return _read("VISPARSE_IMPL", ("auto", *IMPLS), "auto")


def check_inputs() -> bool:
    """Return whether VISPARSE_CHECK asks `attend` to look for non-finite inputs, which costs a pass over each.

    Raises:
        ValueError: it is set to something other than 0 or 1.
    """
    return _read("VISPARSE_CHECK", ("0", "1"), "0") == "1"


def _read(name: str, allowed: tuple[str, ...], default: str) -> str:
    value = os.environ.get(name, default)
    if value not in allowed:
        raise ValueError(f"{name}: wanted one of {', '.join(allowed)}, got {value!r}; unset it or choose one of these")
    return value
