"""How p moves over a training run: a factor, as a function of progress in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[float], float]
"""From progress (0 at the first step, 1 at the last) to a factor by which every site's p is
multiplied."""

_DECAYS: dict[str, Schedule] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


def make_schedule(name: str | Schedule, warmup: float = 0.0) -> Schedule:
    """A schedule in the shapes that learning rates have.

    Args:
        name: `"constant"` stays at 1; `"linear"` and `"cosine"` fall from 1 to 0 at the end of
            training. A callable from progress to a factor is used as it is.
        warmup: fraction of training, in [0, 1), over which the factor first rises linearly from 0.
            The fall takes the rest.

    Raises:
        ValueError: the name is unknown, or a number is out of range.
    """
    if callable(name):
        if warmup:
            raise ValueError("warmup is part of a named schedule; a callable decides by itself")
        return name
    if name not in _DECAYS:
        raise ValueError(f"schedule must be one of {list(_DECAYS)} or a callable; got {name!r}")
    if not 0.0 <= warmup < 1.0:
        raise ValueError(f"warmup is a fraction of training, in [0, 1); got {warmup!r}")
    decay = _DECAYS[name]

    def schedule(progress: float) -> float:
        if progress < warmup:
            return progress / warmup
        return decay((progress - warmup) / (1.0 - warmup))

    return schedule
