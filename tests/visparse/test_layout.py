import pytest
import torch

from visparse.layout import Layout, coordinates


def test_counts() -> None:
    layout = Layout((2, 3, 5), before=4, after=7)
    assert (layout.visual, layout.extra, layout.tokens) == (30, 11, 41)


def test_coordinates_count_columns_first() -> None:
    expected = [[t, h, w] for t in range(2) for h in range(3) for w in range(5)]
    assert Layout((2, 3, 5)).coordinates().tolist() == expected
    assert coordinates(torch.tensor([29, 5]), (2, 3, 5)).tolist() == [[1, 2, 4], [0, 1, 0]]


def test_a_list_from_json_is_a_grid() -> None:
    assert Layout([1, 2, 3]) == Layout((1, 2, 3))  # type: ignore[arg-type]
    assert hash(Layout([1, 2, 3])) == hash(Layout((1, 2, 3)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"grid": (4, 4)}, ValueError, r"grid: wanted \(frames, height, width\), got 2 numbers; write a picture as"),
        ({"grid": 5}, TypeError, r"grid: wanted \(frames, height, width\), got int 5"),
        ({"grid": (4, 0, 4)}, ValueError, "grid height: wanted at least 1, got 0"),
        ({"grid": (4, 4, 2.5)}, TypeError, "grid width: wanted an int, got float 2.5"),
        ({"grid": (1, 1, True)}, TypeError, "grid width: wanted an int, got bool True"),
        ({"grid": (1, 1, 1), "before": -1}, ValueError, "before: wanted at least 0, got -1"),
        ({"grid": (1, 1, 1), "after": "2"}, TypeError, "after: wanted an int, got str '2'"),
    ],
)
def test_errors(arguments: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Layout(**arguments)
