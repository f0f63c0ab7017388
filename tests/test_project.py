"""What the files around the package say is so: versions, linters, targets, code that is shown."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import surgery

ROOT = Path(__file__).parents[1]


def text(name: str) -> str:
    return (ROOT / name).read_text()


MAKEFILE = text("Makefile")


def parsed(name: str) -> Any:
    """A file of YAML."""
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / name).read_text())


def recipe(target: str) -> list[str]:
    """The commands of a target, with variables of the Makefile as they are."""
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.M)
    assert found, f"no target {target} with a recipe"
    return [line.strip() for line in found[1].splitlines()]


def test_the_changelog_begins_with_this_version() -> None:
    versions = re.findall(
        r"^## \[([^]]+)\] - (unreleased|\d{4}-\d\d-\d\d)$", text("CHANGELOG.md"), re.M
    )
    assert versions[0][0] == surgery.__version__
    assert [state for _, state in versions[1:] if state == "unreleased"] == []


def test_the_citation_is_of_this_version_and_licence() -> None:
    citation = parsed("CITATION.cff")
    assert citation["version"] == surgery.__version__
    assert f'license = "{citation["license"]}"' in text("pyproject.toml")
    assert all(
        work["authors"] and work["title"] and work["year"] for work in citation["references"]
    )


def test_the_oldest_python_is_the_one_that_is_named_first() -> None:
    named = re.findall(r"Python :: (3\.\d+)", text("pyproject.toml"))
    assert f'requires-python = ">={named[0]}"' in text("pyproject.toml")


def test_git_lints_as_make_does() -> None:
    hooks = [hook for repo in parsed(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    entries = [hook["entry"].replace(".venv/bin", "$(BIN)") for hook in hooks]
    assert entries == recipe("lint")
    assert not any(hook["pass_filenames"] for hook in hooks)


def test_help_lists_the_targets() -> None:
    phony = re.search(r"^\.PHONY:(.*)$", MAKEFILE.replace("\\\n", " "), re.M)
    assert phony
    targets = {*phony[1].split()} - {"help"}
    listed = re.findall(r'^\t@echo "make ([\w-]+) ', MAKEFILE, re.M)
    assert sorted(listed) == sorted(targets)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
@pytest.mark.parametrize("target", ["setup", "release-check"])
def test_targets_know_how_to_make_what_they_need(target: str) -> None:
    run = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


SHOWN = re.findall(r"```python\n(.*?)```", text("CONTRIBUTING.md"), re.S)


@pytest.mark.parametrize("number", range(len(SHOWN)))
def test_what_contributing_shows_runs(number: int, tmp_path: Path) -> None:
    script = tmp_path / "shown.py"  # a file: who reads a weight is found in the source
    script.write_text(SHOWN[number])
    run = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_links_between_documents_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    files = [target.partition("#")[0] for target in targets if "://" not in target]
    assert [name for name in files if name and not (page.parent / name).exists()] == []


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_files_that_documents_name_are_there(page: Path) -> None:
    folders = "surgery|transforms|adapters|tests|docs|examples|benchmarks|\\.ci"
    named = re.findall(rf"`((?:{folders})/[\w./-]+)", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []
