"""Prediction by one forward, in which mean and variance travel through the model."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..base.journal import restoring
from ..modules.places import Place, moved_by, places, without_moments
from ..modules.walk import unwrapped
from ..spec.errors import NotOperatedError, SurgeryError
from ..torch_private.modes import outside_of_inference, set_gradients, switches_back
from ..torch_private.trees import tree_map
from ..travel import Run, State, TooWide, Travelling, within
from ..travel.adjoint import output_covariance
from ..travel.run import Carrier
from ..travel.sources import Sources
from ..travel.state import certain
from .arguments import Forward
from .batches import Batch, Select, batches_of, is_loader, tensor_of
from .gaussians import LowRank, Prediction, joined_predictions, prediction_of
from .sampling import while_dropping

Covariance = Literal["diagonal", "outputs", "full"]

DRAWS = 32
"""Draws that a full covariance takes where exact columns would be too many."""

FEW = 8
"""Draws for the covariance of outputs: enough to tell how large variances are, so that derivatives are
taken of the right means."""


def predict_moments(
    model: nn.Module,
    inputs: Any,
    covariance: Covariance | int = "diagonal",
    *,
    input_variance: float | Tensor | None = None,
    dropout: bool | None = None,
    class_dim: int | None = -1,
    output: Select = None,
) -> Prediction:
    """Predict mean and variance over all masks, by one deterministic forward.

    Every value in the forward is taken as a Gaussian, whose mean and variance travel from operation to
    operation: through products exactly, through activations by closed forms or quadrature, through
    softmax, attention and norms to second order. Where and by how much it errs is said in
    docs/moments.md.

    Everything but DropConnect runs as in `eval()`. Each example is predicted as if its masks were its
    own, which with one mask for a batch changes nothing for one example.

    Args:
        model: its modes, training flags and gradients are as before afterwards. A compiled one runs
            uncompiled.
        inputs: one batch, or a loader of batches, as for `mc_predict`.
        covariance: how values covary on the way, and what is returned of the outputs.

            * `"diagonal"`: not at all. The cheapest: the time of two to three forwards. Variances of
              trained networks come out too small, and of residual ones by far.
            * a number r: r draws of everything that is random go along, with masks of their own, and
              tell how entries, tokens and positions covary; 32 are enough for most. Means and
              variances are those of formulas, which these covariances enter. Costs two to three
              forwards for each, and r times the memory of the activations. The covariance is
              returned as its factors.
            * `"outputs"`: eight draws, and one backward pass for each output of an example, which
              gives the covariance of the outputs to first order, with all that tokens or positions
              share. For outputs of few entries, as logits; takes the memory of their derivatives by
              all activations.
            * `"full"`: the covariance of all outputs of an example. Where every random number of an
              example fits into the memory (perceptrons), it is carried through the forward; else the
              same as `"outputs"` with 32 draws.
        input_variance: of noise on every floating-point input, which is independent between entries: a
            number, or a tensor that broadcasts to the input.
        dropout: whether `nn.Dropout` and its like drop too. None: where no DropConnect is in place.
        class_dim: dimension of the classes in the output, for `probabilities`, `entropy` and
            `mutual_information`; a size of 1 means one logit of a yes-or-no question. None if the
            output holds no logits.
        output: what of the model's output is looked at, as for `mc_predict`.

    Raises:
        NotOperatedError: nothing is random: no DropConnect is in place, no dropout drops, and the input
            has no variance.
        SurgeryError: a site has no known moments; all variance was lost on the way to the output; or
            the inputs or outputs are none that can be read.
        ValueError: an argument is out of range.
    """
    _check_form(covariance)
    at = list(places(model))
    drops = not at if dropout is None else dropout
    if not at and not drops and input_variance is None:
        raise NotOperatedError.none_in(model, "; give input_variance=, or dropout=True")
    _check(at)

    def predict(batch: Batch) -> Prediction:
        return _Forward(model, batch, input_variance, drops, output, at).predict(
            covariance, class_dim
        )

    forward = Forward(model)
    if not is_loader(inputs):
        return predict(Batch.of(forward.given(inputs)))
    device = _device_of(model, at)
    return joined_predictions([predict(one).cpu() for one in batches_of(inputs, forward, device)])


def _check_form(covariance: Any) -> None:
    if isinstance(covariance, str) and covariance in get_args(Covariance):
        return
    if isinstance(covariance, bool) or not isinstance(covariance, int) or covariance < 1:
        raise ValueError(
            "covariance must be 'diagonal', 'outputs', 'full' or a positive number of draws; got "
            f"{covariance!r}"
        )


def sites_without_moments(at: Iterable[Place]) -> dict[str, str]:
    """The sites of which no moments are known, and why."""
    found = {}
    for place in at:
        problem = without_moments(moved_by(place))
        if problem is not None and place.state.p > 0:
            found[place.state.site] = problem
    return found


def _check(at: Iterable[Place]) -> None:
    for site, problem in sites_without_moments(at).items():
        raise SurgeryError(
            f"{site}: {problem}; strip this site, or use mc_predict. The model is unchanged"
        )


def _has_a_fast_path(model: nn.Module) -> bool:
    """Whether a part computes whole layers by a kernel of its own, from nested tensors. It does not
    where somebody sees the torch functions, as `Sources` does."""
    return any(isinstance(module, nn.TransformerEncoder) for module in model.modules())


def _device_of(model: nn.Module, at: list[Place]) -> torch.device:
    tensors = [place.raw for place in at] or list(model.parameters())
    device: torch.device = tensors[0].device if tensors else torch.device("cpu")
    return device


def _low_rank(factors: Tensor, variance: Tensor) -> LowRank:
    """The covariance whose correlations are those of draws, with these variances."""
    wide = factors.to(variance.dtype)
    carried = wide.square().sum(0)
    scale = torch.where(carried > 0, variance / torch.where(carried > 0, carried, 1), 0).sqrt()
    return LowRank((wide * scale).movedim(0, -1))


class _Forward:
    """The forwards of one batch."""

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        input_variance: float | Tensor | None,
        dropout: bool,
        select: Select,
        at: list[Place],
    ) -> None:
        self.model, self.batch, self.select, self.at = model, batch, select, at
        self.input_variance, self.dropout = input_variance, dropout

    def predict(self, form: Covariance | int, class_dim: int | None) -> Prediction:
        if form == "full":
            try:
                return self._of_columns(*self.run("exact"), class_dim)
            except TooWide:
                return self._of_backward(*self.run("draws", DRAWS, records=True), class_dim)
        if form == "outputs":
            return self._of_backward(*self.run("draws", FEW, records=True), class_dim)
        draws = form if isinstance(form, int) else 0
        run, found = self.run("draws" if draws else "none", draws)
        low = None
        if draws and found.factors is not None:
            low = _low_rank(found.factors, found.variance)
        return prediction_of(found.mean, found.variance, low, class_dim, run.settled)

    def _of_columns(self, run: Run, found: State, class_dim: int | None) -> Prediction:
        mean, rows = found.mean, self.batch.rows
        outputs = mean[0].numel()
        flat = found.variance.new_zeros(rows, 0, outputs)
        if found.factors is not None:
            factors = found.factors.to(flat.dtype)
            flat = factors.reshape(len(factors), rows, outputs).transpose(0, 1)
        whole = flat.transpose(1, 2) @ flat
        return prediction_of(mean, found.variance, whole, class_dim, run.settled)

    def _of_backward(self, run: Run, found: State, class_dim: int | None) -> Prediction:

        def derived() -> Tensor:
            set_gradients(True)
            with outside_of_inference():
                return output_covariance(found.mean, run)

        whole = restoring(switches_back(), derived)
        variance = whole.diagonal(dim1=1, dim2=2).reshape(found.mean.shape).to(found.variance.dtype)
        mean = found.mean.detach()
        return prediction_of(mean, variance, whole.detach(), class_dim, run.settled)

    def run(self, carrier: Carrier, columns: int = 0, records: bool = False) -> tuple[Run, State]:
        """One forward; what is known of the output."""
        run = Run(unwrapped(self.model), self.batch.rows, carrier, columns, records, self.dropout)
        found: list[State] = []

        def call() -> None:
            with outside_of_inference() if records else nullcontext():
                found.append(within(run, lambda: self._state(run, self._output(run))))

        while_dropping(self.model, self.at, "moments", None, call, gradients=records)
        return run, found[0]

    def _output(self, run: Run) -> Any:
        """What the model returns, as it is written also where it is compiled."""
        batch = self._noisy(run)
        sees = run.dropout or _has_a_fast_path(self.model)
        with torch.compiler.set_stance("force_eager"), Sources(run) if sees else nullcontext():
            return batch.call(self.model)

    def _state(self, run: Run, output: Any) -> State:
        """What is known of the output that was looked for."""
        value: Any = tensor_of(output, self.batch.rows, self.select)
        if isinstance(value, Travelling):
            mean = value.expectation()  # as a forward in inference="moments" ends
            state = value.state()
            return state if run.follows else State(mean, state.variance)
        if not run.births and run.settled:
            raise SurgeryError(
                f"no variance reaches the output; it was lost at {', '.join(run.settled)}"
            )
        return certain(value)

    def _noisy(self, run: Run) -> Batch:
        """The batch, whose floating-point tensors vary."""
        noise = self.input_variance
        if noise is None:
            return self.batch
        count = 0

        def noisy(value: Any) -> Any:
            nonlocal count
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            count += 1
            state = certain(value.detach())
            variance = torch.as_tensor(noise, dtype=state.variance.dtype, device=value.device)
            return Travelling.of(run, run.born_apart(state, variance.expand(value.shape).clone()))

        args, kwargs = tree_map(noisy, (self.batch.args, self.batch.kwargs))
        if not count:
            raise SurgeryError("input_variance= needs an input of floating-point numbers")
        return Batch(args, kwargs, self.batch.rows)
