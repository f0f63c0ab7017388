"""Interrupt the verbs everywhere, and look at what is left.

    python -m tests.survive.interrupts [--every N | --random N | --signals SECONDS] [VERB ...]

at every n-th instruction of each verb, at N random ones of all together, or by real signals; it prints,
for each verb, how many interrupts landed and how many left something that is neither as before nor as
after, or that cannot be retried, stripped, and be the checkpoint again.

Not counted as broken, but printed: torch's own `load_state_dict`, and the copy of a tensor, use
`with torch.no_grad()`, which is written in Python, and an interrupt at its ends leaves the gradients of
the thread off; in a plain model as well (`test_interrupts.py` shows it). Likewise functions of torch,
while a mode sees them, take it away for a moment, and put it back at the end for good. What is the
model's must be whole then too.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import surgery
from surgery import strip_dropconnect
from surgery.modules.places import places
from surgery.moments.scope import in_scope
from surgery.torch_private.modes import dispatch_modes, function_modes, switches_back

from .interrupted_verbs import VERBS, Verb, form, inputs_of

OURS = (
    str(Path(surgery.__file__).parent),
    str(Path(surgery.__file__).parent.parent / "transforms"),
)


TORCH = str(Path(torch.__file__).parent)
ENDS = torch.autograd.grad_mode.__file__, contextlib.__file__
"""Files of contexts, whose code runs where they are entered and left."""

OF_TORCH = {"no_grad": "gradients", "_pop_mode_temporarily": "function modes"}
"""Contexts of torch's functions, and what an interrupt at their ends leaves otherwise."""


OUTSIDE = {
    "hooks": None,
    "scope": False,
    "gradients": True,
    "torch functions": True,
    "function modes": 0,
    "dispatch modes": 0,
    "compiled": "default",
}
"""What `surroundings` returns where nothing of a verb is left in the thread."""


def surroundings() -> Any:
    """What belongs to the thread, not to the model."""
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")
    return {
        "hooks": torch._C._autograd._top_saved_tensors_default_hooks(False),
        "scope": in_scope(),
        "gradients": torch.is_grad_enabled(),
        "torch functions": torch._C._is_torch_function_enabled(),
        "function modes": function_modes(),
        "dispatch modes": dispatch_modes(),
        "compiled": "default" if dynamo is None else dynamo._stance.stance,
    }


def left_behind() -> dict[str, Any]:
    """What of a verb is still in the thread; it is put back, so that the next one starts afresh."""
    found = {name: now for name, now in surroundings().items() if now != OUTSIDE[name]}
    if found:
        PUT_BACK()
    return found


PUT_BACK = switches_back()
"""To what they are when this file is imported."""


def torchs_own(frame: FrameType | None) -> set[str]:
    """What an interrupt before this frame's next instruction may leave otherwise in the thread because
    it lands in a function of torch: in one that uses a context of `OF_TORCH`, or there when it is
    entered or left."""
    while frame is not None and (
        frame.f_code.co_filename in ENDS or frame.f_code.co_name in OF_TORCH
    ):
        frame = frame.f_back
    if frame is None or not frame.f_code.co_filename.startswith(TORCH):
        return set()
    return {what for name, what in OF_TORCH.items() if name in frame.f_code.co_names}


@dataclass
class Tally:
    """What interrupts did."""

    landed: int = 0
    torchs_own: int = 0
    """How many left something otherwise in the thread in a function of torch."""
    wrong: Counter[str] = field(default_factory=Counter)

    def add(self, found: str | None) -> None:
        """One that landed, and what was wrong after it."""
        self.landed += 1
        if found is not None:
            self.wrong[found] += 1

    def of_thread(self, own: set[str]) -> str | None:
        """What is otherwise in the thread and not the fault of torch; that is counted."""
        left = left_behind()
        if left and left.keys() <= own:
            self.torchs_own += 1
            return None
        return f"the thread: {left}" if left else None


