"""Products of input and weight in the modes that no masked weight can serve.

A mask for each example, noise on each pre-activation, and moments cannot be had by handing a masked
weight to the forward of a module. They replace the product that the forward computes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..kinds.examples import where_examples_lie
from ..kinds.product import LINEAR_PRODUCT, Product
from ..moments import Gaussian, Points, Source, points_of_two
from ..moments.scope import in_scope, scope_shapes, settle
from ..ops import Law, Layout, drop_weight
from ..ops.hash import Key
from ..ops.ordinary import is_dense
from ..ops.part import Part, part_of
from ..ops.part_mask import is_sharded, local_anchor
from ..torch_private.tracing import is_graphed
from ..travel import ALONE, Numbers, Run, Site, Travelling, running, site_value
from ..travel.state import apart, fixed
from .cut import Cut
from .masking import Operand, check_anchor, draw_keys
from .state import NotGrouped, SiteState, refusal_to_cut


def replaced_product(states: Collection[SiteState], training: bool) -> tuple[SiteState, str] | None:
    """Whether one call of a module or node has its product replaced.

    Args:
        states: of the module or node.
        training: whether it is in training.

    Returns:
        the weight of the product, and the mode: of the weight, or of its bias where that alone has a p.
        None: the call is computed as ever, with masked weights or plain ones.
    """
    weight = next((state for state in states if state.product is not None), None)
    if weight is None:
        return None
    for state in states:
        mode = state.mode(training)
        if mode is not None and mode != "batch":
            return weight, mode
    return None


def drops_in_product(state: SiteState | None, training: bool) -> bool:
    """Whether the product itself drops a weight or bias. If not, that is plain, or masked by now."""
    return state is not None and state.mode(training) not in (None, "batch")


def product_forward(
    mode: str, module: nn.Module | None, x: Any, weight: Operand, bias: Operand | Tensor | None
) -> Any:
    """The pre-activation of one call.

    Args:
        mode: as `replaced_product` returns it: `"example"`, `"gaussian"`, `"moments"` or `"probe"`.
        module: what `Product.run` is given; None in a node of a graph.
        x: the input, dense; its features lie along `Product.features`.
        weight: the site whose state has the product.
        bias: a Operand if the product drops it, a Tensor if it is added as it is, or None.

    Returns:
        a Tensor, or for `"moments"` a `Travelling` (with `samples`, a `Gaussian`) where something
        above settles it.

    Raises:
        TypeError: the input is no Tensor.
        RuntimeError: the input is not dense, it has no example dimension, or not the one of the model's
            input; or a weight has not the shape of its anchor.
    """
    state = weight.state
    check_anchor(state, weight.raw, weight.anchor)
    if isinstance(bias, Operand):
        check_anchor(bias.state, bias.raw, bias.anchor)
    if not (mode == "moments" and isinstance(x, Travelling) and state.samples is None):
        x = settle(x)
        if not isinstance(x, Tensor):
            raise TypeError(f"{state.site}: the input must be a Tensor, not {type(x).__name__}")
        check_dense(x, state, mode)
    assert state.product is not None
    call = ProductCall(state.product, module, x, weight, bias)
    if mode == "probe":
        return call.probe()
    if mode == "example":
        return call.per_example()
    if state.part is not None or is_sharded(weight.raw):
        option = "inference='moments'" if mode == "moments" else f"sampling={mode!r}"
        raise RuntimeError(f"{state.site}: {refusal_to_cut(option)}")
    if mode == "gaussian":
        return call.noisy()
    return call.travelling()


def check_dense(x: Tensor, state: SiteState, mode: str) -> None:
    """Raise `RuntimeError` for an input that this mode cannot use."""
    if is_dense(x):
        return
    if state.group is not None:
        raise NotGrouped(state.site)
    option = "inference='moments'" if mode == "moments" else f"sampling={mode!r}"
    other = "inference='mean'" if mode == "moments" else "sampling='batch'"
    form = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
    dense = "x.to_padded_tensor(0.0)" if x.is_nested else "x.to_dense()"
    raise RuntimeError(
        f"{state.site}: {option} needs a dense input, and got a {form} tensor. Give it {dense}, or "
        f"give this site {other}"
    )


class ProductCall(NamedTuple):
    """One call of a product of input and weight. (A NamedTuple, because dynamo traces its methods.)"""

    product: Product
    module: nn.Module | None
    x: Any
    """A Tensor, or a `Travelling` that is one product's pre-activation after another's."""
    weight: Operand
    bias: Operand | Tensor | None

    def dropped_bias(self) -> Operand | None:
        """The bias, if the product drops it."""
        return self.bias if isinstance(self.bias, Operand) else None

    def added(self) -> Tensor | None:
        """The bias, shape (out,), as it is when nothing of it is dropped."""
        return self.bias.raw if isinstance(self.bias, Operand) else self.bias

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product as the original forward computes it."""
        return self.product.run(self.module, x, weight, bias)

    def probe(self) -> Tensor:
        """What the plain weight gives, tilted so that neighbouring repetitions of the batch differ."""
        group, features = self.weight.state.group, self.product.features
        assert group is not None
        leading = self.x.ndim + features
        if leading < 1 or self.weight.state.part is not None or is_sharded(self.weight.raw):
            raise NotGrouped(self.weight.state.site)
        self.check_group()
        u = self.run(self.x, self.weight.raw, self.added())
        factors = tilt(group.samples, u.shape[features], u.device, u.dtype)
        spatial = -1 - features
        factors = factors.view(len(factors), *(1,) * leading, factors.shape[1], *(1,) * spatial)
        tilted = u.reshape(len(factors), len(u) // len(factors), *u.shape[1:]) * factors
        return tilted.view(u.shape)

    def check_group(self) -> None:
        """Raise `NotGrouped` unless the repetitions of a batch lie where the examples do."""
        state = self.weight.state
        if state.group is None:
            return
        first = state.example_dim in ("all", 0, -self.x.ndim)
        if not first or self.x.shape[0] != state.group.rows:
            raise NotGrouped(state.site)

    def noisy(self) -> Tensor:
        """The pre-activation with Gaussian noise of the mean and variance that masks would give."""
        if self.product == LINEAR_PRODUCT and not isinstance(self.bias, Operand):
            raw, state, anchor = self.weight
            law = state.law_for(raw)
            return ops.gaussian_linear(self.x, raw, self.bias, law, state.unit, anchor)
        return ops.gaussian_sample(*self.moments())

    def travelling(self) -> Travelling | Gaussian | Tensor:
        """Mean and variance as one object, or the mean alone where nothing would settle that."""
        run, state = running(), self.weight.state
        alone = run is None and not state.settled and not in_scope()
        if alone and not isinstance(self.x, Travelling):
            return self.moments()[0]
        if state.samples is None or isinstance(self.x, Travelling):
            return self.through(run or ALONE)
        mean, variance = self.moments()
        shared = state.unit in ("input", "tensor")
        points = self.points(mean)
        return Gaussian.of(Source(mean, variance, state.site, state.samples, points, shared))

    def through(
        self, run: Run, shared: Numbers | None = None, of_shared_bias: Numbers | None = None
    ) -> Travelling:
        """Mean, variance and covariances, in a run through a whole model.

        Args:
            shared, of_shared_bias: the numbers of the masks, if other products may use them too.
        """
        raw, state, anchor = self.weight
        with apart():
            law, bias = _law(self.weight), self.dropped_bias()
            weight = fixed(ops.average(raw, anchor, law))
            moving = weight
            if anchor is not None or law.drops_all:
                moving = fixed(_moving(self.weight))
            if self.product.columns:
                same = moving is weight
                weight = weight.t()
                moving = weight if same else moving.t()
            matrix = self.product.is_matrix
            site = Site(
                F.linear if matrix else functools.partial(self.product.run, self.module),
                weight,
                moving,
                law,
                state.unit,
                state.sampling == "batch"
                or (state.example_dim == 0 and state.sampling == "example"),
                matrix,
                self.product.features,
                self.added() if bias is None else ops.average(bias.raw, bias.anchor, _law(bias)),
                None if bias is None else ops.ratio_of(_law(bias)) * _moving(bias).square(),
                shared,
                of_shared_bias,
            )
        return site_value(run, self.x, self.moments_with, self.points_with, site)

    def moments_with(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance for another input."""
        return self._replace(x=x).moments()

    def points_with(self, x: Tensor, mean: Tensor) -> Points | None:
        """What `points` says for another input."""
        return self._replace(x=x).points(mean)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of each pre-activation."""
        (raw, state, anchor), bias = self.weight, self.dropped_bias()
        return ops.moments_of(
            functools.partial(self.product.run, self.module),
            self.x,
            raw,
            self.added(),
            state.law_for(raw),
            state.unit,
            anchor=anchor,
            bias_anchor=None if bias is None else bias.anchor,
            bias_law=None if bias is None else _law(bias),
        )

    def points(self, mean: Tensor) -> Points | None:
        """Where one mask entry multiplies the whole pre-activation: its value if kept, and if dropped,
        each with its probability. None where many entries do."""
        if self.weight.state.unit not in ("output", "tensor"):
            return None
        moving, law, bias = _moving(self.weight), _law(self.weight), self.dropped_bias()
        part = self.run(self.x, moving, None if bias is None else _moving(bias))
        bias_law = law if bias is None else _law(bias)
        if bias_law is not law:
            of_weight = self.run(self.x, moving, None)
            return points_of_two(mean, of_weight, part - of_weight, law.scale, bias_law.scale)
        never = law.scale == 0  # p = 1: the mean is that of dropped weights
        kept = torch.where(never, mean, mean + ops.ratio_of(law) * part).to(mean.dtype)
        dropped = torch.where(never, mean, mean - part).to(mean.dtype)
        probability = torch.where(never, 0, 1 / law.scale)
        return (kept, probability), (dropped, 1 - probability)

    def per_example(self) -> Tensor:
        """The pre-activation with masks of its own for each example."""
        (key,) = draw_keys([self.weight])
        dim = self.example_dim()
        if is_sharded(self.weight.raw):
            return self.in_parts(key, dim)
        return self.by_rows(key, dim) if self.product.is_matrix else self.by_channels(key)

    def in_parts(self, key: Key, dim: int | None) -> Tensor:
        """The same for a weight that processes share: each computes with what it has."""
        raw, state, anchor = self.weight
        if not self.product.is_matrix:
            option = "sampling='example' of a convolution"
            raise RuntimeError(f"{state.site}: {refusal_to_cut(option)}")
        cut = Cut.of(raw, self.product.columns, self.x, dim, state.site)
        part = part_of(raw)
        state.hold(part)
        bias: Operand | Tensor | None = self.bias
        if isinstance(bias, Operand):
            towards = None if bias.anchor is None else cut.bias(bias.anchor)
            bias = Operand(cut.bias(bias.raw), bias.state, towards)
        elif bias is not None:
            bias = cut.bias(bias)
        weight = Operand(cut.weight(raw), state, local_anchor(anchor, part))
        here = self._replace(x=cut.input(self.x), weight=weight, bias=bias)
        u: Tensor = cut.output(here.by_rows(key, dim))
        return u

    def example_dim(self) -> int | None:
        """The dimension of the examples, counted from the start; None for all but the features.

        Raises:
            RuntimeError: the input has none, or not the one of the model's input.
        """
        self.check_group()
        state, features = self.weight.state, self.product.features
        given = () if is_graphed() else scope_shapes()
        dim, problem = where_examples_lie(tuple(self.x.shape), state.example_dim, features, given)
        if problem is not None:
            raise RuntimeError(f"{state.site}: {problem}")
        return dim

    def by_rows(self, key: Key, dim: int | None) -> Tensor:
        """A matrix product. `dim`: of the examples in the input; None for all but the features."""
        matrix, state, anchor = self.weight
        law, part = state.law_for(matrix), state.layout_for(matrix).part
        if part is not None:
            anchor = local_anchor(anchor, part)
        if self.product.columns:
            matrix, anchor = matrix.t(), None if anchor is None else anchor.t()
            part = None if part is None else part.transposed()
        rows, leading = _rows(self.x, dim, _groups(state))
        dropped = isinstance(self.bias, Operand)
        bias = None if dropped else self.added()
        u = ops.example_linear(rows, matrix, key, law, state.unit, anchor, part, bias)
        if dropped:
            added = self.bias_of_examples(key, len(rows), part).to(u.dtype)
            u = u + (added if u.dim() == 2 else added.unsqueeze(1))
        if leading is None:
            return u
        u = u.reshape(*leading, u.shape[-1])
        return u if dim is None else u.movedim(0, dim)

    def by_channels(self, key: Key) -> Tensor:
        """A convolution whose masks lie on the channels of its input or of its output."""
        x, (raw, state, anchor) = self.x, self.weight
        law = state.law_for(raw)
        groups = _groups(state) or len(x)
        own = (0,) if state.unit == "tensor" else (0, 2)

        def kept(values: Tensor) -> Tensor:
            view = (groups, len(values) // max(groups, 1), *values.shape[1:])
            return drop_weight(values, key, law, Layout.shared(view, own))

        if state.unit == "input":
            dropped = kept(x)
            u = self.run(dropped, raw, None)
            if anchor is not None:
                u = u + self.run(x - dropped, anchor, None)
        else:
            u = kept(self.run(x, raw, None))
            if anchor is not None:
                towards = self.run(x, anchor, None)
                u = u + (towards - kept(towards))
        if self.bias is None:
            return u
        added = self.bias_of_examples(key, groups)
        added = added.repeat_interleave(len(x) // max(len(added), 1), 0)
        return u + added.reshape(len(x), u.shape[1], *(1,) * (u.ndim - 2)).to(u.dtype)

    def bias_of_examples(self, key: Key, examples: int, part: Part | None = None) -> Tensor:
        """(examples, out), or (1, out) if it is not dropped. `key`, `part`: of the weight."""
        if not isinstance(self.bias, Operand):
            assert self.bias is not None
            return self.bias.unsqueeze(0)
        raw, state, anchor = self.bias
        (own,) = [key] if state.follows is not None else draw_keys([self.bias])
        law = state.law_for(raw)
        return ops.example_vector(raw, own, law, state.unit, examples, anchor, part)


def tilt(samples: int, features: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(samples, features): 0.5 or 1.5, in one pattern for the sample in the middle and every other
    from there, in another between them. No shift and no norm over the features makes them equal."""
    index = torch.arange(features, device=device)
    one, other = 0.5 + (index // 2 % 2).to(dtype), 1.5 - (index % 2).to(dtype)
    return torch.stack([other if (i - samples // 2) % 2 else one for i in range(samples)])


def _law(operand: Operand) -> Law:
    return operand.state.law_for(operand.raw)


def _moving(operand: Operand) -> Tensor:
    """What a mask multiplies: the difference from the anchor."""
    return operand.raw if operand.anchor is None else operand.raw - operand.anchor


def _groups(state: SiteState) -> int | None:
    """Into how many examples the batch is split, if not one for each row."""
    return None if state.group is None or state.sampling != "batch" else state.group.samples


def _rows(x: Tensor, dim: int | None, groups: int | None) -> tuple[Tensor, tuple[int, ...] | None]:
    """The input as (examples, rows that share a mask, features), or as it is where an example has one
    row, and then None; else its leading sizes with the examples first."""
    if x.dim() == 2 and groups is None:
        return x, None
    features = x.shape[-1]
    if dim is None:
        return x.reshape(math.prod(x.shape[:-1]), features), tuple(x.shape[:-1])
    first = x.movedim(dim, 0)
    examples = first.shape[0] if groups is None else groups
    size = math.prod(first.shape[:-1]) // max(examples, 1)
    return first.reshape(examples, size, features), tuple(first.shape[:-1])
