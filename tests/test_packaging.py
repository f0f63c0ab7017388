"""What is imported, and what is shipped."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import surgery

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
FOLDERS = {"surgery": "surgery", "transforms": "surgery.transforms", "adapters": "surgery.adapters"}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def package_of(folder: Path) -> str:
    """The dotted package that a folder of the repository installs as."""
    first, *rest = folder.relative_to(ROOT).parts
    return ".".join([FOLDERS[first], *rest])


HEAVY = ("transformers", "peft", "triton", "accelerate", "datasets", "torch._dynamo", "typer")


def test_import_is_light() -> None:
    """Nothing that `import torch` would not import, of what is slow or may be missing."""
    code = """
import sys, torch
before = set(sys.modules)
import surgery
print(*sorted(set(sys.modules) - before))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = result.stdout.split()
    assert "surgery.verbs.apply" in loaded
    assert not [name for name in loaded if name.startswith(HEAVY)]
    assert not [name for name in loaded if name.startswith(("surgery.adapters", "surgery.tran"))]


def test_every_folder_with_code_is_a_listed_package() -> None:
    """An unlisted one works in an editable install and is missing from the wheel."""
    listed = project()["tool"]["setuptools"]["packages"]
    found = {
        package_of(path.parent) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")
    }
    assert sorted(listed) == sorted(found)


def test_every_folder_of_code_is_a_package() -> None:
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), path.parent


def test_package_directories() -> None:
    directories = project()["tool"]["setuptools"]["package-dir"]
    assert directories == {package: folder for folder, package in FOLDERS.items()}


def test_entry_points_can_be_imported() -> None:
    pytest.importorskip("transformers")
    for name, target in project()["project"]["entry-points"]["surgery.plugins"].items():
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            assert importlib.import_module(target).__doc__, target


def test_installed_entry_points_are_those_of_the_project() -> None:
    """An editable install keeps those of the day when it was made: install again."""
    installed = {entry.name: entry.value for entry in entry_points(group="surgery.plugins")}
    assert project()["project"]["entry-points"]["surgery.plugins"].items() <= installed.items()


def test_public_names_exist_and_are_documented() -> None:
    for name in surgery.__all__:
        assert getattr(surgery, name).__doc__, name
    assert sorted(surgery.__all__) == surgery.__all__


def test_version_and_types_are_shipped() -> None:
    assert surgery.__version__
    assert (Path(surgery.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("name", ["surgery.adapters", "surgery.transforms"])
def test_python_started_in_a_checkout_finds_all_folders(name: str) -> None:
    """There `import surgery` finds the folder of the checkout, which holds the core only."""
    code = f"import surgery, {name}; print(surgery.__file__)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert Path(run.stdout.strip()) == ROOT / "surgery" / "__init__.py"


def test_a_library_that_is_imported_after_a_verb_gets_its_plugin() -> None:
    """In a fresh process: its parts import one another, and the plugin waits for two of them."""
    code = """
import torch, surgery
surgery.apply_dropconnect(torch.nn.Sequential(torch.nn.Linear(3, 3)), "0")
from transformers import GPT2Config, GPT2LMHeadModel
model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1, n_positions=4,
                                   bos_token_id=None, eos_token_id=None))
print(len(surgery.plan_dropconnect(model, "all-linear")))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split()[-1:] == ["4"], result.stderr[-2000:]


def test_the_oldest_releases_are_those_that_are_tested() -> None:
    """Every lower bound of what users install is a release that `make test-oldest` takes."""
    pinned = dict(
        line.split("==")
        for line in (ROOT / "tests" / "oldest.txt").read_text().split()
        if "==" in line
    )
    extras = project()["project"]["optional-dependencies"]
    needed = [*project()["project"]["dependencies"], *extras["hf"], *extras["cli"]]
    bounds = dict(one.split(">=") for one in needed)
    assert bounds.keys() >= {"torch", "safetensors", "transformers", "typer"}
    for name, bound in bounds.items():
        assert pinned[name].removesuffix(".0").removesuffix(".0") == bound, name
