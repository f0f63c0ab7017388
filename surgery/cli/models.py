"""The commands that need a model: it is loaded from a folder by transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoints.output import check_ending, check_new
from ..checkpoints.weights import WrongUse
from ..spec.plan import Plan
from ..verbs.apply import plan_dropconnect


def planned(
    folder: Path,
    targets: Sequence[str],
    p: float | None,
    exclude: Sequence[str] | None,
    options: Mapping[str, Any],
) -> tuple[nn.Module, Plan]:
    """The model in a folder, and the plan that these options give for it."""
    model = load(folder)
    return model, plan_dropconnect(model, [*targets], p, exclude=exclude or None, **options)


def drawn(
    folder: Path,
    out: Path,
    targets: Sequence[str] | None,
    p: float | None,
    exclude: Sequence[str] | None,
) -> int:
    """Write the picture of the model in a folder; returns how many sites are marked.

    Raises:
        WrongUse: `out` is there already, there is no folder for it, or it is named as no picture that
            can be made.
    """
    from surgery.transforms import draw

    check_ending(out, ".svg")
    check_new(out, "file")
    if not targets:
        draw(load(folder), out)
        return 0
    model, plan = planned(folder, targets, p, exclude, {})
    draw(model, out, plan=plan)
    return len(plan)


def load(folder: Path) -> nn.Module:
    """The model in a folder.

    Raises:
        WrongUse: the folder holds no model.
        ImportError: transformers is missing.
    """
    if not (folder / "config.json").is_file():
        raise WrongUse(f"{folder} has no config.json: --model is a folder that transformers loads")
    try:
        from surgery.adapters.transformers.folders import model_in
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        advice = 'pip install "dropconnect-surgery[hf]"'
        raise ImportError(f"plan and draw need transformers: {advice}") from None
    return model_in(folder)
