"""Weights that a forward which does not contain their owner reads: the mask is the same there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from surgery import apply_dropconnect, dropconnect_sites, plan_dropconnect, strip_dropconnect
from surgery.planning.in_place import unused_sites

from ..expected import keep, masked


class Given(nn.Module):
    """Multiplies by the weight of a module that it is given."""

    def forward(self, x: Tensor, scale: float, layer: nn.Module) -> Tensor:
        return scale * self._times(x, layer)

    def _times(self, x: Tensor, layer: nn.Module) -> Tensor:
        return x @ layer.weight.t()


class Keeps(nn.Module):
    """Reads a module that it holds without being its parent."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.held = [layer]

    def forward(self, x: Tensor, scale: float, layer: nn.Module) -> Tensor:
        return scale * (x @ self.held[0].weight.t())

    def times(self, x: Tensor) -> Tensor:
        return x @ self.held[0].weight.t()


def _times(x: Tensor, layer: nn.Module) -> Tensor:
    return x @ layer.weight.t()


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"emb": nn.Embedding(6, 4)})
        self.reader: nn.Module = Given()

    @property
    def emb(self) -> nn.Module:
        return self.parts["emb"]


class ToChild(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.reader(self.parts["emb"](x), 1.0, layer=self.parts["emb"])


class ToMethod(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self._look(self.parts["emb"](x), self.parts["emb"])

    def _look(self, x: Tensor, child: nn.Module) -> Tensor:
        return x @ child.weight.t()


class ToChildsMethod(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.reader._times(self.parts["emb"](x), layer=self.parts["emb"])


class ToFunction(Base):
    def forward(self, x: Tensor) -> Tensor:
        return _times(self.parts["emb"](x), self.parts["emb"])


class ToLambda(Base):
    """The source does not say what `self.function` is."""

    def __init__(self) -> None:
        super().__init__()
        self.function = lambda x, layer: x @ layer.weight.t()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.parts["emb"](x), self.parts["emb"])


class ToSibling(Base):
    def __init__(self) -> None:
        super().__init__()
        self.reader = Keeps(self.parts["emb"])

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(self.parts["emb"](x), 1.0, None)


class ToSiblingsMethod(ToSibling):
    def forward(self, x: Tensor) -> Tensor:
        return self.reader.times(self.parts["emb"](x))


FROM_SOURCE = {
    "child": ToChild,
    "childs-method": ToChildsMethod,
    "method": ToMethod,
    "function": ToFunction,
}
FROM_A_RUN = {"lambda": ToLambda, "sibling": ToSibling, "siblings-method": ToSiblingsMethod}
IDS = torch.tensor([[0, 1, 2], [3, 4, 5]])


def assert_one_mask(model: Any, keys: list[Tensor]) -> None:
    output = model(IDS)
    (key,) = keys
    used = masked(model.emb.weight_raw, keep(key, 0.5, 6, 4), 0.5).float()
    torch.testing.assert_close(output, F.embedding(IDS, used) @ used.t())
    output.sum().backward()
    zeros = model.emb.weight_raw.grad == 0
    assert torch.equal(zeros, keep(key, 0.5, 6, 4) == 0)


@pytest.mark.parametrize("cls", FROM_SOURCE.values(), ids=FROM_SOURCE)
@pytest.mark.parametrize("inputs", [None, IDS], ids=["source", "run"])
def test_what_the_source_shows(cls: Callable[[], Any], inputs: Any, keys: list[Tensor]) -> None:
    model = apply_dropconnect(cls(), "*emb", p=0.5, example_inputs=inputs)
    assert [site.drawn_by for site in dropconnect_sites(model)] == [("",)]
    assert_one_mask(model, keys)


@pytest.mark.parametrize("cls", FROM_A_RUN.values(), ids=FROM_A_RUN)
def test_what_a_run_shows(cls: Callable[[], Any], keys: list[Tensor]) -> None:
    plan = plan_dropconnect(cls(), "*emb", p=0.5, example_inputs=IDS)
    assert [site.drawn_by for site in plan] == [("",)]
    assert_one_mask(apply_dropconnect(cls(), plan), keys)
    del keys[:]
    assert_one_mask(apply_dropconnect(cls(), "*emb", p=0.5, example_inputs=IDS), keys)


class Deep(nn.Module):
    """Owner and reader meet below the root, in a module whose forward runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ToChild()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x), self.inner(x)


def test_the_innermost_that_contains_both_draws(keys: list[Tensor]) -> None:
    model = apply_dropconnect(Deep(), "*emb", p=0.5, example_inputs=IDS)
    assert [site.drawn_by for site in dropconnect_sites(model)] == [("inner",)]
    model(IDS)
    assert len(keys) == 2


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.emb(x))


def test_tied_weights_are_drawn_by_each_user() -> None:
    plan = plan_dropconnect(Tied(), "emb", example_inputs=IDS)
    assert [(site.drawn_by, site.shared_with) for site in plan] == [((), ("head.weight",))]


def _product(module: Any, x: Tensor) -> Tensor:
    return x @ module.w


class HandsItselfOver(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.hidden = nn.Parameter(torch.randn(4, 4))
        self.function = lambda module, x: x @ module.hidden

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, _product(self, x))


@pytest.mark.parametrize("inputs", [None, torch.ones(2, 4)], ids=["source", "run"])
@pytest.mark.parametrize("name", ["w", "hidden"])
def test_a_parameter_of_a_module_that_hands_itself_over(name: str, inputs: Any) -> None:
    model = apply_dropconnect(HandsItselfOver(), name, p=1.0, example_inputs=inputs)
    assert torch.equal(model(torch.ones(2, 4)), torch.zeros(2, 4))


def test_perceiver_and_layoutlmv3_are_planned_as_they_are_operated() -> None:
    """`apply` must carry out what `plan` shows, whether or not dummy inputs can be made."""
    transformers = pytest.importorskip("transformers")
    perceiver = transformers.PerceiverConfig(
        num_latents=4,
        d_latents=16,
        d_model=16,
        num_blocks=1,
        num_self_attends_per_block=1,
        num_self_attention_heads=2,
        num_cross_attention_heads=2,
        vocab_size=30,
        max_position_embeddings=20,
    )
    layout = transformers.LayoutLMv3Config(
        vocab_size=30,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        coordinate_size=4,
        shape_size=4,
        visual_embed=False,
    )
    for model, target, drawn_by in (
        (transformers.PerceiverForMaskedLM(perceiver), "*.embeddings", ("",)),
        (transformers.LayoutLMv3Model(layout), "*.rel_pos_x_bias", ("encoder",)),
    ):
        plan = plan_dropconnect(model, target, p=0.5)
        assert [site.drawn_by for site in plan] == [drawn_by]
        assert [site.drawn_by for site in dropconnect_sites(apply_dropconnect(model, target))] == [
            drawn_by
        ]


class Watched(nn.Module):
    """Reads a weight in ways that its source does not show."""

    def __init__(self, read: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.conv = nn.Conv1d(4, 4, 1)
        self.table = nn.Embedding(4, 4)
        self.rnn = nn.LSTM(4, 4)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(dict(self.named_children()), x)


def _reads(parts: Any, x: Tensor) -> Tensor:
    return x @ parts["proj"].weight + x @ parts["conv"].weight[..., 0] + x @ parts["table"].weight


def _reads_rnn(parts: Any, x: Tensor) -> Tensor:
    return x @ getattr(parts["rnn"], "weight_hh_l0")[:4]  # noqa: B009


def _reads_by_name(parts: Any, x: Tensor) -> Tensor:
    weight = parts["proj"].weight
    return x @ weight


def _asks(parts: Any, x: Tensor) -> Tensor:
    layer = parts["proj"]
    kind = layer.weight.dtype
    weight = layer.weight
    if isinstance(layer.weight, Tensor) and layer.weight is not None and weight.shape[0] == 4:
        x = x.to(kind)
    return layer(x)


def _recomputes(parts: Any, x: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(_reads_by_name, parts, x, use_reentrant=False)


@pytest.mark.parametrize(
    ("read", "sites"),
    [
        (_reads, ["proj.weight", "conv.weight", "table.weight"]),
        (_reads_rnn, ["rnn.weight_hh_l0"]),
        (_reads_by_name, ["proj.weight"]),
        (_recomputes, ["proj.weight"]),
    ],
)
def test_a_read_that_only_training_shows_is_warned_of_once(read, sites: list[str]) -> None:
    model = Watched(read)
    names = [site.rpartition(".")[0] for site in sites]
    apply_dropconnect(model, names, p=0.5)
    x = torch.ones(2, 4)
    model.eval()(x)
    with torch.no_grad():
        model.train()(x)
    with pytest.warns(UserWarning, match="where no mask is drawn") as caught:
        model(x).sum().backward()
    words = [str(one.message) for one in caught]
    assert [text.split()[0] for text in words] == sites
    assert all("is read by the forward of Watched where no mask is drawn" in text for text in words)
    assert all(one.filename == __file__ for one in caught)
    model(x).sum().backward()
    with pytest.warns(UserWarning, match="never dropped anything, the first is"):
        strip_dropconnect(model)


def test_what_is_no_read_of_a_forward_is_not_warned_of() -> None:
    """What a tensor is like, a penalty on the weights, and hooks: warnings are errors here."""
    model = apply_dropconnect(Watched(_asks), "proj", p=0.5)
    model.proj.register_forward_hook(lambda layer, args, output: print(layer.weight.norm()))
    model.register_forward_pre_hook(lambda model, args: print(model.proj.weight.norm()))
    (model(torch.ones(2, 4)).sum() + model.proj.weight.norm()).backward()
    assert not unused_sites(model)
    strip_dropconnect(model)


class Spare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)
        self.unread = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        getattr(self, "used_not"[:4])
        return self.used(x)


@pytest.mark.parametrize("target", ["spare", "unread"])
def test_strip_warns_if_no_site_at_all_dropped(target: str) -> None:
    model = apply_dropconnect(Spare(), target, p=0.5)
    model(torch.ones(2, 4)).sum().backward()
    with pytest.warns(UserWarning, match=f"1 DropConnect site never dropped.*{target}"):
        strip_dropconnect(model)
    # Gradients that were there before tell nothing, nor does a forward in eval().
    strip_dropconnect(apply_dropconnect(model, target, p=0.5))
    model.zero_grad()
    apply_dropconnect(model, target, p=0.5).eval()(torch.ones(2, 4))
    strip_dropconnect(model)


def test_compiled_forwards_count() -> None:
    """In regional compilation some layers are compiled and some are not."""
    model = apply_dropconnect(Spare(), ["used", "spare"], p=0.5)
    model.used.compile(backend="aot_eager", fullgraph=True)
    model(torch.ones(2, 4)).sum().backward()
    assert unused_sites(model) == ["spare.weight"]
    with pytest.warns(UserWarning, match=r"1 DropConnect site never dropped.*'spare\.weight'"):
        strip_dropconnect(model)


class Checkpoints(Base):
    """What is recomputed is inside of what draws."""

    def forward(self, x: Tensor) -> Tensor:
        def inner(h: Tensor) -> Tensor:
            return h @ self.parts["emb"].weight.t()

        h = self.parts["emb"](x)
        return torch.utils.checkpoint.checkpoint(inner, h, use_reentrant=False)


class ChecksTheOwner(Base):
    def forward(self, x: Tensor) -> Tensor:
        emb = self.parts["emb"]
        h = torch.utils.checkpoint.checkpoint(lambda x: emb(x).sin(), x, use_reentrant=False)
        return h @ emb.weight.t()


@pytest.mark.parametrize("cls", [Checkpoints, ChecksTheOwner])
def test_a_recomputation_without_the_forward_that_draws_is_refused(cls) -> None:
    """It would have another mask than the forward had, or none."""
    model = apply_dropconnect(cls(), "*emb", p=0.5)
    loss = model(IDS).sum()
    with pytest.raises(RuntimeError, match=r"recomputes what reads parts\.emb\.weight.*as a whole"):
        loss.backward()
    whole = torch.utils.checkpoint.checkpoint(model, IDS, use_reentrant=False)
    with pytest.raises(RuntimeError, match="recomputes"):
        whole.sum().backward()
    model = apply_dropconnect(ToChild(), "*emb", p=0.5)
    torch.utils.checkpoint.checkpoint(model, IDS, use_reentrant=False).sum().backward()
    assert 0 < (model.emb.weight_raw.grad == 0).float().mean() < 1
