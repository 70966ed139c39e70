import pytest

from visparse.measure.coverage import Coverage, read_coverage


def layer(sparse, dense, density=None, blocks=None, fallbacks=()):
    return {
        "sparse_calls": sparse,
        "dense_calls": dense,
        "density": density,
        "block_density": blocks,
        "fallbacks": dict.fromkeys(fallbacks, 1),
    }


def report(*layers):
    return {"models": [{"layers": layers, "dense_steps": 1, "impl": "cpu", "grid": [2, 4, 6]}]}


def test_means_over_calls_by_hand():
    # Three steps, one of them dense; one layer always dense.
    found = read_coverage(report(layer(0, 3, 1.0, 1.0), layer(2, 1, 0.1, 0.2), layer(2, 1, 0.3, 0.6, ["a mask"])))
    assert found.density == pytest.approx(0.2)
    assert found.block_density == pytest.approx(0.4)
    assert found.run_block_density == pytest.approx((2 * 0.2 + 2 * 0.6 + 5) / 9)
    assert (found.dense_steps, found.impl, found.grid) == (1, "cpu", [2, 4, 6])
    assert found.to_dict()["fallbacks"] == ["a mask"]


def test_no_sparse_call_has_no_density():
    found = read_coverage(report(layer(0, 3, 1.0, 1.0)))
    assert (found.density, found.block_density, found.run_block_density) == (None, None, 1.0)


def test_no_call_at_all_is_an_error():
    with pytest.raises(ValueError, match="no call of self-attention was seen"):
        read_coverage(report(layer(0, 0)))


def test_dense_counts_every_block():
    assert Coverage.dense(4).to_dict() == {
        "density": 1.0,
        "block_density": 1.0,
        "run_block_density": 1.0,
        "dense_steps": 4,
        "impl": None,
        "grid": None,
        "fallbacks": [],
    }
