"""Change the code of a room, one operator at a time, and list the changes that no test notices.

    python .ci/mutate.py planning --sample 100

The changes are those of cosmic-ray, on a copy of the tree. The near tests of the room are collected
once, and run once as they are while coverage notes which of them reach which line. Each change is then
put into the functions of a fork, which runs the tests that reach its line, the quickest first. A change
outside of functions is tried by a new process. What survives is a test that is missing, or no change in
behaviour, or seen only by processes that tests start, which coverage does not follow.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from coverage import Coverage
from some_cases import keep_some

ROOT = Path(__file__).resolve().parent.parent
TREE = ("surgery", "transforms", "adapters", "tests", "examples", "benchmarks", "docs")
FILES = ("pyproject.toml", "README.md", "Makefile")

TESTS = {
    "planning": "tests/planning tests/kinds tests/verbs/test_set_p.py "
    "tests/operating/test_round_trip.py tests/transforms/operating/test_graph_round_trip.py",
    "operating": "tests/operating tests/verbs/test_set_inference.py tests/adapters/test_peft.py "
    "tests/survive/test_copies.py tests/survive/test_state_dict.py tests/transforms/operating",
    "modules": "tests/modules tests/verbs/test_hold_masks.py tests/verbs/test_set_p.py "
    "tests/verbs/test_set_inference.py tests/survive/test_copies.py "
    "tests/survive/test_state_dict.py tests/survive/test_functional.py "
    "tests/transforms/operating/test_insert.py",
    "ops": "tests/ops tests/modules/test_family.py tests/modules/test_fused_linear.py",
    "ops/gpu": "tests/ops/gpu",
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


ARGUMENTS = ("-x", "-s", "-q", "-m", "not slow", "-p", "no:cacheprovider")


class Trials:
    """A pytest plugin that tries changes, instead of running the tests that were collected."""

    def __init__(self, given: argparse.Namespace, folder: Path, reached: Path) -> None:
        self.given, self.folder, self.kept = given, folder, reached
        self.seconds: dict[str, float] = {}
        self.survived = 0

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep some cases of each test."""
        keep_some(items, self.given.cases, self.given.seed)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Try all changes that are drawn."""
        given = self.given
        if not self.kept.exists() and forked(lambda: self.unchanged(session), 3600.0) != 0:
            pytest.exit("the tests fail as they are; see above", 101)
        reached = json.loads(self.kept.read_text())
        sys.dont_write_bytecode = True  # that of a change would be taken for that of the file
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        possible = [one for one in mutants(given.room) if one.place.startswith(given.at)]
        count = min(given.sample or len(possible), len(possible))
        drawn = sorted(random.Random(given.seed).sample(possible, count))
        for one in drawn:
            self.judge(session, one, reached.get(one.place, []))
        print(f"{self.survived} of {count} changes survived ({len(possible)} are possible)")
        return True

    def unchanged(self, session: pytest.Session) -> int:
        """Run all tests, and keep by `file:line` which of them reach it, the quickest first."""
        only = f"{self.folder}/surgery/{self.given.room}/*"
        coverage = Coverage(data_file=None, config_file=False, include=[only])
        coverage.start()
        failed = self.run(session, session.items, coverage.switch_context)
        coverage.stop()
        data, reached = coverage.get_data(), {}
        for file in data.measured_files():
            for line, tests in data.contexts_by_lineno(file).items():
                known = sorted(set(tests) & set(self.seconds), key=self.seconds.__getitem__)
                if known:
                    reached[f"{os.path.relpath(file)}:{line}"] = known
        self.kept.write_text(json.dumps(reached))
        return failed

    def run(
        self,
        session: pytest.Session,
        items: list[pytest.Item],
        begins: Callable[[str], None] = lambda test: None,
    ) -> int:
        """Run tests until one fails; how many failed. `begins` is told each."""
        for item, following in zip(items, [*items[1:], None]):
            begins(item.nodeid)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.testsfailed:
                break
        return session.testsfailed

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add the time of one phase of a test, and say why it failed."""
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            print(report.nodeid, report.longreprtext, sep="\n", flush=True)

    def judge(self, session: pytest.Session, one: Mutant, tests: list[str]) -> None:
        """Try one change, and print what became of it."""
        path = self.folder / one.path
        source = path.read_text()
        changed = one.text(source)
        path.write_text(changed)  # for processes that tests start, and for what is imported later
        by_name = {item.nodeid: item for item in session.items}

        def tried() -> int:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            if "/gpu/" in one.path:  # triton has read its source
                return afresh("ops/gpu")
            if not patched(path, changed):
                return afresh(self.given.room)
            return self.run(session, [by_name[test] for test in tests])

        try:
            code = forked(tried, self.given.timeout)
        finally:
            path.write_text(source)
        fate = {0: "SURVIVED", None: "too long"}.get(code, "killed  ")
        print(fate, one.place, one.kind, flush=True)
        if code in (0, None):
            self.survived += 1
            lines = difflib.unified_diff(
                source.splitlines(), changed.splitlines(), lineterm="", n=0
            )
            print("\n".join(list(lines)[3:]), flush=True)


def patched(path: Path, text: str) -> bool:
    """Give the functions of a file the code that they have in this text. False if none differs."""
    codes, todo, found = {}, [compile(text, str(path), "exec")], False
    while todo:
        inner = [one for one in todo.pop().co_consts if isinstance(one, CodeType)]
        codes.update({(one.co_qualname, one.co_firstlineno): one for one in inner})
        todo += inner
    for one in gc.get_objects():
        if type(one) is FunctionType and one.__code__.co_filename == str(path):
            code = codes.get((one.__code__.co_qualname, one.__code__.co_firstlineno))
            if code is not None and code != one.__code__:
                one.__code__, found = code, True
    return found


def afresh(room: str) -> int:
    """Run the near tests of a room in a new process; pytest's exit code."""
    command = [sys.executable, "-m", "pytest", *ARGUMENTS, *TESTS[room].split()]
    return subprocess.run(command, check=False).returncode


def forked(body: Callable[[], int], seconds: float) -> int | None:
    """Exit code of a fork of this process that does this; None if it took too long."""

    def group() -> None:
        os.setpgrp()  # so that what tests start ends with it
        os._exit(body())

    process = multiprocessing.get_context("fork").Process(target=group)
    process.start()
    try:
        process.join(seconds)
        return process.exitcode
    finally:
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            process.join()


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


def main() -> int:
    """Number of changes that survived, 100 at most."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("room", choices=sorted(TESTS))
    parser.add_argument("--sample", type=int, default=100, help="how many changes; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for each change")
    parser.add_argument("--cases", type=int, default=0, help="of each test, at most; 0 for all")
    parser.add_argument("--at", default="", help="only in files and lines that begin so")
    parser.add_argument("--map", type=Path, help="file that keeps which tests reach which line")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        reached = folder / "reached.json" if given.map is None else given.map.resolve()
        for part in TREE:
            shutil.copytree(
                ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__")
            )
        for file in FILES:
            shutil.copy(ROOT / file, folder / file)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        os.environ["PYTHONPATH"] = os.pathsep.join([name, os.environ.get("PYTHONPATH", "")])
        trials = Trials(given, folder, reached)
        code = pytest.main([*ARGUMENTS, *TESTS[given.room].split()], plugins=[trials])
        return int(code) or min(trials.survived, 100)


if __name__ == "__main__":
    sys.exit(main())
