"""What the tests know of the inside of the package: a name that changes there changes one line here.

Everything else in the tests goes through public names, environment variables and the fixtures of
`conftest.py`, which use this file.
"""

# mypy: disable-error-code=attr-defined

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor, nn

from surgery import DropConnectModule
from surgery.base.caching import PerObject
from surgery.kinds import kind as kinds
from surgery.modules import dropping, flat, fused, masking, product_forward, state
from surgery.ops import engine, example_product, expect, hash, linear, mask, random, switch
from surgery.ops.cpu import build, cache, native, workspace
from surgery.ops.extension import loading
from surgery.ops.gpu import launch, products
from surgery.spec import forms
from surgery.torch_private import compiler
from surgery.verbs import savers

Patch = pytest.MonkeyPatch

derived_key = hash._derived
derived_words = hash._derived_words
signed = hash._signed
shift_right = hash._shift_right
STEP = hash._STEP
tilt = product_forward.tilt

CONSTANTS = {
    "chunk": (engine, "CHUNK"),
    "chunk of draws": (expect, "CHUNK"),
    "chunk of examples": (example_product, "CHUNK"),
    "block of examples": (example_product, "BLOCK"),
    "segment": (mask, "SEGMENT"),
    "few rows": (products, "FEW_ROWS"),
    "scratch": (products, "SCRATCH"),
    "compiler flags": (native, "_FLAGS"),
    "extra compiler flags": (native, "_EXTRAS"),
    "patience with a compiler": (build, "PATIENCE"),
    "devices of flat weights": (flat, "DEVICES"),
    "interpreted devices": (launch, "INTERPRETED"),
    "format version": (forms, "FORMAT_VERSION"),
    "migrations": (forms, "MIGRATIONS"),
    "can classes change": (savers, "can_undo"),
}
"""What tests change so that small tensors, and this machine, take the ways of others."""


def constant(name: str) -> Any:
    return getattr(*CONSTANTS[name])


def set_constant(patch: Patch, name: str, value: Any) -> None:
    patch.setattr(*CONSTANTS[name], value)


def states_of(module: nn.Module) -> list[state.SiteState]:
    """What one operated module knows of its sites; of any other module nothing."""
    return list(module._dropconnect.values()) if isinstance(module, DropConnectModule) else []


def live_masks(model: nn.Module) -> Iterator[Tensor]:
    """The masked weights that a forward that runs now would read."""
    for module in model.modules():
        for site in states_of(module):
            if vars(module)[site.live] is not None:
                yield vars(module)[site.live]


def kernel_functions() -> list[str]:
    """The C++ kernels: library and function."""
    return [f"{name}.{one}" for name, functions in native._SIGNATURES.items() for one in functions]


def free_blocks() -> list[Tensor]:
    """The memory that waits for the masked weight of the next product."""
    return [block.base for blocks in workspace._free.values() for block in blocks]


def replace_draw_key(patch: Patch, draw: Callable[..., Any]) -> Callable[..., Any]:
    """Let forward calls draw their keys by `draw`; the function that it replaces."""
    without_extension(patch)
    before = state.draw_key
    patch.setattr(state, "draw_key", draw)
    return before


def note_keys(patch: Patch, note: Callable[[str, Tensor], None]) -> None:
    """`note(site, key)` is called with every key that a forward draws; `site` is a plain name."""
    without_extension(patch)
    new_key = state.SiteState.new_key

    def noted(self: state.SiteState, device: Any) -> Any:
        key = new_key(self, device)
        note(self.site, hash.key_tensor(key))
        return key

    patch.setattr(state.SiteState, "new_key", noted)


def give_bits(patch: Patch, words: Tensor) -> None:
    """Let the generator give these two words for each key."""
    without_extension(patch)
    patch.setattr(hash, "drawn", lambda *args, **options: words)


def forget_generators(patch: Patch) -> None:
    patch.setattr(random, "_generators", {})


def note_masked_weights(patch: Patch, note: Callable[[Tensor], None]) -> None:
    """`note` is called with every masked weight that is made."""
    without_extension(patch)
    drop, drop_both = masking.drop_weight, linear.drop_both

    def one(*args: Any, **options: Any) -> Tensor:
        used = drop(*args, **options)
        note(used)
        return used

    def both(*args: Any) -> tuple[Tensor, Tensor]:
        used, grad = drop_both(*args[:4])  # without the space that is used again and again
        note(used)
        return used, grad

    patch.setattr(masking, "drop_weight", one)
    patch.setattr(linear, "drop_both", both)


def note_fused(patch: Patch, note: Callable[[Tensor], None]) -> None:
    """`note` is called with the input of every Linear that runs as one function."""
    without_extension(patch)
    fused = dropping.fused_forward

    def noted(module: nn.Module, x: Tensor) -> Tensor | None:
        found = fused(module, x)
        if found is not None:
            note(x)
        return found

    patch.setattr(dropping, "fused_forward", noted)


