"""One case in a process of its own: what crashes, hangs or eats the memory there harms no other."""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from ..forks import fork
from .check import Failed, check, line_of
from .models import Case, NotBuilt, build

SECONDS = 20
"""Of computing; and five times as many by the clock."""
MEMORY = 10 * 2**30

Result = dict[str, Any]


def result_of(case: Case) -> Result:
    """What became of a case, as JSON has it."""
    begun = time.perf_counter()
    result: Result = {"case": str(case), "type": case.model_type, "head": case.head}
    try:
        built = build(case)
        result |= {
            "class": type(built.model).__name__,
            "factor": built.factor,
            "parameters": built.parameters,
            "inputs": {name: list(v.shape) for name, v in built.inputs.items()},
        }
        found = check(built.model, built.inputs)
        status = "refused" if found.refused else "passed" if found.sites else "nothing to drop"
        result |= {
            "status": status,
            "sites": found.sites,
            "drew": found.drew,
            "refused": found.refused,
            "refused_linear": found.refused_linear,
            "left_out": found.left_out,
        }
    except NotBuilt as error:
        result |= {"status": "not built", "reason": str(error)}
    except Failed as error:
        result |= {"status": "failed", "reason": str(error)}
    except Exception as error:
        result |= {
            "status": "failed",
            "reason": line_of(error),
            "trace": traceback.format_exc()[-3000:],
        }
    return result | {"seconds": round(time.perf_counter() - begun, 2)}


def results(cases: Iterable[Case], workers: int = 1) -> Iterator[Result]:
    """The results of cases, so many at a time, as they come."""
    gc.collect()
    gc.freeze()  # what is there by now is not looked at, and so not copied, in each process
    try:
        yield from _results(iter(cases), workers)
    finally:
        gc.unfreeze()


def _results(waiting: Iterator[Case], workers: int) -> Iterator[Result]:
    running: dict[int, tuple[Case, Any]] = {}
    while True:
        while len(running) < workers and (case := next(waiting, None)) is not None:
            pid, pipe = _start(case)
            running[pid] = case, pipe
        if not running:
            return
        pid, status = os.wait()
        if pid not in running:
            continue  # a child of somebody else
        case, pipe = running.pop(pid)
        with pipe:
            pipe.seek(0)
            told = pipe.read()
        yield json.loads(told) if told else _died(case, status)


def _start(case: Case) -> tuple[int, Any]:
    """A process that writes its result into a file."""
    pipe = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  read once it has ended
    sys.stdout.flush()
    pid = fork()
    if pid:
        return pid, pipe
    try:
        signal.alarm(5 * SECONDS)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        warnings.simplefilter("ignore")
        pipe.write(json.dumps(result_of(case)))
        pipe.flush()
    finally:
        os._exit(0)


def _died(case: Case, status: int) -> Result:
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    slow = number in (signal.SIGALRM, signal.SIGXCPU, signal.SIGKILL)
    why = "took too long" if slow else f"the process died (signal {number})"
    told = {"case": str(case), "type": case.model_type, "head": case.head}
    return {**told, "status": "not built", "reason": why, "seconds": SECONDS}
