"""What an operated module knows of each of its sites, beside the parameter itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..kinds.product import LINEAR_PRODUCT, Demand, Product
from ..ops import Layout, draw_key
from ..ops.hash import SEGMENT, Key
from ..ops.part import Part
from ..spec.config import DropConnectConfig, Inference, Sampling, check_p
from ..spec.errors import SurgeryError
from ..spec.names import anchor_name, raw_name
from ..torch_private.tracing import is_capturing, is_scripted, is_traced
from .laws import HasLaw, change_laws, give_laws
from .ranks import check_alike, note_mesh, replica

_DISTRIBUTED = torch.distributed.is_available()


def live_name(name: str) -> str:
    """Name of the attribute that holds the masked weight while a forward runs, and else None."""
    return f"_{name}_live"


def refusal_to_script(name: str, function: str) -> str:
    """The message that refuses TorchScript. `name`: of what drops. `function`: of torch that was
    called."""
    return (
        f"{name} is masked, and {function} would make the masks constants, or cannot read them; call "
        "strip_dropconnect first"
        + (", or trace in eval()" if function == "torch.jit.trace" else "")
    )


def refusal_to_cut(option: str) -> str:
    """The message for an option that a weight cannot have which processes share. `option`: as the user
    writes it."""
    return (
        f"{option} needs the whole weight, and this one is cut across processes (tensor parallelism); "
        "use sampling='batch' (or 'example', for a Linear) with inference='mean' or 'sample' for it"
    )


class Group(NamedTuple):
    """A batch made of repetitions of one batch, each with its own masks."""

    samples: int
    rows: int
    """Size of the whole batch."""
    probing: bool = False
    """True in a trial run, which shows whether the model keeps repetitions apart:
    `product_forward.tilt` makes them differ, and no mask is drawn."""


class NotGrouped(RuntimeError):
    """The repetitions of a batch do not lie along the first dimension of the input of a site."""


class SiteState(HasLaw):
    """What one module knows of one of its operated parameters. Holds no parameter itself."""

    # Attributes of the class, because they are seldom set, and Python reads objects of 30 attributes or
    # more slower. No trace reads these: a guard on a missing attribute would fail when it is set.
    undropped_by: str | None = None
    """Who was seen to read the raw parameter in a training forward; see `surgery.modules.watch`."""
    drawn_outside = False
    """Whether a forward of a module around the owner has ever drawn a mask of which a backward may
    follow."""
    had_gradients = False
    """Whether a parameter of the model had a gradient already when surgery was done."""
    written = False
    """Whether a trace has seen a forward write to the masked weight."""
    part: Part | None = None
    """Which part of the weight this process has, if a mesh shares it (tensor parallelism)."""
    drawn_together = 0
    """How often the processes of a mesh have drawn a key for it together."""
    in_training: Product | None = None
    """How the module computes its pre-activation where `product` is None only because a module around
    it reads the weight in `eval()`."""
    varies = False
    """Whether moments travel through the functions that read it, though it is of no product."""
    held: Any = None
    """While masks are held: the masked weight, as `masking.Held`."""

    def __init__(
        self,
        name: str,
        kind: str,
        config: DropConnectConfig,
        layout: Layout,
        follows: str | None,
        site: str,
        product: Product | None = None,
        varies: bool = False,
        in_training: Product | None = None,
    ) -> None:
        self.name = name
        self.site = site
        """Full name of the parameter in the model that surgery was done on, for messages."""
        self.kind = kind
        self._config = config
        self.rate = config.p
        """The p of the config. `config` makes a new config when this has changed."""
        self.layout = layout
        self.follows = follows
        """Name of the parameter in this module whose key this one uses (a bias whose mask is that
        of its weight), or None."""
        self.raw = raw_name(name)
        self.live = live_name(name)
        self.anchor = anchor_name(name) if config.toward == "pretrained" else None
        self.factor = 1.0
        """What a schedule multiplies the p of the config by, for now."""
        self.law = None
        self.row = None
        # Copies of options. A compiled graph is guarded by what its trace reads; if it read the config,
        # `set_p` would recompile it.
        self.unit = config.unit
        self.sampling = config.sampling
        self.example_dim = config.example_dim
        self.inference = config.inference
        self.samples = config.samples
        self.independent = config.ranks == "independent"
        self.product = product
        """How the module computes its pre-activation, if that is a product and this its weight."""
        if varies:
            self.varies = True
        if in_training is not None:
            self.in_training = in_training
        self._see_product()
        self.with_weight = config.bias and "bias" in name
        """Whether this is a bias that is dropped with its weight."""
        self.settled = False
        """Whether a graph that this site is part of settles what it returns; see `surgery.moments`."""
        self.group: Group | None = None
        """Set while `mc_predict` runs several samples in one batch."""
        self.drawn = False
        """Whether a masked weight was ever used. False after a training step means that the plan is
        wrong about how the weight is used. A trace writes it and never reads it: no guard."""
        self.held_key: Tensor | None = None
        """Set while masks are held."""

    @property
    def fused(self) -> Product | None:
        """The product that `surgery.modules.fused` may compute."""
        return self.product or self.in_training

    def _see_product(self) -> None:
        """Say how `surgery.modules.fused` may compute it."""
        layout, product = self.layout, self.fused
        in_one = layout.entries <= SEGMENT and self.part is None
        self.is_linear = in_one and product == LINEAR_PRODUCT
        """Whether it is the weight of a Linear, masked in one piece."""
        # Old pickles have the product of a Linear without `how`.
        other = in_one and not self.is_linear and product is not None and product.how is not None
        self.fusible = self.is_linear or other
        """Whether it is the weight of a product whose forward is known there, masked in one piece."""
        self.by_element = self.is_linear and layout.is_elementwise
        """Whether it is the weight of a Linear, masked in one piece and by element."""
        names = "|".join((self.raw, self.live, self.anchor or ""))
        self.in_trace = names if self.by_element and self.sampling == "batch" else ""
        """Names of the parameter, of the masked weight and of the anchor if a trace may compute it, or
        nothing. In one word, since each attribute that a trace reads is a guard at every call."""

    def hold(self, part: Part) -> None:
        """From now on this process has only a part of the weight."""
        if part != self.part:  # some say so at each call
            self.part = part
            self._see_product()

    @property
    def config(self) -> DropConnectConfig:
        """The options as they are now. Their p is the one that a schedule multiplies."""
        if self._config.p != self.rate:
            self._config = self._config.replace(p=self.rate)
        return self._config

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to the original alone: held masks, its group, its row."""
        own = ("held_key", "held", "group", "row")
        return {**self.__dict__, **dict.fromkeys(own)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy gets a row of its own, so that its p can change alone."""
        if "draws" in state:  # the name that files from before the rooms have
            state["samples"] = state.pop("draws")
        state.pop("drawn_outside", None)  # a copy has no forward behind it
        self.__dict__.update(state)
        self._see_product()
        if self.law is not None:
            give_laws([(self, self.law.scale)])

    def new_key(self, device: torch.device) -> Key:
        """The key of one forward call, from the generator of the weight's device. The rank of the
        process is mixed in, or of the first one that has parts of the same weights."""
        return draw_key(device, self.rank())

    def rank(self) -> int:
        """What tells the masks of this process from those of others: see `draw_key`."""
        ranked = self.independent and _DISTRIBUTED and torch.distributed.is_initialized()
        return replica() if ranked else 0

    def new_shared_key(self, weight: Any) -> Key:
        """The same for a weight that the processes of a mesh share (a DTensor): one key for all.

        Raises:
            RuntimeError: their generators differ. They ask each other at every call whose number is a
                power of two, which costs little and finds out sooner or later.
        """
        note_mesh(weight.device_mesh)
        key = self.new_key(weight.device)
        if is_traced():
            return key
        self.drawn_together += 1
        if self.drawn_together & (self.drawn_together - 1) == 0:
            check_alike(key, weight.device_mesh, self.site)
        return key

    def layout_for(self, raw: Tensor) -> Layout:
        """Which weights share a mask entry: of the part that this process has, where only that is
        here, as a plain tensor (transformers runs some forwards so)."""
        if self.part is None or tuple(raw.shape) == self.part.whole:
            return self.layout
        return self.layout.of_part(self.part)

    def with_inference(self, inference: Inference, samples: int | None) -> dict[str, Any]:
        """The attributes that change with what `eval()` does."""
        config = self.config
        if (config.inference, config.samples) != (inference, samples):
            config = config.replace(inference=inference, samples=samples)
        return {"_config": config, "inference": inference, "samples": samples}

    def refused(self, sampling: Sampling, inference: Inference, draws: bool = False) -> str | None:
        """Why this weight cannot be dropped with these options, and what to do; or None.

        Args:
            draws: whether its pre-activation is drawn: `samples=Z` of `inference="moments"`.
        """
        demand = Demand(sampling, inference, self.unit, draws=draws)
        return demand.refused(self.product, varies=self.varies)

    def mode(self, training: bool) -> Sampling | Literal["moments", "probe"] | None:
        """What a forward does: how it samples, `"moments"`, or None for nothing. The value of p is
        looked at in eager mode only: in a compiled graph it is data, so that it can change without
        recompiling."""
        eager = not torch.compiler.is_compiling()
        # Replays of a CUDA graph that is captured now may have another p.
        if eager and self.rate * self.factor == 0.0 and not is_capturing():
            return None
        if training or self.inference == "sample":
            if eager and is_scripted():
                raise SurgeryError(refusal_to_script(self.site, "torch.jit.trace"))
            if self.group is not None and self.group.probing:
                return "probe"
            grouped = self.group is not None and self.sampling == "batch"
            return "example" if grouped else self.sampling
        return "moments" if self.inference == "moments" else None


def change_p(states: Iterable[SiteState], p: float | None = None, factor: float = 1.0) -> None:
    """Change the drop probability of sites to `p * factor`, or None: to their own p times `factor`.

    Laws are replaced, so that a backward pass under way still uses the old ones.

    Raises:
        ValueError: a product is outside [0, 1]; nothing is changed.
    """
    changed = list(states)
    for rate in {state.rate for state in changed} if p is None else {p}:
        check_p(rate * factor)
    change_laws(changed, p, factor)
