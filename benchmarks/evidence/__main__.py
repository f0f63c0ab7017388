"""Do what is missing of the experiments, and write the page."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from . import labels, paper
from .runs import Experiment, do_missing

def experiments(data: Path) -> dict[str, Experiment]:
    """By name, in the order of the page."""
    return {
        own.name: own
        for own in (labels.experiment(), paper.rate_experiment(data), paper.experiment(data))
    }


RESULTS = Path(__file__).parent / "results"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to this")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument(
        "--where", action="append", default=[], metavar="FIELD=VALUE", help="only such units"
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--data", type=Path, default=paper.DEBIAN, help="four files in IDX form")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything needed is installed
    every = experiments(options.data)
    for name in options.experiments or every:
        seeds = range(options.first, options.seeds)
        only = dict(each.split("=", 1) for each in options.where)
        for unit, row in do_missing(
            every[name], seeds, options.results, options.device, only
        ):
            print(name, unit, f"{row.seconds:.0f} s", row.result, flush=True)


if __name__ == "__main__":
    main()
