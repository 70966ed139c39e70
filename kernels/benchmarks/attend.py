"""Time dense attention against `attend` at falling densities; a contender that breaks the error rule gets no time.

    python kernels/benchmarks/attend.py [--device cpu|cuda] [--json FILE]

Every figure is useful work: kept pairs only. Contenders take turns, so that a change of clocks hits all of them.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from visparse.measure.results import Record
from visparse_kernels import BlockLists, attend, choose, preferred_blocks
from visparse_kernels.testing import check_close

DENSITIES = (0.5, 0.25, 0.125, 0.0625)
Call = Callable[[], Tensor]


def random_blocks(tokens: int, heads: int, density: float, blocks: tuple[int, int], device: str) -> BlockLists:
    """Return lists with the same number of random key blocks in every row, different for every head."""
    block_q, block_k = blocks
    n_q, n_k = -(-tokens // block_q), -(-tokens // block_k)
    make = torch.Generator().manual_seed(0)
    cols = torch.rand(heads * n_q, n_k, generator=make).topk(max(1, round(density * n_k))).indices
    rows = torch.arange(heads * n_q).repeat_interleave(cols.shape[1])
    lists = BlockLists.from_entries(
        q_len=tokens,
        k_len=tokens,
        block_q=block_q,
        block_k=block_k,
        head_group=torch.arange(heads),
        q_order=None,
        k_order=None,
        rows=rows,
        cols=cols.flatten(),
        tile=torch.full_like(rows, -1),
    )
    return lists.to(device)


def rows_of(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists | None, picked: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute some rows of attention plainly in a dtype: the truth in fp64, the eager error in the dtype of q."""
    queries, keys, values = (x.transpose(1, 2).to(dtype) for x in (q[:, picked], k, v))
    logits = queries @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5
    if lists is not None:
        logits = logits.masked_fill(~visited(lists, picked), -torch.inf)
    return (logits.softmax(-1) @ values).transpose(1, 2)


