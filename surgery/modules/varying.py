"""The weight that a forward reads in `inference="moments"`, if it is no product that can be replaced:
forwards of attention, recurrent layers and embeddings hand their weights to functions of torch."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..kinds.product import LINEAR_PRODUCT
from ..ops.part_mask import is_sharded
from ..torch_private.tensors import tensor_without_memory
from ..torch_private.tracing import is_traced
from ..travel import ALONE, Numbers, Run, Travelling, Weight, WeightTensor, running
from ..travel.birth import Birth, OfOutputs, OfWords
from ..travel.state import apart, certain
from ..travel.value import expected
from .masking import Operand, check_anchor
from .product_forward import ProductCall, check_dense
from .state import refusal_to_cut


class Varying(Weight):
    """A dropped weight, bias, or part of one."""

    operand: Operand
    masks: dict[int | None, Numbers]
    """The numbers of the masks of one forward: of each part, or of all where the whole weight has one
    mask entry."""
    part: int | None
    """Which one it is."""

    @staticmethod
    def of(operand: Operand) -> Varying:
        """The weight of one forward.

        Raises:
            RuntimeError: it has not the shape of its anchor, or processes share it.
        """
        raw, state, anchor = operand
        check_anchor(state, raw, anchor)
        if state.part is not None or is_sharded(raw):
            option = "inference='moments'"
            raise RuntimeError(f"{state.site}: {refusal_to_cut(option)}")
        return _made(operand, {}, None)

    @property
    def run(self) -> Run:  # type: ignore[override]
        return running() or ALONE

    def shared(self) -> Numbers | None:
        """The numbers of its mask; None if nobody follows them."""
        run = self.run
        if not run.follows:
            return None
        part = None if self.operand.state.unit == "tensor" else self.part
        if part not in self.masks:
            self.masks[part] = run.numbers()
        return self.masks[part]

    def expectation(self) -> Tensor:
        raw, state, anchor = self.operand
        return ops.average(raw, anchor, state.law_for(raw))

    def parts(self, count: int) -> list[Weight]:
        raw, state, anchor = self.operand
        anchors = [None] * count if anchor is None else anchor.chunk(count)
        pairs = enumerate(zip(raw.chunk(count), anchors))
        return [_made(Operand(one, state, its), self.masks, i) for i, (one, its) in pairs]

    def product(self, x: Any, bias: Any) -> Travelling:
        state = self.operand.state
        if not isinstance(x, Travelling):
            x = expected(x)
            check_dense(x, state, "moments")
        of_bias = bias.operand if isinstance(bias, Varying) else bias
        call = ProductCall(LINEAR_PRODUCT, None, x, self.operand, of_bias)
        return call.through(
            self.run, self.shared(), bias.shared() if isinstance(bias, Varying) else None
        )

    def looked_up(self, index: Tensor) -> Travelling:
        raw, state, anchor = self.operand
        run, law = self.run, state.law_for(raw)
        found = certain(F.embedding(index, self.expectation()))
        with apart():
            moving = F.embedding(index, raw if anchor is None else raw - anchor)
            ratio = ops.ratio_of(law)
            effect = ratio.sqrt() * moving.to(found.variance.dtype)
        birth: Birth
        if state.unit in ("output", "tensor"):
            birth = OfOutputs(effect, (-1,) if state.unit == "output" else (), ratio)
        else:
            birth = OfWords(effect, index, state.unit == "input", ratio)
        return Travelling.of(run, run.born(found, birth))

    def added_to(self, value: Any) -> Travelling:
        raw, state, anchor = self.operand
        run, law, shared = self.run, state.law_for(raw), self.shared()
        travelling: Any = Travelling.made_of(run, value)
        total = travelling + self.expectation()
        with apart():
            moving = raw if anchor is None else raw - anchor
            ratio = ops.ratio_of(law)
            effect = ratio.sqrt() * moving.to(total.state().variance.dtype)
            effect = effect.expand(total.shape)
        own = () if state.unit == "tensor" else (-1,)
        return Travelling.of(run, run.born(total.state(), OfOutputs(effect, own, ratio, shared)))


class VaryingTensor(WeightTensor, Varying):
    """The same as a tensor without memory."""

    __torch_function__ = Weight.__torch_function__
    __repr__ = Weight.__repr__  # type: ignore[assignment]


def _made(operand: Operand, masks: dict[int | None, Numbers], part: int | None) -> Varying:
    value: Any
    if is_traced():
        value, value.like = Varying(), operand.raw
    else:
        value, value.like = tensor_without_memory(VaryingTensor, operand.raw), None
    value.operand, value.masks, value.part = operand, masks, part
    return value  # type: ignore[no-any-return]
