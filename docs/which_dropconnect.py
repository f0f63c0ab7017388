"""Every number of which-dropconnect.md, and its figure.

    python docs/which_dropconnect.py            # prints; under a minute
    python docs/which_dropconnect.py --write    # also updates the page and draws the figure

Same seeds, same numbers. The layer written by hand that the page shows is the class below.
"""

from __future__ import annotations

import argparse
import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from which_dropconnect_figure import Measured, draw

from surgery import apply_dropconnect, set_inference, strip_dropconnect

PAGE = Path(__file__).with_name("which-dropconnect.md")
FIGURE = PAGE.with_suffix(".svg")

LAYERS, INPUTS, UNITS, EXAMPLES = 40, 16, 8, 2
"""Random layers, and the size of each. A unit has 2**INPUTS masks."""

BATCHES = (1, 4, 16, 64, 256)
REPEATS, DRAWS = 10, 50
"""For the variance of gradients: estimates, and draws in each."""

PS = (0.3, 0.5)


# ---- by hand -----------------------------------------------------------------------------------


class DropConnectLinear(nn.Linear):
    """nn.Linear with the paper's masks: one for each example."""

    p = 0.5  # probability of dropping; the paper's p is that of keeping

    def masks(self, examples: int) -> Tensor:
        return torch.rand(examples, *self.weight.shape) >= self.p

    def forward(self, x: Tensor) -> Tensor:  # (batch, in) -> (batch, out)
        if not self.training:
            return F.linear(x, self.weight, self.bias)
        weight = self.masks(len(x)) * self.weight / (1 - self.p)  # (batch, out, in)
        return torch.einsum("boi,bi->bo", weight, x) + self.bias


def expected_relu(layer: nn.Linear, x: Tensor, p: float) -> Tensor:
    """The paper's inference for ReLU, without draws."""
    mean = F.linear(x, layer.weight, layer.bias)
    std = (p / (1 - p) * F.linear(x**2, layer.weight**2)).sqrt()
    z = torch.distributions.Normal(0.0, 1.0)
    return mean * z.cdf(mean / std) + std * z.log_prob(mean / std).exp()


def drop_connect(branch: Tensor, p: float, keep: Tensor) -> Tensor:
    """EfficientNet's function of that name; `keep` is its random bit for each example."""
    return branch / (1 - p) * keep.view(-1, *(1 for _ in branch.shape[1:]))


# ---- when they agree ---------------------------------------------------------------------------


def agreements() -> dict[str, bool]:
    """Statements of the page that hold exactly, checked. Rounding is 1e-12 in float64."""
    return {
        "by hand = sampling='example', outputs and gradients": by_hand_is_per_example(),
        "by hand = inference='moments'": by_hand_is_moments(),
        "batch of one: per batch = per example, from the same seed": batch_of_one(),
        "eval(), mean inference: the plain layer, bit for bit": mean_is_plain(),
        "no activation: mean = moments = exact": linear_model(),
        "EfficientNet's drop_connect = unit='tensor', sampling='example'": is_drop_connect(),
    }


def masks_of(layer: nn.Linear, examples: int, seed: int) -> Tensor:
    """The masks that an operated layer draws after that seed: (examples, out, in), bool. Rows of the
    identity, as tokens of each example, read its masked weight."""
    size = layer.in_features
    torch.manual_seed(seed)
    used = layer(torch.eye(size).expand(examples, size, size)) - layer.bias
    return used.detach().transpose(1, 2).abs() > 1e-9


def pair(p: float = 0.5, **options: Any) -> tuple[DropConnectLinear, nn.Linear, Tensor]:
    """Two layers with the same weights, the second operated, and a batch."""
    torch.manual_seed(0)
    plain, x = DropConnectLinear(6, 5), torch.randn(4, 6)
    operated = nn.Linear(6, 5)
    operated.load_state_dict(plain.state_dict())
    return plain, apply_dropconnect(operated, nn.Linear, p=p, **options), x


def same(*pairs: tuple[Any, Any]) -> bool:
    return all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in pairs)


def by_hand_is_per_example() -> bool:
    ours, operated, x = pair(sampling="example")
    kept = masks_of(operated, len(x), seed=1)
    ours.masks = lambda examples: kept  # type: ignore[method-assign]
    torch.manual_seed(1)
    expected, found = ours(x), operated(x)
    expected.square().sum().backward()
    found.square().sum().backward()
    gradients = operated.weight_raw.grad, operated.bias.grad
    return same((expected, found), (ours.weight.grad, gradients[0]), (ours.bias.grad, gradients[1]))


def by_hand_is_moments() -> bool:
    plain, _, x = pair()
    model = with_relu(plain, 0.5)
    with set_inference(model, "moments"):
        return same((model(x), expected_relu(plain, x, 0.5)))


def with_relu(layer: nn.Linear, p: float) -> nn.Module:
    """A copy of the layer with DropConnect, and ReLU, in eval mode."""
    copy = nn.Linear(layer.in_features, layer.out_features)
    copy.load_state_dict(layer.state_dict())
    model = nn.Sequential(copy, nn.ReLU()).eval()
    return apply_dropconnect(model, "0", p=p, sampling="example")


