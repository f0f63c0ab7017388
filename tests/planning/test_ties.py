"""A tied weight is one site with several users: both drop, or only those that are not excluded."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import (
    Plan,
    SurgeryError,
    apply_dropconnect,
    dropconnect_sites,
    load_dropconnect,
    plan_dropconnect,
    save_dropconnect,
    strip_dropconnect,
)
from surgery.operating.suspend import reapplied

from ..expected import keep, masked
from ..helpers import Snapshot
from ..zoo.kinds import ReadsChild

P = 0.5


class Tied(nn.Module):
    """An embedding whose weight is also that of the head, and a child under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.body = nn.Linear(4, 4)
        self.again = self.body
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.body(self.embed(x))))


def model() -> Tied:
    return Tied().double()


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    ("targets", "name", "twin"),
    [
        ("embed", "embed.weight", "head.weight"),
        ("head", "head.weight", "embed.weight"),
        (["head", "embed"], "embed.weight", "head.weight"),
        (nn.Linear, "head.weight", "embed.weight"),
        ("*", "embed.weight", "head.weight"),
    ],
    ids=str,
)
def test_one_site_with_all_its_users(targets, name: str, twin: str) -> None:
    tied = apply_dropconnect(model(), targets)
    found = {site.name: site.shared_with for site in dropconnect_sites(tied)}
    assert set().union(*([n, *others] for n, others in found.items())) >= {name, twin}
    assert sum("embed.weight" in (n, *others) for n, others in found.items()) == 1


def test_both_users_drop_with_masks_of_their_own(keys) -> None:
    tied = model()
    plain = copy.deepcopy(tied)
    output = apply_dropconnect(tied, "embed", p=P)(IDS)
    assert len(keys) == 2
    rows, columns = (masked(plain.embed.weight, keep(key, P, 7, 4), P) for key in keys)
    hidden = plain.body(plain.body(F.embedding(IDS, rows)))
    assert torch.equal(output, F.linear(hidden, columns))


def test_excluded_user_does_not_drop(keys) -> None:
    tied = model()
    plain = copy.deepcopy(tied)
    output = apply_dropconnect(tied, "embed", p=P, exclude="head")(IDS)
    (key,) = keys
    rows = masked(plain.embed.weight, keep(key, P, 7, 4), P)
    assert torch.equal(output, plain.head(plain.body(plain.body(F.embedding(IDS, rows)))))
    (site,) = dropconnect_sites(tied)
    assert (site.name, site.shared_with) == ("embed.weight", ())


@pytest.mark.parametrize("exclude", [None, "head"])
def test_tying_survives(exclude) -> None:
    tied = model()
    before = Snapshot(tied)
    weight = tied.head.weight
    apply_dropconnect(tied, "embed", exclude=exclude, toward="pretrained")
    assert tied.head.weight is tied.embed.weight is weight
    assert len(list(tied.parameters())) == 3
    strip_dropconnect(tied)
    assert Snapshot(tied) == before


def test_tied_weights_share_one_anchor() -> None:
    tied = apply_dropconnect(model(), "embed", toward="pretrained")
    assert tied.embed.weight_anchor is tied.head.weight_anchor


def test_shared_module_draws_at_each_call(keys) -> None:
    tied = apply_dropconnect(model(), "body", p=P)
    tied(IDS)
    assert len(keys) == 2
    assert not torch.equal(*keys)


def test_gradients_of_all_users_add_up() -> None:
    """The raw parameter gets the sum: each user's gradient under its own mask."""
    tied = apply_dropconnect(model(), "embed", p=P, unit="tensor")
    torch.manual_seed(0)
    both = tied(IDS).sum()
    (grad,) = torch.autograd.grad(both, tied.embed.weight)
    step = 1e-6 * torch.randn_like(grad)
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            tied.embed.weight.add_(step, alpha=sign)
            torch.manual_seed(0)
            losses.append(tied(IDS).sum())
            tied.embed.weight.sub_(step, alpha=sign)
    torch.testing.assert_close((losses[0] - losses[1]) / 2, (grad * step).sum(), rtol=1e-4, atol=0)


def test_a_user_that_cannot_drop_refuses_the_whole_site() -> None:
    tied = model()
    tied.embed.max_norm = 1.0
    before = Snapshot(tied)
    with pytest.raises(SurgeryError, match=r"embed\.weight \(Embedding\): max_norm"):
        apply_dropconnect(tied, "head")
    assert Snapshot(tied) == before
    apply_dropconnect(tied, "head", exclude="embed")


def test_extending_to_the_excluded_user_is_refused() -> None:
    """The weight is operated on already, so a second apply is told so."""
    tied = apply_dropconnect(model(), "embed", exclude="head")
    with pytest.raises(SurgeryError, match=r"embed\.weight \(Embedding\): DropConnect is already"):
        apply_dropconnect(tied, "head")
    apply_dropconnect(tied, "head", exclude="embed")
    assert len(dropconnect_sites(tied)) == 1


def test_assigning_a_parameter_ties_while_operated() -> None:
    tied = apply_dropconnect(model(), "embed", p=P)
    fresh = nn.Parameter(torch.randn(7, 4, dtype=torch.float64))
    tied.embed.weight = fresh
    tied.head.weight = tied.embed.weight
    assert tied.embed._parameters["weight_raw"] is tied.head._parameters["weight_raw"] is fresh
    tied(IDS).sum().backward()
    assert fresh.grad is not None
    strip_dropconnect(tied)
    assert tied.head.weight is tied.embed.weight is fresh


