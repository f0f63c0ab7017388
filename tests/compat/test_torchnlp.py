"""`surgery.compat.torchnlp`: what PyTorch-NLP's modules do, and what they did wrong.

The first tests say of ours what PyTorch-NLP's own (`tests/nn/test_weight_drop.py`) say of its modules.
The last compare with the library itself, where it is installed.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from surgery import (
    NoMatchError,
    dropconnect_sites,
    plain_state_dict,
    set_p,
    strip_dropconnect,
)
from surgery.compat import torchnlp
from surgery.compat.torchnlp import WeightDrop, WeightDropGRU, WeightDropLinear, WeightDropLSTM

P = 0.9
BUILD: dict[str, Callable[[float], nn.Module]] = {
    "WeightDropLSTM": lambda p: WeightDropLSTM(10, 10, num_layers=2, weight_dropout=p),
    "WeightDropGRU": lambda p: WeightDropGRU(10, 10, num_layers=2, weight_dropout=p),
    "WeightDropLinear": lambda p: WeightDropLinear(10, 10, weight_dropout=p),
    "WeightDrop": lambda p: WeightDrop(nn.LSTM(10, 10), ["weight_hh_l0"], dropout=p),
    "WeightDrop of a cell": lambda p: WeightDrop(nn.GRUCell(10, 10), ["weight_hh"], p),
    "WeightDrop of a linear": lambda p: WeightDrop(nn.Linear(10, 10), ["weight", "bias"], p),
}
RECURRENT = ["WeightDropLSTM", "WeightDropGRU", "WeightDrop"]
INPUT = torch.linspace(-1, 1, 20).view(2, 1, 10)
"""(time, batch, features)."""


def run(module: nn.Module) -> Tensor:
    """What the module returns: the outputs of an RNN, the state of a cell."""
    cell = isinstance(getattr(module, "module", None), nn.GRUCell)
    out = module(INPUT[0], torch.ones(1, 10)) if cell else module(INPUT)
    return out[0] if isinstance(out, tuple) else out


@pytest.fixture(params=BUILD)
def module(request: Any) -> nn.Module:
    return BUILD[request.param](P)


NAMES = {
    "WeightDropLSTM": "weight_ih_l0 bias_ih_l0 bias_hh_l0 weight_ih_l1 bias_ih_l1 bias_hh_l1 "
    "weight_hh_l0_raw weight_hh_l1_raw",
    "WeightDropLinear": "bias weight_raw",
    "WeightDrop": "module.weight_ih_l0 module.bias_ih_l0 module.bias_hh_l0 module.weight_hh_l0_raw",
    "WeightDrop of a linear": "module.weight_raw module.bias_raw",
}

PEERS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "lstm": ("WeightDropLSTM", (6, 6, 2), {}),
    "both directions": ("WeightDropLSTM", (6, 6, 2), {"bidirectional": True}),
    "gru": ("WeightDropGRU", (6, 6), {}),
    "linear": ("WeightDropLinear", (6, 6), {}),
}


class TestAsInPyTorchNLP:
    @pytest.mark.parametrize("name", RECURRENT)
    def test_hidden_to_hidden_weights_are_dropped(self, name: str) -> None:
        """The state is 0 in the first step, which they cannot change; in the second they do."""
        module = BUILD[name](P)
        one, other = run(module), run(module)
        assert torch.equal(one[0], other[0])
        assert bool((one[1] != other[1]).any())

    def test_linear(self) -> None:
        module = WeightDropLinear(10, 10, weight_dropout=P)
        one, other = module(INPUT), module(INPUT)
        assert bool((one[0] != other[0]).any())
        assert bool((one[1] != other[1]).any())

    @pytest.mark.parametrize("name", BUILD)
    def test_nothing_is_dropped_by_default(self, name: str) -> None:
        module = BUILD[name](0.0)
        assert torch.equal(run(module), run(module))
        assert torch.equal(run(module), run(strip_dropconnect(module)))

    def test_signatures(self) -> None:
        assert str(inspect.signature(WeightDrop)).startswith("(module: ")
        assert list(inspect.signature(WeightDrop).parameters) == ["module", "weights", "dropout"]
        for cls in (WeightDropLSTM, WeightDropGRU, WeightDropLinear):
            parameters = inspect.signature(cls.__init__).parameters
            assert list(parameters) == ["self", "args", "weight_dropout", "kwargs"]
            assert parameters["weight_dropout"].default == 0.0

    def test_classes(self) -> None:
        for cls, base in (
            (WeightDropLSTM, nn.LSTM), (WeightDropGRU, nn.GRU), (WeightDropLinear, nn.Linear)
        ):  # fmt: skip
            assert isinstance(cls(2, 2), cls)
            assert isinstance(cls(2, 2), base)

    @pytest.mark.parametrize("name", NAMES)
    def test_names_and_their_order(self, name: str) -> None:
        """The state of an optimizer goes by the order of parameters."""
        module = BUILD[name](P)
        assert list(module.state_dict()) == NAMES[name].split()
        assert [n for n, _ in module.named_parameters()] == NAMES[name].split()


class TestWithoutItsFaults:
    def test_train_eval_train(self, module: nn.Module) -> None:
        names = list(module.state_dict())
        first = run(module)
        plain = [run(module.eval()) for _ in range(2)]
        assert torch.equal(*plain)
        assert list(module.state_dict()) == names
        assert not torch.equal(run(module.train()), first)
        assert torch.equal(run(module.eval()), plain[0])
        assert set(load(save(module.state_dict()))) == set(names)

    def test_parameters_are_those_of_the_module(self) -> None:
        lstm = nn.LSTM(4, 4)
        own = set(map(id, lstm.parameters()))
        dropped = WeightDrop(lstm, ["weight_hh_l0"], 0.5)
        assert set(map(id, dropped.parameters())) == own
        assert dropped.module is lstm
        assert {p.dtype for p in dropped.double().parameters()} == {torch.float64}

    def test_it_trains(self, module: nn.Module) -> None:
        before = {name: value.clone() for name, value in module.state_dict().items()}
        run(module).square().sum().backward()
        torch.optim.SGD(module.parameters(), lr=0.1).step()
        after = module.state_dict()
        assert [name for name in before if torch.equal(before[name], after[name])] == []

    @pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
    def test_a_copy_has_weights_of_its_own(self, module: nn.Module, mode: bool) -> None:
        run(module.train(mode))
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            torch.manual_seed(0)
            expected = run(twin)
            assert type(twin).__mro__[1:] == type(module).__mro__[1:]
            changed = copy.deepcopy(twin)
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.zero_()
            torch.manual_seed(0)
            assert torch.equal(run(twin), expected)
            assert dropconnect_sites(changed) == dropconnect_sites(twin)

    def test_whole_modules_are_saved(self, module: nn.Module) -> None:
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        again = torch.load(buffer, weights_only=False)
        torch.manual_seed(0)
        expected = run(module)
        torch.manual_seed(0)
        assert torch.equal(run(again), expected)

    @pytest.mark.parametrize("cls", [WeightDropLSTM, WeightDropGRU])
    def test_both_directions_are_dropped(self, cls: Any) -> None:
        rnn = cls(4, 4, 2, bidirectional=True, weight_dropout=1.0)
        names = [site.parameter for site in dropconnect_sites(rnn)]
        assert sorted(names) == [
            "weight_hh_l0", "weight_hh_l0_reverse", "weight_hh_l1", "weight_hh_l1_reverse",
        ]  # fmt: skip
        x = torch.randn(5, 2, 4)
        dropped = rnn(x)[0]
        strip_dropconnect(rnn)
        with torch.no_grad():
            for name in names:
                getattr(rnn, name).zero_()
        assert torch.equal(rnn(x)[0], dropped)

    def test_the_mean_over_masks_is_the_plain_module(self, check_mean: Any) -> None:
        module = WeightDropLinear(6, 6, weight_dropout=0.5)
        x = torch.randn(2, 6)
        check_mean(lambda: module(x), nn.functional.linear(x, module.weight, module.bias).detach())

    def test_p_changes_and_dropconnect_comes_out(self, module: nn.Module) -> None:
        set_p(module, 0.0)
        plain = run(module)
        strip_dropconnect(module)
        assert torch.equal(run(module), plain)
        assert not [name for name in module.state_dict() if name.endswith("_raw")]

    def test_a_new_one_of_its_class(self) -> None:
        """`type(module)(...)`, as code that copies layers writes."""
        module = WeightDropLinear(3, 3, weight_dropout=0.25)
        other = type(module)(5, 2, weight_dropout=0.75)
        assert [site.p for site in dropconnect_sites(other)] == [0.75]

    @pytest.mark.compiler
    @pytest.mark.parametrize("name", ["WeightDropLinear", "WeightDrop of a linear"])
    def test_compiles_whole(self, name: str) -> None:
        module = BUILD[name](0.5)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.manual_seed(3)
        one = compiled(INPUT)
        assert not torch.equal(one, compiled(INPUT))
        torch.manual_seed(3)
        assert torch.equal(one, module(INPUT))


class TestCheckpoints:
    """As PyTorch-NLP and awd-lstm-lm wrote them."""

    @pytest.fixture(params=["WeightDropLSTM", "WeightDropGRU", "WeightDropLinear", "WeightDrop"])
    def name(self, request: Any) -> str:
        return str(request.param)

    def test_loads(self, name: str) -> None:
        saved, module = BUILD[name](P).state_dict(), BUILD[name](P)
        assert not torch.equal(run(module.eval()), run(BUILD[name](P).eval()))
        module.load_state_dict(saved)
        assert all(torch.equal(value, saved[key]) for key, value in module.state_dict().items())

    def test_written_after_an_evaluation_it_has_both_names(self, name: str) -> None:
        saved = dict(BUILD[name](P).state_dict())
        for key in [key for key in saved if key.endswith("_raw")]:
            saved[key.removesuffix("_raw")] = saved[key]
        count = len(saved)
        module = BUILD[name](P)
        module.load_state_dict(saved)
        assert all(torch.equal(value, saved[key]) for key, value in module.state_dict().items())
        assert len(saved) == count

    def test_two_names_with_two_values_are_refused(self, name: str) -> None:
        saved = dict(BUILD[name](P).state_dict())
        raw = next(key for key in saved if key.endswith("_raw"))
        saved[raw.removesuffix("_raw")] = saved[raw] + 1
        with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict"):
            BUILD[name](P).load_state_dict(saved)

    @pytest.mark.parametrize("value", [3, None, "text", torch.ones(2), torch.ones(4, 4).double()])
    def test_what_is_no_such_weight_is_refused_by_torch(self, name: str, value: Any) -> None:
        """With the words that it has for a plain module, whichever of the two names has it."""
        saved = dict(BUILD[name](P).state_dict())
        raw = next(key for key in saved if key.endswith("_raw"))
        for wrong in ({raw: value}, {raw.removesuffix("_raw"): value}):
            both = {**saved, raw.removesuffix("_raw"): saved[raw], **wrong}
            with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict for "):
                BUILD[name](P).load_state_dict(both)

    def test_plain_ones_load_too(self, name: str) -> None:
        module, other = BUILD[name](P), BUILD[name](P)
        other.load_state_dict(plain_state_dict(module))
        assert torch.equal(run(module.eval()), run(other.eval()))

    def test_a_bidirectional_one_has_plain_reverse_keys(self) -> None:
        module = WeightDropLSTM(4, 4, bidirectional=True, weight_dropout=0.5)
        saved = {
            key.replace("reverse_raw", "reverse"): value.clone() + 1
            for key, value in module.state_dict().items()
        }
        module.load_state_dict(saved)
        assert torch.equal(module.weight_hh_l0_reverse, saved["weight_hh_l0_reverse"])

    def test_a_module_that_is_held_twice_has_both_keys(self) -> None:
        """PyTorch-NLP's WeightDrop has none, so that its checkpoint has the keys of `rnn` alone."""

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.rnn = nn.LSTM(4, 4)
                self.dropped = WeightDrop(self.rnn, ["weight_hh_l0"], 0.5)

        model, other = Model(), Model()
        saved = {k: v for k, v in model.state_dict().items() if k.startswith("rnn.")}
        found = other.load_state_dict(saved, strict=False)
        assert not found.unexpected_keys
        assert {re.sub("^dropped.module", "rnn", key) for key in found.missing_keys} == set(saved)
        assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_what_is_wrong_is_refused() -> None:
    lstm = nn.LSTM(4, 4)
    with pytest.raises(NoMatchError, match="weight_hh_l7"):
        WeightDrop(lstm, ["weight_hh_l0", "weight_hh_l7"], 0.5)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]; got 1.5"):
        WeightDrop(lstm, ["weight_hh_l0"], 1.5)
    assert type(lstm) is nn.LSTM
    assert list(lstm.state_dict()) == list(nn.LSTM(4, 4).state_dict())


