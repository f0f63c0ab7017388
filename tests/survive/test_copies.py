"""Copies are whole and their own: deepcopy, pickle, torch.save, averaged models, replicas."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from surgery import (
    apply_dropconnect,
    dropconnect_sites,
    set_p,
    strip_dropconnect,
)

from ..internals import live_masks
from ..steps import anchor, assert_drops, assert_same, gradients, raw, step, step_gradients, tensors
from ..zoo.subjects import BY_NAME, Subject


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, through_pickle, through_torch_save]


@pytest.fixture(params=COPIES, ids=lambda way: way.__name__)
def duplicate(request: pytest.FixtureRequest) -> Callable[[nn.Module], nn.Module]:
    return request.param


@pytest.mark.parametrize("toward", ["zero", "pretrained"])
def test_copy_computes_the_same(subject: Subject, duplicate: Callable, toward: str) -> None:
    model = subject.moved(toward=toward)
    twin = duplicate(model)
    assert_same(tensors(twin), tensors(model))
    assert dropconnect_sites(twin) == dropconnect_sites(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    x = subject.inputs()
    assert_same(step_gradients(twin, x), step_gradients(model, x))


def test_copy_trains_on_its_own_weights(subject: Subject, duplicate: Callable) -> None:
    model, x = subject.operated(toward="pretrained"), subject.inputs()
    before = tensors(model)
    twin = duplicate(model)
    assert not {p.data_ptr() for p in model.parameters()} & {
        p.data_ptr() for p in twin.parameters()
    }
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        step(twin, x)
        optimizer.step()
    assert_same(tensors(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    for site in subject.sites:
        assert not torch.equal(twin.state_dict()[raw(site)], before[raw(site)])
        assert torch.equal(twin.state_dict()[anchor(site)], before[anchor(site)])


def test_copy_has_its_own_p(subject: Subject, duplicate: Callable) -> None:
    model, x = subject.operated(), subject.inputs()
    twin = duplicate(model)
    set_p(twin, 0.0)
    assert [site.p for site in dropconnect_sites(model)] == [0.5] * len(subject.sites)
    assert torch.equal(twin(x), subject.plain()(x))
    assert_drops(model, x)


def test_copy_strips_to_the_plain_model(subject: Subject, duplicate: Callable) -> None:
    twin = strip_dropconnect(duplicate(subject.operated()))
    plain = subject.plain()
    assert_same(tensors(twin), tensors(plain))
    assert [type(m) for m in twin.modules()] == [type(m) for m in plain.modules()]
    assert torch.equal(twin(subject.inputs()), plain(subject.inputs()))


def test_copy_keeps_ties(duplicate: Callable) -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    plain[1].weight = plain[0].weight
    twin = duplicate(apply_dropconnect(plain, "*", p=0.5))
    assert twin[0].weight is twin[1].weight
    assert len(dropconnect_sites(twin)) == 1


LOAD = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
torch.manual_seed(7)
out = [model["transformer"](torch.ones(1, 2, 4)), model["rnn"](torch.ones(2, 1, 4))[0]]
torch.save(out, sys.argv[2])
"""


def test_fresh_process_loads_a_saved_model(tmp_path: Path) -> None:
    """Nothing of ours is imported there before `torch.load` needs it."""
    model = nn.ModuleDict({"transformer": BY_NAME["transformer"].plain(), "rnn": nn.LSTM(4, 5)})
    apply_dropconnect(model, "*", p=0.5, toward="pretrained")
    torch.save(model, tmp_path / "model.pt")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "model.pt"), str(tmp_path / "out.pt")]
    subprocess.run(command, check=True, timeout=120)
    torch.manual_seed(7)
    expected = [model["transformer"](torch.ones(1, 2, 4)), model["rnn"](torch.ones(2, 1, 4))[0]]
    for found, wanted in zip(torch.load(tmp_path / "out.pt"), expected):
        assert torch.equal(found, wanted)


def test_averaged_model(subject: Subject) -> None:
    """The average holds raw weights, drops in training and is the mean of them in evaluation."""
    model, x = subject.operated(), subject.inputs()
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    first = tensors(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    averaged.update_parameters(model)
    for name, value in averaged.module.state_dict().items():
        torch.testing.assert_close(value, first[name] + 0.5)
    assert_drops(averaged, x)
    stripped = strip_dropconnect(averaged.module).eval()
    plain = subject.plain().eval()
    plain.load_state_dict(stripped.state_dict())
    assert torch.equal(averaged(x), plain(x))


def test_averaged_model_with_buffers_averages_anchors_unchanged(subject: Subject) -> None:
    model = subject.operated(toward="pretrained")
    average = get_ema_multi_avg_fn(0.5)
    averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(model)
    assert_same(tensors(averaged.module), tensors(model))


def replicate(model: nn.Module) -> nn.Module:
    """What `nn.DataParallel` does for each device (`torch.nn.parallel.replicate`): shallow copies
    whose parameters are differentiable copies, kept as plain attributes."""
    twins = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, twin in twins.items():
        for name, child in module._modules.items():
            setattr(twin, name, None if child is None else twins[child])
        for name, parameter in module._parameters.items():
            setattr(twin, name, None if parameter is None else parameter.clone())
        for name, buffer in module._buffers.items():
            setattr(twin, name, buffer)
    return twins[model]


@pytest.mark.parametrize("toward", ["zero", "pretrained"])
def test_replicas_of_data_parallel(subject: Subject, toward: str) -> None:
    model, x = subject.moved(toward=toward), subject.inputs()
    expected = step_gradients(model, x)
    model.zero_grad()
    out = step(replicate(model), x)
    assert_same({**gradients(model), "output": out}, expected)


def test_threads_on_replicas_do_not_mix() -> None:
    """Each replica has live masks of its own, so concurrent forward calls agree with serial ones."""
    subject = BY_NAME["transformer"]
    model, x = subject.operated(inference="sample"), subject.inputs()
    replicas = [replicate(model) for _ in range(4)]
    failures: list[BaseException] = []
    barrier = threading.Barrier(len(replicas))

    def work(replica: nn.Module) -> None:
        try:
            barrier.wait()
            for _ in range(20):
                replica(x).sum().backward()
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(replica,)) for replica in replicas]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
    assert list(live_masks(model)) == []


def test_frames_of_other_threads_are_left_alone(monkeypatch) -> None:
    """To ask for them can block every thread: replicas that ran at once stood still now and then."""
    asked: list[int] = []
    monkeypatch.setattr(sys, "_current_frames", lambda: asked.append(1) or {})
    model = BY_NAME["transformer"].operated()
    step(model, BY_NAME["transformer"].inputs())
    model.eval()
    strip_dropconnect(model)
    assert asked == []


def test_deepcopy_inside_a_forward_takes_no_mask_along() -> None:
    model = BY_NAME["linear"].operated()
    copies: list[nn.Module] = []
    model[1].register_forward_hook(lambda *_: copies.append(copy.deepcopy(model)))
    step(model, BY_NAME["linear"].inputs())
    assert torch.equal(copies[0][0].weight, model[0].weight)
