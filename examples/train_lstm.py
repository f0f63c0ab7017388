"""Train a word-level language model with a weight-dropped LSTM, the heart of AWD-LSTM.

    python examples/train_lstm.py                        # about 3 minutes on 2 CPU cores
    python examples/train_lstm.py --hidden 400 --p 0.7 --seeds 3

The same two-layer LSTM learns BBC news twice, without and with DropConnect on its hidden-to-hidden
weights (Merity et al. 2017): one mask for each window of backpropagation, the same at all its time
steps. The text is short, so the plain LSTM soon learns it by heart and its validation perplexity
rises. Prints a table and draws both curves.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from bbc import Texts, load_bbc, stratified_split
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from surgery import apply_dropconnect, strip_dropconnect

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

State = tuple[Tensor, Tensor]
VALIDATION_ARTICLES = 100
UNKNOWN, END = "<unk>", "<eos>"


class LanguageModel(nn.Module):
    """Embedding, two LSTM layers, and an output layer tied with the embedding."""

    def __init__(self, words: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, hidden)
        self.lstm = nn.LSTM(hidden, hidden, num_layers=2)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, words)
        self.head.weight = self.embed.weight
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)
        nn.init.zeros_(self.head.bias)

    def forward(self, words: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Logits of every next word, (time, batch, words), and the state to carry on with."""
        output, state = self.lstm(self.dropout(self.embed(words)), state)
        return self.head(self.dropout(output)), state


@dataclass(frozen=True)
class Corpus:
    """Words as numbers, in columns that are read side by side: (time, batch)."""

    vocabulary: list[str]
    train: Tensor
    validation: Tensor


@dataclass
class Run:
    """What is known of one training. Perplexities are measured after each epoch."""

    train: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    step_seconds: float = 0.0
    """Median."""

    @property
    def best(self) -> int:
        """The epoch, from 0, with the lowest validation perplexity."""
        return min(range(len(self.validation)), key=self.validation.__getitem__)


def train(p: float, seed: int, text: Corpus, options: argparse.Namespace) -> Run:
    """Train one model from scratch; p = 0 is the plain LSTM."""
    torch.manual_seed(seed)
    model = LanguageModel(len(text.vocabulary), options.hidden, options.dropout)

    # ---- DropConnect: one line puts it in. A target that is an LSTM means its weight_hh_* ------
    if p > 0:
        apply_dropconnect(model, nn.LSTM, p=p)
    # --------------------------------------------------------------------------------------------

    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    run, seconds = Run(), list[float]()
    steps = options.epochs * sum(1 for _ in windows(text.train, options.window))
    with tqdm(total=steps, desc=f"p = {p:g}, seed {seed}", unit="step") as bar:
        for _ in range(options.epochs):
            seconds += train_epoch(model, optimizer, text.train, options.window, bar)
            run.train.append(perplexity(model, text.train[: len(text.validation)], options.window))
            run.validation.append(perplexity(model, text.validation, options.window))
            bar.set_postfix(validation=f"{run.validation[-1]:.0f}")

    # ---- ... and one line takes it out: a plain LSTM with exactly the same perplexity ----------
    if p > 0:
        strip_dropconnect(model)
        assert perplexity(model, text.validation, options.window) == run.validation[-1]
    # --------------------------------------------------------------------------------------------

    run.step_seconds = statistics.median(seconds)
    return run


def train_epoch(
    model: LanguageModel, optimizer: torch.optim.Optimizer, words: Tensor, window: int, bar: tqdm
) -> list[float]:
    """One pass over the text; returns how long each step took."""
    model.train()
    state, seconds = None, []
    for inputs, targets in windows(words, window):
        begun = time.perf_counter()
        output, state = model(inputs, state)
        state = (state[0].detach(), state[1].detach())  # truncated backpropagation through time
        loss = F.cross_entropy(output.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - begun)
        bar.update()
    return seconds


@torch.no_grad()
def perplexity(model: LanguageModel, words: Tensor, window: int) -> float:
    """exp of the mean loss per word, in eval mode: all weights act, nothing is dropped."""
    model.eval()
    state, total, count = None, 0.0, 0
    for inputs, targets in windows(words, window):
        output, state = model(inputs, state)
        total += F.cross_entropy(output.flatten(0, 1), targets.flatten(), reduction="sum").item()
        count += targets.numel()
    return math.exp(total / count)


