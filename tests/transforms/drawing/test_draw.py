"""Pictures of models and graphs with their sites marked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn

from surgery import apply_dropconnect, dropconnect_sites, plan_dropconnect, strip_dropconnect

pytest.importorskip("pygraphviz", reason="the extra `draw` is not installed")

from surgery.transforms.drawing.draw import draw

SVG = "{http://www.w3.org/2000/svg}"


class Block(nn.Module):
    """A transformer's MLP with its residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.fc1 = nn.Linear(8, 32)
        self.act = nn.GELU()
        self.drop = nn.Dropout(0.1)
        self.fc2 = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.drop(self.fc2(self.act(self.fc1(self.norm(x)))))
        return x + hidden


class Deep(nn.Module):
    """Four blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layer:
            x = layer(x)
        return torch.softmax(self.head(x.mean(1)), -1)


class Recurrent(nn.Module):
    """An embedding tied with the head, and an LSTM between them."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(100, 16)
        self.rnn = nn.LSTM(16, 16, num_layers=2)
        self.head = nn.Linear(16, 100)
        self.head.weight = self.emb.weight

    def forward(self, words: Tensor) -> Tensor:
        hidden: Tensor = self.head(self.rnn(self.emb(words))[0])
        return hidden


class Functional(nn.Module):
    """A weight that a functional call reads."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(nn.functional.linear(x, self.fc.weight, self.fc.bias))


class Both(nn.Module):
    """A module that is called, and whose weight a functional call reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.relu(self.fc(x)), self.fc.weight)


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10)
    )


class Picture:
    """An SVG text, parsed: its boxes by key, its arrows, all its words."""

    def __init__(self, text: str) -> None:
        root = ElementTree.fromstring(text)
        assert root.tag == f"{SVG}svg"
        self.words = [element.text or "" for element in root.iter(f"{SVG}text")]
        groups = list(root.iter(f"{SVG}g"))
        named = [(group.get("class", ""), group.findtext(f"{SVG}title", "")) for group in groups]
        self.boxes = sorted(title for kind, title in named if "node" in kind.split())
        self.sites = sorted(title for kind, title in named if "site" in kind.split())
        self.arrows = {tuple(title.split("->")) for kind, title in named if kind == "edge"}
        self.frames = [title for kind, title in named if kind == "cluster"]

    @property
    def marks(self) -> list[str]:
        """One for each site, as `DropConnect p=0.3`; not those of the other users of tied weights."""
        return [word for word in self.words if word.startswith("DropConnect p=")]


def test_a_plain_model_is_drawn_with_its_flow_and_no_mark() -> None:
    picture = Picture(draw(Block()))
    assert picture.boxes == sorted(["input x", "norm", "fc1", "act", "fc2", " add 1", "output"])
    assert picture.arrows == {
        ("input x", "norm"),
        ("norm", "fc1"),
        ("fc1", "act"),
        ("act", "fc2"),
        ("fc2", " add 1"),
        ("input x", " add 1"),
        (" add 1", "output"),
    }
    assert not picture.sites
    assert not picture.marks
    assert {"32×8", "8×32", "Linear", "GELU", "+"} <= {word.strip() for word in picture.words}


CASES: list[tuple[type[nn.Module] | Any, Any]] = [
    (Block, "fc*"),
    (Block, "fc2"),
    (cnn, [nn.Conv2d, nn.Linear]),
    (Recurrent, ["emb", "rnn"]),
    (Recurrent, "re:.*weight_.*_l1"),
    (Recurrent, "head"),
    (Functional, "fc"),
    (Both, "fc"),
]


@pytest.mark.parametrize(("make", "targets"), CASES)
def test_every_site_is_marked_exactly_once_in_place_and_in_a_plan(make: Any, targets: Any) -> None:
    model = make()
    before = draw(model)
    plan = plan_dropconnect(model, targets, p=0.25, unit="input")
    planned = draw(model, plan=plan)
    picture = Picture(planned)
    assert picture.marks == ["DropConnect p=0.25 unit=input"] * len(plan)
    owners = {name.rpartition(".")[0] for s in plan for name in (s.name, *s.shared_with)}
    assert picture.sites == sorted(owners)
    apply_dropconnect(model, plan)
    assert draw(model) == planned
    strip_dropconnect(model)
    assert draw(model) == before
    assert Picture(before).boxes == picture.boxes


@pytest.mark.parametrize(
    ("unit", "pale"), [("element", 12), ("input", 12), ("output", 10), ("tensor", 0)]
)
def test_the_little_matrix_shows_how_much_drops_and_what_drops_together(
    unit: Any, pale: int
) -> None:
    """Ten columns and four rows, of which p = 0.3 are pale: whole columns, or rows (0.3 of 4 is 1)."""
    model = nn.Sequential(nn.Linear(4, 4))
    text = draw(model, plan=plan_dropconnect(model, "0", p=0.3, unit=unit))
    corners = re.findall(r'<polygon fill="#fbe3cd"[^>]*points="([-\d.]+),([-\d.]+)', text)
    assert len(corners) == pale
    assert len(re.findall('<polygon fill="#e8710a"', text)) == 40 - pale
    if unit == "input":
        assert len({x for x, _ in corners}) == 3
    if unit == "output":
        assert len({y for _, y in corners}) == 1


