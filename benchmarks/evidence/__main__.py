"""Do what is missing of the experiments, and put the tables into the page.

python -m benchmarks.evidence                         # all of them, as far as they are not done
python -m benchmarks.evidence labels --seeds 10 --where labels=256 --device cuda
python -m benchmarks.evidence --seeds 0               # nothing more: only the tables of what is there
python -m benchmarks.evidence --page docs/evidence.md # make evidence
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from surgery.base.files import whole_file

from . import foreign_digits, foreign_texts, labels, language, paper
from .page import rendered, section
from .runs import Experiment, do_missing, load

RESULTS = Path(__file__).parent / "results"


def experiments(data: Path = paper.DEBIAN) -> dict[str, Experiment]:
    """By name, in the order of the page."""
    every = (
        labels.experiment(),
        paper.rate_experiment(data),
        paper.experiment(data),
        language.experiment(),
        foreign_texts.experiment(),
        foreign_digits.experiment(),
    )
    return {own.name: own for own in every}


def work(experiment: Experiment, options: argparse.Namespace) -> bool:
    """Do what is missing; whether there was all that it needs."""
    seeds = range(options.first, options.seeds)
    where = [(field, value) for field, _, value in (each.partition("=") for each in options.where)]
    try:
        for unit, row in do_missing(experiment, seeds, options.results, options.device, where):
            print(f"[{experiment.name} {told(unit)}: {row.seconds:.0f} s]", flush=True)
    except FileNotFoundError as error:
        print(f"{experiment.name} is left out: {error}", file=sys.stderr)
        return False
    return True


def told(unit: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in unit.items())


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence", description=(__doc__ or "").splitlines()[0]
    )
    every = list(experiments())
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=", ".join(every))
    parser.add_argument("--seeds", type=int, default=5, help="from --first up to this, less one")
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="only such units; the same field again: or such",
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--data", type=Path, default=paper.DEBIAN, help="four files in IDX form")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--page", type=Path, help="put all tables into this page, too")
    options = parser.parse_args(arguments)
    unknown = sorted({*options.experiments} - {*every})
    if unknown:
        parser.error(f"no experiment is called {', '.join(unknown)}; there are {', '.join(every)}")
    if any("=" not in each for each in options.where):
        parser.error("--where needs FIELD=VALUE, as in --where labels=256")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything needed is installed
    every = experiments(options.data)
    whole = True
    for name in options.experiments or every:
        whole &= work(every[name], options)
        print(f"\n{section(every[name], load(every[name], options.results))}\n", flush=True)
    if options.page is not None:
        text = rendered(options.page.read_text(), list(every.values()), options.results)
        with whole_file(options.page) as path:
            Path(path).write_text(text)
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