def visited(lists: BlockLists, picked: Tensor) -> Tensor:
    """Return bool [H, picked, k_len] for lists of full blocks in token order, one group per head."""
    kept = torch.zeros(lists.groups * lists.n_q, lists.n_k, dtype=torch.bool, device=lists.device)
    rows = torch.arange(kept.shape[0], device=lists.device).repeat_interleave(lists.full_offsets.diff())
    kept[rows, lists.full_indices.long()] = True
    by_block = kept.view(lists.groups, lists.n_q, lists.n_k)[:, picked // lists.block_q]
    return by_block.repeat_interleave(lists.block_k, -1)[..., : lists.k_len]


def verdict(out: Tensor, q: Tensor, k: Tensor, v: Tensor, lists: BlockLists | None) -> str | None:
    """Return what breaks the error rule on a sample of rows, or None."""
    picked = torch.linspace(0, q.shape[1] - 1, 64, device=q.device).long()
    wanted = rows_of(q, k, v, lists, picked, torch.float64)
    try:
        check_close("out", out[:, picked], wanted, rows_of(q, k, v, lists, picked, q.dtype), q.dtype)
    except AssertionError as error:
        return str(error)
    return None


def milliseconds(call: Call, device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def dense_contenders(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]

    def dense(backend: SDPBackend | None) -> Tensor:
        if backend is None:
            return scaled_dot_product_attention(*heads_first).transpose(1, 2)
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*heads_first).transpose(1, 2)

    if q.device.type == "cpu":
        return {"dense sdpa": partial(dense, None)}
    backends = {"dense flash": SDPBackend.FLASH_ATTENTION, "dense cudnn": SDPBackend.CUDNN_ATTENTION}
    return {name: partial(dense, backend) for name, backend in backends.items()}


def measure(args: argparse.Namespace) -> list[dict]:
    dtype = getattr(torch, args.dtype)
    shape = (1, args.tokens, args.heads, args.head_dim)
    q, k, v = (torch.randn(shape, device=args.device).to(dtype) for _ in range(3))
    blocks = (args.block_q, args.block_k)
    lists = {density: random_blocks(args.tokens, args.heads, density, blocks, args.device) for density in DENSITIES}
    contenders: dict[str, tuple[Call, BlockLists | None]] = {
        name: (call, None) for name, call in dense_contenders(q, k, v).items()
    }
    for density, chosen in lists.items():
        contenders[f"attend {density:.2%}"] = (partial(attend, q, k, v, chosen), chosen)
    red = {name: verdict(call(), q, k, v, chosen) for name, (call, chosen) in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(args.repeats):
        for name, (call, _) in contenders.items():
            times[name].append(milliseconds(call, args.device))

    medians = {name: statistics.median(taken) for name, taken in times.items()}
    right = [medians[name] for name, (_, chosen) in contenders.items() if chosen is None and red[name] is None]
    dense = min(right, default=float("nan"))
    rows = []
    for name, (_, chosen) in contenders.items():
        density = 1.0 if chosen is None else chosen.density
        row = {
            "contender": name,
            "impl": "dense" if chosen is None else choose(q, chosen),
            "tokens": args.tokens,
            "heads": args.heads,
            "head_dim": args.head_dim,
            "dtype": args.dtype,
            "density": density,
            "block_density": 1.0 if chosen is None else chosen.block_density,
            "correct": red[name] is None,
        }
        if red[name] is None:
            work = 4 * args.tokens**2 * args.heads * args.head_dim * density
            row |= {
                "milliseconds": medians[name],
                "milliseconds_min": min(times[name]),
                "tflops": work / medians[name] / 1e9,
                "ratio_to_fastest_dense": dense / medians[name],
            }
        else:
            row["error"] = red[name]
        rows.append(row)
    return rows


def record(args: argparse.Namespace, rows: list[dict]) -> Record:
    settings = {
        "block_q": args.block_q,
        "block_k": args.block_k,
        "repeats": args.repeats,
        "threads": torch.get_num_threads(),
        "cudnn": torch.backends.cudnn.version() if args.device == "cuda" else None,
        "pattern": "random blocks, different for every head, none masked",
        "check": "error rule on 64 rows of each contender",
    }
    return Record.collect("kernels", settings, rows, device=args.device)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to a file")
    parser.add_argument("--tokens", type=int, help="default: 9216 on the CPU, 32768 on CUDA")
    parser.add_argument("--heads", type=int, help="default: 4 on the CPU, 24 on CUDA")
    parser.add_argument("--head-dim", type=int, help="default: 64 on the CPU, 128 on CUDA")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 or bfloat16")
    parser.add_argument("--block-q", type=int, help="default: preferred_blocks of the device")
    parser.add_argument("--block-k", type=int)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    cpu = args.device == "cpu"
    args.tokens = args.tokens or (9216 if cpu else 32768)
    args.heads = args.heads or (4 if cpu else 24)
    args.head_dim = args.head_dim or (64 if cpu else 128)
    args.dtype = args.dtype or ("float32" if cpu else "bfloat16")
    block_q, block_k = preferred_blocks(args.device, args.head_dim)
    args.block_q, args.block_k = args.block_q or block_q, args.block_k or block_k
    return args


def main() -> int:
    args = arguments()
    with torch.no_grad():
        rows = measure(args)
    result = record(args, rows)
    print(f"{result.device['name']}, {args.tokens} tokens, {args.heads} heads of {args.head_dim}, {args.dtype}")
    print(f"{'contender':18}{'impl':>10}{'density':>10}{'ms':>10}{'TFLOP/s':>10}{'x dense':>9}")
    for row in rows:
        head = f"{row['contender']:18}{row['impl']:>10}{row['density']:>10.2%}"
        if row["correct"]:
            print(f"{head}{row['milliseconds']:>10.2f}{row['tflops']:>10.3g}{row['ratio_to_fastest_dense']:>9.2f}")
        else:
            print(f"{head}  wrong, so no time: {row['error']}")
    if args.json:
        result.write(args.json)
    return 0 if all(row["correct"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
