"""Does a fine-tuned model know what it does not know? MC-DropConnect on real text.

    python examples/uncertainty.py                 # about 3 minutes on 2 CPU cores, no downloads
    python examples/uncertainty.py --seeds 5       # means and standard errors over seeds

MiniLM-L6 learns four of the five classes of BBC news, plainly and with DropConnect. Then it reads test
articles of these classes, and three kinds of text that it was not made for: articles of the class that
was held out, articles with their words shuffled, and articles with the letters of each word shuffled.
An uncertainty is good if it is higher there: measured by the AUROC, the chance that a random foreign
text gets a higher one than a random article. Compared are the entropy of a plain softmax, of the
plainly trained model and of the other, and the mutual information and predictive entropy of many
forwards with masks (`mc_predict`, which takes the `DataLoader` of a test set as it is), and of one
forward in which mean and variance travel (`predict_moments`). Prints tables and draws a picture.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from bbc import Texts, load_bbc, stratified_split
from minilm import load_classifier, minilm, quiet
from report import compare, estimate, written_whole
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel
from transformers import default_data_collator as collate

from surgery import apply_dropconnect, mc_predict, predict_moments

matplotlib.use("Agg")
from matplotlib import pyplot as plt

INSIDE = "articles"
PLAIN, MEAN = "softmax, plain training", "softmax, DropConnect training"
ENTROPY, INFORMATION = "MC entropy", "MC mutual information"
TRAVELLED = "one-pass mutual information"
COLOURS = {
    PLAIN: "#555555",
    MEAN: "#009e73",
    ENTROPY: "#56b4e9",
    INFORMATION: "#d55e00",
    TRAVELLED: "#cc79a7",
}

TOGETHER = 64
"""Texts that are read together."""

Scores = dict[str, np.ndarray]
"""Uncertainty of every text, in nats, by kind of text."""


@dataclass(frozen=True)
class Run:
    """What one seed found."""

    scores: dict[str, Scores]
    """By measure of uncertainty."""
    accuracy: dict[str, float]
    """On the articles, by measure: of the prediction that goes with it."""


def run(seed: int, options: argparse.Namespace) -> Run:
    """Train both models and let them read everything."""
    train, texts = load_texts(options)
    tokenizer = AutoTokenizer.from_pretrained(minilm())

    def encode(some: list[str]) -> dict[str, Tensor]:
        tokens = tokenizer(
            some,
            truncation=True,
            padding="max_length",
            max_length=options.max_length,
            return_tensors="pt",
        )
        return dict(tokens)

    inputs = {kind: encode(own.texts) for kind, own in texts.items()}
    labels = np.array(texts[INSIDE].labels)
    scores: dict[str, Scores] = {}
    accuracy = {}
    for name, p in ((PLAIN, 0.0), (MEAN, options.p)):
        model = fine_tune(train, encode, p, seed, options)
        softmax = {kind: predict(model, own) for kind, own in inputs.items()}
        scores[name] = {kind: entropy(own) for kind, own in softmax.items()}
        accuracy[name] = accuracy_of(softmax[INSIDE], labels)

    # ---- many forwards with masks: mutual information is what they disagree about --------------
    found = {}
    for kind, own in inputs.items():
        loader = loader_of(own, texts[kind].labels)
        found[kind] = mc_predict(
            model, loader, options.samples, seed=seed, batch_size=TOGETHER, progress=True
        )
    # ---- and one forward, in which variances travel ---------------------------------------------
    single = {
        kind: predict_moments(model, loader_of(own, texts[kind].labels), options.covariance)
        for kind, own in inputs.items()
    }
    # --------------------------------------------------------------------------------------------

    scores[ENTROPY] = {kind: known(own.entropy).numpy() for kind, own in found.items()}
    scores[INFORMATION] = {
        kind: known(own.mutual_information).numpy() for kind, own in found.items()
    }
    probabilities = known(found[INSIDE].probabilities)
    accuracy[ENTROPY] = accuracy[INFORMATION] = accuracy_of(probabilities, labels)
    scores[TRAVELLED] = {
        kind: known(own.mutual_information).numpy() for kind, own in single.items()
    }
    accuracy[TRAVELLED] = accuracy_of(known(single[INSIDE].probabilities), labels)
    return Run(scores, accuracy)


def loader_of(inputs: dict[str, Tensor], labels: list[int]) -> Any:
    """A data set in batches."""
    return DataLoader(examples(inputs, labels), TOGETHER, collate_fn=collate)


def load_texts(options: argparse.Namespace) -> tuple[Texts, dict[str, Texts]]:
    """Texts to learn from, and to read: all of them different articles."""
    articles = load_bbc()
    if options.held_out not in articles.classes:
        raise ValueError(f"--held-out must be one of {articles.classes}; got {options.held_out!r}")
    foreign = articles.classes.index(options.held_out)
    known = drop_class(articles, foreign)
    held_out = articles.take([i for i, label in enumerate(articles.labels) if label == foreign])
    size = options.test_size
    train, inside, words, letters, _ = stratified_split(known, options.train_size, *(size,) * 3)
    shuffle = random.Random(0)
    return train, {
        INSIDE: inside,
        f"class {options.held_out}": held_out.take(range(min(size, len(held_out)))),
        "shuffled words": changed(words, lambda text: shuffled_words(text, shuffle)),
        "shuffled letters": changed(letters, lambda text: shuffled_letters(text, shuffle)),
    }


def drop_class(data: Texts, label: int) -> Texts:
    """The texts of the other classes, which are numbered anew."""
    kept = [i for i, own in enumerate(data.labels) if own != label]
    names = [name for i, name in enumerate(data.classes) if i != label]
    labels = [data.labels[i] - (data.labels[i] > label) for i in kept]
    return Texts([data.texts[i] for i in kept], labels, names)


def changed(data: Texts, change: Callable[[str], str]) -> Texts:
    return Texts([change(text) for text in data.texts], data.labels, data.classes)


def shuffled_words(text: str, shuffle: random.Random) -> str:
    """The same words in a random order."""
    words = text.split()
    return " ".join(shuffle.sample(words, len(words)))


def shuffled_letters(text: str, shuffle: random.Random) -> str:
    """The same words in order, each with its letters in a random order."""
    return " ".join("".join(shuffle.sample(word, len(word))) for word in text.split())


def fine_tune(
    train: Texts,
    encode: Callable[[list[str]], dict[str, Tensor]],
    p: float,
    seed: int,
    options: argparse.Namespace,
) -> PreTrainedModel:
    """AdamW with a linear schedule; p = 0 is the plain model."""
    quiet()
    model = load_classifier(minilm(), train.classes, seed)

    # ---- DropConnect: one line puts it in ------------------------------------------------------
    if p > 0:
        apply_dropconnect(model, "all-linear", p=p)
    # --------------------------------------------------------------------------------------------

    inputs, labels = encode(train.texts), torch.tensor(train.labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, options.steps)
    model.train()
    batches = batches_of(len(train), options.batch)
    for _ in tqdm(range(options.steps), desc=f"p = {p:g}, seed {seed}", unit="step"):
        chosen = next(batches)
        loss = model(**{k: v[chosen] for k, v in inputs.items()}, labels=labels[chosen]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def examples(inputs: dict[str, Tensor], labels: list[int]) -> Any:
    """A data set as those of the `datasets` package: a dict for each text, with the label in it."""
    rows = zip(*inputs.values(), labels)
    return [dict(zip((*inputs, "labels"), row)) for row in rows]


def batches_of(count: int, size: int) -> Iterator[Tensor]:
    """Random batches without end; every example comes once an epoch."""
    while True:
        yield from torch.randperm(count).split(size)


@torch.no_grad()
def predict(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Probabilities of one forward in eval mode."""
    parts = zip(*(value.split(TOGETHER) for value in inputs.values()))
    logits = [model(**dict(zip(inputs, part))).logits for part in parts]
    return torch.cat(logits).softmax(-1)


