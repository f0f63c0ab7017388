"""How p moves over a training run, as a function of progress in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Callable

from .config import check_p

Schedule = Callable[[float], float]
"""From progress (0 at the first step, 1 at the last) to a drop probability."""

_DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


def make_schedule(name: str | Schedule, p: float, warmup: float = 0.0) -> Schedule:
    """A schedule for `set_p`, in the shapes that learning rates have.

    Args:
        name: `"constant"` stays at p; `"linear"` and `"cosine"` fall from p to 0 at the end of
            training. A callable from progress to a probability is used as it is.
        p: the largest drop probability, in [0, 1].
        warmup: fraction of training, in [0, 1), over which p first rises linearly from 0. The fall
            takes the rest.

    Raises:
        ValueError: the name is unknown, or a number is out of range.
    """
    if callable(name):
        if warmup:
            raise ValueError("warmup is part of a named schedule; a callable decides p by itself")
        return name
    if name not in _DECAYS:
        raise ValueError(f"schedule must be one of {list(_DECAYS)} or a callable; got {name!r}")
    if not 0.0 <= warmup < 1.0:
        raise ValueError(f"warmup is a fraction of training, in [0, 1); got {warmup!r}")
    top, decay = check_p(p), _DECAYS[name]

    def schedule(progress: float) -> float:
        if progress < warmup:
            return top * progress / warmup
        return top * decay((progress - warmup) / (1.0 - warmup))

    return schedule
