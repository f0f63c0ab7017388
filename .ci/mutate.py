"""Change the code of a room, one operator at a time, and list the changes that no test notices.

    python .ci/mutate.py planning --sample 100

The changes are those of cosmic-ray, on a copy of the tree. The near tests of the room run once as they
are, while coverage notes which of them reach which line; then each change is tried on the tests that
reach its line, the quickest first. A change that survives is a test that is missing, or no change in
behaviour, or seen only by processes that tests start, which coverage does not follow.
"""

from __future__ import annotations

import argparse
import difflib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch  # noqa: F401  # once, here: every run below is a fork of this process
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from coverage import Coverage

ROOT = Path(__file__).resolve().parent.parent
TREE = ("surgery", "transforms", "adapters", "tests", "examples", "benchmarks", "docs")
FILES = ("pyproject.toml", "README.md", "Makefile")

TESTS = {
    "planning": "tests/planning tests/kinds tests/verbs/test_set_p.py "
    "tests/operating/test_round_trip.py tests/transforms/operating/test_graph_round_trip.py",
    "operating": "tests/operating tests/verbs/test_set_inference.py tests/adapters/test_peft.py "
    "tests/survive/test_copies.py tests/survive/test_state_dict.py tests/transforms/operating",
    "modules": "tests/modules tests/verbs/test_hold_masks.py tests/verbs/test_set_p.py "
    "tests/verbs/test_set_inference.py tests/verbs/test_checkpoint.py tests/verbs/test_edges.py "
    "tests/verbs/test_mc_predict_together.py tests/moments/test_moments.py "
    "tests/survive/test_copies.py tests/survive/test_state_dict.py tests/survive/test_functional.py "
    "tests/transforms/operating/test_graph_round_trip.py tests/transforms/operating/test_insert.py",
    "ops": "tests/ops tests/modules/test_family.py tests/modules/test_fused_linear.py",
}
"""By room: its near tests."""

KINDS = (
    "core/AddNot",
    "core/NumberReplacer",
    "core/ReplaceAndWithOr",
    "core/ReplaceBinaryOperator_Add_Sub",
    "core/ReplaceBinaryOperator_Mul_Div",
    "core/ReplaceBinaryOperator_Sub_Add",
    "core/ReplaceBreakWithContinue",
    "core/ReplaceComparisonOperator_Eq_NotEq",
    "core/ReplaceComparisonOperator_GtE_Gt",
    "core/ReplaceComparisonOperator_Gt_GtE",
    "core/ReplaceComparisonOperator_IsNot_Is",
    "core/ReplaceComparisonOperator_Is_IsNot",
    "core/ReplaceComparisonOperator_LtE_Lt",
    "core/ReplaceComparisonOperator_Lt_LtE",
    "core/ReplaceComparisonOperator_NotEq_Eq",
    "core/ReplaceContinueWithBreak",
    "core/ReplaceFalseWithTrue",
    "core/ReplaceOrWithAnd",
    "core/ReplaceTrueWithFalse",
    "core/ReplaceUnaryOperator_Delete_Not",
    "core/ZeroIterationForLoop",
)
"""Changes that programmers make. Others (`+` to `<<`) fail at once."""

FIRST = 15
"""How many tests run before the others: most changes are noticed by them."""


class Mutant(NamedTuple):
    """A change of one operator: the `occurrence`-th place of a file where it can be made."""

    path: str
    line: int
    kind: str
    occurrence: int

    @property
    def place(self) -> str:
        """Its file and line."""
        return f"{self.path}:{self.line}"

    def text(self, source: str) -> str:
        """The file with the change."""
        return mutate_code(source, get_operator(self.kind)(), self.occurrence)


class Reach:
    """A pytest plugin that notes which tests reach which line, and how long each takes."""

    def __init__(self, coverage: Coverage) -> None:
        self.coverage = coverage
        self.seconds: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """What runs from here on is of this test."""
        self.coverage.switch_context(item.nodeid)
        return (yield)  # type: ignore[return-value]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add the time of one phase of a test."""
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration

    def by_line(self) -> dict[str, list[str]]:
        """By `file:line`: the tests that reach it, the quickest first. A line that no test reaches for
        itself, as a `def`, is not in it."""
        data, reached = self.coverage.get_data(), {}
        for file in data.measured_files():
            for line, tests in data.contexts_by_lineno(file).items():
                known = sorted(set(tests) & set(self.seconds), key=self.seconds.__getitem__)
                if known:
                    reached[f"{os.path.relpath(file)}:{line}"] = known
        return reached