def note_flat_weights(patch: Patch, note: Callable[[Tensor], None]) -> None:
    """`note` is called with every piece of memory that is made for the weights of an RNN."""
    memory = flat.Flat._memory

    def made(self: flat.Flat) -> Tensor:
        whole = memory(self)
        note(whole)
        return whole

    patch.setattr(flat.Flat, "_memory", made)


def note_kernels(patch: Patch, note: Callable[..., None]) -> None:
    """`note(name, *arguments)` is called before each C++ kernel."""

    def noted(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: (note(name, *args), kernel(*args))[1]

    names = "drop drop_shared example_product example_gradients excess sample"
    of_moments = "moments_of_entries moments_of_norm moments_of_softmax weighted_gram"
    for name in f"{names} {of_moments}".split():
        patch.setattr(native, name, noted(name, getattr(native, name)))


def note_launches(patch: Patch, note: Callable[[str, bool], None]) -> None:
    """`note(name, ran)` is called after each try to launch a kernel for the GPU, by Python."""
    without_extension(patch)
    launched = launch.Kernel.launch

    def noted(self: launch.Kernel, *args: Any) -> bool:
        ran = launched(self, *args)
        note(self.name, ran)
        return ran

    patch.setattr(launch.Kernel, "launch", noted)


def forget_indices() -> None:
    """The formula keeps the indices of a chunk."""
    engine._indices_of_a_chunk.cache_clear()


def forget_failures(patch: Patch) -> None:
    """No kernel was found not to work."""
    patch.setattr(switch, "_broken", set())


def forget_kernels() -> None:
    """As in a process that has loaded none. Those that are loaded stay as they are."""
    native._libraries.clear()
    native._drop_functions.clear()


def as_in_a_new_process(patch: Patch) -> None:
    """No kernel is loaded, none was found not to work, and every warning is given again."""
    patch.setattr(native, "_libraries", {})
    patch.setattr(native, "_drop_functions", {})
    patch.setattr(cache, "_warn", cache._warn.__wrapped__)
    forget_failures(patch)


def expect_functions(patch: Patch, library: str, functions: dict[str, list[Any]]) -> None:
    """What the C++ kernels of a name must have to be taken."""
    patch.setitem(native._SIGNATURES, library, functions)


@contextmanager
def own_table_of_kinds() -> Iterator[None]:
    """Kinds that are registered inside are forgotten afterwards."""
    before = list(kinds._kinds)
    kinds._kind_of_class.clear()
    yield
    kinds._kinds[:] = before
    kinds._kind_of_class.clear()


@contextmanager
def own_table_of_closed_forms() -> Iterator[None]:
    tables: tuple[dict[Any, Any], ...] = expect._FORMS, expect._NAMES
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before):
        table.clear()
        table.update(entries)


def own_notes(module: nn.Module) -> tuple[Any, ...]:
    """What an operated module knows beside its sites: whose masks its forward draws, and whether it is
    the outermost one."""
    if not isinstance(module, DropConnectModule):
        return ()
    return module._dropconnect_draws, module._dropconnect_scope


def entries_of(known: PerObject[Any, Any]) -> dict[int, Any]:
    """By the ids of what is known."""
    return known._known


def compile_extension() -> bool:
    """Whether the extension is there, after it was compiled."""
    return loading.compile_now()


def without_extension(patch: Patch) -> None:
    """Python does its work, as where it is not compiled yet."""
    for name in ("product", "mask", "example", "gaussian"):
        patch.setattr(loading, name, None)
    for name in ("note_product", "take_kernels"):
        patch.setattr(loading, name, lambda: None)


def extension_is_used() -> bool:
    """Whether it is loaded, and does what it can."""
    return loading.product is not None


def extension_module() -> Any:
    """The extension itself, which is there."""
    assert loading._module is not None
    return loading._module


def extension_product() -> Callable[..., Tensor | None]:
    """The product of the extension, which is there."""
    assert loading.product is not None
    return loading.product


def without_operators(patch: Patch) -> None:
    """Compiled graphs have the formula."""
    patch.setattr(mask, "HAS_OPERATORS", frozenset())
    patch.setattr(fused, "has_operators", compiler.constant_in_traces(lambda kind: False))


def taken_by_extension(patch: Patch, name: str = "product") -> list[bool]:
    """For each product that the extension was asked for, whether it took it. `name`: its function."""
    taken: list[bool] = []
    function = getattr(loading, name)
    assert function is not None

    def noted(*args: Any) -> Tensor | None:
        found: Tensor | None = function(*args)
        taken.append(found is not None)
        return found

    patch.setattr(loading, name, noted)
    return taken


def note_taken(patch: Patch) -> list[None]:
    """Has an entry for each time at which the extension was told of new kernels."""
    taken: list[None] = []
    patch.setattr(loading, "take_kernels", lambda: taken.append(None))
    return taken
