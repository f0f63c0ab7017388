"""Models made at random: parts that take and return (2, 3, 6), one after another, nested, shared, tied.

Annotations are not put off here: `torch.fx` cannot pickle a graph with names for types.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, weight_norm

from ..zoo.kinds import Experts, OwnLinear, ReadsChild, Router

WIDTH = 6
NAMES = (
    *("fc", "0", "weight", "a-b", "é", "_x", "two words", "w_raw", "weight_anchor", "a[b]", "c*"),
    *("dropconnect", "_dropconnect_x", "module", "layers", "10"),
)
"""Of children. Those with brackets and stars are patterns as well."""


class Net(nn.Module):
    """Calls children, by their names, in an order that may repeat one."""

    def __init__(self, parts: dict[str, nn.Module], order: list[str]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = torch.tanh(x + called(self._modules[name], x).to(x.dtype))
        return x


def called(part: nn.Module, x: Tensor) -> Tensor:
    """What a part returns for an input that has its type."""
    return part(fitting(part, x))


def fitting(part: nn.Module, x: Tensor) -> Tensor:
    """An input of the type of a part."""
    for parameter in part.parameters():
        return x.to(parameter.dtype)
    return x


def nothing(*args: object) -> None:
    """A hook."""


class Fit(nn.Module):
    """A module whose output is cut or filled up to the width of the input."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        out = out[0] if isinstance(out, tuple) else out
        return F.pad(out, (0, WIDTH - out.shape[-1]))


class Mlp(nn.Module):
    """A network of two layers; `width` may be 0."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.fc1, self.act = nn.Linear(WIDTH, width, bias=bias), nn.GELU()
        self.fc2 = nn.Linear(width, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class ByTime(nn.Module):
    """A convolution whose channels are the last dimension."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class AsImage(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[:, None]).mean(1)


class Words(nn.Module):
    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table

    def forward(self, x: Tensor) -> Tensor:
        ids = (x.detach().float().abs() * 97).long() % 9
        if isinstance(self.table, nn.EmbeddingBag):
            return self.table(ids.view(6, 6)).view(x.shape)
        return self.table(ids[..., 0])


