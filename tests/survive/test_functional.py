"""`functional_call` and function transforms, by raw names and by plain ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vjp, vmap
from torch.utils._pytree import tree_leaves

from surgery import SurgeryError, apply_dropconnect, strip_dropconnect

from ..steps import assert_same, raw, step_gradients, tensors
from ..zoo.subjects import BY_NAME, SUBJECTS, Subject

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
"""Of vmap, where it has no rule of its own for a kernel (attention, the GRU cell)."""

VMAPPED = [subject for subject in SUBJECTS if subject.name != "lstm"]
"""vmap has no rule for the LSTM kernel; the plain model fails alike."""


def seeded(run: Callable[[], Tensor], seed: int = 7) -> Tensor:
    torch.manual_seed(seed)
    return run()


def test_functional_call_uses_what_it_is_given(subject: Subject) -> None:
    model, other, x = subject.operated(), subject.moved(), subject.inputs()
    before = tensors(model)
    values = {name: p.detach().requires_grad_() for name, p in other.named_parameters()}
    found = seeded(lambda: functional_call(model, values, (x,)))
    assert torch.equal(found, seeded(lambda: other(x)))
    assert_same(tensors(model), before)


def test_functional_call_passes_gradients_to_what_it_is_given(subject: Subject) -> None:
    model, x = subject.operated(), subject.inputs()
    expected = step_gradients(model, x)
    model.zero_grad()
    values = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    seeded(lambda: functional_call(model, values, (x,))).square().sum().backward()
    for site in subject.sites:
        assert torch.equal(values[raw(site)].grad, expected[site])
    assert all(p.grad is None for p in model.parameters())


def loss_of(model: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, values, (x,)).square().sum()

    return loss


def test_grad_agrees_with_backward(subject: Subject) -> None:
    model, x = subject.operated(), subject.inputs()
    expected = step_gradients(model, x)
    values = {name: p.detach() for name, p in model.named_parameters()}
    torch.manual_seed(7)
    found = grad(loss_of(model))(values, x)
    for site in subject.sites:
        torch.testing.assert_close(found[raw(site)], expected[site])


@pytest.mark.parametrize("subject", VMAPPED, ids=lambda subject: subject.name)
def test_per_example_gradients_with_one_mask(subject: Subject) -> None:
    """`randomness="same"`: the examples share a mask, so their gradients add up to the batch's."""
    model, x = subject.operated(), subject.inputs()
    expected = step_gradients(model, x)
    values = {name: p.detach() for name, p in model.named_parameters()}
    each = vmap(grad(loss_of(model)), in_dims=(None, 0), randomness="same")
    torch.manual_seed(7)
    found = each(values, x.unsqueeze(1))
    for site in subject.sites:
        assert found[raw(site)].shape == (len(x), *expected[site].shape)
        torch.testing.assert_close(found[raw(site)].sum(0), expected[site])


@pytest.mark.parametrize("subject", VMAPPED, ids=lambda subject: subject.name)
def test_per_example_masks(subject: Subject) -> None:
    """`randomness="different"`: each example draws its own mask."""
    model, x = subject.operated(), subject.inputs()
    values = {name: p.detach() for name, p in model.named_parameters()}
    same = x[:1].expand(4, *x.shape[1:]).unsqueeze(1)
    each = vmap(loss_of(model), in_dims=(None, 0), randomness="different")
    losses = each(values, same)
    assert len(losses.unique()) > 1


