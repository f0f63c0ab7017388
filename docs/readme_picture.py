"""Writes `docs/surgery.svg`, the picture that opens the README: python docs/readme_picture.py"""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor, nn

from surgery import plan_dropconnect
from surgery.transforms.drawing.draw import draw_states

FILE = Path(__file__).with_name("surgery.svg")


class TransformerMLP(nn.Module):
    """The feed-forward half of a transformer layer, as wide as BERT's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(768)
        self.fc1 = nn.Linear(768, 3072)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(3072, 768)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.fc2(self.act(self.fc1(self.norm(x))))
        return x + hidden


def picture(path: str | os.PathLike[str]) -> str:
    """Draw it before, operated and stripped; the text of the SVG file."""
    model = TransformerMLP()
    return draw_states(
        model,
        plan_dropconnect(model, targets=["*.fc*"], p=0.3),
        path,
        titles=("your model", "training", "your model again"),
        captions=("any checkpoint", "a fresh mask at every forward", "bit for bit"),
    )


if __name__ == "__main__":
    picture(FILE)
    print(f"wrote {FILE.name}")
