"""What is done to one weight: the options of DropConnect, validated in one place."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

from .errors import SurgeryError
from .forms import (
    FORMAT_VERSION,
    Reader,
    fields,
    flag,
    integer,
    maybe,
    migrated,
    number,
    shown,
    text,
)

Unit = Literal["element", "input", "output", "tensor"]
Toward = Literal["zero", "pretrained"]
Sampling = Literal["batch", "example", "gaussian"]
Inference = Literal["mean", "moments", "sample"]
Ranks = Literal["independent", "same"]


def check_p(p: Any, where: str = "p") -> float:
    """`p` as a float in [0, 1], or a `ValueError` that names the value (or `TypeError`)."""
    if isinstance(p, bool) or not isinstance(p, Real):
        raise TypeError(f"{where} is the probability of dropping, a number in [0, 1]; got {p!r}")
    value: Any = p
    if not 0 <= value <= 1:  # also NaN, and integers that no float holds
        raise ValueError(
            f"{where} is the probability of dropping and must be in [0, 1]; got {shown(p)}"
        )
    return float(p)


@dataclass(frozen=True, kw_only=True)
class DropConnectConfig:
    """How the weights of a site are dropped.

    With keep mask `m` and anchor `A`, the weight that is used is `A + m * (W - A) / (1 - p)`, whose
    expectation is `W`.

    Raises:
        ValueError: a field has a value outside its range; the message lists the allowed ones.
        TypeError: `p` is not a number, or `bias` is not a bool.
    """

    p: float = 0.5
    """Probability of *dropping*, in [0, 1], as in `torch.nn.Dropout` (the paper's p is 1 - this)."""

    unit: Unit = "element"
    """What shares one mask entry: `"element"` (DropConnect), `"input"` (Dropout of that input),
    `"output"` (Dropout of that pre-activation) or `"tensor"` (stochastic depth)."""

    toward: Toward = "zero"
    """Where a dropped weight goes: `"zero"`, or `"pretrained"`, its value at surgery (mixout)."""

    sampling: Sampling = "batch"
    """How often a mask is drawn: `"batch"`, one for each forward call of the module; `"example"`, one
    for each example (the paper); `"gaussian"`, each pre-activation of each example from the Gaussian
    that has its mean and variance (local reparameterisation, Kingma et al. 2015)."""

    example_dim: int | Literal["all"] = 0
    """For `sampling="example"`: the dimension of the input along which the examples lie. All that lies
    along the others, the tokens of a sequence, shares its example's mask. `"all"`: every token has
    its own."""

    inference: Inference = "mean"
    """What `eval()` does: `"mean"` uses the weight as it is; `"moments"` lets mean and variance of
    every pre-activation travel to the output, whose expectation over the masks the model returns
    (docs/moments.md); `"sample"` keeps dropping (MC-DropConnect)."""

    samples: int | None = None
    """For `inference="moments"`: take that many draws from each Gaussian through its activation, as
    the paper does (Wan et al. 2013, section 3.2), and go on with their mean. None computes."""

    bias: bool = False
    """Drop the bias that goes with the weight too (the paper's figures drop it, its code does not)."""

    ranks: Ranks = "independent"
    """In distributed training: `"independent"` mixes the process rank into every mask, so that
    ranks differ even if all were seeded alike; `"same"` does not, so ranks seeded alike agree."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "p", check_p(self.p))
        if not isinstance(self.bias, bool):
            raise TypeError(f"bias must be True or False; got {self.bias!r}")
        for field, allowed in _CHOICES.items():
            value = getattr(self, field)
            if value not in allowed:
                names = ", ".join(repr(choice) for choice in allowed)
                raise ValueError(f"{field} must be one of {names}; got {value!r}")
        self._check_example_dim()
        self._check_samples()
        if self.sampling == "gaussian" and self.unit in ("input", "tensor"):
            raise ValueError(
                f'sampling="gaussian" draws every pre-activation by itself, but unit={self.unit!r} '
                'drops several together; use sampling="example"'
            )

    def _check_example_dim(self) -> None:
        dim = self.example_dim
        if dim != "all" and (isinstance(dim, bool) or not isinstance(dim, int)):
            raise ValueError(f"example_dim must be a dimension of the input or 'all'; got {dim!r}")
        if dim != 0 and self.sampling != "example":
            raise ValueError(
                f"example_dim={dim!r} says where examples lie for sampling='example'; it has no "
                f"meaning for sampling={self.sampling!r}"
            )

    def _check_samples(self) -> None:
        count = self.samples
        if count is None:
            return
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"samples must be a positive number of draws or None; got {count!r}")
        if self.inference != "moments":
            raise ValueError(
                f"samples={count} is the number of draws of inference='moments'; it has no meaning for "
                f"inference={self.inference!r}"
            )

    def replace(self, **changes: Any) -> DropConnectConfig:
        """A copy with some fields changed, validated again."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise TypeError(
                    f"{name!r} is no option of DropConnect; these are: {', '.join(known)}"
                )
        return dataclasses.replace(self, **changes)

    def options(self) -> dict[str, Any]:
        """The fields but p and bias whose value is not the default: what is worth showing."""
        default = DropConnectConfig()
        named = [field.name for field in dataclasses.fields(self)]
        return {
            name: getattr(self, name)
            for name in named
            if name not in ("p", "bias") and getattr(self, name) != getattr(default, name)
        }

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict with every field and the version of the form."""
        return {"version": FORMAT_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, form: Any, where: str = "config") -> DropConnectConfig:
        """The inverse of `to_json`.

        Args:
            form: of this version or an older one.
            where: what errors call it.

        Raises:
            SurgeryError: the form has a newer version, unknown fields, or wrong values.
        """
        read = fields(migrated(form, "config", where), where, {}, _READERS)
        try:
            return cls(**read)
        except ValueError as error:
            raise SurgeryError(f"{where}: {error}") from error


def _dimension(value: Any, where: str) -> int | str:
    return value if value == "all" else integer(value, where)


_READERS: dict[str, Reader[Any]] = {
    "p": number,
    "unit": text,
    "toward": text,
    "sampling": text,
    "example_dim": _dimension,
    "inference": text,
    "samples": maybe(integer),
    "bias": flag,
    "ranks": text,
}

_CHOICES: dict[str, tuple[str, ...]] = {
    "unit": get_args(Unit),
    "toward": get_args(Toward),
    "sampling": get_args(Sampling),
    "inference": get_args(Inference),
    "ranks": get_args(Ranks),
}