def batch_of_one() -> bool:
    outputs = []
    for sampling in ("batch", "example"):
        _, operated, x = pair(sampling=sampling)
        torch.manual_seed(2)
        outputs.append(operated(x[:1]))
    return same((outputs[0], outputs[1]))


def mean_is_plain() -> bool:
    plain, operated, x = pair(sampling="example")
    return torch.equal(operated.eval()(x), plain.eval()(x))


def linear_model() -> bool:
    plain, operated, x = pair(sampling="example")
    set_inference(operated, "moments")
    exact = enumerate_masks(plain.weight, plain.bias, x, 0.5, lambda u: u)
    return same((operated.eval()(x), exact), (plain.eval()(x), exact))


def is_drop_connect() -> bool:
    plain, operated, x = pair(unit="tensor", sampling="example", bias=True)
    torch.manual_seed(3)
    found = operated(x)
    keep = found.detach().abs().amax(1) > 0
    assert 0 < keep.sum() < len(keep)
    return same((found, drop_connect(plain.eval()(x), 0.5, keep)))


# ---- errors of inference -----------------------------------------------------------------------


@torch.no_grad()
def enumerate_masks(
    weight: Tensor, bias: Tensor, x: Tensor, p: float, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """E[activation(W_used x + b)] over all masks: (examples, out). Units have masks of their own, so
    each is the sum over 2**in masks of one row."""
    size = weight.shape[1]
    masks = (torch.arange(2**size)[:, None] >> torch.arange(size) & 1).to(weight.dtype)
    kept = masks.sum(1)
    chance = (1 - p) ** kept * p ** (size - kept)
    products = (x[:, None] * weight / (1 - p)).flatten(0, 1)  # (examples * out, in)
    u = (masks @ products.T).view(len(masks), len(x), -1) + bias
    return torch.einsum("m,mbo->bo", chance, activation(u))


@torch.no_grad()
def errors_of_one(seed: int, p: float, inputs: int = INPUTS) -> dict[str, float]:
    """Root mean square error of each way of inference on one random layer, in percent of the root mean
    square of the exact expectation."""
    torch.manual_seed(seed)
    plain, x = nn.Linear(inputs, UNITS), torch.randn(EXAMPLES, inputs)
    exact = enumerate_masks(plain.weight, plain.bias, x, p, torch.relu)
    model = with_relu(plain, p)
    found = {"mean": model(x)}
    for draws in (10, 100, 1000):
        with set_inference(model, "moments", samples=draws):
            found[f"{draws} draws"] = model(x)
    with set_inference(model, "moments"):
        found["moments"] = model(x)
    with set_inference(model, "sample"):
        found["1000 masks"] = model(x.repeat(1000, 1)).view(1000, EXAMPLES, UNITS).mean(0)
    scale = exact.square().mean().sqrt()
    return {k: 100 * float((v - exact).square().mean().sqrt() / scale) for k, v in found.items()}


def inference_errors(p: float, layers: int = LAYERS, inputs: int = INPUTS) -> Measured:
    """Errors in percent, over random layers, by way of inference."""
    runs = [errors_of_one(seed, p, inputs) for seed in range(layers)]
    return {name: estimate([run[name] for run in runs]) for name in runs[0]}


def estimate(values: list[float]) -> tuple[float, float]:
    found = torch.tensor(values)
    return float(found.mean()), float(found.std()) / math.sqrt(len(values))


# ---- variance of gradients ---------------------------------------------------------------------


def gradient_variances(p: float = 0.5) -> dict[int, Measured]:
    """Total variance, over batches and masks, of the gradient of a dropped weight, times the batch
    size: by batch size and sampling. The unit is that of one example."""
    found = {
        size: {name: variances(sampling, size, p) for name, sampling in SAMPLINGS.items()}
        for size in BATCHES
    }
    one = estimate(found[1]["per example"])[0]
    return {
        size: {name: estimate([size * v / one for v in values]) for name, values in row.items()}
        for size, row in found.items()
    }


SAMPLINGS = {"no masks": None, "per example": "example", "per batch": "batch"}


def variances(sampling: Any, size: int, p: float) -> list[float]:
    """Independent estimates, each from some draws."""
    model, data, labels = half_trained(p)
    weight = model[0].get_parameter("weight")
    if sampling is not None:
        apply_dropconnect(model, "0", p=p, sampling=sampling)

    def gradient() -> Tensor:
        chosen = torch.randint(len(data), (size,))
        loss = F.cross_entropy(model(data[chosen]), labels[chosen])
        return torch.autograd.grad(loss, weight)[0].flatten()

    return [
        float(torch.stack([gradient() for _ in range(DRAWS)]).var(0).sum()) for _ in range(REPEATS)
    ]


def half_trained(p: float) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network of two layers after a hundred steps with masks per example, and its data: random
    inputs, classes by the largest of four random projections."""
    torch.manual_seed(0)
    data = torch.randn(1024, 20)
    labels = (data @ torch.randn(20, 4)).argmax(1)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4))
    apply_dropconnect(model, "0", p=p, sampling="example")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(100):
        chosen = torch.randint(len(data), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(data[chosen]), labels[chosen]).backward()
        optimizer.step()
    return strip_dropconnect(model), data, labels


# ---- masks, to look at -------------------------------------------------------------------------

DIAGRAMS: dict[str, dict[str, Any]] = {
    "WeightDrop\none mask per call": {"sampling": "batch"},
    "DropConnect (paper)\none mask per example": {"sampling": "example"},
    "Dropout\ncolumns, per example": {"sampling": "example", "unit": "input"},
    "EfficientNet drop_connect\nall or nothing, per example": {
        "sampling": "example",
        "unit": "tensor",
    },
}


def drawn_masks() -> dict[str, Tensor]:
    """The masks of four examples, as the library draws them: (4, 5, 6) by title."""
    found = {}
    for title, options in DIAGRAMS.items():
        torch.manual_seed(0)
        layer = apply_dropconnect(nn.Linear(6, 5), nn.Linear, p=0.5, **options)
        found[title] = masks_of(layer, 4, seed=4)
    return found


# ---- the page ----------------------------------------------------------------------------------


def tables() -> tuple[dict[str, str], dict[float, Measured], dict[int, Measured]]:
    """The Markdown of every table, by name, and what they show."""
    errors = {p: inference_errors(p) for p in PS}
    gradients = gradient_variances()
    by_inputs = {size: inference_errors(0.5, inputs=size)["moments"] for size in (4, 8)}
    by_inputs[INPUTS] = errors[0.5]["moments"]
    found = {
        "agreements": agreement_table(agreements()),
        "errors": error_table(errors),
        "inputs": sentence(by_inputs),
        "gradients": gradient_table(gradients),
    }
    return found, errors, gradients


def agreement_table(checks: dict[str, bool]) -> str:
    rows = [f"| {statement} | {'yes' if holds else 'NO'} |" for statement, holds in checks.items()]
    return "\n".join(["| exactly equal | checked |", "|---|---|", *rows])


NAMES = {
    "mean": '`"mean"`: the weights as they are',
    "10 draws": "the paper, Z = 10 draws",
    "100 draws": "the paper, Z = 100",
    "1000 draws": "the paper, Z = 1000",
    "moments": '`"moments"`: the same without draws',
    "1000 masks": "1000 forwards with real masks",
}


def error_table(errors: dict[float, Measured]) -> str:
    header = "| inference | " + " | ".join(f"p = {p:g}" for p in errors) + " |"
    rows = [
        f"| {NAMES[name]} | " + " | ".join(cell(*errors[p][name], " %") for p in errors) + " |"
        for name in NAMES
    ]
    return "\n".join([header, "|---" * (len(errors) + 1) + "|", *rows])


def sentence(by_inputs: dict[int, tuple[float, float]]) -> str:
    sizes = ", ".join(str(size) for size in by_inputs)
    values = ", ".join(cell(*value, " %") for value in by_inputs.values())
    return f"(The error of moments at p = 0.5 with {sizes} inputs: {values}.)"


def gradient_table(gradients: dict[int, Measured]) -> str:
    header = "| batch | " + " | ".join(SAMPLINGS) + " |"
    rows = [
        f"| {size} | " + " | ".join(cell(*row[name]) for name in SAMPLINGS) + " |"
        for size, row in gradients.items()
    ]
    return "\n".join([header, "|---" * (len(SAMPLINGS) + 1) + "|", *rows])


def cell(mean: float, error: float, unit: str = "") -> str:
    """Rounded to the first digit of the standard error."""
    places = max(0, -math.floor(math.log10(float(f"{error:.0e}"))))
    return f"{mean:.{places}f} ± {error:.{places}f}{unit}"


IMPORTS = """import torch
import torch.nn.functional as F
from torch import Tensor, nn"""


def written_by_hand() -> str:
    """The code that the page shows."""
    parts = [inspect.getsource(part).rstrip() for part in (DropConnectLinear, expected_relu)]
    return f"```python\n{IMPORTS}\n\n\n" + "\n\n\n".join(parts) + "\n```"


def put_into(page: str, blocks: dict[str, str]) -> str:
    """The page with what lies between `<!-- name -->` and `<!-- end -->` replaced."""
    for name, block in blocks.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        literal = block.replace("\\", r"\\")
        page, count = re.subn(pattern, rf"\g<1>{literal}\n\g<2>", page, flags=re.S)
        assert count == 1, f"the page has {count} places for {name}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="update the page and the figure")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    blocks, errors, gradients = tables()
    for block in blocks.values():
        print(block, end="\n\n")
    if options.write:
        PAGE.write_text(put_into(PAGE.read_text(), {**blocks, "by hand": written_by_hand()}))
        draw(drawn_masks(), errors[0.5], gradients, FIGURE)


if __name__ == "__main__":
    main()
