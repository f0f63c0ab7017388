"""A model as a tree in the terminal."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from surgery import apply_dropconnect, plan_dropconnect, strip_dropconnect
from surgery.transforms.drawing.tree import MARK, tree


def mlp() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(fc1=nn.Linear(16, 32), act=nn.ReLU(), drop=nn.Dropout(), fc2=nn.Linear(32, 4))
    )


class Recurrent(nn.Module):
    """An embedding tied with the head, and an LSTM between them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.emb = nn.Embedding(100, 16)
        self.rnn = nn.LSTM(16, 16)
        self.head = nn.Linear(16, 100, bias=False)
        self.head.weight = self.emb.weight


class Layers(nn.Module):
    """Six layers in a list, with a part of their own each."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList(mlp() for _ in range(6))
        self.out = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)])


PLAIN = """\
Sequential
├─ fc1   Linear   weight 32×16, bias 32
├─ act   ReLU
├─ drop  Dropout
└─ fc2   Linear   weight 4×32, bias 4
no sites, 676 weights"""

OPERATED = """\
Sequential
├─ fc1   Linear   weight 32×16, bias 32  ◆ weight p=0.3 toward=pretrained
├─ act   ReLU
├─ drop  Dropout
└─ fc2   Linear   weight 4×32, bias 4
1 site, 512 of 676 weights"""

WITH_BIAS = """\
Sequential
├─ fc1   Linear   weight 32×16, bias 32  ◆ weight p=0.25 unit=output  ◆ bias p=0.25 unit=output
├─ act   ReLU
├─ drop  Dropout
└─ fc2   Linear   weight 4×32, bias 4    ◆ weight p=0.25 unit=output  ◆ bias p=0.25 unit=output
4 sites, 676 of 676 weights"""

RECURRENT = """\
Recurrent
├─ scale                       scalar
├─ emb              Embedding  weight 100×16  ◆ weight p=0.5
├─ rnn              LSTM
│  ├─ weight_ih_l0             64×16
│  ├─ weight_hh_l0             64×16          ◆ p=0.5
│  ├─ bias_ih_l0               64
│  └─ bias_hh_l0               64
└─ head             Linear     weight 100×16  ◆ weight with emb.weight
2 sites, 2,624 of 3,777 weights"""

FOLDED = """\
Layers
├─ layer.0–1  ×2  Sequential
│  ├─ fc1         Linear      weight 32×16, bias 32
│  ├─ act         ReLU
│  ├─ drop        Dropout
│  └─ fc2         Linear      weight 4×32, bias 4
├─ layer.2        Sequential
│  ├─ fc1         Linear      weight 32×16, bias 32  ◆ weight p=0.5
│  ├─ act         ReLU
│  ├─ drop        Dropout
│  └─ fc2         Linear      weight 4×32, bias 4
├─ layer.3–5  ×3  Sequential
│  ├─ fc1         Linear      weight 32×16, bias 32
│  ├─ act         ReLU
│  ├─ drop        Dropout
│  └─ fc2         Linear      weight 4×32, bias 4
├─ out.0–1  ×2    Linear      weight 4×4, bias 4
└─ out.2          Linear      weight 2×4, bias 2
1 site, 512 of 4,106 weights"""


def test_a_plain_model_has_no_mark() -> None:
    assert tree(mlp()) == PLAIN


def test_what_is_in_place_is_marked_with_p_and_the_options_that_are_not_the_default() -> None:
    model = apply_dropconnect(mlp(), "fc1", p=0.3, toward="pretrained")
    assert tree(model) == OPERATED
    assert tree(strip_dropconnect(model)) == PLAIN


def test_a_plan_marks_what_would_be_operated_on_and_changes_nothing() -> None:
    model = mlp()
    plan = plan_dropconnect(model, "fc1", p=0.3, toward="pretrained")
    assert tree(model, plan=plan) == OPERATED
    assert tree(model) == PLAIN


def test_a_bias_that_drops_has_its_own_mark() -> None:
    model = mlp()
    plan = plan_dropconnect(model, "fc*", p=0.25, unit="output", bias=True)
    assert tree(model, plan=plan) == WITH_BIAS


def test_many_weights_have_lines_of_their_own_and_a_tied_site_names_its_first_user() -> None:
    model = Recurrent()
    text = tree(model, plan=plan_dropconnect(model, ["emb", "rnn"], p=0.5))
    assert text == RECURRENT


def test_a_tied_weight_that_is_not_dropped_says_so() -> None:
    line = tree(Recurrent()).splitlines()[-2]
    assert line == "└─ head             Linear     weight 100×16 (tied with emb.weight)"


def test_a_tied_weight_of_which_only_the_second_user_drops_is_marked_there() -> None:
    model = Recurrent()
    lines = tree(model, plan=plan_dropconnect(model, "head", p=0.5, exclude="emb")).splitlines()
    assert [line for line in lines if MARK in line] == [lines[-2]]
    assert lines[-2].endswith("◆ weight p=0.5")


def test_equal_neighbours_are_folded_and_a_layer_that_differs_is_not() -> None:
    model = Layers()
    assert tree(model, plan=plan_dropconnect(model, "layer.2.fc1", p=0.5)) == FOLDED


def test_a_graph_has_the_same_tree_as_its_model() -> None:
    graph = torch.fx.symbolic_trace(mlp())
    assert tree(graph).splitlines()[1:] == PLAIN.splitlines()[1:]


@pytest.mark.parametrize("width", [40, 60, 80])
def test_width_limits_every_line_and_keeps_the_marks_longest(width: int) -> None:
    model = Layers()
    lines = tree(model, plan=plan_dropconnect(model, "*.fc1", p=0.5), width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert sum(MARK in line for line in lines) == 1
    if width >= 60:
        assert all(line.endswith("◆ weight p=0.5") for line in lines if MARK in line)


def test_a_width_that_is_enough_changes_nothing() -> None:
    model = Layers()
    longest = max(map(len, tree(model).splitlines()))
    assert tree(model, width=longest) == tree(model)
    assert "…" in tree(model, width=longest - 1)


def test_a_width_too_small_to_read_is_refused() -> None:
    with pytest.raises(ValueError, match="width must be at least 40 characters; got 39"):
        tree(mlp(), width=39)


def test_color_only_adds_codes() -> None:
    model = apply_dropconnect(mlp(), "fc1", p=0.3, toward="pretrained")
    colored = tree(model, color=True)
    assert "\033[1;33m◆ weight p=0.3 toward=pretrained\033[0m" in colored
    for code in ("\033[1;33m", "\033[2m", "\033[0m"):
        colored = colored.replace(code, "")
    assert colored == OPERATED


def test_the_forward_is_not_run_and_weights_may_be_on_meta() -> None:
    class Never(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("tree runs nothing")

    with torch.device("meta"):
        model = Never()
    assert tree(model).splitlines()[1] == "└─ fc  Linear  weight 4×4, bias 4"
