"""What others offer. A name that ends in "(formula)" is their published formula, everything else is
their code as it is on PyPI (see `peers.txt`)."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

WEIGHT_DROP = "PyTorch-NLP WeightDrop"
FASTAI = "fastai WeightDropout"
BAAL = "baal MCDropoutConnect"
SPIKING = "SpikingJelly DropConnectLinear"
PARAMETRIZE = "torch parametrize + dropout"
F_DROPOUT = "F.dropout(W)"
PYPI = "PyPI dropconnect (formula)"
EINSUM = "einsum (formula)"
MIXOUT = "mixout (formula)"

MODULES = {
    WEIGHT_DROP: "torchnlp.nn",
    FASTAI: "fastai.text.models.awdlstm",
    BAAL: "baal.bayesian.weight_drop",
    SPIKING: "spikingjelly.activation_based.layer",
}

NOT_ON_INDEX = "not on the package index here"


class NotInstallable(RuntimeError):
    """A peer cannot be run here; the message says why."""


def load(name: str) -> Any:
    """The module of a peer.

    Raises:
        NotInstallable: it cannot be imported beside this torch.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(MODULES[name])
    except Exception as error:  # a peer may fail in any way
        raise NotInstallable(f"{type(error).__name__}: {error}") from error


def weight_drop(module: nn.Module, names: Sequence[str], p: float) -> Any:
    return load(WEIGHT_DROP).WeightDrop(copy.deepcopy(module), list(names), dropout=p)


def fastai(module: nn.Module, names: Sequence[str], p: float) -> Any:
    return load(FASTAI).WeightDropout(copy.deepcopy(module), p, layer_names=list(names))


def baal(model: nn.Module, names: Sequence[str], p: float) -> Any:
    """Every Linear in `model`, which baal replaces."""
    whole = nn.Sequential(copy.deepcopy(model))
    return load(BAAL).patch_module(whole, ["Linear"], weight_dropout=p)


class _Dropout(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, weight: Tensor) -> Tensor:
        return F.dropout(weight, self.p)


def parametrized(module: nn.Module, names: Sequence[str], p: float) -> nn.Module:
    module = copy.deepcopy(module)
    for name in names:
        parametrize.register_parametrization(module, name, _Dropout(p))
    return module


def parametrized_linears(model: nn.Module, p: float) -> nn.Module:
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            parametrize.register_parametrization(module, "weight", _Dropout(p))
    return model


class DroppedLinear(nn.Linear):
    """`F.linear(x, F.dropout(weight))`, the shortest way to write it."""

    p = 0.5

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, F.dropout(self.weight, self.p), self.bias)


def f_dropout(model: nn.Module, names: Sequence[str], p: float) -> nn.Module:
    """Every Linear in `model`."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = DroppedLinear
            module.__dict__["p"] = p
    return model


def spiking(linear: nn.Linear, p: float, samples: int, activation: nn.Module | None) -> nn.Module:
    layer: nn.Module = load(SPIKING).DropConnectLinear(
        linear.in_features, linear.out_features, True, p, samples, False, activation
    )
    layer.load_state_dict(linear.state_dict())
    return layer


def pypi_dropconnect(x: Tensor, weight: Tensor, p: float) -> Tensor:
    """Package `dropconnect` 0.1: the input is scaled, a mask drawn for each example."""
    keep = torch.bernoulli(torch.full((len(x), *weight.shape), 1 - p, device=x.device))
    masked = torch.masked_fill(weight, keep == 0, 0.0)
    return torch.matmul(masked, (x / (1 - p)).unsqueeze(-1)).squeeze(-1)


def einsum(x: Tensor, weight: Tensor, p: float) -> Tensor:
    """Algorithm 1 of Wan et al. (2013) as one would write it down: x (examples, …, in)."""
    masks = F.dropout(weight.expand(len(x), *weight.shape), p)
    return torch.einsum("e...i,eoi->e...o", x, masks)


class _Mixout(torch.autograd.Function):
    """https://github.com/bloodwass/mixout: one mask for all rows, and a backward without the scale."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, target: Tensor, p: float) -> Tensor:
        noise = weight.new_empty(weight.shape)
        noise[0].bernoulli_(1 - p)
        noise = noise[0].repeat(len(weight), 1)
        ctx.noise = noise
        return ((1 - noise) * target + noise * weight - p * target) / (1 - p)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.noise, None, None


class MixoutLinear(nn.Linear):
    """What `MixLinear` of mixout computes."""

    p: float
    target: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, _Mixout.apply(self.weight, self.target, self.p), self.bias)  # type: ignore[no-untyped-call]


def mixout(linear: nn.Linear, p: float) -> nn.Module:
    linear = copy.deepcopy(linear)
    linear.target = linear.weight.detach().clone()
    linear.__class__ = MixoutLinear
    linear.__dict__["p"] = p
    return linear


def available(
    builders: dict[str, Callable[[], Any]],
) -> tuple[dict[str, Any], dict[str, str]]:
    """What each builder makes, and for those that cannot, why."""
    made, missing = {}, {}
    for name, build in builders.items():
        try:
            made[name] = build()
        except NotInstallable as error:
            missing[name] = f"not installable: {error}"
    return made, missing