class AtOpcode:
    """Raises `KeyboardInterrupt` before one instruction of Python code, counted from the start."""

    def __init__(self, count: int | None, everywhere: bool) -> None:
        self.left, self.everywhere, self.seen = count, everywhere, 0
        self.torchs_own: set[str] = set()

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        file = frame.f_code.co_filename
        if not self.everywhere and not file.startswith(OURS):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._local

    def _local(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "opcode":
            self.seen += 1
            if self.seen == self.left:
                self.torchs_own = torchs_own(frame)
                raise KeyboardInterrupt
        return self._local


def run_traced(call: Callable[[], Any], tracer: AtOpcode) -> bool:
    """Whether the interrupt landed."""
    before = sys.gettrace()  # that of a debugger, or of coverage
    sys.settrace(tracer)
    try:
        call()
    except KeyboardInterrupt:
        return True
    except Exception:  # compiled code of a library may make another error of an interrupt
        if tracer.left is None or tracer.seen < tracer.left:
            raise
        return True
    finally:
        sys.settrace(before)
    return False


def problem(verb: Verb, model: nn.Module, own: Any, plain: Tensor, forms: list[Any]) -> str | None:
    """What is wrong with a model after an interrupt, or None."""
    try:
        found = form(model, own)
        if found not in forms:
            return "neither before nor after"
        if verb.retry and found == forms[0]:
            verb.run(model)
            if form(model, own) != forms[1]:
                return "a retry ends elsewhere"
        if next(places(model), None) is not None:
            strip_dropconnect(model)
        with torch.no_grad():
            same = torch.equal(model.eval()(inputs_of(model))[..., :7], plain[..., :7])
    except Exception as error:
        return f"afterwards: {type(error).__name__}: {error}"
    same_objects = all(a is b for a, b in zip(model.parameters(), own))
    if not same or (not same_objects and verb.retry):
        return "stripped, it is another model"
    return None


def sweep(verb: Verb, every: int = 1, start: int = 1, everywhere: bool = False) -> Tally:
    """Interrupt at every n-th instruction."""
    forms, tally = verb.forms(), Tally()
    for count in itertools.count(start, every):
        if not _interrupt(verb, AtOpcode(count, everywhere), forms, tally):
            return tally
    raise AssertionError("unreachable")


def sweep_of(verb: Verb, *functions: str) -> Tally:
    """Interrupt at every instruction of all functions that have these names, of torch and of Python as
    well, once: at the last time that it is reached."""
    forms, tally, tracer = verb.forms(), Tally(), Visits(functions)
    model, *_ = verb.fresh()
    run_traced(lambda: verb.run(model), tracer)
    for count in tracer.last.values():
        _interrupt(verb, AtOpcode(count, everywhere=True), forms, tally)
    return tally


class Visits(AtOpcode):
    """Interrupts nothing; notes when each instruction of functions is reached for the last time."""

    def __init__(self, functions: tuple[str, ...]) -> None:
        super().__init__(None, everywhere=True)
        self.functions, self.last = functions, dict[Any, int]()

    def _local(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "opcode" and frame.f_code.co_name in self.functions:
            self.last[frame.f_code, frame.f_lasti] = self.seen + 1
        return super()._local(frame, event, arg)


def at_random(verb: Verb, count: int, rng: random.Random) -> Tally:
    """Interrupt at instructions chosen at random, of our code and of all."""
    forms, tally = verb.forms(), Tally()
    totals = {}
    for everywhere in (False, True):
        model, *_ = verb.fresh()
        tracer = AtOpcode(None, everywhere)
        run_traced(lambda: verb.run(model), tracer)  # noqa: B023
        totals[everywhere] = tracer.seen
    while tally.landed < count:
        everywhere = rng.random() < 0.5
        _interrupt(verb, AtOpcode(rng.randint(1, totals[everywhere]), everywhere), forms, tally)
    return tally


def _interrupt(verb: Verb, tracer: AtOpcode, forms: list[Any], tally: Tally) -> bool:
    """One interrupt, and what it left; whether it landed."""
    model, own, plain = verb.fresh()
    state = torch.get_rng_state()
    if not run_traced(lambda: verb.run(model), tracer):
        return False
    left = tally.of_thread(tracer.torchs_own)
    if left is None and verb.seeded and not torch.equal(state, torch.get_rng_state()):
        left = "the generator"
    tally.add(left or problem(verb, model, own, plain, forms))
    return True


def by_signals(verb: Verb, seconds: float) -> Tally:
    """Interrupt by real signals at random times, for so long."""
    forms, tally = verb.forms(), Tally()
    model, *_ = verb.fresh()
    began = time.perf_counter()
    verb.run(model)
    longest = 1.5 * (time.perf_counter() - began)
    end, own_fault = time.perf_counter() + seconds, set[str]()

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal own_fault
        own_fault = torchs_own(frame)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        while time.perf_counter() < end:
            model, own, plain = verb.fresh()
            own_fault = set()
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, longest))
                verb.run(model)
                signal.setitimer(signal.ITIMER_REAL, 0)
                continue
            except (KeyboardInterrupt, Exception):  # C++ may make another error of an interrupt
                left = tally.of_thread(own_fault)
            tally.add(left or problem(verb, model, own, plain, forms))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return tally


def _chosen(names: list[str]) -> Iterator[tuple[str, Verb]]:
    for name in names or VERBS:
        yield name, VERBS[name]


def _print(name: str, tally: Tally) -> None:
    broken = sum(tally.wrong.values())
    print(
        f"{name:20} {tally.landed:7} landed {broken:6} broken {tally.torchs_own:6} torch's own",
        dict(tally.wrong) or "",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verbs", nargs="*")
    parser.add_argument("--every", type=int, default=1, help="instructions from one to the next")
    parser.add_argument("--everywhere", action="store_true", help="in torch's frames too")
    parser.add_argument("--random", type=int, default=0, help="interrupts of all verbs together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signals", type=float, default=0.0, help="seconds of real signals each")
    options = parser.parse_args()
    total, rng = Tally(), random.Random(options.seed)
    verbs = list(_chosen(options.verbs))
    for name, verb in verbs:
        if options.random:
            tally = at_random(verb, -(-options.random // len(verbs)), rng)
        elif options.signals:
            tally = by_signals(verb, options.signals)
        else:
            tally = sweep(verb, options.every, 1, options.everywhere)
        _print(name, tally)
        total.landed += tally.landed
        total.torchs_own += tally.torchs_own
        total.wrong += tally.wrong
    _print("all", total)


if __name__ == "__main__":
    main()
