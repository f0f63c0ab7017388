"""Files that were pickled, and code that was written, before modules moved into rooms."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from surgery import Plan, dropconnect_sites, strip_dropconnect
from surgery.aliases import MOVED
from surgery.modules import SiteState

from ..internals import states_of

FILE = Path(__file__).with_name("before_the_rooms.pt")
"""Written by release 0.1.0.dev of one room: models with DropConnect in modules and in graphs, a plan, a
config, and what the models returned in `eval()` and, after `torch.manual_seed(1)`, in training."""


def test_a_file_from_before_the_move() -> None:
    """In a fresh process, which knows nothing but the file: the same outputs and masks, up to the
    rounding of the machine that wrote it."""
    code = f"""
import torch
saved = torch.load({str(FILE)!r}, weights_only=False)
def run(model):
    out = model(saved["x"])
    return out[0] if isinstance(out, tuple) else out
for name, model in saved["models"].items():
    torch.testing.assert_close(run(model.eval()), saved["outputs"][name])
    torch.manual_seed(1)
    torch.testing.assert_close(run(model.train()), saved["outputs"][name + " dropping"])
print(len(saved["models"]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["5"], run.stderr[-2000:]


@pytest.mark.filterwarnings("ignore:surgery.*is now surgery:DeprecationWarning")
def test_what_it_holds_is_of_todays_classes() -> None:
    saved = torch.load(FILE, weights_only=False)
    net = saved["models"]["net"]
    assert isinstance(saved["plan"], Plan)
    assert [site.name for site in dropconnect_sites(net)] == [site.name for site in saved["plan"]]
    assert {type(state) for state in states_of(net[0])} == {SiteState}
    assert type(strip_dropconnect(net)[0]) is torch.nn.Linear


@pytest.mark.parametrize("old", sorted(MOVED))
def test_old_names_are_the_moved_modules(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same object, under either name, and known by its new one."""
    pytest.importorskip("transformers")
    package, _, name = f"surgery.{old}".rpartition(".")
    parent = importlib.import_module(package)
    if name in vars(parent):  # an import sets it
        monkeypatch.setattr(parent, name, vars(parent)[name])
    monkeypatch.delitem(sys.modules, f"surgery.{old}", raising=False)
    with pytest.warns(DeprecationWarning, match=f"surgery.{MOVED[old]}; the old name goes"):
        found = importlib.import_module(f"surgery.{old}")
    new = importlib.import_module(f"surgery.{MOVED[old]}")
    assert found is new
    assert new.__spec__ is not None
    assert new.__name__ == new.__spec__.name == f"surgery.{MOVED[old]}"


def test_an_unknown_name_is_still_unknown() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"surgery\.no_such"):
        importlib.import_module("surgery.no_such")


def test_functions_stay_what_they_are() -> None:
    """Modules were once called as functions of the package are: `surgery.transforms.find`. In a fresh
    process, where nothing but a pickle names the old module."""
    code = """
import pickle, warnings
assert isinstance(pickle.loads(b"csurgery.transforms.find\\nFindings\\n."), type)
import surgery.transforms.draw, surgery.transforms.record, surgery.transforms.tree
import surgery.transforms as t
from surgery.transforms.capture import Capture, CaptureError
assert not [name for name in t.__all__ if not callable(getattr(t, name))]
warnings.simplefilter("ignore")
import surgery
from surgery.modules import kinds
assert surgery.config.DropConnectConfig is surgery.DropConnectConfig
assert kinds.register_kind is surgery.modules.register_kind
assert not hasattr(surgery, "nothing")
from surgery.finder import register_finder
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