def entropy(probabilities: Tensor) -> np.ndarray:
    """In nats, of each row."""
    nats: Tensor = torch.special.entr(probabilities).sum(-1)
    return nats.numpy()


def known(found: Tensor | None) -> Tensor:
    """What `mc_predict` leaves out of models that are no classifiers; this one is."""
    assert found is not None
    return found


def accuracy_of(probabilities: Tensor, labels: np.ndarray) -> float:
    return float((probabilities.argmax(-1).numpy() == labels).mean())


@dataclass(frozen=True)
class Auroc:
    """The area under the ROC curve, and each text's part in it (DeLong et al. 1988)."""

    inside: np.ndarray
    """Of each text inside: the share of foreign texts above it (ties count half)."""
    outside: np.ndarray
    """Of each foreign text: the share of texts inside below it."""

    @property
    def value(self) -> float:
        return float(self.outside.mean())

    @property
    def error(self) -> float:
        """Standard error over texts."""
        return math.sqrt(variance_of_mean(self.inside) + variance_of_mean(self.outside))


def variance_of_mean(values: np.ndarray) -> float:
    return float(values.var(ddof=1) / len(values))


def auroc(inside: np.ndarray, outside: np.ndarray) -> Auroc:
    """How well a score that is higher outside tells the two apart."""
    above = (outside > inside[:, None]) + 0.5 * (outside == inside[:, None])
    return Auroc(above.mean(1), above.mean(0))


