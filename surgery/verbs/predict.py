"""Monte Carlo prediction: many forwards with masks, and what they say of the uncertainty."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..base.journal import Changes, restoring
from ..modules.own_generator import own_generators
from ..modules.places import Place, places, product_site
from ..modules.state import Group
from ..ops.random import default_generators
from ..spec.config import Sampling
from ..spec.errors import NotOperatedError, SurgeryError

ROWS = 256
"""Default of `batch_size`: rows that run together."""

FEW = 8
"""Fewer samples run one after the other: to find out whether they may run together takes four."""


@dataclass(frozen=True)
class MCPrediction:
    """What `mc_predict` found. `batch` is that of the inputs; logarithms are natural."""

    mean: Tensor
    """Mean of the outputs over the samples: the shape of the model's output."""

    variance: Tensor
    """Unbiased variance of the outputs over the samples, entry by entry: the same shape."""

    probabilities: Tensor | None
    """Mean of the class probabilities, the same shape; for one logit, of its class. None without
    classes."""

    entropy: Tensor | None
    """Predictive entropy, that of `probabilities`: total uncertainty. The output's shape without the
    class dimension."""

    mutual_information: Tensor | None
    """Between prediction and weights (BALD, Houlsby et al. 2011): the part of the entropy that comes
    from not knowing the weights. The shape of `entropy`."""

    samples: int
    """Number of forwards for each input."""


