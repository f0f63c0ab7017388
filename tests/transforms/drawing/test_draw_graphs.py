"""Pictures of graphs, of a model in three states, and the files they are written to."""

from __future__ import annotations

import importlib.util
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import fx, nn

from surgery import apply_dropconnect, dropconnect_sites, plan_dropconnect
from surgery.spec.plan import Plan

pytest.importorskip("pygraphviz", reason="the extra `draw` is not installed")

from surgery.transforms.drawing.draw import draw, draw_states

from .test_draw import Block, Functional, Picture

ROOT = Path(__file__).parents[3]


class TestGraphs:
    def test_every_node_is_a_box(self) -> None:
        graph = fx.symbolic_trace(Block())
        picture = Picture(draw(graph))
        assert picture.boxes == sorted(node.name for node in graph.graph.nodes)
        assert len(picture.arrows) == sum(len(n.all_input_nodes) for n in graph.graph.nodes)
        assert not picture.sites

    def test_modules_that_a_graph_calls_are_marked(self) -> None:
        graph = fx.symbolic_trace(Block())
        plan = plan_dropconnect(graph, "fc*", p=0.3)
        planned = Picture(draw(graph, plan=plan))
        assert (planned.sites, planned.marks) == (["fc1", "fc2"], ["DropConnect p=0.3"] * 2)

    def test_a_parameter_that_nodes_read_is_marked_where_it_is_read(self) -> None:
        graph = functional_graph()
        plan = Plan(tuple(dropconnect_sites(apply_dropconnect(Functional(), "fc", p=0.3))))
        picture = Picture(draw(graph, plan=plan))
        assert picture.sites == ["fc_weight"]
        assert picture.marks == ["DropConnect p=0.3"]

    def test_a_dropconnect_node_is_marked_and_not_the_raw_parameter(self) -> None:
        picture = Picture(draw(operated_graph()))
        assert picture.sites == ["dropconnect_fc"]
        assert picture.marks == ["DropConnect p=0.3"]

    def test_a_graph_with_dropconnect_nodes_drawn_by_module(self) -> None:
        picture = Picture(draw(operated_graph(), detail="modules"))
        assert picture.boxes == [" relu 1", "fc", "input x", "output"]
        assert "linear" in picture.words
        assert picture.sites == ["fc"]
        assert picture.marks == ["DropConnect p=0.3"]

    def test_a_large_graph_is_drawn_by_module(self) -> None:
        graph = fx.symbolic_trace(nn.Sequential(*(nn.Linear(4, 4) for _ in range(100))))
        assert len(Picture(draw(graph)).boxes) == 3
        assert len(Picture(draw(graph, detail="nodes")).boxes) == 102

    def test_nodes_of_a_model_that_is_no_graph_are_refused(self) -> None:
        with pytest.raises(
            ValueError, match=r"detail='nodes' .* Block is none; give draw\(capture"
        ):
            draw(Block(), detail="nodes")
        with pytest.raises(ValueError, match="detail must be 'modules' or 'nodes'; got 'all'"):
            draw(Block(), detail="all")  # type: ignore[arg-type]


def functional_graph() -> fx.GraphModule:
    return fx.symbolic_trace(Functional())


def operated_graph() -> fx.GraphModule:
    return apply_dropconnect(functional_graph(), "fc.weight", p=0.3)


class TestStates:
    def test_three_panels_of_which_the_last_is_the_first(self) -> None:
        model = Block()
        before = list(model.state_dict())
        text = draw_states(model, plan_dropconnect(model, "fc*", p=0.3))
        first, second, third = panels(text)
        assert first == third
        assert first != second
        assert len(Picture(text).marks) == 2
        assert Picture(text).sites == ["fc1", "fc2"]
        assert {"before", "operated", "stripped"} <= set(Picture(text).words)
        assert list(model.state_dict()) == before
        assert not dropconnect_sites(model)

    def test_the_boxes_have_the_same_places_in_all_panels(self) -> None:
        model = Block()
        first, second, _ = panels(draw_states(model, plan_dropconnect(model, "fc*", p=0.3)))
        assert [name for _, name in titles(first)] == ["norm", "fc1", "act", "fc2"]
        assert titles(first) == titles(second)

    def test_a_model_that_cannot_be_operated_on_is_left_as_it_was(self) -> None:
        model = apply_dropconnect(Block(), "fc1", p=0.3)
        with pytest.raises(ValueError, match="already in place"):
            draw_states(model, dropconnect_sites(model))
        assert len(dropconnect_sites(model)) == 1


def panels(text: str) -> list[str]:
    """The three panels without where they stand."""
    return re.findall(r'<g transform="translate\([^"]*\)">\n(.*?</g>)\n</g>\n', text, re.DOTALL)


def titles(panel: str) -> list[tuple[str, str]]:
    """Where the names of boxes stand."""
    return re.findall(r'(x="[^"]*" y="[^"]*")[^>]*font-weight="bold"[^>]*>((?!Drop)[^<]*)<', panel)


class TestFiles:
    def test_the_file_has_the_text(self, tmp_path: Path) -> None:
        text = draw(Block(), tmp_path / "model.svg")
        assert (tmp_path / "model.svg").read_text(encoding="utf-8") == text

    def test_a_failure_leaves_the_old_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "model.svg"
        path.write_text("old")

        def full(*args: Any) -> None:
            raise OSError("no space left on device")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="no space left"):
            draw(Block(), path)
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_missing_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pygraphviz", None)
        with pytest.raises(ImportError, match=r"pip install .*\[draw\]"):
            draw(Block())

    def test_importing_needs_no_graphviz(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pygraphviz", None)
        spec = importlib.util.find_spec("surgery.transforms.drawing.draw")
        assert spec is not None
        assert spec.loader is not None
        again = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(again)
        assert again.draw is not draw

    def test_the_readme_has_the_picture_that_its_script_draws(self, tmp_path: Path) -> None:
        script = ROOT / "docs" / "readme_picture.py"
        if not script.is_file():
            pytest.skip("no checkout")
        text = runpy.run_path(str(script))["picture"](tmp_path / "surgery.svg")
        committed = (ROOT / "docs" / "surgery.svg").read_text(encoding="utf-8")
        assert Picture(text).words == Picture(committed).words
        assert Picture(text).arrows == Picture(committed).arrows


def test_a_minilm_is_readable(tiny) -> None:
    minilm = tiny("minilm", num_hidden_layers=6).eval()
    plan = plan_dropconnect(minilm, "all-linear", p=0.1)
    picture = Picture(draw(minilm, plan=plan))
    assert len(plan) == 37
    assert len(picture.boxes) == 22
    assert len(picture.marks) == 7  # six in the layer that stands for six, and the pooler
    assert picture.frames == ["cluster encoder.layer.0"]
    assert "encoder.layer.0–5 ×6" in picture.words
    self_attention = "encoder.layer.0.attention.self"
    attention = f"{self_attention} scaled_dot_product_attention 1"
    for name in ("query", "key", "value"):
        assert (f"{self_attention}.{name}", attention) in picture.arrows
    assert (attention, "encoder.layer.0.attention.output.dense") in picture.arrows
    assert ("embeddings.LayerNorm", "encoder.layer.0.attention.output add 1") in picture.arrows
