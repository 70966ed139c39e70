import json
from pathlib import Path

import pytest
import torch

import visparse
from visparse.bench.cases import find_case
from visparse.bench.patterns import grid_pattern
from visparse.compile import compile_lists
from visparse.estimate_fit import fit_rates
from visparse.estimate_fit import main as fit
from visparse.estimate_rates import RATES, all_rates, rates_of
from visparse.estimates import Estimate, estimate
from visparse.layout import Layout
from visparse.order import Order
from visparse.patterns import Dense, Neighborhood, Radial, Skip
from visparse.templates import PatternTemplate

ROOT = Path(__file__).parents[2]
FILES = [
    ROOT / "gallery" / "results" / f"{name}.json"
    for name in ("attend_cpu", "kernels_sequences_h200", "kernels_video_h200")
]
needs_results = pytest.mark.skipif(
    not FILES[0].exists(), reason="the results are in the repository, not in the package"
)


def rows_of(name: str) -> list[dict]:
    return [
        row for row in json.loads((ROOT / "gallery" / "results" / name).read_text())["rows"] if "milliseconds" in row
    ]


@needs_results
@pytest.mark.parametrize(
    ("case", "pattern"), [("hunyuan_sta", "gna_strided"), ("hunyuan_sta", "gna"), ("wan14b_720p", "radial_code")]
)
def test_measured_videos_are_predicted(case: str, pattern: str) -> None:
    shape = find_case(case)
    kept = grid_pattern(pattern, shape)
    assert kept is not None
    said = estimate(kept, Layout(shape.grid), device="h200", heads=shape.heads)
    rows = {
        row["contender"]: row
        for row in rows_of("kernels_video_h200.json")
        if (row["case"], row["pattern"]) == (case, pattern)
    }
    ours, dense = rows["visparse:gluon"], rows["sdpa_cudnn"]
    assert said.block_density == pytest.approx(ours["block_density"], rel=1e-6)
    assert said.density == pytest.approx(ours["density"], rel=1e-6)
    assert said.milliseconds == pytest.approx(ours["milliseconds"], rel=0.15)
    assert said.dense_milliseconds == pytest.approx(dense["milliseconds"], rel=0.15)
    assert said.speedup == pytest.approx(dense["milliseconds"] / ours["milliseconds"], rel=0.2)