def windows(words: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Consecutive stretches of the text, and the same moved on by one word."""
    for start in range(0, len(words) - 1, size):
        stop = min(start + size, len(words) - 1)
        yield words[start:stop], words[start + 1 : stop + 1]


def load_corpus(articles: int, batch: int) -> Corpus:
    """Text of the given number of articles, and of others to validate on."""
    chosen, validation, _ = stratified_split(load_bbc(), articles, VALIDATION_ARTICLES)
    words = tokenize(chosen)
    counts = Counter(words)
    vocabulary = [UNKNOWN, *(word for word, n in counts.most_common() if n >= 3)]
    return Corpus(
        vocabulary,
        columns(words, vocabulary, batch),
        columns(tokenize(validation), vocabulary, batch),
    )


def tokenize(data: Texts) -> list[str]:
    """Lower-case words, numbers and punctuation marks, with an end mark after each article."""
    return [
        word
        for text in data.texts
        for word in (*re.findall(r"[a-z]+|\d|[^\w\s]", text.lower()), END)
    ]


def columns(words: list[str], vocabulary: list[str], batch: int) -> Tensor:
    """The numbers of the words, (time, batch): each column is one part of the text. Words that the
    training text has fewer than three times count as one, which comes up more often, and is guessed
    more easily, in the validation text."""
    numbers = {word: i for i, word in enumerate(vocabulary)}
    ids = torch.tensor([numbers.get(word, 0) for word in words])
    length = len(ids) // batch
    return ids[: length * batch].view(batch, length).t().contiguous()


def summarise(runs: dict[float, list[Run]]) -> str:
    """A table of the best epoch, the last epoch and the time of a step."""
    header = (
        f"{'p':<6}{'best validation perplexity':<30}{'after the last epoch':<24}{'ms per step'}"
    )
    lines = [header, "-" * len(header)]
    for p, own in runs.items():
        best = mean_and_error([run.validation[run.best] for run in own])
        epochs = " ".join(str(run.best + 1) for run in own)
        last = mean_and_error([run.validation[-1] for run in own])
        step = 1000 * statistics.median(run.step_seconds for run in own)
        lines.append(f"{p:<6g}{f'{best} (epoch {epochs})':<30}{last:<24}{step:.0f}")
    return "\n".join(lines)


def mean_and_error(values: list[float]) -> str:
    """The mean, with its standard error if there are several values."""
    mean = f"{statistics.mean(values):.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}"


def describe(runs: dict[float, list[Run]]) -> str:
    """What the curves show, in words."""
    plain, dropped = (
        [statistics.mean(values) for values in zip(*(run.validation for run in own))]
        for own in runs.values()
    )
    change = 100 * (min(dropped) / min(plain) - 1)
    return (
        f"Without DropConnect, validation perplexity ends {rise(plain)}; with it, {rise(dropped)}. The "
        f"best value with DropConnect is {abs(change):.1f} % {'lower' if change < 0 else 'higher'}."
    )


def rise(curve: list[float]) -> str:
    """How far a curve ends above its lowest point."""
    above = 100 * (curve[-1] / min(curve) - 1)
    return f"{above:.1f} % above its best" if above > 0 else "at its best"


def draw(runs: dict[float, list[Run]], options: argparse.Namespace, path: Path) -> None:
    """Validation and training perplexity by epoch, one line for each seed."""
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    epochs = range(1, options.epochs + 1)
    for (p, own), colour in zip(runs.items(), ("#555555", "#d55e00")):
        name = f"DropConnect on weight_hh, p = {p:g}" if p else "plain LSTM"
        for i, run in enumerate(own):
            label = f"{name}: validation" if i == 0 else None
            axes.plot(epochs, run.validation, color=colour, label=label, linewidth=2)
            axes.plot(run.best + 1, run.validation[run.best], "o", color=colour)
            label = f"{name}: training text" if i == 0 else None
            axes.plot(epochs, run.train, color=colour, label=label, linewidth=1, linestyle="--")
    axes.set(
        title=f"Word-level LSTM on {options.articles} BBC articles, with and without DropConnect",
        xlabel="epoch (dot: lowest validation perplexity)",
        ylabel="perplexity, everything kept (log scale)",
        yscale="log",
    )
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--p", type=float, default=0.5, help="probability of dropping a weight")
    parser.add_argument("--hidden", type=int, default=200, help="size of embedding and LSTM layers")
    parser.add_argument("--dropout", type=float, default=0.0, help="plain Dropout, in both runs")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--articles", type=int, default=150, help="how much text to train on")
    parser.add_argument("--window", type=int, default=35, help="time steps of backpropagation")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds to train with")
    parser.add_argument("--output", type=Path, default=Path("out/lstm"))
    options = parser.parse_args(arguments)
    if not 0 < options.p <= 1:
        parser.error("--p must be in (0, 1]; the run with p = 0 is always there to compare with")
    return options


def main() -> None:
    options = parse()
    options.output.mkdir(parents=True, exist_ok=True)
    text = load_corpus(options.articles, options.batch)
    print(
        f"{text.train.numel():,} words to train on, {text.validation.numel():,} to validate on, a "
        f"vocabulary of {len(text.vocabulary):,}"
    )
    runs = {
        p: [train(p, seed, text, options) for seed in range(options.seeds)]
        for p in (0.0, options.p)
    }
    print(f"\n{summarise(runs)}\n\n{describe(runs)}")
    if options.seeds == 1:
        print("(One seed; --seeds 3 shows the spread.)")
    draw(runs, options, options.output / "perplexity.png")
    print(f"Curves: {options.output / 'perplexity.png'}")


if __name__ == "__main__":
    main()
