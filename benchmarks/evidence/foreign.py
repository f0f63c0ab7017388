"""Who knows what it does not know? One protocol for texts and one for digits.

A model sees test examples of its classes (inside), and kinds of examples that it was not made for. An
uncertainty is good if it is higher there: the AUROC is the chance that a foreign example gets a higher
one than one inside. Every method has the same examples.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from uncertainty import auroc

from surgery import DropConnectModule, mc_predict, predict_moments

from .runs import Result, Row, Unit
from .scores import all_scores
from .tables import Column, by, table

INSIDE = "inside"
PLAIN, DROPOUT, BATCH, EXAMPLE = "plain", "Dropout", "a mask per batch", "a mask per example"
TRAININGS = (PLAIN, DROPOUT, BATCH, EXAMPLE)

SOFTMAX, ENSEMBLE = "softmax, plain training", "ensemble"


@dataclass(frozen=True)
class Guess:
    """What a method says of some examples."""

    probabilities: Tensor
    """(examples, classes)."""
    entropy: Tensor
    """Of these, in nats."""
    information: Tensor | None
    """Mutual information of class and weights, in nats: what the samples disagree about."""


Predict = Callable[[Any], Guess]
"""Of the examples of one kind."""


@dataclass(frozen=True)
class Task:
    """What texts and digits differ in."""

    kinds: Mapping[str, Any]
    """The examples that are looked at, `INSIDE` first."""
    labels: Tensor
    """Of those inside."""
    train: Callable[[str, int], Any]
    """A trained model, of the training's name and a seed; it is in eval mode."""
    logits: Callable[[Any, Any], Tensor]
    """Of a model and some examples."""
    batches: Callable[[Any], Any]
    """Examples as `mc_predict` takes them."""
    samples: int
    members: int


def units(settings: Any, seed: int) -> list[Unit]:
    return [{"training": training, "seed": seed} for training in TRAININGS]


def run(
    unit: Unit, settings: Any, device: torch.device, prepare: Callable[[Any, int, Any], Task]
) -> Result:
    """Train once (or all members of an ensemble), and score every method that this makes possible."""
    task = prepare(settings, unit["seed"], device)
    ways = methods(task, unit["training"], unit["seed"])
    return {name: scores(task, predict) for name, predict in ways}


def methods(task: Task, training: str, seed: int) -> Iterator[tuple[str, Predict]]:
    """The ways to predict by what one training gives, by name."""
    if training == PLAIN:
        members = [task.train(PLAIN, 1000 * i + seed) for i in range(task.members)]
        yield SOFTMAX, partial(single, task, members[0])
        yield ENSEMBLE, partial(several, task, members)
        return
    model = task.train(training, seed)
    many = dropped if is_operated(model) else with_dropout
    yield f"softmax, {training}", partial(single, task, model)
    yield f"MC, {training}", partial(many, task, model, seed)
    if training == BATCH:
        yield "one pass, a mask per batch", partial(one_pass, task, model)


def is_operated(model: Any) -> bool:
    return any(isinstance(module, DropConnectModule) for module in model.modules())


def single(task: Task, model: Any, examples: Any) -> Guess:
    found = of_many(task.logits(model, examples).unsqueeze(0))
    return Guess(found.probabilities, found.entropy, None)


def several(task: Task, models: list[Any], examples: Any) -> Guess:
    return of_many(torch.stack([task.logits(model, examples) for model in models]))


def with_dropout(task: Task, model: Any, seed: int, examples: Any) -> Guess:
    """The model's own Dropout, left on (Gal and Ghahramani 2016)."""
    torch.manual_seed(seed)
    model.train()
    found = of_many(torch.stack([task.logits(model, examples) for _ in range(task.samples)]))
    model.eval()
    return found


def dropped(task: Task, model: Any, seed: int, examples: Any) -> Guess:
    return of_prediction(mc_predict(model, task.batches(examples), task.samples, seed=seed))


def one_pass(task: Task, model: Any, examples: Any) -> Guess:
    """With as many draws as the others have samples."""
    return of_prediction(predict_moments(model, task.batches(examples), task.samples))


