"""Run the cases of proxy tokens with the Triton kernels in Triton's interpreter, whose switch precedes the import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the Triton kernels need the triton package")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="runs already in the interpreter")
@pytest.mark.parametrize("name", ["test_lay_out.py", "test_proxies_attend.py", "test_proxies_pool.py"])
def test_the_kernels_in_the_interpreter(name) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VISPARSE_")}
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    cases = Path(__file__).with_name(name)
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
