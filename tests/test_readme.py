"""The README does what it says: its Python runs, its commands exist, its links lead somewhere."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_runs(capsys) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    # the same lines on a smaller video, so that it takes seconds
    for wanted, smaller in (("128", "64"), ("num_frames=17", "num_frames=5"), ("=12", "=4")):
        assert wanted in block
        block = block.replace(wanted, smaller)
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["video"].frames.shape == (1, 5, 64, 64, 3)  # type: ignore[attr-defined]
    shown = capsys.readouterr().out
    assert "foveal" in shown
    assert "layer" in shown


def test_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+) +#", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_links_lead_somewhere() -> None:
    pages = [
        ROOT / "README.md",
        ROOT / "gallery" / "RESULTS.md",
        *(ROOT / d / "README.md" for d in ("kernels", "pipelines", "gallery", "gallery/training")),
    ]
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page}: {link}"
