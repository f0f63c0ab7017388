"""The weights of an RNN on cuDNN, masked, in one block of memory.

cuDNN reads all weights of an RNN from one block of memory, in an order of its own. `flatten_parameters`
puts the stored ones there. If masked weights lay elsewhere, torch would copy all weights into such a
block at every call, and warn of it. So each forward makes a block of its own, writes the masked weights
and copies of the other weights into it, and reads tensors that see this block. The gradient of each
goes to the stored weight: masked, or as it is.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import Law, drop_into, drop_weight
from ..ops.hash import Key
from ..ops.ordinary import is_ordinary_there
from ..ops.versions import check_unmodified
from ..torch_private.recurrent import names_of, put_where_cudnn_wants
from ..torch_private.tensors import copy_all, identity, version_of
from ..torch_private.tracing import is_traced
from .live import Open, watched
from .masking import Operand, check_anchor, requiring_as
from .recompute import Recipe, address_of, can_recompute
from .state import SiteState

DEVICES = {"cuda"}
"""Types of device on which RNNs read their weights from one block of memory."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Block(NamedTuple):
    """A block of memory for all weights of an RNN."""

    size: int
    """In entries, of the dtype of the weights."""
    offsets: tuple[int, ...]
    """Where each weight begins, in entries, in the order of the RNN."""


class _Masked(NamedTuple):
    """How one weight is masked."""

    state: SiteState
    key: Key
    law: Law
    anchor: Tensor | None


class Flat:
    """The weights of one forward.

    Args:
        names: of all weights of the RNN, in its order.
        raws: the stored ones.
        block: where the masked ones are to lie.
    """

    def __init__(self, names: list[str], raws: list[Tensor], block: Block) -> None:
        self.names, self.raws, self.block = names, raws, block
        self.versions = [version_of(raw) for raw in raws]
        self.masks: dict[int, _Masked] = {}
        """By index in the lists."""
        self._again: Tensor | None = None
        self._saved = self._asked = 0

    def add(self, operand: Operand, key: Key) -> None:
        """_Masked one of the weights.

        Raises:
            RuntimeError: its shape is no longer that of its anchor.
        """
        raw, state, anchor = operand
        check_anchor(state, raw, anchor)
        self.masks[self.names.index(state.name)] = _Masked(state, key, state.law_for(raw), anchor)

    def tensors(self) -> list[Tensor]:
        """All weights, in one new block of memory. None of them is a view, because an autograd Function
        must not return views of one tensor."""
        memory = self._memory()
        storage, seen = memory.untyped_storage(), []
        for raw, offset in zip(self.raws, self.block.offsets):
            # Each is at version 1, and so is the tensor that cuDNN's code makes of the block: `recipe`
            # says 1.
            seen.append(memory.new_empty(0).set_(storage, offset, raw.size(), raw.stride()))
        return seen

    def _memory(self) -> Tensor:
        raws = [raw.detach() for raw in self.raws]
        filled = sum(raw.numel() for raw in raws) == self.block.size
        memory = (raws[0].new_empty if filled else raws[0].new_zeros)(self.block.size)
        rest = [i for i in range(len(raws)) if i not in self.masks]
        if rest:
            copy_all([self._part(memory, i) for i in rest], [raws[i] for i in rest])
        for i, mask in self.masks.items():
            law = mask.key, mask.law, mask.state.layout, mask.anchor
            drop_into(self._part(memory, i), raws[i], *law)
        return memory

    def _part(self, memory: Tensor, i: int) -> Tensor:
        raw, offset = self.raws[i], self.block.offsets[i]
        return memory[offset : offset + raw.numel()].view(raw.shape)

    def recipe(self, address: int) -> Recipe:
        """How autograd can have the block at this address again. Each saved view would cost a whole
        block, so a backward makes it for the first view that it asks for, and keeps it until the last.
        """
        i = min(self.masks)
        args = self.raws[i], self.versions[i], self._rebuilt, self.names[i], 1, self._count
        return Recipe(address, *args)

    def _count(self) -> None:
        self._saved += 1

    def _rebuilt(self) -> Tensor:
        for name, raw, version in zip(self.names, self.raws, self.versions):
            check_unmodified(name, raw, version)
        memory = self._memory() if self._again is None else self._again
        self._asked += 1
        self._again = None if self._asked % self._saved == 0 else memory
        return memory


class _InBlock(torch.autograd.Function):
    """The stored weights -> the weights that one forward reads. Backward masks the gradients."""

    @staticmethod
    def forward(ctx: Any, flat: Flat, *raws: Tensor) -> tuple[Tensor, ...]:
        ctx.masks = flat.masks
        ctx.set_materialize_grads(False)
        used = flat.tensors()
        frozen = [one for one, raw in zip(used, raws) if not raw.requires_grad]
        ctx.mark_non_differentiable(*frozen)
        return tuple(used)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        of_raws = list(grads)
        for i, mask in ctx.masks.items():
            if of_raws[i] is not None:
                of_raws[i] = drop_weight(of_raws[i], mask.key, mask.law, mask.state.layout)
        return None, *of_raws