@needs_results
def test_measured_sequences_are_predicted() -> None:
    seen = 0
    for row in [
        *rows_of("kernels_sequences_h200.json"),
        *rows_of("kernels_video_h200.json"),
        *rows_of("attend_cpu.json"),
    ]:
        rate = next(
            (
                r
                for r in rates_of("h200" if row["tokens"] != 9216 else "cpu", row["head_dim"])
                if r.impl == row.get("impl")
            ),
            None,
        )
        if rate is None or "partial" in row.get("pattern", "") or row.get("pattern") in ("gna", "radial_code"):
            continue
        query_blocks, key_blocks = -(-row["tokens"] // rate.block_q), -(-row["tokens"] // rate.block_k)
        visited = row["heads"] * query_blocks * key_blocks * row["block_density"]
        assert rate.milliseconds(row["heads"] * query_blocks, visited, 0) == pytest.approx(
            row["milliseconds"], rel=0.15
        )
        seen += 1
    assert seen > 20


@needs_results
def test_the_rates_that_ship_are_the_fit_of_the_committed_results(tmp_path: Path) -> None:
    fit([*map(str, FILES[:2]), "--out", str(tmp_path / "rates.json")])
    again = json.loads((tmp_path / "rates.json").read_text())["rates"]
    shipped = {(rate["kind"], rate["head_dim"], rate["impl"]): rate for rate in json.loads(RATES.read_text())["rates"]}
    compared = 0
    for rate in again:
        if "kernels_video" not in shipped[rate["kind"], rate["head_dim"], rate["impl"]]["source"]:
            assert rate == shipped[rate["kind"], rate["head_dim"], rate["impl"]]
            compared += 1
    assert compared == 3


def test_a_fit_finds_the_costs_that_made_the_times(tmp_path: Path) -> None:
    """Times made of known costs, in a file of the usual form."""
    rows = [
        {
            "contender": "dense sdpa",
            "tokens": 960,
            "heads": 2,
            "head_dim": 8,
            "dtype": "float32",
            "density": 1.0,
            "block_density": 1.0,
            "milliseconds": 960**2 * 2 * 3e-6,
        }
    ]
    for share in (0.5, 0.25, 0.125):
        cost = (2 * 10 * 700 + 2 * 10 * 30 * share * 40) / 1e6
        rows.append(
            rows[0]
            | {
                "contender": f"attend {share}",
                "impl": "cpu",
                "density": share,
                "block_density": share,
                "milliseconds": cost,
            }
        )
    record = json.loads(FILES[0].read_text()) if FILES[0].exists() else None
    if record is None:
        pytest.skip("the form is taken from a file of the repository")
    record["rows"], record["settings"] = rows, {"block_q": 96, "block_k": 32}
    (tmp_path / "made.json").write_text(json.dumps(record))
    (rate,) = fit_rates([tmp_path / "made.json"])
    assert (rate.query_block_ns, rate.full_ns) == (pytest.approx(700), pytest.approx(40))
    assert rate.masked_ns is None
    assert rate.dense_pair_ns == pytest.approx(3)
    assert rate.worst == pytest.approx(0, abs=1e-9)
    record["rows"] = rows[1:]
    (tmp_path / "made.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="cpu, head_dim 8: no dense row of"):
        fit_rates([tmp_path / "made.json"])


def test_bounds_that_the_paper_gives_for_hunyuan() -> None:
    """arXiv 2504.16922: query tiles 4x8x8, key tiles 2x8x8; 3.3x at stride 1 and 11.1x at stride 16x8x8.

    The paper counts a query far from every border; windows near a border are shared, so the mean is better.
    """
    grid, window = (30, 48, 80), (18, 24, 24)
    tiles = Order((4, 8, 8), (2, 8, 8))
    plain, strided = (
        compile_lists([Neighborhood(window=window, stride=stride)], Layout(grid), block_q=256, block_k=128, order=tiles)
        for stride in (1, (16, 8, 8))
    )
    most = int((plain.full_offsets.diff() + plain.partial_offsets.diff()).max())
    assert round(900 / most, 1) == 3.3
    usual = (strided.full_offsets.diff() + strided.partial_offsets.diff()).mode().values
    assert round(900 / int(usual), 1) == 11.1


def test_counts_are_those_of_the_lists() -> None:
    layout = Layout((5, 11, 13), 3, 40)
    patterns = [Neighborhood(window=3), Skip(), Radial(), Neighborhood(window=3)]
    said = estimate(patterns, layout, head_dim=64)
    lists = compile_lists(patterns, layout, block_q=192, block_k=32)
    assert (said.block_q, said.block_k, said.boxes, said.heads) == (192, 32, False, 4)
    assert [group.heads for group in said.groups] == [2, 1, 1]
    assert [group.order for group in said.groups][1] == "skipped"
    assert said.density == pytest.approx(lists.density)
    assert said.block_density == pytest.approx(lists.block_density)
    assert said.bound == pytest.approx(1 / lists.block_density)
    visited = [group.full + group.masked for group in said.groups]
    assert visited == [int(lists.block_density_per_head[i] * lists.n_q * lists.n_k + 0.5) for i in (0, 1, 2)]
    rows = (lists.full_offsets.diff() + lists.partial_offsets.diff())[: -(-715 // 192)]  # the last block is text
    assert said.groups[0].fullest == pytest.approx(int(rows.max()) / lists.n_k)
    for group in (said.groups[0], said.groups[2]):
        assert list(group.tried.values()) == sorted(group.tried.values())
        assert {"row-major", "pixel-major", "z-order", "hilbert"} <= set(group.tried)


def test_heads_and_batch_multiply_the_time() -> None:
    layout = Layout((3, 8, 8))
    one = estimate(Neighborhood(window=3), layout, head_dim=64, heads=1)
    many = estimate(Neighborhood(window=3), layout, head_dim=64, heads=6, batch=2)
    assert one.milliseconds is not None
    assert many.milliseconds == pytest.approx(12 * one.milliseconds)
    assert many.dense_milliseconds == pytest.approx(12 * (one.dense_milliseconds or 0))
    assert many.speedup == pytest.approx(one.speedup)


@pytest.mark.parametrize(
    ("order", "impl"), [("auto", "gluon"), ("row-major", "gluon"), ("hilbert", "triton"), ((2, 4, 8), "triton")]
)
def test_blocks_that_cannot_be_fetched_are_for_the_other_kernel(order: str | tuple, impl: str) -> None:
    said = estimate(Neighborhood(window=3), Layout((4, 16, 16)), device="h200", order=order)
    assert said.rate is not None
    assert said.rate.impl == impl
    assert said.boxes == (impl == "gluon")
    assert (said.block_q, said.block_k) == (128, 128 if impl == "gluon" else 64)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"head_dim": 96}, "time: not measured: cpu with head_dim 96 (measured: cpu with head_dim 64, h200"),
        ({"device": "a100"}, "time: not measured: a100 with head_dim 128 (measured:"),
        ({"device": "h200", "block_q": 64}, "time: not measured: blocks of 64x64 (measured:"),
    ],
)
def test_nothing_is_invented(options: dict, text: str) -> None:
    said = estimate(Neighborhood(window=3), Layout((3, 8, 8)), **options)
    assert text in str(said)
    assert (said.milliseconds, said.dense_milliseconds, said.speedup, said.source) == (None, None, None, None)
    assert said.bound is not None


