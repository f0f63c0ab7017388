"""Monte Carlo prediction: many forwards with masks, and what they say of the uncertainty."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from ..modules.own_generator import own_generators
from .arguments import Forward
from .bake import check_seed
from .batches import Batch, Select, batches_of, is_loader
from .prediction import MCPrediction, Totals, joined
from .sampling import Sampler, while_dropping

ROWS = 256
"""Default of `batch_size`: rows that run together."""


def mc_predict(
    model: nn.Module,
    inputs: Any,
    samples: int = 32,
    *,
    seed: int | None = None,
    class_dim: int | None = -1,
    batch_size: int = ROWS,
    output: Select = None,
    progress: bool = False,
) -> MCPrediction:
    """Predict by dropping at inference, `samples` times (MC-DropConnect).

    Everything but DropConnect runs as in `eval()`. Each sample has masks of its own: one for the whole
    batch where `sampling="batch"`, one for each example otherwise. Samples run together, as one bigger
    batch, where every site is the weight of a linear layer and two forwards without masks show that
    the model keeps the samples of such a batch apart. It does not if time comes first in its input
    (samples would run on into each other) or if it mixes the batch; then, and if that fails, samples
    run one after the other. Sums over the samples are kept, and not their outputs.

    Args:
        model: operated. Its modes, training flags and gradients are as before afterwards.
        inputs: one batch, or a loader of batches. A batch is a tensor (batch first), a tuple or list
            of positional arguments, or a mapping of keyword arguments; these may hold tensors in
            nested containers. Every tensor has the same first size, that of the output too, or no
            dimension. Where that is the time, rows are time steps. A loader is any other iterable, as
            a `DataLoader`: its batches go where the model is, and what is gathered of them lies on the
            CPU. Of its tuples the first parts are the arguments that the forward cannot do without,
            at least one, and the others targets; one that might be an optional argument (a tensor of
            two dimensions, say) is an error. Of its mappings `labels`, `label`, `label_ids` and names
            that the forward does not know are left out. Where every site has `sampling="batch"`, all
            batches get the same masks: then it is the same weights that predict the whole data set,
            in whatever order it comes.
        samples: at least 2.
        seed: as for `torch.manual_seed`; seeds the draws, and leaves torch's generators as they were.
            None draws from them. The same seed and `batch_size` give the same result. With a loader,
            rows in a batch more or less change nothing but roundings where samples run one by one
            (`batch_size=1` does that), if each has one mask.
        class_dim: dimension of the classes in the output, for `probabilities`, `entropy` and
            `mutual_information`; a size of 1 means one logit of a yes-or-no question. None if the
            output holds no logits.
        batch_size: about how many rows run together; halved when memory runs out.
        output: what of the model's output is looked at: the name of a part of it
            (`"last_hidden_state"`), or a function that takes it and returns a tensor. None is
            `logits`, or where there are none the first tensor of real numbers with one row for each
            example, also in nested tuples, mappings and dataclasses.
        progress: show a bar over the batches of a loader (needs tqdm).

    Raises:
        NotOperatedError: no DropConnect is in place.
        SurgeryError: the forward does not take the inputs, their first sizes differ, the output has no
            such tensor (integers and truth values are none), or batches of a loader have outputs of
            different shapes, or there is none.
        RuntimeError: masks are held.
        ValueError, TypeError: an argument is out of range, or the seed is no integer.
        ImportError: `progress=True` without tqdm.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 2:
        raise ValueError(f"samples must be at least 2; got {samples!r}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be positive; got {batch_size!r}")
    if seed is not None and not -(2**63) <= check_seed(seed) < 2**64:
        raise ValueError(f"seed must lie in [-2**63, 2**64), as for torch.manual_seed; got {seed}")
    sampler, forward = Sampler(model, samples, batch_size, output), Forward(model)
    if not is_loader(inputs):
        return _of_batch(sampler, model, Batch.of(forward.given(inputs)), seed, class_dim)
    loader = _shown(inputs) if progress else inputs
    batches, seeds = batches_of(loader, forward, sampler.device), _seeds(model, sampler, seed)
    return joined(
        [
            _of_batch(sampler, model, batch, its, class_dim).cpu()
            for batch, its in zip(batches, seeds)
        ]
    )


def _of_batch(
    sampler: Sampler, model: nn.Module, batch: Batch, seed: int | None, class_dim: int | None
) -> MCPrediction:
    total = Totals(class_dim)
    while_dropping(model, sampler.places, "sample", seed, partial(sampler.run, batch, total.add))
    return total.result()


def _seeds(model: nn.Module, sampler: Sampler, seed: int | None) -> Iterator[int]:
    """A seed for each batch of a loader: the same where all rows share the masks of a sample."""
    if seed is None:
        own = next(iter(own_generators(model)), None)
        device = None if own is None else own.device
        seed = int(torch.randint(2**62, (), generator=own, device=device))
    step = 0 if sampler.has_one_mask_a_sample else 1
    return (
        one % 2**64 for one in itertools.count(seed, step)
    )  # a negative one is the same to torch


def _shown(loader: Iterable[Any]) -> Iterable[Any]:
    """The same batches, under a bar."""
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from error
    shown: Iterable[Any] = tqdm(loader, desc="mc_predict", unit="batch")
    return shown
