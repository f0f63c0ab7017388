"""DDP, FSDP2 and distributed state dicts: two gloo processes, judged by the files that they write."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from surgery import plain_state_dict, set_p, strip_dropconnect

from ..steps import anchor, assert_same, raw, tensors
from ..zoo.subjects import BY_NAME

SUBJECT = BY_NAME["transformer"]

Ranks = list[dict[str, Any]]


def single_process(steps: int = 2, p_after: float | None = None) -> dict[str, Tensor]:
    """What one process computes in the steps of the workers: same data, same seed."""
    model = SUBJECT.moved(toward="pretrained")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(3)
    found: dict[str, Tensor] = {}
    for step in range(steps):
        optimizer.zero_grad()
        out = model(SUBJECT.inputs())
        out.square().sum().backward()
        found |= {f"{step}.grad.{name}": p.grad.clone() for name, p in model.named_parameters()}
        found[f"{step}.output"] = out.detach()
        optimizer.step()
        if p_after is not None:
            set_p(model, p_after)
    return found


class TestDDP:
    @pytest.mark.parametrize("case", ["ddp_independent", "ddp_same"])
    def test_ranks_agree_on_gradients_and_weights(self, job: Ranks, case: str) -> None:
        first, second = ({**rank[case]} for rank in job)
        first.pop("output"), second.pop("output")
        assert any(key.startswith("after.") for key in first)
        assert_same(first, second)

    def test_ranks_draw_different_masks_though_seeded_alike(self, job: Ranks) -> None:
        first, second = (rank["ddp_independent"]["output"] for rank in job)
        assert not torch.equal(first, second)

    def test_ranks_draw_the_same_masks_on_request(self, job: Ranks) -> None:
        first, second = (rank["ddp_same"] for rank in job)
        assert torch.equal(first["output"], second["output"])
        expected = single_process(1)
        assert torch.equal(first["output"], expected["0.output"])
        for name, value in expected.items():
            if name.startswith("0.grad."):
                assert torch.equal(first[name.removeprefix("0.")], value)

    def test_gradients_are_the_mean_over_different_masks(self, job: Ranks) -> None:
        key = f"grad.{raw(SUBJECT.sites[0])}"
        independent, same = (job[0][case][key] for case in ("ddp_independent", "ddp_same"))
        assert (independent == 0).float().mean() < (same == 0).float().mean()

    @pytest.mark.parametrize("ranks", ["independent", "same"])
    def test_masks_from_a_generator_of_their_own(self, job: Ranks, ranks: str) -> None:
        """As with torch's own: the first process has the masks of a single one, and others have them if
        `ranks="same"`."""
        first, second = (rank["ddp_generator"] for rank in job)
        alone = SUBJECT.moved(generator=11)(SUBJECT.inputs()).detach()
        assert torch.equal(first[f"{ranks} 0 output"], alone)
        assert torch.equal(second[f"{ranks} 0 output"], alone) == (ranks == "same")
        for step in range(2):
            assert_same(first[f"{ranks} {step}"], second[f"{ranks} {step}"])
        for found in (first, second):
            assert found[f"{ranks} goes on"]
            assert found[f"{ranks} leaves torch's"]

    def test_anchors_stay(self, job: Ranks) -> None:
        plain = SUBJECT.plain().state_dict()
        for site in SUBJECT.sites:
            assert torch.equal(job[1]["ddp_independent"][f"after.{anchor(site)}"], plain[site])


class TestFSDP2:
    def test_two_steps_equal_a_single_process(self, job: Ranks) -> None:
        expected = single_process(p_after=0.25)
        for rank in job:
            assert set(rank["fsdp"]) == set(expected)
            for name, value in rank["fsdp"].items():
                assert torch.equal(value, expected[name]), name

    def test_ranks_draw_different_masks(self, job: Ranks) -> None:
        first, second = (rank["fsdp_independent"] for rank in job)
        assert not torch.equal(first.pop("output"), second.pop("output"))
        assert_same(first, second)

    def test_activation_checkpointing_is_bit_equal(self, job: Ranks) -> None:
        found = job[0]["fsdp_checkpointing"]
        names = [name.removeprefix("plain.") for name in found if name.startswith("plain.")]
        assert names
        for name in names:
            assert torch.equal(found[f"checkpointed.{name}"], found[f"plain.{name}"]), name

    def test_strip_while_sharded_is_refused(self, job: Ranks) -> None:
        message = job[0]["fsdp_errors"]["strip"]
        assert "its class was changed to FSDP" in message
        assert "by fully_shard" in message
        assert "plain_state_dict" in message

    def test_apply_when_sharded_is_refused(self, job: Ranks) -> None:
        message = job[0]["fsdp_errors"]["apply"]
        assert "linear1.weight" in message
        assert "apply before fully_shard" in message

    def test_plain_state_dict_while_sharded(self, job: Ranks) -> None:
        plain = strip_dropconnect(SUBJECT.moved()).eval()
        assert_same(job[1]["fsdp_errors"]["plain"], dict(plain.state_dict()))
        assert torch.equal(job[1]["fsdp_errors"]["output"], plain(SUBJECT.inputs()))


@pytest.mark.parametrize("own", ["True", "False"], ids=["use_orig_params", "flat"])
class TestFSDP1:
    """Of accelerate, the default."""

    def test_applied_before_it_trains_as_one_process_does(self, job: Ranks, own: str) -> None:
        for rank in job:
            assert torch.equal(rank["fsdp1"][f"{own}.wrapped"], rank["fsdp1"][f"{own}.single"])
            assert len(rank["fsdp1"][f"{own}.sites"]) == len(SUBJECT.sites)
        plain = strip_dropconnect(SUBJECT.moved()).state_dict()
        assert_same(job[0]["fsdp1"][f"{own}.plain"], dict(plain))

    def test_applied_after_it_is_refused_and_so_is_strip(self, job: Ranks, own: str) -> None:
        found = job[0]["fsdp1"]
        assert "linear1.weight" in found[f"{own}.apply"]
        assert "apply before FSDP" in found[f"{own}.apply"]
        for verb in ("strip", "strip-inner"):
            assert "FSDP holds its parameters" in found[f"{own}.{verb}"]
            assert "plain_state_dict" in found[f"{own}.{verb}"]


class TestDistributedStateDict:
    def test_ddp(self, job: Ranks) -> None:
        expected = tensors(SUBJECT.moved(toward="pretrained"))
        for rank in job:
            found = rank["ddp_state_dict"]
            assert set(found.pop("keys")) == set(expected)
            assert {name.removeprefix("state.") for name in found} == set(expected)
            for name, value in found.items():
                assert torch.equal(value, expected[name.removeprefix("state.")] + 1)

    def test_full_fsdp2(self, job: Ranks) -> None:
        model = SUBJECT.moved(toward="pretrained")
        expected = tensors(model)
        got = {k: v for k, v in job[0]["fsdp_state_dict"].items() if k.startswith("got.")}
        assert {name.removeprefix("got.") for name in got} == set(expected)
        for rank in job:
            for name, value in expected.items():
                assert torch.equal(rank["fsdp_state_dict"][f"set.{name}"], value + 1), name
        for name, value in got.items():
            assert torch.equal(value, expected[name.removeprefix("got.")]), name
        plain = plain_state_dict(model, {k.removeprefix("got."): v for k, v in got.items()})
        assert set(plain) == set(SUBJECT.plain().state_dict())

    @pytest.mark.parametrize("way", ["ddp", "sharded", "full", "broadcast", "offload"])
    def test_plain_keys(self, job: Ranks, way: str) -> None:
        """Each weight is loaded, and each anchor is the one that was in place."""
        anchors = {anchor(site) for site in SUBJECT.sites}
        expected = tensors(SUBJECT.moved(toward="pretrained"))
        start = SUBJECT.plain().state_dict()
        plain = {raw(site): site for site in SUBJECT.sites}
        for rank in job:
            found = rank["plain_keys"]
            assert set(found[f"keys.{way}"]) == set(expected)
            for name, value in expected.items():
                wanted = value if name in anchors else start[plain.get(name, name)] + 1
                assert torch.equal(found[f"{way}.{name}"], wanted), name

    @pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
    def test_plain_names_in_an_optimizer(self, flat: bool) -> None:
        options = StateDictOptions(flatten_optimizer_state_dict=flat)

        def optimizer(model: nn.Module) -> torch.optim.Optimizer:
            return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        plain, model = SUBJECT.plain(), SUBJECT.operated(toward="pretrained")
        trained = optimizer(plain)
        plain(SUBJECT.inputs()).square().sum().backward()
        trained.step()
        given: Any = get_state_dict(plain, trained, options=options)
        resumed = optimizer(model)
        set_state_dict(
            model,
            resumed,
            model_state_dict=given[0],
            optim_state_dict=given[1],
            options=options,
        )
        assert_same(plain_state_dict(model), given[0])
        for ours, theirs in zip(model.parameters(), plain.parameters()):
            momentum = trained.state[theirs]["momentum_buffer"]
            assert torch.equal(resumed.state[ours]["momentum_buffer"], momentum)

    def test_single_process(self) -> None:
        model: nn.Module = SUBJECT.operated(toward="pretrained")
        state: dict[str, Any] = get_model_state_dict(model)
        assert set(state) == set(model.state_dict())
        changed = {name: value + 1 for name, value in state.items()}
        set_model_state_dict(model, changed)
        assert_same(tensors(model), {name: changed[name] for name in model.state_dict()})
