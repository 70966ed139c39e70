"""Guards of the repository: the traps that are easy to fall into again."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_plain_folders_have_no_init() -> None:
    """A top-level package `kernels` would hide Hugging Face's, which diffusers imports; so would `tests/kernels`."""
    found = [p for p in (ROOT / "kernels" / "__init__.py", ROOT / "pipelines" / "__init__.py") if p.exists()]
    assert not found + list((ROOT / "tests").rglob("__init__.py"))


def test_hugging_face_kernels_is_importable_from_the_root() -> None:
    pytest.importorskip("kernels", reason="Hugging Face's kernels is not installed (pip install -e .[dev])")
    code = (
        "from kernels import get_kernel\n"
        "from diffusers.utils import is_kernels_available\n"
        "print(callable(get_kernel), is_kernels_available())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True True", done.stderr


def test_top_level_folders_are_the_five() -> None:
    folders = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if folders.returncode:
        pytest.skip("not a git checkout")
    names = {line.split("/")[0] for line in folders.stdout.splitlines() if "/" in line}
    assert {n for n in names if not n.startswith(".")} == {"visparse", "kernels", "pipelines", "tests", "gallery"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_wheel_holds_three_packages_and_the_model(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    tops = {n.split("/")[0] for n in names if ".dist-info/" not in n}
    assert tops == {"visparse", "visparse_kernels", "visparse_pipelines"}
    for package in tops:
        assert f"{package}/py.typed" in names
    model = [i for i in wheel.infolist() if i.filename.startswith("visparse_pipelines/tiny_video/")]
    assert any(i.filename.endswith("transformer/diffusion_pytorch_model.safetensors") for i in model)
    assert any(i.filename.endswith("CREDITS.txt") for i in model)
    assert sum(i.file_size for i in model) <= 40e6


def test_requirements_are_lower_bounds() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"]:
        assert re.match(r"^[a-z0-9]+>=[\d.]+(; .*)?$", requirement), requirement


def test_tree_is_free_of_leftovers() -> None:
    """No commented-out tests, no tests that are run again until they pass."""
    for path in (ROOT / "tests").rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"^\s*#\s*(@pytest|def test_|assert )", text, re.MULTILINE), path
        assert "flaky(" not in text or path.name == "test_repository.py", path
