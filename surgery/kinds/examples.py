"""Where the examples lie in the input of a product: one rule for plans and for forwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Shape = tuple[int, ...]


def where_examples_lie(
    shape: Shape, example_dim: int | Literal["all"], features: int, given: Sequence[Shape]
) -> tuple[int | None, str | None]:
    """The dimension of the examples, or why there is none.

    Args:
        shape: of what the product acts on.
        example_dim: of the config. `"all"` is every row; of an input without rows, the first dimension.
        features: `Product.features`: the place of the features in `shape`, from the end.
        given: shapes of the tensors that the outermost forward got, if they are known. Examples lie in
            the first dimension there, or where they lie in `shape`.

    Returns:
        the dimension, counted from the start (None for every row), and None; or None and the reason,
        with what to do.
    """
    leading = len(shape) + features
    if example_dim == "all" and (leading or features == -1):
        return None, None
    wanted = 0 if example_dim == "all" else example_dim
    dim = wanted if wanted >= 0 else len(shape) + wanted
    if not 0 <= dim < leading:
        return None, (
            f"sampling='example' finds examples along dimension {wanted} of its input, which has "
            f"shape {shape}: no such dimension comes before the features. Give it a batch, or set "
            "example_dim"
        )
    sizes = {size for one in given for size in (*one[:1], *one[dim : dim + 1])}
    if sizes and shape[dim] not in sizes:
        return None, (
            f"sampling='example' takes dimension {wanted} of its input for the examples; it has size "
            f"{shape[dim]} (shape {shape}), but the model's input has shape "
            f"{', '.join(map(str, given))}. Set example_dim ('all': a mask for every row), or exclude "
            "this site"
        )
    return dim, None
