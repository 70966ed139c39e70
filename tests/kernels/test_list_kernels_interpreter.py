"""Run the cases of the kernels of lists, choices and hidden proxies in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need the triton package")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="runs already in the interpreter")
def test_the_kernels_in_the_interpreter() -> None:
    cases = Path(__file__).with_name("test_list_kernels.py")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VISPARSE_")}
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "interpreter", str(cases)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
