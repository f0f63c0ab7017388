"""Masks from a generator of their own: independent of torch's, and resumable."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from surgery import (
    SurgeryError,
    apply_dropconnect,
    dropconnect,
    dropconnect_sites,
    hold_masks,
    load_dropconnect,
    mc_predict,
    plan_dropconnect,
    save_dropconnect,
    strip_dropconnect,
)
from surgery.modules import own_generator
from surgery.spec.saved import PLAN_FILE


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.LSTM(6, 6), First(), nn.Linear(6, 6))


class First(nn.Module):
    """The first of what it is given."""

    def forward(self, given: Any) -> Any:
        return given[0]


class Graph(nn.Module):
    """With a weight that a node reads, once it is traced."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):  # a graph with annotations that are text does not pickle
        return nn.functional.linear(x, self.weight)


X = torch.linspace(-1, 1, 18).view(3, 6)


def graph() -> nn.Module:
    return torch.fx.symbolic_trace(Graph())


MODELS: dict[str, Any] = {"modules": (net, [nn.Linear, nn.LSTM]), "graph": (graph, "weight")}


@pytest.fixture(params=MODELS)
def build(request: Any) -> Any:
    """Builds a model and operates on it."""
    make, targets = MODELS[request.param]
    return lambda **options: apply_dropconnect(make(), targets, **{"p": 0.5, **options})