def mc_predict(
    model: nn.Module,
    inputs: Any,
    samples: int = 32,
    *,
    seed: int | None = None,
    class_dim: int | None = -1,
    batch_size: int = ROWS,
) -> MCPrediction:
    """Predict by dropping at inference, `samples` times (MC-DropConnect).

    Everything but DropConnect runs as in `eval()`. Each sample has masks of its own: one for the whole
    batch where `sampling="batch"`, one for each example otherwise. Samples run together, as one bigger
    batch, where every site is the weight of a linear layer and two forwards without masks show that
    the model keeps the samples of such a batch apart. It does not if time comes first in its input
    (samples would run on into each other) or if it mixes the batch; then, and if that fails, samples
    run one after the other.

    Args:
        model: operated. Its modes, training flags and gradients are as before afterwards.
        inputs: a tensor (batch first), a tuple or list of positional arguments, or a mapping of
            keyword arguments. Every tensor has the same first size, that of the output too, or no
            dimension. Where that is the time, rows are time steps.
        samples: at least 2.
        seed: seeds the draws, and leaves torch's generators as they were. None draws from them. The
            same seed and `batch_size` give the same result.
        class_dim: dimension of the classes in the output, for `probabilities`, `entropy` and
            `mutual_information`; a size of 1 means one logit of a yes-or-no question. None if the
            output holds no logits.
        batch_size: about how many rows run together; halved when memory runs out.

    Raises:
        NotOperatedError: no DropConnect is in place.
        SurgeryError: leading sizes of the inputs differ, or the output is neither a tensor nor has
            `logits`, nor is a tuple that starts with a tensor.
        RuntimeError: masks are held.
        ValueError: an argument is out of range.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 2:
        raise ValueError(f"samples must be at least 2; got {samples!r}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be positive; got {batch_size!r}")
    sampled = _Sampled(model, inputs)
    total = _Totals(class_dim)
    run = partial(sampled.run, samples, batch_size, total)
    _while_sampling(model, sampled.places, seed, run)
    return total.result()


class _Sampled:
    """A model and the inputs that every sample gets."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self._model = model
        self.places = list(places(model))
        if not self.places:
            raise NotOperatedError.none_in(model, " to sample")
        if any(place.state.held_key is not None for place in self.places):
            raise RuntimeError(
                "masks are held, so every sample would be the same; leave hold_masks first"
            )
        self._args, self._kwargs = _arguments(inputs)
        self._rows = _batch_of(self._args, self._kwargs)

    def run(self, samples: int, batch_size: int, total: _Totals) -> None:
        """Add the outputs of so many samples to `total`, about `batch_size` rows at a time."""
        together = max(1, batch_size // self._rows)
        group = together > 1 and samples >= FEW and self._keeps_repetitions_apart()
        together, left = together if group else 1, samples
        while left:
            count = min(together, left)
            try:
                outputs = self._grouped(count) if group else self._alone()
            except torch.OutOfMemoryError:
                if count == 1:
                    raise
                together = count // 2
                continue
            except Exception:  # memory of the CPU, a size that is a limit
                if not group:
                    raise
                together, group = 1, False
                continue
            total.add(outputs.reshape(count, self._rows, *outputs.shape[1:]))
            left -= count

    def _keeps_repetitions_apart(self) -> bool:
        """Whether a batch of several repetitions, each with its own masks, gives what they give alone.

        One repetition alone, and three of which the outer two are tilted otherwise: the one in the
        middle must come out the same. It does not if time comes first (it runs on from one to the
        next), if the model mixes the batch, or if what it returns lies elsewhere.
        """
        if not all(_can_group(place) for place in self.places):
            return False
        try:
            alone, among = (self._grouped(count, probing=True) for count in (1, 3))
        except Exception:  # a size that was fixed, a nested input, memory
            return False
        middle = among[self._rows : 2 * self._rows]
        return _close(alone, middle, _precision(self.places, alone))

    def _alone(self) -> Tensor:
        """The outputs of one sample, (rows, ...)."""
        return _logits(self._model(*self._args, **self._kwargs), self._rows)

    def _grouped(self, count: int, probing: bool = False) -> Tensor:
        """The outputs of `count` samples in one batch, (count * rows, ...)."""
        group = Group(count, count * self._rows, probing)
        for place in self.places:
            place.state.group = group
        try:
            outputs = self._model(
                *(_repeated(value, count) for value in self._args),
                **{name: _repeated(value, count) for name, value in self._kwargs.items()},
            )
        finally:
            for place in self.places:
                place.state.group = None
        return _logits(outputs, group.rows)


def _close(expected: Tensor, given: Tensor, precision: float) -> bool:
    """Whether outputs differ by no more than roundings, each entry by the size that it has over the
    batch: some may be huge (-1e9 for what is masked)."""
    if expected.shape != given.shape or expected.dtype != given.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(expected, given)
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


def _repeated(value: Any, count: int) -> Any:
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    return value.repeat(count, *(1 for _ in value.shape[1:]))


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def _batch_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The leading size that all input tensors have."""
    named = {**{f"inputs[{i}]": value for i, value in enumerate(args)}, **kwargs}
    shapes = {k: tuple(v.shape) for k, v in named.items() if isinstance(v, Tensor) and v.ndim}
    sizes = {shape[0] for shape in shapes.values()}
    if len(sizes) != 1 or 0 in sizes:
        described = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "no tensor"
        raise SurgeryError(
            f"every input tensor must have the batch as its first dimension; got {described}. Move the "
            "batch there, or expand what all examples share"
        )
    return sizes.pop()


def _logits(outputs: Any, rows: int) -> Tensor:
    get = outputs.get if isinstance(outputs, Mapping) else partial(getattr, outputs)
    logits = get("logits", None)
    if logits is None:
        logits = outputs[0] if isinstance(outputs, (tuple, list)) and outputs else outputs
    if not isinstance(logits, Tensor):
        raise SurgeryError(
            f"the model returned a {type(outputs).__name__}; mc_predict needs a tensor, an output with "
            "logits, or a tuple that starts with a tensor. Wrap the model so that it returns one"
        )
    if logits.ndim == 0 or logits.shape[0] != rows:
        raise SurgeryError(
            f"the output has shape {tuple(logits.shape)}, but the batch has {rows} rows; it must "
            "come first"
        )
    return logits


def _while_sampling(
    model: nn.Module, at: list[Place], seed: int | None, call: Callable[[], None]
) -> None:
    """`call()` in `eval()` with every site dropping, without gradients and, with a seed, with torch's
    generators seeded; afterwards all that is as it was."""
    now, before = Changes(), Changes()
    for module in model.modules():
        now.put(module.__dict__, {"training": False})
        before.put(module.__dict__, {"training": module.training})
    for state in (place.state for place in at):
        now.put(state.__dict__, state.with_inference("sample", None))
        kept = state.with_inference(state.inference, state.samples)
        before.put(state.__dict__, {**kept, "group": None})
    gradients = torch.is_grad_enabled()
    generators: list[torch.Generator] = []
    if seed is not None:
        generators = [*default_generators(place.raw for place in at), *own_generators(model)]
    random = [generator.get_state() for generator in generators]

    def put_back() -> None:
        before.make()
        torch.set_grad_enabled(gradients)
        for generator, state in zip(generators, random):
            generator.set_state(state)

    def sample() -> None:
        now.make()
        torch.set_grad_enabled(False)
        for generator in generators:
            generator.manual_seed(seed)
        call()

    restoring(put_back, sample)


class _Totals:
    """Sums over samples, so that outputs need not be kept."""

    def __init__(self, class_dim: int | None) -> None:
        self.class_dim = class_dim
        self.count = 0
        self.mean: Any = 0.0
        self.squares: Any = 0.0
        """Sum of squared deviations from the mean (Chan, Golub and LeVeque 1983)."""
        self.probabilities: Any = 0.0
        self.entropies: Any = 0.0

    def add(self, outputs: Tensor) -> None:
        """`outputs` is (samples, batch, ...)."""
        outputs = outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs
        n, mean = len(outputs), outputs.mean(0)
        total = self.count + n
        gap = mean - self.mean
        self.squares = (
            self.squares + ((outputs - mean) ** 2).sum(0) + gap**2 * (self.count * n / total)
        )
        self.mean = self.mean + gap * (n / total)
        self.count = total
        if self.class_dim is not None:
            log_p = self._log_probabilities(outputs)
            self.probabilities = self.probabilities + log_p.exp().sum(0)
            self.entropies = self.entropies + _entropy(log_p, self._dim(outputs)).sum(0)

    def _dim(self, outputs: Tensor) -> int:
        """The class dimension of stacked outputs, counted from the end."""
        assert self.class_dim is not None
        ndim = outputs.ndim - 1
        dim = self.class_dim if self.class_dim < 0 else self.class_dim - ndim
        if not 1 - ndim <= dim <= -1:
            raise ValueError(
                f"class_dim={self.class_dim} is no dimension after the batch of an output of shape "
                f"{tuple(outputs.shape[1:])}; give that of the classes, or None"
            )
        return dim

    def _log_probabilities(self, outputs: Tensor) -> Tensor:
        dim = self._dim(outputs)
        if outputs.shape[dim] == 1:  # one logit: the other class has logit 0
            outputs = torch.cat([torch.zeros_like(outputs), outputs], dim)
        return outputs.log_softmax(dim)

    def result(self) -> MCPrediction:
        variance = self.squares / (self.count - 1)
        if self.class_dim is None:
            return MCPrediction(self.mean, variance, None, None, None, self.count)
        dim = self._dim(self.mean[None])
        probabilities = self.probabilities / self.count
        entropy = _entropy(probabilities.log(), dim)
        information = (entropy - self.entropies / self.count).clamp_min(0)
        if self.mean.shape[dim] == 1:
            probabilities = probabilities.narrow(dim, 1, 1)
        return MCPrediction(self.mean, variance, probabilities, entropy, information, self.count)


def _entropy(log_p: Tensor, dim: int) -> Tensor:
    entropy: Tensor = torch.special.entr(log_p.exp()).sum(dim)
    return entropy
