"""A diagram in the language of Graphviz, with the look of our pictures."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from html import escape

from surgery.spec.plan import join

from .diagram import Box, Diagram
from .outline import Part, Weight

FONT = "ui-monospace,SFMono-Regular,Menlo,Consolas,DejaVu Sans Mono,monospace"
INK, MUTED, _GRAY = "#1f2328", "#656d76", "#8c959f"
BLUE, ORANGE, PALE = "#4f83b6", "#e8710a", "#fbe3cd"
_DARK_ORANGE, _CREAM = "#b34f00", "#fffaf4"
_SIZE, _LINE, _MARK = 12, 15, 20
"""Size of the type, height of a line, and height of a line with a mark, in points."""
_COLUMNS, _ROWS, _CELL = 10, 4, 6
_MATRIX = _COLUMNS * (_CELL + 1) + 1
"""Width of a small matrix."""
_UNITS: dict[str, Callable[[tuple[int, int]], object]] = {
    "element": lambda cell: cell,
    "input": lambda cell: cell[1],
    "output": lambda cell: cell[0],
    "tensor": lambda cell: None,
}
"""What of a matrix, by (row, column), is dropped together."""

_HEAD = f"""digraph {{
graph [bgcolor="transparent" pad=0.05 nodesep=0.3 ranksep=0.32 fontname="{FONT}" fontsize={_SIZE}]
node [shape=box style="rounded,filled" fillcolor="#ffffff" color="#d0d7de" penwidth=1.2
  fontname="{FONT}" fontsize={_SIZE} fontcolor="{INK}" margin="0.13,0.09" height=0.3 width=0.3]
edge [color="{_GRAY}" penwidth=1.3 arrowsize=0.6]
"""


def dot(diagram: Diagram, room: Mapping[str, str]) -> str:
    """DOT text; `room` keeps place for marks, by parameter name, that this diagram does not have, so
    that it is laid out like one that has them."""
    return "".join([_HEAD, *_frames(diagram, room), *_arrows(diagram), "}\n"])


def _frames(diagram: Diagram, room: Mapping[str, str]) -> Iterator[str]:
    """Every box, inside its frames."""
    for box in diagram.boxes.values():
        opened = [_frame(diagram.frames[path]) for path in box.frames]
        yield "".join(
            [*opened, f"{_quoted(box.key)} [{_look(box, room)}]", "}" * len(opened), "\n"]
        )


def _frame(part: Part) -> str:
    """A cluster; Graphviz joins those of one name."""
    label = _quoted(f"{part.path}–{part.last} ×{part.count}")
    return (
        f"subgraph {_quoted('cluster ' + part.path)} {{ label={label} labeljust=l labelloc=b "
        f'style=rounded color="#d0d7de" bgcolor="#f6f8fa" fontcolor="{MUTED}" margin=12 '
    )


def _arrows(diagram: Diagram) -> Iterator[str]:
    """The arrows; those along the main flow are kept straight."""
    order = {key: number for number, key in enumerate(diagram.boxes)}
    sources: dict[str, list[str]] = {}
    for source, target in diagram.arrows:
        sources.setdefault(target, []).append(source)
    for source, target in diagram.arrows:
        fed = [other for other in sources[target] if other in sources]
        straight = len(sources[target]) == 1 or (
            diagram.boxes[target].role == "symbol"
            and source == max(fed or sources[target], key=lambda key: order[key])
        )
        yield f"{_quoted(source)} -> {_quoted(target)} [weight={8 if straight else 1}]\n"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _look(box: Box, room: Mapping[str, str]) -> str:
    """The attributes of a node."""
    if box.role in ("input", "output"):
        return f'label={_quoted(box.title)} style="" shape=plaintext fontcolor="{MUTED}"'
    if box.role == "symbol":
        return f"label={_quoted(box.title)} shape=circle fixedsize=true width=0.3 fontsize=14"
    site = any(weight.site for weight in box.weights)
    look = f'class=site color="{ORANGE}" fillcolor="{_CREAM}" penwidth=2 ' if site else ""
    return f"{look}label=<{_table(box, room)}>"


def _table(box: Box, room: Mapping[str, str]) -> str:
    """The title and class; below, each matrix and whatever else drops."""
    title = f"<b>{escape(box.title)}</b>" if box.role == "module" else escape(box.title)
    kind = f' <font color="{MUTED}">{escape(box.kind)}</font>' if box.kind else ""
    rows = [_row(title + kind, _width(f"{box.title} {box.kind}".rstrip()))]
    for weight in box.weights:
        promised = room.get(join(box.path, weight.name))
        if len(weight.shape) > 1 or weight.site or promised:
            rows += _weight_rows(weight, promised)
    return _rows(rows)


def _weight_rows(weight: Weight, promised: str | None) -> Iterator[str]:
    """A small matrix beside its name and shape; below, the mark and the tie. Where a mark is promised,
    half of its height is above and half below."""
    spare = []
    if promised and not weight.site:
        spare = [_row("", _width(f"DropConnect {promised}"), _MARK // 2)]
    yield from (*spare, _row("", 0, 4))
    yield f"<tr><td>{_pair(weight)}</td></tr>"
    if weight.site:
        mark = f"DropConnect {weight.mark}"
        yield _row(f"<b>{_colored(mark, _DARK_ORANGE)}</b>", _width(mark), _MARK)
    if weight.note:
        yield _text_row(weight.note)
    yield from spare


def _pair(weight: Weight) -> str:
    """A small matrix, and to its right the name and shape; as wide as they need and no wider."""
    words = max(_width(weight.name), _width(weight.size))
    cells = (
        f'<td fixedsize="true" width="{_MATRIX}" height="{2 * _LINE}">{_matrix(weight)}</td>'
        '<td fixedsize="true" width="8" height="1"></td>'
        f'<td width="{words}">{_rows(map(_text_row, (weight.name, weight.size)))}</td>'
    )
    size = f'align="left" fixedsize="true" width="{_MATRIX + 8 + words}" height="{2 * _LINE}"'
    return _rows([f"<tr>{cells}</tr>"], more=size)


def _rows(rows: Iterable[str], spacing: int = 0, more: str = "") -> str:
    return (
        f'<table border="0" cellborder="0" cellspacing="{spacing}" cellpadding="0" {more}>'
        f"{''.join(rows)}</table>"
    )


def _text_row(text: str) -> str:
    return _row(_colored(text, MUTED), _width(text))


def _row(content: str, width: int, height: int = _LINE) -> str:
    return f'<tr><td align="left" width="{width}" height="{height}">{content}</td></tr>'


def _colored(text: str, color: str) -> str:
    return f'<font color="{color}">{escape(text)}</font>'


def _width(text: str) -> int:
    """Room for a line of fixed-width type, in any of the fonts, so that the fonts of the machine do not
    decide the layout."""
    return math.ceil(0.62 * _SIZE * len(text)) + 2


def _matrix(weight: Weight) -> str:
    """A few cells; those of a site that one mask could drop are pale."""
    rows = _ROWS if len(weight.shape) > 1 else 1
    dropped = _dropped(weight, rows)
    color = ORANGE if weight.site else BLUE
    lines = []
    for row in range(rows):
        dots = (_dot(PALE if (row, at) in dropped else color) for at in range(_COLUMNS))
        lines.append(f"<tr>{''.join(dots)}</tr>")
    size = f'fixedsize="true" width="{_MATRIX}" height="{rows * (_CELL + 1) + 1}"'
    return _rows(lines, spacing=1, more=size)


def _dot(color: str) -> str:
    return f'<td fixedsize="true" width="{_CELL}" height="{_CELL}" bgcolor="{color}"></td>'


def _dropped(weight: Weight, rows: int) -> set[tuple[int, int]]:
    """A sample mask: a fraction p of the units, always the same for the same site."""
    if weight.site is None:
        return set()
    unit_of = _UNITS[weight.site.config.unit]
    cells = [(row, column) for row in range(rows) for column in range(_COLUMNS)]
    units = list(dict.fromkeys(map(unit_of, cells)))
    chance = random.Random(min((weight.site.name, *weight.site.shared_with)))
    order = sorted(units, key=lambda _: chance.random())
    few = weight.site.p > 0 and len(units) > 1
    gone = set(order[: max(round(weight.site.p * len(units)), int(few))])
    return {cell for cell in cells if unit_of(cell) in gone}