class Many(nn.Module):
    """Ties of every sort: between kinds, three users, inside one module, read by a parent."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.embed = nn.Linear(4, 4), nn.Embedding(4, 4)
        self.pair = nn.ParameterDict({"a": nn.Parameter(torch.randn(4, 4))})
        self.pair["b"] = self.pair["a"]
        self.rnn = nn.LSTM(4, 4, num_layers=2)
        self.rnn.weight_hh_l1 = self.rnn.weight_hh_l0
        self.attention = nn.MultiheadAttention(4, 2)
        self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head.weight = self.second.weight = self.embed.weight
        self.attention.out_proj.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x @ self.pair["a"])


def traced() -> nn.Module:
    """The weights of one graph, one of which has two names."""

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.randn(4, 4)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(F.linear(x, self.c), self.b), self.a)

    graph = torch.fx.symbolic_trace(Functional())
    graph.b = graph.a
    return graph


@pytest.mark.parametrize("exclude", [None, "embed", "second", "head", ["embed", "head"], "first"])
@pytest.mark.parametrize("last_first", [False, True])
def test_the_plan_has_the_names_and_the_order_of_what_is_in_place(exclude, last_first) -> None:
    """Whatever was named, a site is called by the first of its users that drop; and a plan means the
    users that it lists, in a file too."""
    targets = ["embed", "second", "head", "first", "attention", "*.weight_hh_l*", nn.Linear]
    made = Many()
    plan = plan_dropconnect(made, targets[::-1] if last_first else targets, 0.3, exclude=exclude)
    apply_dropconnect(made, targets, 0.3, exclude=exclude)
    assert dropconnect_sites(made) == plan
    names = [site.name for site in plan]
    in_order = [name for name, _ in Many().named_parameters(remove_duplicate=False)]
    assert names == sorted(names, key=in_order.index)
    for copied in (plan, Plan.from_json(plan.to_json())):
        assert plan_dropconnect(Many(), copied) == plan
        assert dropconnect_sites(apply_dropconnect(Many(), copied)) == plan


@pytest.mark.parametrize("name", ["head.weight", "second.weight", "embed.weight"])
def test_one_user_named_one_name(name: str) -> None:
    site = plan_dropconnect(Many(), name)[0]
    assert (site.name, site.shared_with) == ("embed.weight", ("second.weight", "head.weight"))
    assert site.kind == "embedding"


@pytest.mark.parametrize("name", ["a", "b"])
def test_one_user_named_one_name_in_a_graph(name: str) -> None:
    plan = plan_dropconnect(traced(), [name, "c"])
    graph = apply_dropconnect(traced(), [name, "c"])
    assert [(site.name, site.shared_with) for site in plan] == [("c", ()), ("b", ("a",))]
    assert dropconnect_sites(graph) == plan == plan_dropconnect(traced(), plan)
    alone = plan_dropconnect(traced(), "a", exclude="b")
    assert [(site.name, site.shared_with) for site in alone] == [("a", ())]
    assert dropconnect_sites(apply_dropconnect(traced(), alone)) == alone


def test_excluded_users_stay_so(tmp_path) -> None:
    """Through a plan, a file, and surgery that is done again because a weight was resized."""
    tied = apply_dropconnect(model(), "embed", exclude="head", toward="pretrained")
    save_dropconnect(tied, tmp_path)
    again = apply_dropconnect(model(), dropconnect_sites(tied))
    grown = nn.Parameter(torch.cat([tied.embed.weight.detach()] * 2))

    def grow() -> None:
        tied.embed.weight = tied.head.weight = grown

    reapplied(tied, grow)
    assert tied.embed.weight is tied.head.weight is grown
    loaded = load_dropconnect(model(), tmp_path)
    for one in (tied, loaded, again):
        (site,) = dropconnect_sites(one)
        assert (site.name, site.shared_with) == ("embed.weight", ())
        assert type(one.head) is nn.Linear


def test_what_draws_is_named_by_its_first_name() -> None:
    """A module that stands in a model twice, and reads the weight of its child."""
    block = ReadsChild()
    plan = plan_dropconnect(nn.ModuleDict({"first": block, "second": block}), "first.proj")
    assert [(site.name, site.drawn_by) for site in plan] == [("first.proj.weight", ("first",))]


def test_a_name_that_no_node_reads_is_no_user() -> None:
    """Of a weight in a graph that has two names, of which the graph reads one."""
    root, graph = nn.Module(), torch.fx.Graph()
    root.fc, root.other = nn.Linear(3, 3), nn.Linear(3, 3)
    x = graph.placeholder("x")
    weight, bias = graph.get_attr("other.weight"), graph.get_attr("fc.bias")
    graph.output(graph.call_function(nn.functional.linear, (x, weight, bias)))
    model = torch.fx.GraphModule(root, graph)
    model.fc.weight = model.other.weight
    plan = plan_dropconnect(model, "other.weight")
    assert [(site.name, site.shared_with) for site in plan] == [("other.weight", ())]