class Loop(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state, out = None, []
        for step in x.unbind(1):
            state = self.cell(step, state)
            out.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(out, 1)


class Attention(nn.Module):
    def __init__(self, **options: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        other = x[..., : self.attention.kdim]
        return self.attention(x, other, other, need_weights=False)[0]


class Listed(nn.Module):
    """Parameters without modules, one of them with the name that surgery would give to another."""

    def __init__(self) -> None:
        super().__init__()
        self.many = nn.ParameterList([torch.randn(WIDTH, WIDTH) / 3 for _ in range(2)])
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)
        self.w_raw = nn.Parameter(torch.randn(WIDTH))
        self.scale = nn.Parameter(torch.randn(()))
        self.unused = nn.Parameter(torch.randn(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        for one in self.many:
            x = F.linear(x, one)
        return (x @ self.w + self.w_raw) * self.scale


class Strange(nn.Module):
    """Parameters of unusual types and sizes, some of them read through a dict, and a product of two."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Bilinear(WIDTH, WIDTH, 3)
        self.named = nn.ParameterDict({"a": torch.randn(WIDTH), "é b": torch.randn(1, WIDTH)})
        self.none = nn.Parameter(torch.zeros(0, WIDTH))
        self.whole = nn.Parameter(torch.arange(4), requires_grad=False)
        self.register_parameter("absent", None)

    def forward(self, x: Tensor) -> Tensor:
        out = F.pad(self.twice(x, x * self.named["a"]), (0, 3)) + self.named["é b"]
        both = torch.cat([out.flatten(0, 1), self.none]).view(out.shape)
        return both + self.whole[2]


class Normed(nn.Module):
    """Buffers that change in training, and some that files do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.batch, self.layer = nn.BatchNorm1d(WIDTH), nn.LayerNorm(WIDTH)
        self.register_buffer("kept", torch.ones(WIDTH))
        self.register_buffer("not_kept", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.batch(x.transpose(1, 2)).transpose(1, 2)) * self.kept


class Borrowing(nn.Module):
    """Another parent of a module that is elsewhere in the model."""

    def __init__(self, lent: nn.Module) -> None:
        super().__init__()
        self.lent = lent

    def forward(self, x: Tensor) -> Tensor:
        return called(self.lent, x) / 2


def _recurrent(rng: Random) -> nn.Module:
    cls = rng.choice([nn.LSTM, nn.GRU, nn.RNN])
    ways = rng.choice([1, 2])
    options = {"proj_size": 2} if cls is nn.LSTM and rng.random() < 0.3 else {}
    return Fit(
        cls(WIDTH, 3, rng.choice([1, 2]), bidirectional=ways == 2, batch_first=True, **options)
    )


def _conv(rng: Random) -> nn.Module:
    groups = rng.choice([1, 2, 6])
    match rng.randrange(5):
        case 0:
            return ByTime(nn.ConvTranspose1d(WIDTH, WIDTH, 3, padding=1, groups=groups))
        case 1:
            return AsImage(nn.Conv2d(1, 4, 3, padding=1))
        case 2:
            return AsImage(nn.ConvTranspose2d(1, 2, 3, padding=1))
    mode: Any = rng.choice(["zeros", "reflect"])
    return ByTime(nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=groups, padding_mode=mode))


def _words(rng: Random) -> nn.Module:
    if rng.random() < 0.3:
        return Words(nn.EmbeddingBag(9, WIDTH, mode=rng.choice(["sum", "mean"])))
    return Words(nn.Embedding(9, WIDTH, padding_idx=rng.choice([None, 0])))


COMPUTED: list[Any] = [weight_norm, orthogonal]
"""Give a Linear a weight that is computed from others, which surgery refuses."""

PARTS: dict[str, Callable[[Random], nn.Module]] = {
    "linear": lambda rng: nn.Linear(WIDTH, WIDTH, bias=rng.random() < 0.7),
    "mlp": lambda rng: Mlp(rng.choice([0, 4, 9]), rng.random() < 0.7),
    "own": lambda rng: Fit(rng.choice([OwnLinear(6, 4), Router(), Experts(), ReadsChild()])),
    "conv": _conv,
    "words": _words,
    "recurrent": _recurrent,
    "cell": lambda rng: Loop(rng.choice([nn.RNNCell, nn.GRUCell, nn.LSTMCell])(WIDTH, WIDTH)),
    "attention": lambda rng: Attention(**rng.choice([{}, {"kdim": 4, "vdim": 4}])),
    "encoder": lambda rng: nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True),
    "listed": lambda rng: Listed(),
    "strange": lambda rng: Strange(),
    "parametrized": lambda rng: rng.choice(COMPUTED)(nn.Linear(WIDTH, WIDTH)),
    "normed": lambda rng: Normed(),
    "sequential": lambda rng: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6)),
}


def part(rng: Random, depth: int = 0) -> nn.Module:
    """A part, perhaps one with parts in it."""
    if depth < 2 and rng.random() < 0.15:
        return net(rng, depth + 1)
    return PARTS[rng.choice(list(PARTS))](rng)


def net(rng: Random, depth: int = 0) -> nn.Module:
    """A module with one to four parts, one of which may be called twice or have two parents."""
    names = rng.sample(NAMES, rng.randint(1, 4 - depth))
    parts = OrderedDict((name, part(rng, depth)) for name in names)
    if rng.random() < 0.2:
        lent = rng.choice(list(parts.values()))
        parts["borrowing"] = Borrowing(lent)
    if rng.random() < 0.2 and all(
        type(one) in (nn.Linear, nn.Sequential) for one in parts.values()
    ):
        return nn.Sequential(parts)
    order = list(parts)
    if rng.random() < 0.2:
        order.append(rng.choice(order))
    return Net(parts, order)


def model(rng: Random) -> nn.Module:
    """A whole model, with ties, frozen parameters, modes and a type."""
    torch.default_generator.manual_seed(rng.randrange(2**32))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        made = net(rng)
    if rng.random() < 0.4:
        tie(made, rng)
    for parameter in made.parameters():
        if rng.random() < 0.1:
            parameter.requires_grad_(False)
    return made.to(rng.choice([torch.float64, torch.float64, torch.float32, torch.bfloat16]))


def tie(made: nn.Module, rng: Random) -> tuple[str, str] | None:
    """Let a module have the weight of another; their names, or None if no two fit."""
    owners = [
        name
        for name, module in made.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding))
        and "parametrizations" not in module._modules
        and module.weight.shape == (WIDTH, WIDTH)
    ]
    if len(owners) < 2:
        return None
    one, other = rng.sample(owners, 2)
    made.get_submodule(one).weight = made.get_submodule(other).weight
    return one, other
