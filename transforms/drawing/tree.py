"""A model as a tree in the terminal, with its DropConnect sites marked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from surgery import Prediction, dropconnect_sites
from surgery.modules.places import places
from surgery.spec.forms import counted
from surgery.spec.plan import Plan, moments_known
from surgery.verbs.moments import sites_without_moments

from .outline import Part, Weight, outline

MARK = "◆"
CUT = "✂"
"""Where mean and variance do not travel on."""
_NARROW = (16, 4, 4, 8)
"""The columns are not made narrower than this many characters."""
_PLAIN = "\033[0m"
_CODES = ("", "\033[2m", "", "\033[1;33m")
"""ANSI codes of the columns: classes dim, marks bold yellow."""


class _Line(NamedTuple):
    """One line: the branches and name, the class, the weights, the marks."""

    name: str
    kind: str = ""
    weights: str = ""
    mark: str = ""

    @property
    def columns(self) -> bool:
        """Whether anything stands beside the name."""
        return any(self[1:])


def tree(
    model: nn.Module,
    *,
    plan: Plan | None = None,
    moments: bool | Prediction = False,
    width: int | None = None,
    color: bool = False,
) -> str:
    """The modules of a model with the shapes of their weights, its DropConnect sites marked by ◆.

        >>> print(tree(model))
        MLP
        ├─ fc1  Linear  weight 32×16, bias 32  ◆ weight p=0.3
        ├─ act  ReLU
        └─ fc2  Linear  weight 4×32, bias 4
        1 site, 512 of 676 weights

    Equal neighbours in a list of layers share one entry (`layer.0–5 ×6`).

    Args:
        model: a plain or operated model, or a `torch.fx.GraphModule`. Not changed.
        plan: mark these sites instead of those in place: what `apply_dropconnect` would do.
        moments: how far mean and variance travel. True: which sites have none, so that
            `predict_moments` would refuse them. What `predict_moments` returned: where in that
            forward values settled (`✂ sort`), because a function has no rule.
        width: longest line, in characters; what does not fit ends in `…`. None does not limit.
        color: use ANSI colours.

    Raises:
        ValueError: `width` is less than 40.
    """
    if width is not None and width < 40:
        raise ValueError(f"width must be at least 40 characters; got {width}")
    root = outline(model, plan)
    settled, without = _settled(moments), _without(model) if moments is True else {}
    lines = [_Line(root.kind, weights=_own(root), mark=_marks(root)), *_below(root, "")]
    lines = [*_noted(root, lines, settled)] if settled else lines
    columns = zip(*(line for line in lines if line.columns))
    widths = _fit([max(map(len, column)) for column in columns] or [0, 0, 0, 0], width)
    text = [_render(line, widths, color) for line in lines]
    total = _total(model, dropconnect_sites(model) if plan is None else plan)
    return "\n".join([*text, total, *_far(moments, settled, without)])


def _settled(moments: bool | Prediction) -> dict[str, list[str]]:
    """The functions that settled values, by the dotted name of the module."""
    found: dict[str, list[str]] = {}
    for where in () if isinstance(moments, bool) else moments.settled:
        module, _, function = where.rpartition(": ")
        found.setdefault(module, []).append(function)
    return found


def _without(model: nn.Module) -> dict[str, str]:
    return sites_without_moments(places(model))


def _noted(root: Part, lines: list[_Line], settled: dict[str, list[str]]) -> Iterator[_Line]:
    """The lines, with what settled in each module. They are those of the parts in order, and of
    weights that have one of their own, whose lines have no class."""
    parts = iter(root.walk())
    for index, line in enumerate(lines):
        part = next(parts) if index == 0 or line.kind else None
        paths = [] if part is None else [part.path or part.kind, *part.paths()]
        functions = dict.fromkeys(name for path in paths for name in settled.get(path, ()))
        cuts = [f"{CUT} {name}" for name in functions]
        yield line._replace(mark="  ".join(filter(None, [line.mark, *cuts])))


def _far(
    moments: bool | Prediction, settled: dict[str, list[str]], without: dict[str, str]
) -> Iterator[str]:
    """What is said of mean and variance below the tree."""
    if moments is True:
        yield from moments_known(without)
    elif moments and settled:
        count = sum(map(len, settled.values()))
        yield f"variance is lost at {counted(count, 'function')} ({CUT})"
    elif moments:
        yield "variance travels to the output"


def _below(part: Part, indent: str) -> Iterator[_Line]:
    entries: list[Weight | Part] = [*(part.weights if _apart(part) else ()), *part.children]
    for entry in entries:
        last = entry is entries[-1]
        name = indent + ("└─ " if last else "├─ ")
        if isinstance(entry, Weight):
            yield _Line(name + entry.name, "", entry.size + _tie(entry), _mark(entry, named=False))
            continue
        times = f"  ×{entry.count}" if entry.count > 1 else ""
        yield _Line(name + entry.title + times, entry.kind, _own(entry), _marks(entry))
        yield from _below(entry, indent + ("   " if last else "│  "))


def _apart(part: Part) -> bool:
    """Whether the weights have lines of their own: an RNN has many."""
    return len(part.weights) > 2 or (bool(part.weights) and bool(part.children))


def _own(part: Part) -> str:
    if _apart(part):
        return ""
    return ", ".join(f"{weight.name} {weight.size}{_tie(weight)}" for weight in part.weights)


def _marks(part: Part) -> str:
    if _apart(part):
        return ""
    return "  ".join(_mark(weight, named=True) for weight in part.weights if weight.site)


def _mark(weight: Weight, named: bool) -> str:
    if weight.mark is None:
        return ""
    return f"{MARK} {weight.name} {weight.mark}" if named else f"{MARK} {weight.mark}"


def _tie(weight: Weight) -> str:
    return f" ({weight.note})" if weight.note else ""


def _fit(widths: list[int], width: int | None) -> list[int]:
    """Narrower columns where the line would be too long: the weights first, the marks last."""
    fitted = list(widths)
    over = 0 if width is None else sum(widths) + 2 * sum(map(bool, widths[1:])) - width
    for column in (2, 1, 0, 3):
        cut = max(0, min(over, fitted[column] - _NARROW[column]))
        fitted[column] -= cut
        over -= cut
    return fitted


def _render(line: _Line, widths: list[int], color: bool) -> str:
    if not line.columns:
        return line.name
    text = ""
    for cell, room, code in zip(line, widths, _CODES):
        shown = cell if len(cell) <= room else cell[: room - 1] + "…"
        painted = f"{code}{shown}{_PLAIN}" if color and code and shown else shown
        text += painted + " " * (room - len(shown) + 2 if room else 0)
    return text.rstrip()


def _total(model: nn.Module, plan: Plan) -> str:
    every = sum(parameter.numel() for parameter in model.parameters())
    if not len(plan):
        return f"no sites, {counted(every, 'weight')}"
    return f"{counted(len(plan), 'site')}, {plan.numel:,} of {counted(every, 'weight')}"
