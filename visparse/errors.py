"""Small helpers for error texts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a name that is not known: `"; did you mean 'radial'?"`, or an empty string where nothing is near.

    Args:
        word: the name that came.
        known: the names that exist.

    Returns:
        Text to put into an error message.
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_keys(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse keys that are not known.

    Args:
        given: keys that came.
        known: keys that exist.
        where: what holds the keys, for the error text.

    Raises:
        ValueError: names the first unknown key, the nearest known one, and all known ones.
    """
    known = list(known)
    for key in given:
        if key not in known:
            raise ValueError(
                f"{where} has an unknown key {key!r}{nearest(str(key), known)} (known: {', '.join(known) or 'none'})"
            )
