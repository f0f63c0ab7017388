"""Random surgery, beside a plain twin.

    python -m tests.random_surgery [--graphs] [--count N] [--first SEED] [--workers W]
    python -m tests.random_surgery [--graphs] --seed SEED [--keep 0,3,7]

plays so many sequences of random actions and prints how many were tried and how many found a fault,
each with the command that plays it again.
"""

import argparse
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from .play import command, how, many, play

BLOCK = 50
"""Sequences that a worker plays at a time."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--keep", default="")
    options = parser.parse_args()
    if options.seed is not None:
        keep = [int(index) for index in options.keep.split(",")] if options.keep else None
        played = play(options.seed, keep=keep, **how(options.graphs))
        print(*played.steps, played.where or "no fault", sep="\n")
        return int(played.fault is not None)
    return _print_many(options)


def _print_many(options: argparse.Namespace) -> int:
    done: Counter[str] = Counter()
    faults = 0
    firsts = range(options.first, options.first + options.count, BLOCK)
    with ProcessPoolExecutor(options.workers, get_context("forkserver")) as pool:
        left = [min(BLOCK, options.first + options.count - first) for first in firsts]
        for counts, found in pool.map(many, firsts, left, [options.graphs] * len(firsts)):
            done += counts
            faults += len(found)
            for played, keep in found:
                print(f"FAULT {played.fault}")
                print(" ", command(played.seed, keep, options.graphs))
    kind = "graphs" if options.graphs else "models"
    print(f"random surgery on {kind}: {options.count} sequences tried, {faults} faults;", end=" ")
    print(
        f"{sum(done.values())} actions:", ", ".join(f"{n} {name}" for name, n in done.most_common())
    )
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