def difference(own: Auroc, other: Auroc) -> tuple[float, float]:
    """Of two scores on the same texts, with its standard error, which is paired."""
    parts = own.inside - other.inside, own.outside - other.outside
    return own.value - other.value, math.sqrt(sum(variance_of_mean(part) for part in parts))


def summarise(runs: list[Run]) -> str:
    """AUROC and accuracy by measure: one seed with its error over texts, several with theirs over
    seeds."""
    kinds = foreign_kinds(runs)
    header = f"{'AUROC of uncertainty':<32}" + "".join(f"{k:<20}" for k in kinds) + "accuracy"
    lines = [header, "-" * len(header)]
    for measure in runs[0].scores:
        cells = []
        for kind in kinds:
            own = aurocs(runs, measure, kind)
            value, error = (
                estimate([a.value for a in own]) if own[1:] else (own[0].value, own[0].error)
            )
            cells.append(f"{f'{value:.3f} ± {error:.3f}':<20}")
        correct = float(np.mean([run.accuracy[measure] for run in runs]))
        lines.append(f"{measure:<32}{''.join(cells)}{100 * correct:.1f} %")
    return "\n".join(lines)


def foreign_kinds(runs: list[Run]) -> list[str]:
    return [kind for kind in runs[0].scores[PLAIN] if kind != INSIDE]


def aurocs(runs: list[Run], measure: str, kind: str) -> list[Auroc]:
    """One for each seed."""
    return [auroc(run.scores[measure][INSIDE], run.scores[measure][kind]) for run in runs]


def compare_all(runs: list[Run]) -> str:
    """What masks add: to the softmax of the plain training, and to that of the same model."""
    lines = []
    for own, other in (
        (INFORMATION, PLAIN),
        (INFORMATION, MEAN),
        (ENTROPY, MEAN),
        (TRAVELLED, INFORMATION),
    ):
        lines.append(f"AUROC, {own} against {other}:")
        for kind in foreign_kinds(runs):
            pairs = aurocs(runs, own, kind), aurocs(runs, other, kind)
            lines.append(compare_pairs(kind, *pairs))
    return "\n".join(lines)


def compare_pairs(kind: str, own: list[Auroc], other: list[Auroc]) -> str:
    if len(own) > 1:
        return compare(kind, [a.value for a in own], [a.value for a in other], "", 3)
    gap, error = difference(own[0], other[0])
    verdict = "more than noise" if abs(gap) > 1.96 * error else "within noise"
    return f"  {kind:<24}{gap:+.3f} ± {error:.3f}, {verdict}"


