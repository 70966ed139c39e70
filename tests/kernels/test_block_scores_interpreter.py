"""Run the kernel's cases in the interpreter: its switch must be set before triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the Triton kernel needs the triton package")


@pytest.mark.interpreter
def test_the_kernel_in_the_interpreter() -> None:
    cases = Path(__file__).with_name("block_scores_interpreter_cases.py")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VISPARSE_")}
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
