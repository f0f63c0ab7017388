"""Draws the figure of which-dropconnect.md from what which_dropconnect.py measured."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Shape
from matplotlib.transforms import Affine2D

Measured = dict[str, tuple[float, float]]
"""(mean, standard error) by name."""

KEPT, DROPPED, INK = "#2f6fb2", "#dfe5ec", "#1c2733"
COLOURS = {"no masks": "#8a97a5", "per example": "#2f6fb2", "per batch": "#d55e00"}


def draw(
    masks: dict[str, Tensor], errors: Measured, gradients: dict[int, Measured], path: Path
) -> None:
    """Masks of four examples above, the two measurements below.

    Args:
        masks: by title, bool, (4, rows, columns).
        errors: in percent, by way of inference.
        gradients: variances, by batch size and sampling.
        path: of the file to write.
    """
    style = {"svg.fonttype": "none", "svg.hashsalt": "which", "font.size": 10, "text.color": INK}
    with plt.rc_context(style):
        figure = plt.figure(figsize=(9.6, 6.2), layout="constrained", facecolor="white")
        above, below = figure.subfigures(2, 1, height_ratios=(1, 1.35))
        for axes, (title, own) in zip(above.subplots(1, len(masks)), masks.items()):
            draw_masks(axes, title, own)
        left, right = below.subplots(1, 2)
        draw_errors(left, errors)
        draw_gradients(right, gradients)
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw_masks(axes: Axes, title: str, masks: Tensor) -> None:
    for colour, chosen in ((KEPT, masks), (DROPPED, ~masks)):
        squares = [square(*place) for place in chosen.nonzero().tolist()]
        axes.add_patch(PathPatch(Shape.make_compound_path(*squares), color=colour, linewidth=0))
    axes.set(xlim=(-0.5, 13.7), ylim=(11.8, -0.5), aspect="equal")
    axes.set_title(title, fontsize=10)
    axes.axis("off")


def square(example: int, row: int, column: int) -> Shape:
    """Where a weight of an example is drawn; examples lie two by two."""
    left, top = 7.2 * (example % 2) + column, 6.4 * (example // 2) + row
    return Shape.unit_rectangle().transformed(Affine2D().scale(0.86).translate(left, top))


def draw_errors(axes: Axes, errors: Measured) -> None:
    draws = [10, 100, 1000]
    points = [errors[f"{z} draws"] for z in draws]
    axes.axhline(errors["mean"][0], color="#d55e00", linewidth=2, label='"mean": plain weights')
    axes.errorbar(draws, *zip(*points), fmt="o-", color=INK, capsize=3, label="the paper: Z draws")
    axes.axhline(errors["moments"][0], color=KEPT, linewidth=2, label='"moments": no draws')
    axes.set(xscale="log", yscale="log", ylim=(0.5, 40), xlabel="Z", ylabel="error (%)")
    axes.set_xticks(draws, [str(z) for z in draws])
    axes.set_yticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.set_title("Inference, against all masks (p = 0.5)", fontsize=10)
    finish(axes, (0.02, 0.2))


def draw_gradients(axes: Axes, gradients: dict[int, Measured]) -> None:
    for name, colour in COLOURS.items():
        points = [row[name] for row in gradients.values()]
        axes.errorbar(list(gradients), *zip(*points), fmt="o-", color=colour, capsize=3, label=name)
    axes.set(xscale="log", ylim=(0, None), xlabel="batch size", ylabel="variance times batch size")
    axes.set_xticks(list(gradients), [str(size) for size in gradients])
    axes.minorticks_off()
    axes.set_title("Gradient: noise per example (p = 0.5)", fontsize=10)
    finish(axes, "upper left")


def finish(axes: Axes, place: str | tuple[float, float]) -> None:
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc=place)
    axes.spines[["top", "right"]].set_visible(False)