def test_the_other_user_of_a_tied_weight_names_the_first() -> None:
    model = Recurrent()
    picture = Picture(draw(model, plan=plan_dropconnect(model, "emb", p=0.5)))
    assert picture.sites == ["emb", "head"]
    assert "DropConnect with emb.weight" in picture.words
    assert "tied with emb.weight" in Picture(draw(model)).words


def test_the_picture_of_an_operated_model_leaves_it_operated() -> None:
    model = apply_dropconnect(Block(), "fc*", p=0.5, toward="pretrained")
    plan, kept = dropconnect_sites(model), {k: v.clone() for k, v in model.state_dict().items()}
    parameters = list(model.parameters())
    draw(model)
    assert dropconnect_sites(model) == plan
    assert model.training
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(kept)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_the_same_model_gives_the_same_text() -> None:
    plan = plan_dropconnect(Deep(), "*.fc*", p=0.3)
    assert draw(Deep(), plan=plan) == draw(Deep(), plan=plan)


def test_equal_layers_are_drawn_once_in_a_frame() -> None:
    model = Deep()
    picture = Picture(draw(model, plan=plan_dropconnect(model, "*.fc*", p=0.3)))
    assert picture.frames == ["cluster layer.0"]
    assert "layer.0–3 ×4" in picture.words
    assert picture.sites == ["layer.0.fc1", "layer.0.fc2"]
    assert ("layer.0 add 1", "head") in picture.arrows
    assert ("layer.0 add 1", "layer.0.norm") not in picture.arrows
    assert " softmax 1" in picture.boxes


def test_a_layer_that_differs_is_drawn_apart() -> None:
    model = Deep()
    picture = Picture(draw(model, plan=plan_dropconnect(model, "layer.1.fc1", p=0.3)))
    assert picture.sites == ["layer.1.fc1"]
    assert picture.frames == ["cluster layer.2"]
    assert {("layer.0 add 1", "layer.1.norm"), ("layer.1 add 1", "layer.2.norm")} <= picture.arrows


def test_weights_without_a_module_and_attention_read_by_a_parent() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8, 8))
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.attn(x, x, x, need_weights=False)[0]
            return y @ self.scale

    model = Attending()
    plan = plan_dropconnect(model, ["attn", "scale"], p=0.3)
    picture = Picture(draw(model, plan=plan))
    assert len(plan) == 3
    assert len(picture.marks) == 3
    assert {"out_proj.weight", "in_proj_weight", "scale"} <= set(picture.words)
    assert picture.arrows == {("input x", "attn"), ("attn", "scale"), ("scale", "output")}


def test_two_weights_of_one_module_are_two_boxes() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(4, 8)), nn.Parameter(torch.ones(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x @ self.a) @ self.b

    picture = Picture(draw(Two()))
    expected = {("input x", "a"), ("a", " relu 1"), (" relu 1", "b"), ("b", "output")}
    assert picture.arrows == expected


def test_a_module_that_is_called_twice_is_one_box() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(torch.relu(self.fc(x)))
            return y

    model = Twice()
    picture = Picture(draw(model, plan=plan_dropconnect(model, "fc", p=0.5)))
    assert picture.marks == ["DropConnect p=0.5"]
    assert {("fc", " relu 1"), (" relu 1", "fc")} <= picture.arrows


@pytest.mark.parametrize("way", ["symbolic_trace", "export", "record"])
def test_the_picture_does_not_depend_on_the_way_of_capturing(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("not this way")

    model = Deep().eval()
    expected = Picture(draw(model))
    if way != "symbolic_trace":
        monkeypatch.setattr("torch.fx.symbolic_trace", refuse)
    if way == "record":
        monkeypatch.setattr("torch.export.export", refuse)
    picture = Picture(draw(model, example_inputs=torch.ones(2, 3, 8)))
    name = "input x" if way != "record" else next(box for box in picture.boxes if "input" in box)
    assert picture.boxes == [box.replace("input x", name) for box in expected.boxes]
    assert len(picture.arrows) == len(expected.arrows)


def test_a_residual_starts_before_a_norm_whose_cast_does_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Export gives the result of `x.to(x.dtype)` to everyone who reads `x` afterwards."""

    class RMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            x = x.to(torch.float32)
            return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True))

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("not this way")

    monkeypatch.setattr("torch.fx.symbolic_trace", refuse)
    model = Block()
    model.norm = RMSNorm()  # type: ignore[assignment]
    picture = Picture(draw(model, example_inputs=torch.ones(2, 8)))
    assert ("input x", " add 1") in picture.arrows
    assert not {("norm", " add 1"), ("norm", "norm")} & picture.arrows


def test_the_file_of_a_picture_is_replaced_and_needs_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "x.svg"
    path.write_text("old")
    assert draw(cnn(), path) == path.read_text(encoding="utf-8")
    message = f"there is no folder {tmp_path / 'no'}; make it first, or name another"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        draw(cnn(), tmp_path / "no" / "x.svg")