def of_prediction(found: Any) -> Guess:
    return Guess(found.probabilities.cpu(), found.entropy.cpu(), found.mutual_information.cpu())


def of_many(logits: Tensor) -> Guess:
    """Of (samples, examples, classes)."""
    each = logits.double().softmax(-1).cpu()
    middle = each.mean(0)
    entropy = torch.special.entr(middle).sum(-1)
    return Guess(middle, entropy, entropy - torch.special.entr(each).sum(-1).mean(0))


def scores(task: Task, predict: Predict) -> Result:
    """On the examples inside; and how well either uncertainty tells each other kind from them."""
    inside = predict(task.kinds[INSIDE])
    found: Result = all_scores(inside.probabilities, task.labels)
    for kind, examples in task.kinds.items():
        if kind != INSIDE:
            other = predict(examples)
            found[f"entropy {kind}"] = area(inside.entropy, other.entropy)
            if inside.information is not None and other.information is not None:
                found[f"information {kind}"] = area(inside.information, other.information)
    return found


def area(inside: Tensor, outside: Tensor) -> float:
    return auroc(inside.numpy(), outside.numpy()).value


def shuffled(texts: list[str], change: Callable[[str, random.Random], str]) -> list[str]:
    """The same for every seed of a training."""
    shuffle = random.Random(0)
    return [change(text, shuffle) for text in texts]


@dataclass(frozen=True)
class Cost:
    trainings: str
    forwards: str


def costs(samples: int, members: int) -> dict[str, Cost]:
    """By method, in the order of the tables."""
    found = {SOFTMAX: Cost("1", "1"), ENSEMBLE: Cost(str(members), str(members))}
    for training in TRAININGS[1:]:
        found[f"softmax, {training}"] = Cost("1", "1")
        found[f"MC, {training}"] = Cost("1", str(samples))
    return found | {"one pass, a mask per batch": Cost("1", "one pass: 2 to 3 a draw")}


def tables(rows: list[Row], settings: Any, kinds: tuple[str, ...]) -> str:
    """Two tables: calibration with AUROC by entropy, and AUROC by mutual information with costs."""
    named = methods_of(rows)
    cost = costs(settings.samples, settings.members)
    own = {name: named[name] for name in cost if name in named}
    if SOFTMAX not in own:
        return ""
    first = [Column("accuracy, %", "accuracy"), Column("NLL", "nll", 3), Column("ECE, %", "ece")]
    by_entropy = [Column(f"AUROC, {kind}", f"entropy {kind}", 3) for kind in kinds]
    parts = [table(own, SOFTMAX, [*first, *by_entropy])]
    several = {name: rows for name, rows in own.items() if not name.startswith("softmax")}
    if several:
        parts.append(information_table(several, own[SOFTMAX], kinds, cost))
    return "\n\n".join(parts)


def methods_of(rows: list[Row]) -> dict[str, list[Row]]:
    """A row for each method of each unit, by method."""
    each = [
        Row({"seed": row.unit["seed"], "method": name}, result, row.seconds, row.where)
        for row in rows
        for name, result in row.result.items()
    ]
    return by(each, list(dict.fromkeys(row.unit["method"] for row in each)), method_of)


def method_of(row: Row) -> str:
    return str(row.unit["method"])


def information_table(
    own: Mapping[str, list[Row]], softmax: list[Row], kinds: tuple[str, ...], cost: dict[str, Cost]
) -> str:
    """AUROC by mutual information, beside the entropy of plain training's softmax."""
    base = [
        Row(
            row.unit, {k.replace("entropy", "information"): v for k, v in row.result.items()}, 0, ""
        )
        for row in softmax
    ]
    columns = [Column(f"AUROC, {kind}", f"information {kind}", 3) for kind in kinds]
    lines = table({SOFTMAX: base, **own}, SOFTMAX, columns).splitlines()
    extra = [" trainings | forwards", "---|---"]
    extra += [f" {cost[name].trainings} | {cost[name].forwards}" for name in (SOFTMAX, *own)]
    return "\n".join(f"{line}{more} |" for line, more in zip(lines, extra))
