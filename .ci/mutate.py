"""Change the code of a room, one operator at a time, and list the changes that no test notices.

    python .ci/mutate.py planning --sample 100

Runs cosmic-ray on a copy of the tree. A change that survives is either a test that is missing, or no
change in behaviour.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ("surgery", "transforms", "adapters", "tests", "examples", "benchmarks", "docs")

TESTS = {
    "planning": "tests/planning tests/kinds tests/verbs/test_set_p.py "
    "tests/operating/test_round_trip.py tests/transforms/operating/test_graph_round_trip.py",
    "operating": "tests/operating tests/verbs/test_set_inference.py tests/adapters/test_peft.py "
    "tests/survive/test_copies.py tests/survive/test_state_dict.py tests/transforms/operating",
    "modules": "tests/modules tests/verbs tests/moments/test_moments.py tests/survive/test_copies.py "
    "tests/survive/test_state_dict.py tests/transforms/operating",
    "ops": "tests/ops tests/modules/test_family.py tests/modules/test_fused_linear.py",
}
"""By room: what is run for each change, the nearest tests first."""

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

CONFIG = """\
[cosmic-ray]
module-path = ["surgery/{room}"]
timeout = {timeout}
excluded-modules = []
test-command = "{python} -m pytest -x -q -m 'not slow' -p no:cacheprovider {tests}"

[cosmic-ray.distributor]
name = "local"
"""


def main() -> int:
    """Number of changes that survived, 100 at most."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("room", choices=sorted(TESTS))
    parser.add_argument("--sample", type=int, default=100, help="how many changes; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for each change")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in TREE:
            shutil.copytree(
                ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__")
            )
        for file in ("pyproject.toml", "README.md", "Makefile"):
            shutil.copy(ROOT / file, folder / file)
        config, session = folder / "mutation.toml", folder / "mutation.sqlite"
        tests = TESTS[given.room]
        config.write_text(
            CONFIG.format(
                room=given.room, timeout=given.timeout, python=sys.executable, tests=tests
            )
        )
        tool(folder, "init", config, session)
        total = draw(session, given.sample, given.seed)
        tool(folder, "exec", config, session)
        return min(report(session, total), 100)


def tool(folder: Path, *args: str | Path) -> None:
    """Run cosmic-ray in a folder."""
    command = [sys.executable, "-m", "cosmic_ray.cli", *map(str, args)]
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    subprocess.run(command, cwd=folder, check=True, env={**os.environ, "PYTHONPATH": path})


def draw(session: Path, sample: int, seed: int) -> int:
    """Leave `sample` changes of these kinds in a session; returns how many there were."""
    with sqlite3.connect(session) as store:
        rows = store.execute("select job_id, operator_name from mutation_specs").fetchall()
        wanted = sorted(job for job, kind in rows if kind in KINDS)
        kept = random.Random(seed).sample(wanted, min(sample or len(wanted), len(wanted)))
        gone = [(job,) for job in {job for job, _ in rows} - set(kept)]
        for table in ("mutation_specs", "work_items"):
            store.executemany(f"delete from {table} where job_id = ?", gone)
    return len(wanted)


def report(session: Path, total: int) -> int:
    """Print what survived; returns how many did."""
    with sqlite3.connect(session) as store:
        rows = store.execute(
            "select test_outcome, module_path, start_pos_row, operator_name, diff "
            "from work_results join mutation_specs using (job_id) order by module_path, start_pos_row"
        ).fetchall()
    survived = [row for row in rows if str(row[0]).lower().endswith("survived")]
    for _, path, line, kind, diff in survived:
        print(f"{path}:{line} {kind}")
        print("\n".join(one for one in diff.splitlines()[2:] if one[:1] in "+-"))
    print(f"{len(survived)} of {len(rows)} changes survived ({total} are possible)")
    return len(survived)


if __name__ == "__main__":
    sys.exit(main())
