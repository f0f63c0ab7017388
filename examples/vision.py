"""Fine-tune a vision model on few images, plainly, with DropConnect, and with mixout.

    python examples/vision.py                       # about 2 minutes on 2 CPU cores, no downloads
    python examples/vision.py --timm resnet18       # a model of timm, if that is installed

A small vision transformer first learns the handwritten digits 0 to 4 (scikit-learn's, 8 x 8 pixels)
from all that there are. Then it is given the digits 5 to 9, of each only a few, and is fine-tuned on
these: as it is, with every linear layer and convolution dropping toward zero (DropConnect, Wan et al.
2013), and toward its weights from before (mixout, Lee et al. 2020). Prints a table over seeds, and
draws what was learned from and how often each model is wrong.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from digits import Digits, load_digits
from report import compare, estimate, written_whole
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from surgery import apply_dropconnect, dropconnect_sites, strip_dropconnect

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PLAIN, ZERO, PRETRAINED = "fine-tuning", "DropConnect", "mixout"
COLOURS = {PLAIN: "#555555", ZERO: "#d55e00", PRETRAINED: "#0072b2"}
CLASSES = 5


@dataclass(frozen=True)
class Run:
    """What one fine-tuning found."""

    wrong: Tensor
    """Of each test image, whether it was classified wrongly."""
    sites: int
    """Weights that dropped."""

    @property
    def error(self) -> float:
        """In percent."""
        return 100 * float(self.wrong.float().mean())


def build(options: argparse.Namespace) -> nn.Module:
    """A vision transformer of transformers, or a model of timm; its weights are random."""
    if options.timm is not None:
        import timm

        model: nn.Module = timm.create_model(options.timm, num_classes=CLASSES, in_chans=1)
        return model
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    vit: nn.Module = ViTForImageClassification(config)
    return vit


def logits(model: nn.Module, images: Tensor, options: argparse.Namespace) -> Tensor:
    """Of images with 64 pixels each; models of timm get them 32 x 32."""
    x = images.view(-1, 1, 8, 8) * 2 - 1
    if options.timm is not None:
        return model(F.interpolate(x, size=32, mode="bilinear"))  # type: ignore[no-any-return]
    return model(x).logits  # type: ignore[no-any-return]


def train(
    model: nn.Module, data: Digits, steps: int, lr: float, options: argparse.Namespace
) -> None:
    """AdamW with a learning rate that falls to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(data), (options.batch,))
        loss = F.cross_entropy(logits(model, data.images[chosen], options), data.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def new_head(model: nn.Module) -> None:
    """Forget what the last layer has learned: the classes are others now."""
    head: Any = getattr(model, "classifier", None) or model.get_classifier()  # type: ignore[operator]
    head.reset_parameters()


def fine_tune(
    method: str, model: nn.Module, few: Digits, test: Digits, options: argparse.Namespace
) -> Run:
    """One fine-tuning of a copy of the pretrained model."""
    model = copy.deepcopy(model)

    # ---- DropConnect: every weight of a linear layer or a convolution drops --------------------
    if method != PLAIN:
        toward = "pretrained" if method == PRETRAINED else "zero"
        apply_dropconnect(model, [nn.Linear, nn.Conv2d], p=options.p, toward=toward)
    # --------------------------------------------------------------------------------------------

    train(model, few, options.steps, options.lr, options)
    sites = len(dropconnect_sites(model))
    if sites:
        strip_dropconnect(model)  # the plain model again
    with torch.no_grad():
        found = torch.cat([logits(model, part, options) for part in test.images.split(256)])
    return Run(found.argmax(-1) != test.labels, sites)


def load(seed: int, options: argparse.Namespace) -> tuple[Digits, Digits, Digits]:
    """All digits 0 to 4; some of each of 5 to 9, and all others of these, numbered from 0."""
    digits = load_digits()
    old, new = (digits.take((digits.labels // CLASSES == part).nonzero()[:, 0]) for part in (0, 1))
    new = Digits(new.images, new.labels - CLASSES)
    order = torch.randperm(len(new), generator=torch.Generator().manual_seed(seed))
    shuffled = new.take(order)
    places = [(shuffled.labels == label).nonzero()[:, 0] for label in range(CLASSES)]
    few = torch.cat([place[: options.each] for place in places])
    others = torch.cat([place[options.each :] for place in places])
    return old, shuffled.take(few), shuffled.take(others)


def run(options: argparse.Namespace) -> dict[str, list[Run]]:
    """Every method with every seed, each from the model that this seed has pretrained."""
    runs: dict[str, list[Run]] = {method: [] for method in COLOURS}
    for seed in tqdm(range(options.seeds), unit="seed"):
        old, few, test = load(seed, options)
        torch.manual_seed(seed)
        model = build(options)
        train(model, old, options.pretraining, options.lr, options)
        new_head(model)
        for method, own in runs.items():
            torch.manual_seed(seed)
            own.append(fine_tune(method, model, few, test, options))
    return runs


def summarise(runs: dict[str, list[Run]], options: argparse.Namespace) -> str:
    """A table with a row for each method, and what the others are against plain fine-tuning."""
    header = f"{'method':<16}{'test error':<18}{'sites':<8}"
    lines = [header, "-" * len(header)]
    for method, own in runs.items():
        mean, error = estimate([one.error for one in own])
        lines.append(f"{method:<16}{f'{mean:.2f} ± {error:.2f} %':<18}{own[0].sites:<8}")
    lines += ["", "Error against plain fine-tuning, paired by seed:"]
    plain = [one.error for one in runs[PLAIN]]
    for method in (ZERO, PRETRAINED):
        lines.append(compare(method, [one.error for one in runs[method]], plain, "points"))
    return "\n".join(lines)


def draw(runs: dict[str, list[Run]], options: argparse.Namespace, path: Path) -> None:
    """The images of the first seed that were fine-tuned on, and the errors of all seeds."""
    figure = plt.figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subfigures(1, 2)
    _, few, _ = load(0, options)
    shown = min(options.each, 8)
    for row, axes in enumerate(left.subplots(CLASSES, shown, squeeze=False)):
        own = few.images[few.labels == row]
        for image, axis in zip(own, axes):
            axis.imshow(image.view(8, 8), cmap="gray_r")
            axis.set_axis_off()
    left.suptitle(f"What there is to learn from: {options.each} images of each digit")
    axis = right.subplots()
    for place, (method, own_runs) in enumerate(runs.items()):
        errors = [one.error for one in own_runs]
        mean, error = estimate(errors)
        colour = COLOURS[method]
        axis.plot([place] * len(errors), errors, "o", color=colour, alpha=0.4)
        axis.errorbar(place, mean, error, fmt="_", color=colour, capsize=12, markersize=24)
    axis.set_xticks(range(len(runs)), list(runs))
    axis.set(ylabel="test error (%)", xlim=(-0.5, len(runs) - 0.5))
    axis.grid(alpha=0.3, axis="y")
    right.suptitle("Errors by seed, mean ± standard error")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write(runs: dict[str, list[Run]], options: argparse.Namespace) -> None:
    """All files, or none."""
    errors = {method: [one.error for one in own] for method, own in runs.items()}
    with written_whole(options.output) as folder:
        draw(runs, options, folder / "vision.png")
        text = json.dumps({"options": vars(options), "errors": errors}, default=str)
        (folder / "results.json").write_text(text + "\n")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--timm", help="name of a model of timm, instead of a ViT of transformers")
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds to train with")
    parser.add_argument("--p", type=float, default=0.2, help="probability of dropping a weight")
    parser.add_argument("--width", type=int, default=64, help="of the vision transformer")
    parser.add_argument("--each", type=int, default=5, help="images of each digit to fine-tune on")
    parser.add_argument("--pretraining", type=int, default=400, help="steps on the digits 0 to 4")
    parser.add_argument("--steps", type=int, default=200, help="steps on the digits 5 to 9")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, default=Path("out/vision"))
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error("--seeds must be at least 2: the table is about the methods, not two models")
    return options


def main() -> None:
    options = parse()
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything needed is installed
    runs = run(options)
    print(f"\n{summarise(runs, options)}\n")
    write(runs, options)
    print(f"Written to {options.output}: vision.png, results.json")


if __name__ == "__main__":
    main()
