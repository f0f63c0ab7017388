"""What `predict_moments` costs, in forwards of the plain model.

    python -m benchmarks.moments_cost                   # one thread, and as many as there are cores
    python -m benchmarks.moments_cost minilm --threads 1 --device cuda

Each number is the least time of several rounds, in which all ways take turns.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from surgery import apply_dropconnect, mc_predict, predict_moments, strip_dropconnect

from .moments import called

P = 0.1


def perceptrons() -> Iterator[tuple[str, nn.Module, Any]]:
    torch.manual_seed(0)
    for width, rows in ((64, 32), (512, 128), (1024, 256)):
        layers = [nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Linear(width, 10))
        yield f"MLP 784-{width}-{width}-10, {rows} rows", model, torch.randn(rows, 784)


def minilms() -> Iterator[tuple[str, nn.Module, Any]]:
    """A classifier as that of `examples/uncertainty.py`, with random heads and words."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
        num_labels=4,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    for rows, tokens in ((4, 16), (64, 32), (16, 128)):
        inputs = {"input_ids": torch.randint(1000, 20000, (rows, tokens))}
        inputs["attention_mask"] = torch.ones(rows, tokens, dtype=torch.long)
        yield f"MiniLM-L6, {rows} texts of {tokens} tokens", model, inputs


def vits() -> Iterator[tuple[str, nn.Module, Any]]:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=192, num_hidden_layers=6, num_attention_heads=3, intermediate_size=768,
        image_size=64, patch_size=8, num_labels=10,
    )  # fmt: skip
    inputs = {"pixel_values": torch.randn(16, 3, 64, 64)}
    yield "ViT, 6 layers of 192, 16 images of 64 patches", ViTForImageClassification(config), inputs


CASES: dict[str, Callable[[], Iterator[tuple[str, nn.Module, Any]]]] = {
    "mlp": perceptrons,
    "minilm": minilms,
    "vit": vits,
}

WAYS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "plain": lambda model, x: called(model, x),
    "diagonal": lambda model, x: predict_moments(model, x, class_dim=None),
    "outputs": lambda model, x: predict_moments(model, x, "outputs", class_dim=None),
    "8 draws": lambda model, x: predict_moments(model, x, 8, class_dim=None),
    "2 samples": lambda model, x: mc_predict(model, x, 2, batch_size=1, class_dim=None),
}


@torch.no_grad()
def times(
    model: nn.Module, inputs: Any, seconds: float, names: Sequence[str] = tuple(WAYS)
) -> dict[str, float]:
    """The least of each way, in seconds."""
    on_gpu = next(model.parameters()).is_cuda

    def once(way: Callable[[nn.Module, Any], Any]) -> float:
        begun = time.perf_counter()
        way(model, inputs)
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    least, ways = {}, {name: WAYS[name] for name in names}
    for name, way in ways.items():
        once(way)
        least[name] = once(way)
    rounds = max(3, min(50, round(seconds / sum(least.values()))))
    for _ in range(rounds):
        for name, way in ways.items():
            least[name] = min(least[name], once(way))
    return least


def moved(inputs: Any, device: str) -> Any:
    """Inputs on a device."""
    if isinstance(inputs, dict):
        return {name: value.to(device) for name, value in inputs.items()}
    return inputs.to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--threads", type=int, nargs="*", default=[1, os.cpu_count() or 1])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each model")
    parser.add_argument("--device", default="cpu")
    others = [name for name in WAYS if name != "plain"]
    parser.add_argument("--ways", nargs="*", choices=others, default=others)
    options = parser.parse_args()
    others = options.ways
    for threads in options.threads:
        torch.set_num_threads(threads)
        print(f"{threads} thread{'s' * (threads > 1)}\n")
        print(f"| | plain, ms | {' | '.join(others)} |\n|{'---|' * (len(others) + 2)}")
        for case in options.cases:
            for name, model, inputs in CASES[case]():
                apply_dropconnect(model.eval().to(options.device), [nn.Linear], p=P)
                given = moved(inputs, options.device)
                found = times(model, given, options.seconds, ["plain", *others])
                strip_dropconnect(model)
                ratios = [f"{found[other] / found['plain']:.1f}" for other in others]
                print(
                    f"| {name} | {1000 * found['plain']:.1f} | {' | '.join(ratios)} |", flush=True
                )
        print()


if __name__ == "__main__":
    main()
