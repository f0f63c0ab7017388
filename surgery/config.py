"""What is done to one weight: the options of DropConnect, validated in one place."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

Unit = Literal["element", "input", "output", "tensor"]
Toward = Literal["zero", "pretrained"]
Sampling = Literal["batch"]
Inference = Literal["mean", "sample"]
Ranks = Literal["independent", "same"]

FORMAT_VERSION = 1
"""Version of the JSON form written by `DropConnectConfig.to_json` and `surgery.checkpoint`."""


def check_p(p: Any, where: str = "p") -> float:
    """`p` as a float in [0, 1], or a `ValueError` that names the value (or `TypeError`)."""
    if isinstance(p, bool) or not isinstance(p, Real):
        raise TypeError(f"{where} is the probability of dropping, a number in [0, 1]; got {p!r}")
    value = float(p)
    if math.isnan(value) or not 0.0 <= value <= 1.0:
        raise ValueError(f"{where} is the probability of dropping and must be in [0, 1]; got {p!r}")
    return value


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
    """How often a mask is drawn: `"batch"`, one for each forward call of the module."""

    inference: Inference = "mean"
    """What `eval()` does: `"mean"` uses the weight as it is, `"sample"` keeps dropping
    (MC-DropConnect)."""

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

    def replace(self, **changes: Any) -> DropConnectConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict with every field and the version of the form."""
        return {"version": FORMAT_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, form: dict[str, Any]) -> DropConnectConfig:
        """The inverse of `to_json`.

        Raises:
            ValueError: the form has another version, or fields this version does not know.
        """
        fields = dict(form)
        version = fields.pop("version", None)
        if version != FORMAT_VERSION:
            raise ValueError(
                f"config was saved in format {version!r}; this release reads format {FORMAT_VERSION}"
            )
        unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"config has unknown fields {unknown}")
        return cls(**fields)


_CHOICES: dict[str, tuple[str, ...]] = {
    "unit": get_args(Unit),
    "toward": get_args(Toward),
    "sampling": get_args(Sampling),
    "inference": get_args(Inference),
    "ranks": get_args(Ranks),
}