def test_vmap_over_an_ensemble() -> None:
    subject = BY_NAME["linear"]
    models = [subject.moved(), subject.operated()]
    values, buffers = stack_module_state(models)
    x = subject.inputs()

    def call(values: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(models[0], (values, buffers), (x,))

    torch.manual_seed(7)
    found = vmap(call, randomness="same")(values, buffers)
    for out, model in zip(found, models):
        torch.testing.assert_close(out, seeded(lambda model=model: model(x)))


def test_strip_after_functional_calls(subject: Subject) -> None:
    model, x = subject.operated(), subject.inputs()
    functional_call(model, dict(subject.moved().named_parameters()), (x,))
    assert_same(tensors(strip_dropconnect(model)), tensors(subject.plain()))


def test_plain_names_do_what_raw_names_do(subject: Subject) -> None:
    """Tensors or Parameters, and the model is as it was."""
    model, x = subject.operated(), subject.inputs()
    before = tensors(model)
    values = {name: p.detach() * 1.25 for name, p in subject.plain().named_parameters()}
    moved = subject.moved()
    expected = seeded(lambda: moved(x))
    for given in (values, {name: nn.Parameter(value) for name, value in values.items()}):
        kept = dict(given)
        torch.testing.assert_close(
            seeded(lambda g=given: functional_call(model, g, (x,))), expected
        )
        assert all(given[name] is value for name, value in kept.items())
        inside = {f"0.{name}": value for name, value in given.items()}
        functional_call(nn.Sequential(model), inside, (x,))
    assert_same(tensors(model), before)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


@pytest.mark.parametrize("name", ["table.weight", "head.weight", "table.weight_raw"])
def test_a_tied_weight_is_given_to_all_its_users(name: str) -> None:
    model = apply_dropconnect(Tied(), "table", p=0.5, toward="pretrained").eval()
    ids, value = torch.arange(7), torch.randn(7, 4)
    expected = value @ value.t()
    for make in (torch.clone, nn.Parameter):
        for strict in (False, True):
            given = {name: make(value)}
            if strict:
                given |= {key: value for key, value in model.named_buffers()}
            found = functional_call(model, given, (ids,), strict=strict)
            torch.testing.assert_close(found, expected)
    assert model.head.weight is model.table.weight


def test_one_weight_under_both_names_is_refused() -> None:
    model = apply_dropconnect(nn.Linear(4, 4), nn.Linear, p=0.5)
    bias, value = model.bias, torch.randn(4, 4)
    with pytest.raises(SurgeryError, match="'weight' and 'weight_raw' are one weight"):
        functional_call(model, {"bias": value[0], "weight": value, "weight_raw": value}, value)
    assert model.bias is bias


def test_an_ensemble_of_plain_models() -> None:
    subject = BY_NAME["linear"]
    plain, base, x = [subject.plain(), subject.plain()], subject.operated(), subject.inputs()
    with torch.no_grad():
        plain[1][0].weight.add_(1)
    stacked = stack_module_state(plain)

    def call(values: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(base, (values, buffers), (x,))

    torch.manual_seed(7)
    found = vmap(call, randomness="same")(*stacked)
    for out, model in zip(found, plain):
        apply_dropconnect(model, list(subject.targets), p=0.5)
        torch.testing.assert_close(out, seeded(lambda model=model: model(x)))


COMPILED: list[tuple[str, dict[str, str], str]] = [
    ("linear", {}, "grad"),
    ("linear", {"sampling": "example", "toward": "pretrained"}, "jvp"),
    ("attention", {}, "grad"),
]
COMPILED_TOO: list[tuple[str, dict[str, str], str]] = [
    ("linear", {}, "jvp"),
    ("linear", {}, "per example"),
    ("linear", {"sampling": "example", "toward": "pretrained"}, "vjp"),
    ("embedding", {}, "per example"),
]

Transformed = Callable[[dict[str, Tensor], Tensor], object]


def transformed(model: nn.Module, name: str) -> Transformed:
    """A transform of the model's loss, or output, by its parameters."""

    def out(values: dict[str, Tensor], x: Tensor) -> Tensor:
        found: Tensor = functional_call(model, values, (x,))
        return found

    loss = loss_of(model)
    known: dict[str, Transformed] = {
        "grad": grad(loss),
        "vjp": lambda values, x: vjp(lambda v: out(v, x), values)[0],
        "jvp": lambda values, x: jvp(lambda v: out(v, x), (values,), (values,)),
        "per example": lambda values, x: vmap(
            lambda one: grad(loss)(values, one[None]), randomness="same"
        )(x),
    }
    return known[name]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "options", "transform"),
    [*COMPILED, *(pytest.param(*case, marks=pytest.mark.slow) for case in COMPILED_TOO)],
    ids=str,
)
def test_transforms_compile(name: str, options: dict[str, str], transform: str) -> None:
    """The first thing that is done with the model."""
    model, x = BY_NAME[name].moved(**options), BY_NAME[name].inputs()
    values = {name: p.detach() for name, p in model.named_parameters()}
    run = transformed(model, transform)
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    torch.manual_seed(7)
    found = compiled(values, x)
    torch.manual_seed(7)
    torch.testing.assert_close(found, run(values, x))
    torch.manual_seed(8)
    other = compiled(values, x)
    assert not all(map(torch.equal, tree_leaves(other), tree_leaves(found)))


class Halves(nn.Linear):
    """Writes to the weight after it has read it."""

    def forward(self, x: Tensor) -> Tensor:
        u = x @ self.weight.t()
        self.weight.mul_(0.5)
        return u


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_write_is_refused_in_compiled_transforms() -> None:
    model = apply_dropconnect(Halves(4, 3, bias=False), "*", p=0.5)
    values = {name: p.detach() for name, p in model.named_parameters()}
    compiled = torch.compile(grad(loss_of(model)), backend="eager")
    with pytest.raises(SurgeryError, match="the forward of Halves writes to it while it is masked"):
        compiled(values, torch.randn(5, 4))
