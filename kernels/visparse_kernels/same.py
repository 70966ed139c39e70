"""Same: tensors as keys of caches, by the memory that they lie in."""

from torch import Tensor


class Same:
    """A tensor as a key: equal to others over the same memory. It keeps that alive, so that none can take its place.

    Only for tensors that nobody changes.
    """

    def __init__(self, tensor: Tensor) -> None:
        """Wrap a tensor of any shape and dtype."""
        self.tensor = tensor
        self._key = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device

    def __eq__(self, other: object) -> bool:
        """Whether the other one is a view of the same memory, with the same shape and dtype."""
        return isinstance(other, Same) and self._key == other._key

    def __hash__(self) -> int:
        """By the place in memory."""
        return hash(self._key)
