"""What a cached residual costs in memory, by storage, and which storage fits a budget."""

from dataclasses import dataclass

from visparse.compensation.residual_groups import count_groups
from visparse.layout import Grid, Layout

STORAGES = ("full", "fp8", "average", "average-fp8", "low-rank", "host")
SCALE_ROWS = 128
DEFAULT_RANK = 16
DEFAULT_BUDGET = 6 * 2**30
# a tile in fp8 always beats a larger tile in 16 bits of the same bytes: the mean loses more than the rounding
_TILES: tuple[Grid, ...] = ((1, 1, 2), (1, 2, 2), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4))


@dataclass(frozen=True)
class StorageChoice:
    """A storage that fits a budget.

    Args:
        storage: name of the storage.
        tile: (frames, height, width) of the groups that share a mean; None where the storage has no groups.
        nbytes: device memory of all residuals together, in bytes.
    """

    storage: str
    tile: Grid | None
    nbytes: int


def check_storage(storage: str) -> None:
    """Raise ValueError where the name of a storage is unknown."""
    if storage not in STORAGES:
        raise ValueError(f"storage: wanted one of {', '.join(STORAGES)}, got {storage!r}; use one of these names")


def storage_bytes(
    storage: str,
    *,
    tokens: int,
    heads: int,
    head_dim: int,
    batch: int = 1,
    dtype_bytes: int = 2,
    groups: int | None = None,
    rank: int = DEFAULT_RANK,
) -> int:
    """Return the device memory of one stored residual, without making it; equal to `Stored.nbytes`.

    Args:
        storage: "full", "fp8", "average", "average-fp8", "low-rank" or "host".
        tokens: tokens of the sequence.
        heads: heads of the layer.
        head_dim: numbers per head.
        batch: rows of the batch.
        dtype_bytes: bytes of one number of the residual.
        groups: number of groups (`TokenGroups.count`); needed for the two averages. The tables of the groups, 8 bytes a
            token, are shared by all layers and not counted.
        rank: rank of "low-rank".

    Returns:
        Bytes. "host" is 0: it takes what "full" does in pinned host memory, and as much again on the device from
        `prefetch` to `add_to`. Where the residual lies on a CPU, "host" is "full".

    Raises:
        ValueError: an unknown storage, or an average without groups.
    """
    check_storage(storage)
    if storage == "host":
        return 0
    if storage == "low-rank":
        return batch * heads * (tokens + head_dim) * rank * dtype_bytes
    rows = tokens
    if storage.startswith("average"):
        if groups is None:
            raise ValueError(f"groups: wanted the number of groups for storage {storage!r}, got None; see count_groups")
        rows = groups
    if storage.endswith("fp8"):
        return batch * heads * (rows * head_dim + 4 * -(-rows // SCALE_ROWS))
    return batch * heads * rows * head_dim * dtype_bytes


def choose_storage(
    layout: Layout,
    *,
    layers: int,
    heads: int,
    head_dim: int,
    branches: int = 2,
    batch: int = 1,
    dtype_bytes: int = 2,
    budget_bytes: int = DEFAULT_BUDGET,
) -> StorageChoice:
    """Return the most exact storage that keeps the residuals of all branches and layers within a budget.

    Tried in this order: full; fp8; group means in fp8 over tiles of 2, 4, 8, 16, 32 and 64 tokens. "low-rank" and
    "host" are never chosen: how exact the first is depends on the content, and how fast the second is on the machine.

    Args:
        layout: grid and extra tokens.
        layers: layers that keep a residual.
        heads: heads per layer.
        head_dim: numbers per head.
        branches: passes of guidance that keep their own.
        batch: rows of the batch.
        dtype_bytes: bytes of one number of the residual.
        budget_bytes: device memory for all of them, in bytes; 6 GiB unless said otherwise.

    Raises:
        ValueError: not even the smallest fits.
    """

    def whole(storage: str, groups: int | None = None) -> int:
        one = storage_bytes(
            storage,
            tokens=layout.tokens,
            heads=heads,
            head_dim=head_dim,
            batch=batch,
            dtype_bytes=dtype_bytes,
            groups=groups,
        )
        return branches * layers * one

    choices = [StorageChoice(name, None, whole(name)) for name in ("full", "fp8")]
    choices += [StorageChoice("average-fp8", tile, whole("average-fp8", count_groups(layout, tile))) for tile in _TILES]
    for choice in choices:
        if choice.nbytes <= budget_bytes:
            return choice
    raise ValueError(
        f"budget_bytes: wanted at least {choices[-1].nbytes} (average-fp8 over tiles of {_TILES[-1]}), got "
        f"{budget_bytes}; raise it, keep fewer layers, or take storage 'host' with {choices[0].nbytes} bytes of "
        "pinned host memory"
    )
