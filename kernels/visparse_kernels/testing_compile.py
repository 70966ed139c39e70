"""Compile Triton and Gluon kernels for Hopper where there is no GPU, and read what the assembler says of them."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Compiled:
    """What the assembler made of a kernel.

    Args:
        registers: per thread, at entry.
        spilled: bytes of registers stored to and loaded from local memory.
        shared: bytes of shared memory.
        warps: of a block of threads.
        warnings: lines in which the assembler warns; a serialised wgmma is one.
        sass: machine code, as text.
    """

    registers: int
    spilled: int
    shared: int
    warps: int
    warnings: list[str]
    sass: str

    def count(self, instruction: str) -> int:
        """Return how often an instruction occurs in the machine code."""
        return len(re.findall(rf"\b{instruction}\b", self.sass))


def cannot_compile() -> str | None:
    """Return why kernels cannot be compiled and read here, or None."""
    try:
        import triton
    except ImportError as error:
        return f"compiling needs the triton package ({error})"
    if triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET=1 leaves nothing to compile"
    missing = [name for name in ("ptxas", "cuobjdump", "nvdisasm") if not (tools() / name).exists()]
    return f"this triton has no {missing[0]}" if missing else None


def tools() -> Path:
    """Return the folder with the ptxas, cuobjdump and nvdisasm that Triton brings."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@contextmanager
def hopper_driver() -> Iterator[None]:
    """Let Triton believe that an sm_90 GPU is there: kernels can be warmed up, not run."""
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

        def map_python_to_cpp_type(self, name: str) -> str:
            return name

    before = vars(triton.runtime.driver).get("_active")  # None where there is no GPU: asking by name would raise
    triton.runtime.driver.set_active(Driver())
    try:
        yield
    finally:
        triton.runtime.driver.set_active(before)


def assemble(kernel: Any) -> Compiled:
    """Run ptxas and nvdisasm on a kernel that Triton has compiled.

    Args:
        kernel: what ``warmup`` or ``triton.compile`` returns.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(kernel.asm["ptx"])
        log = _run("ptxas", "-v", "--gpu-name=sm_90a", source, "-o", binary).stderr
        sass = _run("nvdisasm", "-c", binary).stdout
    numbers = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    return Compiled(
        registers=max(int(x) for x in re.findall(r"Used (\d+) registers", log)),
        spilled=sum(map(int, numbers)),
        shared=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        warnings=[line for line in log.splitlines() if "warning" in line.lower() or "C75" in line],
        sass=sass,
    )


def _run(tool: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([tools() / tool, *arguments], capture_output=True, text=True, check=True)
