"""Activation checkpointing recomputes with the same masks, and what it discards stays discarded."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from surgery import apply_dropconnect, hold_masks, set_p

from ..steps import assert_same, gradients, rounding_without_grad, step, step_gradients
from ..zoo.subjects import BY_NAME, Subject


class Between(nn.Module):
    """The subject between two layers, so that gradients flow in, through and out of it."""

    def __init__(self, inner: nn.Module, size: int, reentrant: bool | None) -> None:
        super().__init__()
        self.before = nn.Linear(size, size) if size else nn.Identity()
        self.inner = inner
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        if self.reentrant is None:
            return self.inner(x)
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


WAYS = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])


@WAYS
@pytest.mark.parametrize("toward", ["zero", "pretrained"])
def test_gradients_are_bit_equal(subject: Subject, reentrant: bool, toward: str) -> None:
    if subject.words and reentrant:
        pytest.skip("a reentrant checkpoint needs an input that requires grad; ids have none")
    x = subject.inputs()
    results = []
    for way in (None, reentrant):
        torch.manual_seed(2)
        model = Between(subject.moved(toward=toward), 0 if subject.words else x.shape[-1], way)
        out = step(model, x)
        results.append({**gradients(model), "output": out})
    # a reentrant checkpoint runs its first forward without gradients
    assert_same(results[1], results[0], rounding_without_grad(subject) if reentrant else 0.0)


@WAYS
def test_nested_and_sequential(reentrant: bool) -> None:
    """Checkpoints inside a checkpoint, and segments, each redraw what they drew."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6) for _ in range(4)]
    model = apply_dropconnect(nn.Sequential(*layers), "*", p=0.5)
    x = torch.randn(3, 6, requires_grad=True)
    expected = step_gradients(model, x)

    def segments(x: Tensor) -> Tensor:
        return checkpoint_sequential(model, 2, x, use_reentrant=reentrant)

    def nested(x: Tensor) -> Tensor:
        def half(x: Tensor) -> Tensor:
            return model[1](checkpoint(model[0], x, use_reentrant=reentrant))

        x = checkpoint(half, x, use_reentrant=reentrant)
        return model[3](model[2](x))

    for run in (segments, nested):
        model.zero_grad()
        out = step(run, x)
        assert_same({**gradients(model), "output": out}, expected)


def test_held_masks() -> None:
    subject = BY_NAME["gru-cell"]
    model, x = subject.operated(), subject.inputs().requires_grad_()

    def run(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False)

    results = []
    for forward in (model, run):
        model.zero_grad()
        torch.manual_seed(7)
        with hold_masks(model):
            out = step(forward, x, seed=None)
        results.append({**gradients(model), "output": out})
    assert_same(results[1], results[0])


class Watched(nn.Module):
    """Square: saves its input for backward. Remembers, weakly, what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        y = x + 1
        self.seen.append(weakref.ref(y))
        return y * y

    def alive(self) -> int:
        gc.collect()
        return sum(reference() is not None for reference in self.seen)


class Block(nn.Module):
    """Reads its own parameter and runs a watched module inside its forward, hence inside the hooks
    that replace masked weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.watched = Watched()

    def forward(self, x: Tensor) -> Tensor:
        return self.watched(x @ self.weight) @ self.weight


@pytest.mark.parametrize("sampled", [False, True], ids=["plain", "operated"])
def test_discarded_activations_stay_discarded(sampled: bool) -> None:
    block = Block()
    if sampled:
        apply_dropconnect(block, "weight", p=0.5)
    x = torch.randn(2, 4, requires_grad=True)
    kept = block(x)
    assert block.watched.alive() == 1
    kept.sum().backward()
    del kept
    assert block.watched.alive() == 0
    out = checkpoint(block, x, use_reentrant=False)
    assert block.watched.alive() == 0
    out.sum().backward()
    assert len(block.watched.seen) == 3


class Spy(nn.Linear):
    """Remembers, weakly, every weight that it has used."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)
        self.seen: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        self.seen.append(weakref.ref(weight))
        return torch.addmm(self.bias, x, weight.t()) + F.linear(x, weight) + x @ weight


def test_no_masked_weight_is_kept_for_backward() -> None:
    model = apply_dropconnect(nn.Sequential(Spy(5), nn.Tanh(), Spy(5)), "*", p=0.5)
    out = model(torch.randn(2, 5, requires_grad=True))
    gc.collect()
    assert [reference() for spy in (model[0], model[2]) for reference in spy.seen] == [None, None]
    out.sum().backward()


def test_hooks_of_the_user_see_all_other_tensors(subject: Subject) -> None:
    """`saved_tensors_hooks` around the model get everything but the weights that are computed again,
    and may replace it by copies."""
    model, x = subject.operated(), subject.inputs()
    counts = []
    for p in (0.0, 0.5):
        set_p(model, p)
        expected = step_gradients(model, x)
        model.zero_grad()
        packed: list[Tensor] = []
        with saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):  # noqa: B023
            out = step(model, x)
        assert_same({**gradients(model), "output": out}, expected)
        counts.append(len(packed))
    assert 0 < counts[1] <= counts[0]