def main() -> int:
    """Number of changes that survived, 100 at most."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("room", choices=sorted(TESTS))
    parser.add_argument("--sample", type=int, default=100, help="how many changes; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for each change")
    parser.add_argument("--at", default="", help="only in files and lines that begin so")
    parser.add_argument("--map", type=Path, help="file that keeps which tests reach which line")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        kept = folder / "reached.json" if given.map is None else given.map.resolve()
        for part in TREE:
            shutil.copytree(
                ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__")
            )
        for file in FILES:
            shutil.copy(ROOT / file, folder / file)
        os.chdir(folder)
        sys.path.insert(0, name)
        os.environ["PYTHONPATH"] = os.pathsep.join([name, os.environ.get("PYTHONPATH", "")])
        if not kept.exists() and forked(lambda: unchanged(given.room, kept), 3600.0) != 0:
            raise SystemExit("the tests fail as they are; see above")
        reached = json.loads(kept.read_text())
        sys.dont_write_bytecode = True  # that of a change would be taken for that of the file
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        possible = [one for one in mutants(given.room) if one.place.startswith(given.at)]
        count = min(given.sample or len(possible), len(possible))
        drawn = random.Random(given.seed).sample(possible, count)
        survived = sum(not killed(one, reached, given) for one in sorted(drawn))
        print(f"{survived} of {len(drawn)} changes survived ({len(possible)} are possible)")
        return min(survived, 100)


def unchanged(room: str, kept: Path) -> int:
    """Run all near tests of a room, and keep which lines each reaches; pytest's exit code."""
    coverage = Coverage(data_file=None, include=[f"{os.getcwd()}/surgery/{room}/*"])
    reach = Reach(coverage)
    coverage.start()
    code = pytest.main([*ARGUMENTS, *TESTS[room].split()], plugins=[reach])
    coverage.stop()
    kept.write_text(json.dumps(reach.by_line()))
    return int(code)


ARGUMENTS = ("-x", "-q", "--no-header", "-m", "not slow", "-p", "no:cacheprovider")


def forked(body: Callable[[], int], seconds: float) -> int | None:
    """Exit code of a fork of this process that does this; None if it took too long."""
    process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(body()))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    return process.exitcode


def mutants(room: str) -> list[Mutant]:
    """All changes of these kinds that can be made to the files of a room."""
    found = []
    for path in sorted(Path("surgery", room).rglob("*.py")):
        tree = get_ast(path.read_text())
        for kind in KINDS:
            operator: Any = get_operator(kind)()
            places = (at for node in ast_nodes(tree) for at in operator.mutation_positions(node))
            found += [Mutant(str(path), at[0][0], kind, n) for n, at in enumerate(places)]
    return found


def killed(one: Mutant, reached: dict[str, list[str]], given: argparse.Namespace) -> bool:
    """Try one change, and print what became of it."""
    path = Path(one.path)
    source = path.read_text()
    changed = one.text(source)
    tests = reached.get(one.place) or TESTS[given.room].split()
    path.write_text(changed)
    try:
        codes = (forked(lambda part=part: tried(part), given.timeout) for part in parts(tests))
        dead = any(code != 0 for code in codes)
    finally:
        path.write_text(source)
    print(f"{'killed  ' if dead else 'SURVIVED'} {one.place} {one.kind}", flush=True)
    lines = difflib.unified_diff(source.splitlines(), changed.splitlines(), lineterm="", n=0)
    if not dead:
        print("\n".join(list(lines)[3:]), flush=True)
    return dead


def parts(tests: list[str]) -> list[list[str]]:
    """The first tests, and the others, if there are any."""
    return [part for part in (tests[:FIRST], tests[FIRST:]) if part]


def tried(tests: list[str]) -> int:
    """Run these tests quietly; pytest's exit code."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    return int(pytest.main([*ARGUMENTS, *tests]))


if __name__ == "__main__":
    sys.exit(main())