def draw(run: Run, path: Path) -> None:
    """Uncertainty of every text of one seed, and how the measures tell the kinds apart."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.8), layout="constrained")
    draw_texts(left, run)
    draw_aurocs(right, run)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_texts(axes: Any, run: Run) -> None:
    """A dot for every text: total uncertainty, and the part that comes from the weights."""
    kinds, colours = run.scores[INFORMATION], ("#2f6fb2", "#d55e00", "#009e73", "#cc79a7")
    floor = 1e-5
    for (kind, information), colour in zip(kinds.items(), colours):
        place = run.scores[ENTROPY][kind].clip(floor), information.clip(floor)
        axes.plot(*place, "o", color=colour, alpha=0.45, markersize=4, label=kind)
        middle = (np.median(values) for values in place)
        edge = {"markeredgecolor": "white", "markeredgewidth": 1.5, "zorder": 3}
        axes.plot(*middle, "D", color=colour, markersize=11, **edge)
    axes.set(xscale="log", yscale="log", xlabel="predictive entropy (nats)")
    axes.set(ylabel="mutual information (nats)")
    axes.set_title("Every test text (diamonds: medians)")
    axes.legend(frameon=False, loc="upper left")
    axes.grid(alpha=0.3)


def draw_aurocs(axes: Any, run: Run) -> None:
    kinds = foreign_kinds([run])
    for i, (measure, colour) in enumerate(COLOURS.items()):
        found = [aurocs([run], measure, kind)[0] for kind in kinds]
        places = np.arange(len(kinds)) + 0.15 * (i - 2)
        values, errors = [a.value for a in found], [a.error for a in found]
        axes.errorbar(places, values, errors, fmt="o", color=colour, capsize=4, label=measure)
    axes.axhline(0.5, color="#999999", linestyle=":", linewidth=1)
    axes.text(len(kinds) - 0.55, 0.505, "chance", ha="right", color="#777777")
    axes.set_xlim(-0.5, len(kinds) - 0.5)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set(ylabel="AUROC against articles, ± standard error", ylim=(0.4, 1.0))
    axes.set_title("How well uncertainty tells them apart (first seed)")
    axes.legend(frameon=False, loc="lower left")
    axes.grid(alpha=0.3, axis="y")


def write(runs: list[Run], options: argparse.Namespace) -> None:
    """All files, or none."""
    scores = [
        {
            "accuracy": run.accuracy,
            "scores": {
                measure: {kind: values.tolist() for kind, values in own.items()}
                for measure, own in run.scores.items()
            },
        }
        for run in runs
    ]
    with written_whole(options.output) as folder:
        draw(runs[0], folder / "uncertainty.png")
        results = {"options": vars(options), "runs": scores}
        (folder / "results.json").write_text(json.dumps(results, default=str) + "\n")


def form_of(text: str) -> Any:
    """Of a covariance, as `predict_moments` takes it."""
    return int(text) if text.isdigit() else text


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--held-out", default="tech", help="the class that is not trained on")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds to train with")
    parser.add_argument("--p", type=float, default=0.1, help="probability of dropping a weight")
    parser.add_argument("--samples", type=int, default=16, help="forwards with masks")
    parser.add_argument(
        "--covariance",
        type=form_of,
        default=16,
        help="of the one forward: diagonal, outputs, full, or a number of draws",
    )
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--train-size", type=int, default=256, help="training articles")
    parser.add_argument("--test-size", type=int, default=150, help="texts of each kind")
    parser.add_argument("--max-length", type=int, default=32, help="tokens of each text")
    parser.add_argument("--output", type=Path, default=Path("out/uncertainty"))
    options = parser.parse_args(arguments)
    if not 0 < options.p < 1:
        parser.error("--p must be in (0, 1); the model with p = 0 is always there to compare with")
    return options


def main() -> None:
    options = parse()
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything needed is installed
    runs = [run(seed, options) for seed in range(options.seeds)]
    print(f"\n{summarise(runs)}\n\n{compare_all(runs)}\n")
    if options.seeds == 1:
        print(
            "± is the standard error over texts, of these two trained models. It says nothing of how"
        )
        print("other trainings would come out: use --seeds 5 for that.")
    else:
        print("± is the standard error over seeds; differences are paired by seed (t test, 95 %).")
    write(runs, options)
    print(f"Written to {options.output}: uncertainty.png, results.json")


if __name__ == "__main__":
    main()
