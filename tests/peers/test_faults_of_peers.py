"""Faults that were reproduced in other implementations, each a test that it is not ours.

The peers themselves are not needed: each test says what goes wrong there and checks that it does not
here.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from surgery import apply_dropconnect, dropconnect_sites, plain_state_dict, strip_dropconnect
from surgery.ops import hash_bits
from surgery.verbs.raw_files import quiet


def weight_dropped(**options) -> nn.LSTM:
    lstm = nn.LSTM(4, 4, num_layers=2, bidirectional=True)
    return apply_dropconnect(lstm, nn.LSTM, **{"p": 0.5, **options})


SEQUENCE = torch.linspace(-1, 1, 5 * 2 * 4).view(5, 2, 4)


class TestWeightDrop:
    """PyTorch-NLP `WeightDrop` and salesforce/awd-lstm-lm."""

    def test_train_eval_train_raises_type_error(self) -> None:
        lstm = weight_dropped()
        first, plain, again, same = (
            lstm.train(mode)(SEQUENCE)[0] for mode in (True, False, True, False)
        )
        assert not torch.equal(first, again)
        assert torch.equal(plain, same)

    def test_state_dict_after_eval_has_both_names_and_safetensors_refuses(self) -> None:
        lstm = weight_dropped()
        for mode in (True, False):
            lstm.train(mode)(SEQUENCE)
            names = set(lstm.state_dict())
            assert "weight_hh_l0_raw" in names
            assert "weight_hh_l0" not in names
            with quiet():  # raw keys in a file
                assert set(load(save(lstm.state_dict()))) == names
        assert set(load(save(plain_state_dict(lstm)))) == set(
            nn.LSTM(4, 4, 2, bidirectional=True).state_dict()
        )

    def test_parameters_is_empty(self) -> None:
        plain = nn.LSTM(4, 4)
        expected = [id(parameter) for parameter in plain.parameters()]
        dropped = apply_dropconnect(plain, nn.LSTM)
        assert [id(parameter) for parameter in dropped.parameters()] == expected
        assert len(expected) == 4

    @pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
    def test_deepcopy_runs_the_weights_of_the_original(self, mode: bool) -> None:
        lstm = weight_dropped().train(mode)
        twin = copy.deepcopy(lstm)
        torch.manual_seed(0)
        expected = twin(SEQUENCE)[0]
        with torch.no_grad():
            for parameter in lstm.parameters():
                parameter.zero_()
        torch.manual_seed(0)
        assert torch.equal(twin(SEQUENCE)[0], expected)

    def test_reverse_directions_are_never_masked(self, keys) -> None:
        lstm = weight_dropped(p=1.0)
        assert [site.parameter for site in dropconnect_sites(lstm)] == [
            "weight_hh_l0",
            "weight_hh_l0_reverse",
            "weight_hh_l1",
            "weight_hh_l1_reverse",
        ]
        output = lstm(SEQUENCE)[0]
        assert len(keys) == 4
        strip_dropconnect(lstm)
        with torch.no_grad():
            for name, parameter in lstm.named_parameters():
                if name.startswith("weight_hh"):
                    parameter.zero_()
        assert torch.equal(lstm(SEQUENCE)[0], output)

    def test_bias_cannot_be_dropped(self) -> None:
        layer = apply_dropconnect(nn.Linear(4, 4), nn.Linear, p=1.0, bias=True)
        assert torch.equal(layer(torch.ones(2, 4)), torch.zeros(2, 4))


class TestFastai:
    """fastai `WeightDropout`."""

    def test_deepcopy_fails(self) -> None:
        lstm = weight_dropped()
        lstm(SEQUENCE)[0].sum().backward()
        outputs = []
        for model in (lstm, copy.deepcopy(lstm)):
            torch.manual_seed(5)
            outputs.append(model(SEQUENCE)[0])
        assert torch.equal(*outputs)

    def test_raw_key_moves_to_the_outer_module(self) -> None:
        model = nn.ModuleDict({"rnn": nn.LSTM(4, 4)})
        plain = list(model.state_dict())
        apply_dropconnect(model, "rnn")
        expected = [name + "_raw" * ("weight_hh" in name) for name in plain]
        assert list(model.state_dict()) == expected


class TestBaal:
    """baal `MCDropoutConnect`."""

    def test_patching_reinitialises_the_weights(self) -> None:
        layer = nn.Linear(4, 4)
        weight, value = layer.weight, layer.weight.detach().clone()
        apply_dropconnect(layer, nn.Linear)
        assert layer.weight is weight
        assert torch.equal(weight, value)

    def test_patching_adds_a_bias(self) -> None:
        layer = apply_dropconnect(nn.Linear(4, 4, bias=False), nn.Linear, bias=True)
        assert layer.bias is None
        assert len(list(layer.parameters())) == 1

    def test_patching_loses_stride_and_groups(self) -> None:
        conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, dilation=2, groups=4)
        settings = conv.extra_repr()
        x = torch.randn(2, 4, 9, 9)
        expected = conv(x)
        apply_dropconnect(conv, nn.Conv2d)
        assert conv.extra_repr().startswith(settings)
        assert conv(x).shape == expected.shape
        assert torch.equal(conv.eval()(x), expected)

    def test_always_on(self) -> None:
        layer = nn.Linear(4, 4)
        x = torch.randn(2, 4)
        expected = layer(x)
        assert torch.equal(apply_dropconnect(layer, nn.Linear).eval()(x), expected)


class TestPyPIDropconnect:
    """The package `dropconnect` on PyPI."""

    def test_p_is_documented_as_keep_and_used_as_drop(self, check_mean) -> None:
        layer = apply_dropconnect(nn.Linear(64, 64), nn.Linear, p=0.2)
        assert "probability of dropping" in apply_dropconnect.__doc__
        eye = torch.eye(64)
        check_mean(lambda: ((layer(eye) - layer.bias).abs() < 1e-7).double().mean(), 0.2, 200)

    def test_wrong_on_3d_input(self) -> None:
        layer = apply_dropconnect(nn.Linear(4, 5), nn.Linear, p=0.5)
        x = torch.randn(2, 3, 4)
        torch.manual_seed(0)
        whole = layer(x)
        torch.manual_seed(0)
        flat = layer(x.view(6, 4))
        assert whole.shape == (2, 3, 5)
        torch.testing.assert_close(whole.view(6, 5), flat)


class TestMixout:
    """mixout."""

    def layer(self) -> nn.Linear:
        layer = nn.Linear(32, 32)
        with torch.no_grad():
            layer.weight.copy_(torch.randint(-8, 8, (32, 32)) / 8)
            apply_dropconnect(layer, nn.Linear, p=0.5, toward="pretrained")
            layer.weight.add_(1.0)
        return layer

    def test_mask_is_per_column(self) -> None:
        layer = self.layer()
        used = (layer(torch.eye(32)) - layer.bias).t()
        dropped = (used - layer.weight_anchor).abs() < 1e-5
        rates = torch.stack([dropped.double().mean(0), dropped.double().mean(1)])
        assert bool(((rates > 0) & (rates < 1)).all())

    def test_target_is_not_in_the_state_dict(self) -> None:
        layer = self.layer()
        state = layer.state_dict()
        assert torch.equal(state["weight_anchor"], layer.weight.detach() - 1.0)
        other = self.layer()
        other.load_state_dict(state)
        assert torch.equal(other.weight_anchor, layer.weight_anchor)

    def test_backward_lacks_the_scale(self) -> None:
        layer = self.layer()
        layer(torch.ones(1, 32)).sum().backward()
        assert set(layer.weight.grad.unique().tolist()) == {0.0, 2.0}


class TestProbly:
    """probly."""

    @pytest.mark.parametrize("p", [0.1, 0.9])
    def test_eval_is_scaled_by_keep_rate(self, p: float) -> None:
        layer = nn.Linear(4, 4)
        x = torch.randn(2, 4)
        expected = layer(x)
        assert torch.equal(apply_dropconnect(layer, nn.Linear, p=p).eval()(x), expected)


class TestSpikingJelly:
    """SpikingJelly `DropConnectLinear`."""

    def test_training_is_not_scaled(self, check_mean) -> None:
        layer = apply_dropconnect(nn.Linear(8, 8), nn.Linear, p=0.5)
        x = torch.randn(2, 8)
        check_mean(lambda: layer(x), F.linear(x, layer.weight, layer.bias).detach(), 2000)

    @pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 3, 4), (2, 3, 5, 4)], ids=str)
    def test_input_must_be_2d(self, shape: tuple[int, ...]) -> None:
        layer = apply_dropconnect(nn.Linear(4, 6), nn.Linear)
        assert layer(torch.randn(shape)).shape == (*shape[:-1], 6)

    def test_materialises_batch_times_weight(self) -> None:
        """The largest tensor that is made has the size of the weight, whatever the batch."""
        layer = apply_dropconnect(nn.Linear(16, 16), nn.Linear)
        largest = LargestTensor()
        with largest:
            layer(torch.randn(8, 16)).sum().backward()
        assert largest.numel == 16 * 16


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


class TestParametrize:
    """DropConnect written with `torch.nn.utils.parametrize`."""

    def test_a_mask_per_access(self, keys) -> None:
        lstm = apply_dropconnect(nn.LSTM(4, 4), nn.LSTM)
        lstm(SEQUENCE)
        assert len(keys) == 1

    def test_reading_the_weight_draws(self, keys) -> None:
        layer = apply_dropconnect(nn.Linear(4, 4), nn.Linear)
        assert layer.weight.dtype == layer.weight.dtype
        assert keys == []
        seen = []
        layer.register_forward_hook(lambda module, args, output: seen.append(module.weight))
        layer(torch.ones(1, 4))
        assert len(keys) == 1
        assert seen[0] is layer.weight

    def test_key_is_parametrizations_weight_original(self) -> None:
        layer = apply_dropconnect(nn.Linear(4, 4), nn.Linear)
        assert list(layer.state_dict()) == ["weight_raw", "bias"]
        nn.Linear(4, 4).load_state_dict(plain_state_dict(layer))

    def test_pickle_is_refused(self) -> None:
        layer = apply_dropconnect(nn.Linear(4, 4), nn.Linear, p=0.25)
        again = pickle.loads(pickle.dumps(layer))
        assert dropconnect_sites(again) == dropconnect_sites(layer)
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        assert torch.equal(loaded.weight, layer.weight)

    def test_save_pretrained_loads_as_reinitialised(self, tmp_path, tiny) -> None:
        model = apply_dropconnect(tiny("minilm"), "all-linear")
        model.save_pretrained(tmp_path)
        loaded, report = type(tiny("minilm")).from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        plain = plain_state_dict(model)
        assert all(torch.equal(value, plain[name]) for name, value in loaded.state_dict().items())

    def test_an_lstm_step_masks_each_weight_more_than_once(self, masked_weights) -> None:
        """What makes its LSTM step 1.5 times as slow: here one masked weight per site and step."""
        weight_dropped()(SEQUENCE)
        assert len(masked_weights) == 4


class TestAll:
    """Every implementation that draws its mask with `bernoulli_`."""

    def test_mask_is_drawn_by_bernoulli(self, keys) -> None:
        """One 64-bit key is drawn, and the mask is a function of it."""
        layer = apply_dropconnect(nn.Linear(8, 8, bias=False), nn.Linear, p=0.5)
        state = torch.get_rng_state()
        used = layer(torch.eye(8)).t()
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        torch.randint(-(2**31), 2**31, (2,), dtype=torch.int32)
        assert torch.equal(torch.get_rng_state(), after)
        bits = hash_bits(torch.arange(64, dtype=torch.int32), keys[0]).view(8, 8)
        assert torch.equal(used != 0, bits >= 0)

    @pytest.mark.parametrize("toward", ["zero", "pretrained"])
    def test_mask_and_masked_weight_are_both_kept_for_backward(self, toward: str) -> None:
        layer = apply_dropconnect(nn.Linear(16, 16), nn.Linear, toward=toward)
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        x = torch.randn(2, 16, requires_grad=True)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(x)
        assert 16 * 16 not in sizes
        assert max(sizes) == x.numel()
