"""The weight-drop modules of PyTorch-NLP 0.5 (`torchnlp.nn`), by the same names and signatures.

    from surgery.compat.torchnlp import WeightDrop, WeightDropLSTM      # instead of torchnlp.nn

A `state_dict()` has the names that PyTorch-NLP gives (`weight_hh_l0_raw`), and `parameters()` its
order. So what it saved of models and optimizers loads; also what it saved after an evaluation, when
there are both names of a weight. Where it was at fault, this differs:

* `WeightDrop` holds the module that it is given, as `module`, so that its parameters are trained,
  moved and saved. (PyTorch-NLP's holds nothing. That of salesforce/awd-lstm-lm holds it as `module`,
  and its checkpoints load as they are.) A module that something else holds too has its keys under both
  names. Load a checkpoint of PyTorch-NLP there with `strict=False`: the keys of `module` are missing
  in it, and no other.
* The reverse direction of a bidirectional RNN is dropped too. In a checkpoint of PyTorch-NLP it has a
  plain key, which loads.
* `train()`, `eval()` and `train()` again work, and so do copies, pickles and safetensors.

Beyond that, these are modules with DropConnect in place: `set_p` changes the probability, and
`strip_dropconnect` takes it out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..base.journal import Changes
from ..spec.names import raw_name
from ..verbs.apply import apply_dropconnect
from ..verbs.raw_files import forget


class WeightDrop(nn.Module):
    """Calls a module with dropped weights: one mask for each weight and call.

    Args:
        module: changed in place, as by `surgery.apply_dropconnect`.
        weights: names of its own parameters.
        dropout: probability of dropping, in [0, 1].

    Raises:
        NoMatchError: the module has no parameter of such a name.
        SurgeryError: a parameter cannot be dropped; the message says why.
        ValueError, TypeError: the probability is no number in [0, 1].

    Example:
        >>> gru = WeightDrop(nn.GRUCell(2, 2), ["weight_hh"], dropout=0.9)
        >>> gru(torch.randn(3, 2), torch.randn(3, 2)).shape
        torch.Size([3, 2])
    """

    def __init__(self, module: nn.Module, weights: Sequence[str], dropout: float = 0.0) -> None:
        super().__init__()
        _drop(module, weights, dropout)
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns."""
        return self.module(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _forget_doubles(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _DropsItsOwn(nn.Module):
    """A module that drops weights of its own from the start."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _forget_doubles(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


class WeightDropLSTM(_DropsItsOwn, nn.LSTM):
    """An LSTM whose hidden-to-hidden weights are dropped (Merity et al. 2018, section 3).

    Args:
        *args, **kwargs: as for `torch.nn.LSTM`.
        weight_dropout: probability of dropping a weight, in [0, 1].
    """

    def __init__(self, *args: Any, weight_dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _drop_recurrent(self, weight_dropout)


class WeightDropGRU(_DropsItsOwn, nn.GRU):
    """A GRU whose hidden-to-hidden weights are dropped.

    Args:
        *args, **kwargs: as for `torch.nn.GRU`.
        weight_dropout: probability of dropping a weight, in [0, 1].
    """

    def __init__(self, *args: Any, weight_dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _drop_recurrent(self, weight_dropout)


class WeightDropLinear(_DropsItsOwn, nn.Linear):
    """A Linear whose weight is dropped, not its bias.

    Args:
        *args, **kwargs: as for `torch.nn.Linear`.
        weight_dropout: probability of dropping a weight, in [0, 1].
    """

    def __init__(self, *args: Any, weight_dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _drop(self, ["weight"], weight_dropout)


def _drop_recurrent(rnn: nn.RNNBase, p: float) -> None:
    forward = [f"weight_hh_l{layer}" for layer in range(rnn.num_layers)]
    reverse = [f"{name}_reverse" for name in forward] if rnn.bidirectional else []
    _drop(rnn, forward, p, in_place=reverse)


def _drop(
    module: nn.Module, names: Sequence[str], p: float, *, in_place: Sequence[str] = ()
) -> None:
    """Put DropConnect on parameters of a module. Those named in `names` become its last parameters, as
    in PyTorch-NLP: the state of an optimizer goes by their order."""
    if not names:
        return
    apply_dropconnect(module, [f"re:{re.escape(name)}" for name in [*names, *in_place]], p)
    forget(module)  # PyTorch-NLP's files have raw keys
    own = dict(module._parameters)
    own.update({raw: own.pop(raw) for raw in map(raw_name, names) if raw in own})
    changes = Changes()
    changes.fill(module._parameters, own)
    changes.make()


def _forget_doubles(state_dict: dict[str, Any], prefix: str) -> None:
    """Remove from what a module loads the plain names that PyTorch-NLP saved beside raw ones after an
    evaluation, if they have the same values; others stay, and `strict` complains of them."""
    for raw in [key for key in state_dict if key.startswith(prefix) and key.endswith("_raw")]:
        plain = raw.removesuffix("_raw")
        if plain in state_dict and _is_equal(state_dict[plain], state_dict[raw]):
            del state_dict[plain]


def _is_equal(one: Any, other: Any) -> bool:
    """Whether these are tensors with the same values. torch says what is wrong with others."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    alike = one.dtype == other.dtype and one.device == other.device
    return alike and torch.equal(one, other)
