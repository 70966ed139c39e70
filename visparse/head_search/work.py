"""The work file of a search: one JSON object a line, so that a search that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FORM = 1
Key = tuple[int, int, str, int, int]  # prompt, step, branch, row of the batch, layer


class WorkFile:
    """What was scored so far, in memory and, where there is a path, in a file.

    Attributes:
        path: of the file; None: memory only.
        facts: what was measured once, before scoring: it belongs to the search, not to the process.
        scores: key -> what was scored there.
        done: prompts that are complete.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        """Open or begin a file.

        Args:
            path: of the file; its folder is made.
            settings: JSON values that two parts of one search must agree in.

        Raises:
            ValueError: the file belongs to a search with other settings, or is no work file.
        """
        self.path = path
        self.facts: dict[str, Any] = {}
        self.scores: dict[Key, dict[str, Any]] = {}
        self.done: set[int] = set()
        text = json.dumps(settings, sort_keys=True)
        self._settings: dict[str, Any] = json.loads(text)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = self._read(path) if path.is_file() and path.stat().st_size else []
        if not lines or self._is_other_without_scores(lines, digest):
            path.write_text("", encoding="utf-8")
            self._append({"form": FORM, "search": digest, "settings": self._settings})
            return
        self._check_header(lines[0], digest)
        for line in lines[1:]:
            self._take(line)

    def note(self, facts: Mapping[str, Any]) -> None:
        """Keep what was measured before scoring."""
        self._write({"facts": dict(facts)})

    def score(self, key: Key, found: Mapping[str, Any]) -> None:
        """Keep what was scored for one layer in one call."""
        self._write({"key": list(key), **found})

    def finish(self, prompt: int) -> None:
        """A prompt is complete."""
        self._write({"done": prompt})

    def _write(self, entry: dict[str, Any]) -> None:
        self._append(entry)
        self._take(json.loads(json.dumps(entry)))

    def _take(self, entry: dict[str, Any]) -> None:
        if "facts" in entry:
            self.facts |= entry["facts"]
        elif "done" in entry:
            self.done.add(entry["done"])
        else:
            prompt, step, branch, row, layer = entry.pop("key")
            self.scores[prompt, step, branch, row, layer] = entry

    def _append(self, entry: Mapping[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def _read(self, path: Path) -> list[dict[str, Any]]:
        """All whole lines; a last one that was cut short is taken off the file."""
        raw = path.read_bytes()
        end = raw.rfind(b"\n") + 1
        if end < len(raw):
            with path.open("r+b") as file:
                file.truncate(end)
        found = []
        for number, line in enumerate(raw[:end].splitlines(), 1):
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            if not isinstance(entry, dict):
                raise ValueError(f"work file {path}: line {number} is damaged; delete the file to begin again")
            found.append(entry)
        return found

    @staticmethod
    def _is_other_without_scores(lines: Sequence[Mapping[str, Any]], digest: str) -> bool:
        """Whether the file is of another search that was refused before it scored anything."""
        head, *rest = lines
        other = head.get("form") == FORM and "settings" in head and head.get("search") != digest
        return other and all("facts" in line for line in rest)

    def _check_header(self, header: Mapping[str, Any], digest: str) -> None:
        if header.get("form") != FORM or "settings" not in header:
            raise ValueError(f"work file {self.path}: wanted one of visparse search, form {FORM}; give another path")
        if header.get("search") == digest:
            return
        before = header["settings"]
        names = [name for name in self._settings if before.get(name) != self._settings[name]]
        name = names[0] if names else next(iter(set(before) - set(self._settings)), "settings")
        raise ValueError(
            f"work file {self.path}: it belongs to a search with {name}={before.get(name)!r}, this one has "
            f"{self._settings.get(name)!r}; search again with that, or delete the file to begin again"
        )
