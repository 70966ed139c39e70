"""The Triton kernel compiled for sm_90, without a GPU: registers, spills, tensor core instructions, pipelining."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="compiling needs the triton package")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from visparse_kernels import preferred_blocks  # noqa: E402
from visparse_kernels.attend.triton_impl import kernel_constants, launch_options  # noqa: E402
from visparse_kernels.attend.triton_kernel import INTERPRET, attend_kernel  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

pytestmark = [
    pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1 leaves nothing to compile"),
    pytest.mark.skipif(not (TOOLS / "nvdisasm").exists(), reason="this triton has no nvdisasm"),
]


def compile_for_hopper(head_dim: int, dtype: torch.dtype, *, bias: bool, padded: bool):
    block_q, block_k = preferred_blocks("cuda", head_dim)
    constants = kernel_constants(head_dim, dtype, block_q, block_k, 24, bias=bias, padded=padded)
    constants |= {"stride_bias_s": 1} if bias else {"bias": None, "stride_bias_s": 0}
    floats = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
    plain_ints = {"q_len": "i32", "q_order_step": "i32", "k_order_step": "i32", "scale": "fp32"}
    types = dict.fromkeys(("q", "k", "v", "out"), floats[dtype]) | {"lse": "*fp32", "bias": "*fp32"} | plain_ints
    names = attend_kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32" if name.startswith("stride") else "*i32")
        for name in names
    }
    aligned = [name for name in names if name not in plain_ints and signature[name] != "constexpr"]
    source = ASTSource(
        attend_kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = launch_options(head_dim, dtype, block_q, block_k)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_bf16_uses_tensor_cores_and_keeps_its_sums_in_registers(head_dim, bias, tmp_path) -> None:
    kernel = compile_for_hopper(head_dim, torch.bfloat16, bias=bias, padded=True)
    binary = tmp_path / "attend.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", binary], capture_output=True, text=True, check=True)
    registers, stack = (int(x) for x in re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr).groups())
    assert registers <= 255
    assert stack <= 64  # a few words at the edge of the loops; sums that spill take hundreds of bytes
    sass = subprocess.run([TOOLS / "nvdisasm", "-c", binary], capture_output=True, text=True, check=True).stdout
    assert "HGMMA" in sass
    assert "LDGSTS" in sass  # rows are gathered by asynchronous copies
    assert kernel.metadata.shared <= 232448


@pytest.mark.parametrize("head_dim", [64, 128])
def test_bf16_pipelines_keys_and_values_behind_the_order_table(head_dim) -> None:
    kernel = compile_for_hopper(head_dim, torch.bfloat16, bias=False, padded=False)
    stages = launch_options(head_dim, torch.bfloat16, *preferred_blocks("cuda", head_dim))["num_stages"]
    buffers = re.findall(rf"ttg.local_alloc.*memdesc<{stages}x\d+x{head_dim}xbf16", str(kernel.asm["ttgir"]))
    assert len(buffers) >= 4  # K and V, in the full and in the partial loop


def test_fp32_compiles_without_reduced_precision() -> None:
    kernel = compile_for_hopper(64, torch.float32, bias=False, padded=True)
    assert "wgmma" not in kernel.asm["ptx"]
    assert ".tf32" not in kernel.asm["ptx"]