def test_the_text_says_what_it_rests_on() -> None:
    text = str(estimate(Neighborhood(window=3), Layout((3, 8, 8), 5), head_dim=64, heads=2))
    assert text.startswith("3x8x8 + 5 = 197 tokens, 2 heads of 64, batch 1, blocks 192x32\n")
    assert "orders, " in text
    assert "times faster (1 / blocks)" in text
    assert "measured on AMD EPYC, 2 threads in float32 with 9216 tokens (attend_cpu.json of 2026-11-22)" in text
    assert "197 tokens are outside of what was measured" in text
    assert "masked blocks were not measured" in text
    assert "boxes" in str(estimate(Neighborhood(window=(3, 8, 8)), Layout((4, 32, 32)), device="h200"))


@pytest.mark.parametrize("device", ["cpu", "h200"])
def test_a_layer_of_skipped_heads_has_no_bound(device: str) -> None:
    said = estimate([Skip()], Layout((2, 4, 4)), device=device, head_dim=64)
    assert (said.bound, said.speedup, said.milliseconds) == (None, None, 0)
    assert "nothing is visited" in str(said)


def test_json_and_names() -> None:
    assert visparse.estimate is estimate
    assert visparse.Estimate is Estimate
    template = PatternTemplate({"name": "neighborhood", "window": ["100%", "50%/2", 3]})
    said = estimate(template, Layout((3, 8, 8)), head_dim=64).to_dict()
    assert said["groups"][0]["pattern"] == str(Neighborhood(window=(3, 4, 3)))
    assert json.loads(json.dumps(said)) == said
    assert said["tokens"] == 192
    assert said["impl"] == "cpu"


def test_the_shipped_table_is_sound() -> None:
    rates = all_rates()
    assert {(rate.kind, rate.head_dim) for rate in rates} == {("cpu", 64), ("h200", 64), ("h200", 128)}
    for rate in rates:
        assert rate.worst < 0.15
        assert rate.full_ns > 0
        assert rate.masked_ns is None or rate.masked_ns > rate.full_ns


@pytest.mark.parametrize(
    ("patterns", "options", "error", "text"),
    [
        ([], {}, ValueError, "patterns: wanted at least one pattern, got none"),
        (["radial"], {}, TypeError, "patterns: wanted visparse patterns, got str 'radial'"),
        (Dense(), {"heads": 0}, ValueError, "heads: wanted an int of at least 1, got 0"),
        (Dense(), {"head_dim": 64.0}, ValueError, "head_dim: wanted an int of at least 1, got 64.0"),
        (Dense(), {"order": "spiral"}, ValueError, "order: wanted 'auto'.* got 'spiral'"),
        (Neighborhood(window=9), {}, ValueError, "window: 9 .* on the frames axis"),
    ],
)
def test_errors(patterns: object, options: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        estimate(patterns, Layout((2, 8, 8)), **options)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_the_gpu_here_is_recognised() -> None:
    said = estimate(Neighborhood(window=3), Layout((4, 16, 16)), device="cuda")
    assert (said.rate is not None) == (torch.cuda.get_device_name() == "NVIDIA H200")