def flat_of(module: Any) -> Flat | None:
    """The weights of one forward of a module, if they shall lie in one block; none is masked yet. None
    if each masked weight gets memory of its own: the module is no RNN on cuDNN, or it cannot be."""
    if not isinstance(module, nn.RNNBase) or is_traced():
        return None
    raws: list[Tensor] = []
    states: dict[str, SiteState] = module._dropconnect  # type: ignore[assignment]
    if not any(state.mode(module.training) == "batch" for state in states.values()):
        return None
    for name in names_of(module):
        state = states.get(name)
        raw = module._parameters.get(name if state is None else state.raw)
        if raw is None or raw.device.type not in DEVICES or not is_ordinary_there(raw):
            return None
        if state is not None and (
            state.held_key is not None or module.__dict__[state.live] is not None
        ):
            return None  # the masked weight exists already, or is kept for the next call
        raws.append(raw)
    if not all(_are_alike(raws[0], raw) for raw in raws):
        return None
    block = _block(raws) or _block_of_cudnn(module, raws)
    return None if block is None else Flat(list(names_of(module)), raws, block)


def _are_alike(first: Tensor, other: Tensor) -> bool:
    alike = first.dtype == other.dtype and first.device == other.device
    return alike and other.is_contiguous()


def _block(raws: list[Tensor]) -> Block | None:
    """Where weights lie in their storage; None if they do not share one, two of them overlap, or over
    half of it is something else."""
    storage = raws[0].untyped_storage()
    if any(identity(raw.untyped_storage()) != identity(storage) for raw in raws):
        return None
    whole = storage.nbytes() // raws[0].element_size()
    parts = sorted((int(raw.storage_offset()), raw.numel()) for raw in raws)
    apart = all(one + size <= other for (one, size), (other, _) in itertools.pairwise(parts))
    if not apart or whole > 2 * sum(size for _, size in parts):
        return None
    return Block(whole, tuple(int(raw.storage_offset()) for raw in raws))


def _block_of_cudnn(module: nn.RNNBase, raws: list[Tensor]) -> Block | None:
    """Where cuDNN reads weights, for stored ones that do not lie in one block: in a copy of a model
    each has its own memory, and `flatten_parameters` does nothing for bfloat16."""
    raw = raws[0]
    if raw.device.type != "cuda" or raw.dtype not in _DTYPES or not torch.backends.cudnn.enabled:
        return None
    shapes = tuple(tuple(one.shape) for one in raws)
    each = (4 if module.bias else 2) + (module.proj_size > 0)
    sizes = module.input_size, module.hidden_size, module.proj_size, module.num_layers
    options = module.batch_first, bool(module.bidirectional)
    return _asked_of_cudnn(raw.device, raw.dtype, shapes, each, module.mode, *sizes, *options)


@functools.lru_cache(maxsize=256)
def _asked_of_cudnn(
    device: torch.device, dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...], *how: Any
) -> Block | None:
    """What `flatten_parameters` would do: torch lays out empty weights, which are then thrown away.
    `how`: what else `put_where_cudnn_wants` is given."""
    weights = [torch.empty(shape, device=device, dtype=dtype) for shape in shapes]
    try:
        if not put_where_cudnn_wants(weights, *how):
            return None
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return None
    return _block(weights)


def open_flat(module: Any, flat: Flat) -> list[Open]:
    """The masked weights of a forward. Each has the weights that are not masked in `beside`, where
    `flat_weights` looks for them."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():  # with a version, see `live.py`
            return open_flat(module, flat)
    recorded = torch.is_grad_enabled() and any(raw.requires_grad for raw in flat.raws)
    if recorded:
        used: list[Tensor] = list(_InBlock.apply(flat, *flat.raws))  # type: ignore[no-untyped-call]
    else:
        used = flat.tensors()
    used = [requiring_as(one, raw) for one, raw in zip(used, flat.raws)]
    address = address_of(used[0]) if can_recompute() else None
    recipe = None if address is None else flat.recipe(address)
    beside = {name: used[i] for i, name in enumerate(flat.names) if i not in flat.masks}
    opened = []
    for i, mask in flat.masks.items():
        one = watched(module, mask.state, used[i], recipe)
        one.used.beside = beside
        opened.append(one)
    return opened


def flat_weights(module: Any) -> list[Any]:
    """The list that `torch.nn.RNNBase` passes to its kernel: the masked weights of a forward, and the
    stored ones outside of any."""
    beside: dict[str, Tensor] = {}
    used: dict[str, Any] = {}
    for name, state in module._dropconnect.items():
        live = module.__dict__[state.live]
        beside = getattr(live, "beside", beside)
        # Not by the property, which would take a forward that calls `flatten_parameters` for a reader.
        used[name] = module._parameters.get(state.raw) if live is None else getattr(module, name)
    known = {**beside, **used}
    names = names_of(module)
    return [known[name] if name in known else getattr(module, name, None) for name in names]