def outputs(model: nn.Module, count: int = 2) -> list[Tensor]:
    return [model(X).detach() for _ in range(count)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


class TestIndependent:
    def test_torchs_generator_neither_matters_nor_moves(self, build: Any) -> None:
        found = []
        for seed in (1, 2):
            model = build(generator=7)
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            found.append(outputs(model))
            assert torch.equal(torch.get_rng_state(), before)
        assert same(*found)
        assert not torch.equal(*found[0])
        assert not same(found[0], outputs(build(generator=8)))

    def test_seeded_alike_it_gives_the_masks_of_torchs_own(self, build: Any) -> None:
        own, plain = build(generator=7), build()
        torch.manual_seed(7)
        assert same(outputs(plain), outputs(own))

    def test_a_users_generator_moves_on(self, build: Any) -> None:
        generator = torch.Generator().manual_seed(7)
        model = build(generator=generator)
        assert same(outputs(model), outputs(build(generator=7)))
        state = generator.get_state()
        after = outputs(model)
        generator.set_state(state)
        assert same(outputs(model), after)

    @pytest.mark.parametrize("options", [{"sampling": "example"}, {"bias": True}], ids=str)
    def test_every_kind_of_mask(self, options: Any) -> None:
        def build() -> nn.Module:
            torch.manual_seed(3)
            return apply_dropconnect(nn.Linear(6, 6), nn.Linear, generator=5, **options)

        one, other = build(), build()
        torch.manual_seed(9)
        assert same(outputs(one), outputs(other))

    def test_several_applies_have_several(self) -> None:
        model = net()
        apply_dropconnect(model, "0", generator=1)
        apply_dropconnect(model, "4", generator=2)
        apply_dropconnect(model, nn.LSTM)
        torch.manual_seed(4)
        one = outputs(model)
        other = net()
        apply_dropconnect(other, "0", generator=1)
        apply_dropconnect(other, "4", generator=2)
        apply_dropconnect(other, nn.LSTM)
        torch.manual_seed(4)
        assert same(one, outputs(other))

    def test_in_a_with(self) -> None:
        model, found = net(), []
        for _ in range(2):
            with dropconnect(model, nn.Linear, p=0.5, generator=3):
                found.append(outputs(model))
        assert same(*found)


class TestKeptAndCopied:
    def test_a_copy_goes_on_by_itself(self, build: Any) -> None:
        model = build(generator=7)
        outputs(model)
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        after = outputs(model)
        for twin in twins:
            assert same(outputs(twin), after)

    def test_the_sites_of_a_copy_share_one(self) -> None:
        model = apply_dropconnect(net(), [nn.Linear, nn.LSTM], generator=7)
        whole = outputs(model)
        twin = copy.deepcopy(apply_dropconnect(net(), [nn.Linear, nn.LSTM], generator=7))
        assert same(outputs(twin), whole)

    def test_a_saved_one_goes_on(self, build: Any, tmp_path: Path) -> None:
        model = build(generator=7)
        outputs(model)
        save_dropconnect(model, tmp_path)
        after = outputs(model)
        fresh = strip_dropconnect(build())
        torch.manual_seed(99)
        load_dropconnect(fresh, tmp_path)
        assert dropconnect_sites(fresh) == dropconnect_sites(model)
        assert same(outputs(fresh), after)

    def test_in_a_fresh_process(self, tmp_path: Path) -> None:
        model = apply_dropconnect(nn.Linear(6, 6), nn.Linear, generator=7)
        outputs(model)
        save_dropconnect(model, tmp_path)
        torch.save({"weights": model.state_dict(), "after": outputs(model)}, tmp_path / "w.pt")
        code = f"""
import torch, surgery
saved = torch.load({str(tmp_path / "w.pt")!r})
model = surgery.load_dropconnect(torch.nn.Linear(6, 6), {str(tmp_path)!r})
model.load_state_dict(saved["weights"])
x = torch.linspace(-1, 1, 18).view(3, 6)
print(all(torch.equal(model(x), out) for out in saved["after"]))
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.split() == ["True"], done.stderr[-2000:]

    def test_a_file_without_one_is_as_before(self, build: Any, tmp_path: Path) -> None:
        save_dropconnect(build(), tmp_path)
        assert "generators" not in json.loads((tmp_path / PLAN_FILE).read_text())

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"state": "!"}, "is no base64"),
            ({"state": "AAAA"}, "is no state of a generator on 'cpu'"),
            ({"state": "A" * 200000}, "must be the state of a generator"),
            ({"device": "nothing"}, "is no state of a generator on 'nothing'"),
            ({"sites": ["other.weight"]}, "the generator of 'other.weight' was saved"),
            ({"sites": 3}, "must be a list"),
            ({"more": 1}, "unknown fields"),
        ],
        ids=str,
    )
    def test_a_damaged_file_is_refused(
        self, tmp_path: Path, change: dict[str, Any], words: str
    ) -> None:
        save_dropconnect(apply_dropconnect(net(), nn.Linear, generator=7), tmp_path)
        form = json.loads((tmp_path / PLAN_FILE).read_text())
        form["generators"][0].update(change)
        (tmp_path / PLAN_FILE).write_text(json.dumps(form))
        model = net()
        with pytest.raises(SurgeryError, match=words):
            load_dropconnect(model, tmp_path)
        assert not dropconnect_sites(model).sites

    def test_mc_predict_with_a_seed_leaves_it_as_it_was(self) -> None:
        model = apply_dropconnect(nn.Sequential(nn.Linear(6, 4)), nn.Linear, generator=7)
        outputs(model)
        twin = copy.deepcopy(model)
        one = mc_predict(model, X, samples=4, seed=1)
        assert same(outputs(model), outputs(twin))
        assert torch.equal(mc_predict(model, X, samples=4, seed=1).mean, one.mean)

    def test_hold_masks(self) -> None:
        model, other = (apply_dropconnect(net(), nn.Linear, generator=7) for _ in range(2))
        with hold_masks(model):
            one = outputs(model)
        assert torch.equal(*one)
        assert torch.equal(one[0], outputs(other)[0])


class Repeats(nn.Module):
    """Layers in activation checkpoints, one of them twice, and one checkpoint in another."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner, self.last = (nn.Linear(6, 6) for _ in range(3))
        self.reentrant = reentrant

    def run(self, function: Any, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return function(x)
        return checkpoint(function, x, use_reentrant=self.reentrant)

    def block(self, x: Tensor) -> Tensor:
        return self.inner(torch.sin(self.run(self.inner, torch.sin(self.inner(x)))))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.run(self.block, x) + self.run(self.block, x.cos()))


def check(found: list[Tensor], expected: list[Tensor], reentrant: bool) -> None:
    """Bit by bit; a reentrant checkpoint runs its first forward without gradients, which rounds in
    another way."""
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-5 * reentrant, atol=1e-5 * reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
class TestActivationCheckpoints:
    def gradients(self, reentrant: bool | None, forwards: int = 2) -> list[Tensor]:
        model = apply_dropconnect(Repeats(reentrant), nn.Linear, p=0.5, generator=7)
        losses = [model(X * (one + 1)).square().sum() for one in range(forwards)]
        for loss in losses[::-1]:  # not in the order of the forwards
            loss.backward()
        following = model(X).detach()
        return [*(p.grad for p in model.parameters()), following]

    def test_gradients_are_those_without_it(self, reentrant: bool) -> None:
        """The second run has the masks of the first, and takes none of those that come after."""
        check(self.gradients(reentrant), self.gradients(None), reentrant)

    def test_a_graph_may_be_walked_twice(self, reentrant: bool) -> None:
        found = []
        for way in (None, reentrant):
            model = apply_dropconnect(Repeats(way), nn.Linear, generator=7)
            loss = model(X).square().sum()
            for _ in range(2):
                loss.backward(retain_graph=True)
            found.append([p.grad for p in model.parameters()])
        check(found[1], found[0], reentrant)


def test_a_recomputation_that_is_none_of_torchs_is_refused() -> None:
    layer = apply_dropconnect(nn.Linear(6, 6), nn.Linear, generator=7)

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            with torch.no_grad():
                return layer(x)

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            (x,) = ctx.saved_tensors
            with torch.enable_grad():
                layer(x.detach().requires_grad_())
            return grad

    out = Again.apply(X.clone().requires_grad_())
    with pytest.raises(RuntimeError, match=r"weight has masks from a generator of its own, and a"):
        out.sum().backward()


class TestRefused:
    @pytest.mark.parametrize("verb", [apply_dropconnect, plan_dropconnect])
    def test_noise_has_no_masks(self, verb: Any) -> None:
        model = net()
        with pytest.raises(SurgeryError, match=r"0.weight: sampling='gaussian' draws noise"):
            verb(model, "0", sampling="gaussian", generator=7)
        assert type(model[0]) is nn.Linear

    @pytest.mark.parametrize(
        ("generator", "error", "words"),
        [
            ("7", TypeError, "must be a torch.Generator or a seed; got '7'"),
            (True, TypeError, "must be a torch.Generator or a seed; got True"),
            (1 << 70, ValueError, "is no seed"),
        ],
        ids=["text", "flag", "large"],
    )
    def test_what_is_no_generator(self, generator: Any, error: Any, words: str) -> None:
        with pytest.raises(error, match=words):
            apply_dropconnect(net(), nn.Linear, generator=generator)

    def test_cuda_graphs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = apply_dropconnect(nn.Linear(6, 6), nn.Linear, generator=7)
        monkeypatch.setattr(own_generator, "is_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="each replay of a CUDA graph would have it again"):
            model(X)

    def test_export(self) -> None:
        model = apply_dropconnect(nn.Sequential(nn.Linear(6, 6)), nn.Linear, generator=7)
        with pytest.raises(Exception, match=r"torch\.export would make it a constant"):
            torch.export.export(model, (X,), strict=False)
        torch.export.export(model.eval(), (X,), strict=False)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.compiler
class TestCompiled:
    def test_a_graph_ends_at_each_site(self) -> None:
        """And gives what eager code gives, cold."""
        torch._dynamo.reset()
        build = lambda: apply_dropconnect(net()[:2], nn.Linear, generator=7)  # noqa: E731
        model = build()
        compiled = torch.compile(model, backend="aot_eager")
        torch.manual_seed(5)
        before = torch.get_rng_state()
        found = [compiled(X).detach() for _ in range(3)]
        assert torch.equal(torch.get_rng_state(), before)
        assert all(map(torch.allclose, found, outputs(build(), 3)))
        compiled(X).sum().backward()
        eager = build()
        outputs(eager, 3)
        eager(X).sum().backward()
        torch.testing.assert_close(model[0].weight.grad, eager[0].weight.grad)

    def test_with_activation_checkpoints(self) -> None:
        torch._dynamo.reset()
        found = []
        for way in (None, False):
            model = apply_dropconnect(Repeats(way), nn.Linear, generator=7)
            run = model if way is None else torch.compile(model, backend="aot_eager")
            run(X).square().sum().backward()
            found.append([p.grad for p in model.parameters()])
        check(found[1], found[0], True)

    def test_fullgraph_says_why(self) -> None:
        torch._dynamo.reset()
        model = apply_dropconnect(net()[:2], nn.Linear, generator=7)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with pytest.raises(Exception, match=r"Compile without fullgraph=True, or apply without"):
            compiled(X)


def test_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with torch's generator: independent ranks differ, though their generators agree."""
    found = {}
    for ranks in ("independent", "same"):
        for rank in (0, 1):
            monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
            monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            torch.manual_seed(0)
            layer = apply_dropconnect(nn.Linear(6, 6), nn.Linear, generator=7, ranks=ranks)
            found[ranks, rank] = outputs(layer)
    assert same(found["same", 0], found["same", 1])
    assert same(found["same", 0], found["independent", 0])
    assert not same(found["independent", 0], found["independent", 1])
