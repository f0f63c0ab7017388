"""A weight that drops, where a function takes it as an argument.

The forwards of attention, recurrent layers and embeddings hand their weights to functions of torch. So
that moments travel there, a forward reads a `Weight` in the place of its parameter. The functions that
have a rule for it know what it does; any other gets the expectation, and the run notes that.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..moments.scope import Deferred
from ..torch_private.tensors import without_torch_function
from .run import Run
from .value import Travelling, of_expectations


class Weight(Deferred):
    """A weight or bias that varies from mask to mask. One mask serves all functions that read it."""

    run: Run
    like: Tensor | None
    """Has its shape, dtype and device, where it is no tensor that has them itself."""

    def product(self, x: Any, bias: Any) -> Travelling:
        """`x @ weight.T + bias`.

        Args:
            x: (rows, ..., in): a tensor, or a `Travelling`; examples come first.
            bias: (out,): a tensor, a `Weight`, or None.
        """
        raise NotImplementedError

    def added_to(self, value: Any) -> Travelling:
        """A value (rows, ..., out) with this bias added, whose weight does not vary."""
        raise NotImplementedError

    def looked_up(self, index: Tensor) -> Travelling:
        """Rows of the weight, as an embedding looks them up: (rows, ..., out).

        Args:
            index: (rows, ...): examples come first.
        """
        raise NotImplementedError

    def parts(self, count: int) -> list[Weight]:
        """So many parts of it, cut along its rows."""
        raise NotImplementedError

    def __repr__(self, *, tensor_contents: Any = None) -> Any:
        with without_torch_function():
            return f"Weight(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return Travelling.dispatch(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.like, name)


class WeightTensor(Tensor, Weight):
    """The same as a tensor without memory."""

    __torch_function__ = Weight.__torch_function__
    __repr__ = Weight.__repr__  # type: ignore[assignment]
    __torch_dispatch__: Any = classmethod(of_expectations)
