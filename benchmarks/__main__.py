"""Measure everything and write `bench.md`, `bench.json` and plots.

python -m benchmarks                  # make bench
python -m benchmarks --quick          # make bench-quick
python -m benchmarks --only linear lstm
python -m benchmarks --page docs/performance.md
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from . import growth, host, layers, memory, models, paper, rounds, verbs
from .conditions import busy, conditions, now, wait_for_quiet
from .measure import FULL, QUICK, Settings, compile_extension
from .plots import draw
from .report import into_page, markdown, number, to_json, write
from .rows import OURS, Benchmark, Row

BENCHMARKS: dict[str, Benchmark] = {
    "mask": layers.mask_and_apply,
    "rounds": rounds.third_round,
    "linear": layers.linear,
    "mixout": layers.mixout,
    "lstm": layers.lstm,
    "host": host.host,
    "transformer": models.transformer,
    "trainer": models.fine_tuning,
    "kept": memory.kept,
    "peaks": memory.peaks,
    "example": paper.per_example,
    "gaussian": paper.gaussian,
    "moments": paper.moments,
    "predict": paper.monte_carlo,
    "apply": verbs.apply_and_strip,
    "set_p": verbs.change_p,
    "first": verbs.first_step,
    "compiling": verbs.compiling,
}
GROWTH = "growth"


def measure(name: str, settings: Settings) -> list[Row]:
    """The rows of one benchmark; one that fails is a row that says so."""
    torch.manual_seed(0)
    begun = time.perf_counter()
    try:
        rows = BENCHMARKS[name](settings)
    except Exception as error:
        traceback.print_exc()
        reason = f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        rows = [Row(name, name, "", skipped=reason)]
    print(f"[{name}: {time.perf_counter() - begun:.0f} s]", flush=True)
    for row in rows:
        print(f"  {row.work}: {_told(row)}", flush=True)
    return rows


def _told(row: Row) -> str:
    if row.skipped is not None:
        return f"skipped, {row.skipped}"
    found = row.reached()
    if found is None:
        found = row.ratio(OURS)
    goal = "" if row.goal is None else f" (goal {row.goal.text(row.unit)})"
    return f"{'–' if found is None else number(found)}{goal}"


def run(names: Sequence[str], settings: Settings, output: Path, page: Path | None = None) -> bool:
    """Measure, write, and say whether every benchmark ran."""
    begun, before = time.perf_counter(), now()
    warning = busy(before["load"])
    if warning is not None:
        print(f"WARNING: {warning}", file=sys.stderr)
    rows = [row for name in names if name in BENCHMARKS for row in measure(name, settings)]
    curves = growth.growth(settings) if GROWTH in names else []
    where, seconds = conditions(), time.perf_counter() - begun
    machine = {"before": before, "after": now()}
    plots = draw(rows, curves, output)
    report = to_json(rows, curves, where, machine, seconds)
    text = markdown(rows, where, machine, seconds, plots)
    write(output, report, text)
    if page is not None:
        into_page(page, text, output, plots)
    return not any((row.skipped or "").startswith("failed") for row in rows)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    every = [*BENCHMARKS, GROWTH]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="under two minutes")
    parser.add_argument("--only", nargs="+", choices=every, default=every, metavar="NAME")
    parser.add_argument("--output", type=Path, default=Path("out/bench"))
    parser.add_argument("--page", type=Path, help="put the results into this page, too")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    settings = QUICK if options.quick else FULL
    compile_extension()
    if not options.quick:
        wait_for_quiet()
    ran = run(options.only, settings, options.output, options.page)
    print(f"\n{(options.output / 'bench.md').read_text()}\nWritten to {options.output}")
    return not ran


if __name__ == "__main__":
    sys.exit(main())
