"""Forwards that drop in evaluation: several samples in one batch, or one after the other."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..base.journal import Changes, restoring
from ..modules.own_generator import own_generators
from ..modules.places import Place, places, product_site
from ..modules.state import Group
from ..ops.random import default_generators
from ..spec.config import Inference, Sampling
from ..spec.errors import NotOperatedError
from ..torch_private.modes import set_gradients, switches_back
from .batches import Batch, Select, tensor_of

FEW = 8
"""Fewer samples run one after the other: to find out whether they may run together takes four."""


class Sampler:
    """A model whose outputs are sampled."""

    def __init__(self, model: nn.Module, samples: int, batch_size: int, select: Select) -> None:
        self._model, self._samples, self._select = model, samples, select
        self._batch_size = batch_size
        self._together: int | None = None
        """Samples that run in one batch: as many for each batch, which so have the same masks."""
        self._apart: dict[tuple[Any, ...], bool] = {}
        """Whether the model keeps repetitions apart, by the shapes of a batch."""
        self.places = list(places(model))
        if not self.places:
            raise NotOperatedError.none_in(model, " to sample")
        if any(place.state.held_key is not None for place in self.places):
            raise RuntimeError(
                "masks are held, so every sample would be the same; leave hold_masks first"
            )

    @property
    def device(self) -> torch.device:
        """Where the model is, as far as one device tells."""
        device: torch.device = self.places[0].raw.device
        return device

    @property
    def has_one_mask_a_sample(self) -> bool:
        """Whether a sample has the same masks for every row of every batch."""
        return all(place.state.sampling == "batch" for place in self.places)

    def run(self, batch: Batch, add: Callable[[Tensor], None]) -> None:
        """Give the outputs for one batch to `add`, as (samples, rows, ...), some samples at a time."""
        if self._together is None:
            self._together = max(1, self._batch_size // batch.rows)
        group = self._together > 1 and self._samples >= FEW and self._keeps_apart(batch)
        together, left = self._together if group else 1, self._samples
        while left:
            count = min(together, left)
            try:
                outputs = self._grouped(batch, count) if group else self._alone(batch)
            except torch.OutOfMemoryError:
                if count == 1:
                    raise
                together = self._together = count // 2
                continue
            except Exception:  # memory of the CPU, a size that is a limit
                if not group:
                    raise
                together, group = 1, False
                continue
            add(outputs.reshape(count, batch.rows, *outputs.shape[1:]))
            left -= count

    def _keeps_apart(self, batch: Batch) -> bool:
        """`_keeps_repetitions_apart`, found out once for each shape of a batch."""
        shapes = batch.shapes()
        if shapes not in self._apart:
            self._apart[shapes] = self._keeps_repetitions_apart(batch)
        return self._apart[shapes]

    def _keeps_repetitions_apart(self, batch: Batch) -> bool:
        """Whether a batch of several repetitions, each with its own masks, gives what they give alone.

        One repetition alone, and three of which the outer two are tilted otherwise: the one in the
        middle must come out the same. It does not if time comes first (it runs on from one to the
        next), if the model mixes the batch, or if what it returns lies elsewhere.
        """
        if not all(_can_group(place) for place in self.places):
            return False
        try:
            alone, among = (self._grouped(batch, count, probing=True) for count in (1, 3))
        except Exception:  # a size that was fixed, a nested input, memory
            return False
        middle = among[batch.rows : 2 * batch.rows]
        return _close(alone, middle, _precision(self.places, alone))

    def _alone(self, batch: Batch) -> Tensor:
        """The outputs of one sample, (rows, ...)."""
        return tensor_of(batch.call(self._model), batch.rows, self._select)

    def _grouped(self, batch: Batch, count: int, probing: bool = False) -> Tensor:
        """The outputs of `count` samples in one batch, (count * rows, ...)."""
        group = Group(count, count * batch.rows, probing)
        for place in self.places:
            place.state.group = group
        try:
            outputs = batch.call(self._model, count)
        finally:
            for place in self.places:
                place.state.group = None
        return tensor_of(outputs, group.rows, self._select)


def _close(expected: Tensor, given: Tensor, precision: float) -> bool:
    """Whether outputs differ by no more than roundings, each entry by the size that it has over the
    batch: some may be huge (-1e9 for what is masked)."""
    if expected.shape != given.shape or expected.dtype != given.dtype:
        return False
    finite = expected.isfinite()
    if not torch.allclose(expected[~finite], given[~finite], equal_nan=True):
        return False
    wide = torch.promote_types(expected.dtype, torch.float32)
    one, other = (torch.where(finite, value, 0).to(wide) for value in (expected, given))
    size = one.abs().amax(0)
    nonzero = size[size > 0]
    if nonzero.numel():  # an entry may be near zero by chance
        size = size.maximum(nonzero.kthvalue(1 + nonzero.numel() // 10).values)
    return bool(((one - other).abs() <= min(math.sqrt(precision), 1 / 32) * size).all())


def _precision(at: list[Place], outputs: Tensor) -> float:
    """The coarsest relative rounding that outputs may have been computed with."""
    device = outputs.device.type
    dtypes = {outputs.dtype, *(place.raw.dtype for place in at)}
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    roundings = [torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point]
    return max(*roundings, {"highest": 0.0, "high": 2.0**-10}.get(_matmul_precision(), 2.0**-8))


def _matmul_precision() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.9 asks for another way to ask, which is newer
        return torch.get_float32_matmul_precision()


def _can_group(place: Place) -> bool:
    """Whether a site can have several masks in one forward."""
    state, by = place.state, product_site(place)
    if state.p == 0.0:
        return True
    if by is None or by.p == 0.0:
        return False
    sampling: Sampling = "example" if by.sampling == "batch" else by.sampling
    return by.refused(sampling, "sample") is None


def while_dropping(
    model: nn.Module,
    at: list[Place],
    inference: Inference,
    seed: int | None,
    call: Callable[[], None],
    gradients: bool = False,
) -> None:
    """`call()` in `eval()` with this inference of every site, with or without gradients and, with a
    seed, with torch's generators seeded; afterwards all that is as it was."""
    now, before = Changes(), Changes()
    for module in model.modules():
        now.put(module.__dict__, {"training": False})
        before.put(module.__dict__, {"training": module.training})
    for state in (place.state for place in at):
        now.put(state.__dict__, state.with_inference(inference, None))
        kept = state.with_inference(state.inference, state.samples)
        before.put(state.__dict__, {**kept, "group": None})
    switches = switches_back()
    generators: list[torch.Generator] = []
    if seed is not None:
        generators = [*default_generators(place.raw for place in at), *own_generators(model)]
    random = [generator.get_state() for generator in generators]

    def put_back() -> None:
        before.make()
        switches()
        for generator, state in zip(generators, random):
            generator.set_state(state)

    def sample() -> None:
        now.make()
        set_gradients(gradients)
        if seed is not None:
            for generator in generators:
                generator.manual_seed(seed)
        call()

    restoring(put_back, sample)