class TestPeer:
    """The library itself."""

    @pytest.fixture
    def theirs(self) -> Any:
        return pytest.importorskip("torchnlp.nn.weight_drop")

    @pytest.mark.parametrize("case", PEERS)
    def test_model_and_optimizer(self, theirs: Any, case: str) -> None:
        """After a training step there, both go on here as there."""
        name, args, options = PEERS[case]
        old = getattr(theirs, name)(*args, weight_dropout=0.5, **options)
        new = getattr(torchnlp, name)(*args, weight_dropout=0.5, **options)
        x = torch.randn(3, 2, 6)
        optimizers = [torch.optim.Adam(one.parameters(), lr=0.1) for one in (old, new)]
        out = old(x)
        (out[0] if isinstance(out, tuple) else out).square().sum().backward()
        optimizers[0].step()
        new.load_state_dict(old.state_dict())
        optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
        for one, other in zip(old.parameters(), new.parameters()):
            assert torch.equal(one, other)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        assert all(map(torch.equal, old.parameters(), new.parameters()))
        outs = [one.eval()(x) for one in (old, new)]
        assert torch.equal(*(one[0] if isinstance(one, tuple) else one for one in outs))
        saved = old.state_dict()  # after an evaluation, with both names
        assert len(saved) > len(list(new.parameters()))
        new.load_state_dict(saved)

    def test_of_both_the_first_step_is_as_it_was(self, theirs: Any) -> None:
        for one in (theirs.WeightDrop, WeightDrop):
            module = one(nn.LSTM(10, 10), ["weight_hh_l0"], dropout=0.9)
            first, second = (module(INPUT)[0] for _ in range(2))
            assert torch.equal(first[0], second[0])
            assert not torch.equal(first[1], second[1])
