"""Tensor parallelism, and checkpoints that processes share: two gloo processes against one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load

from surgery import apply_dropconnect, load_dropconnect, mc_predict
from surgery.adapters.distributed import get_plain_state_dict

from ..zoo import columns
from ..zoo.integers import ids, net, step, train_a_little
from .checkpoints_of_one import TARGETS, content, trained
from .mesh_options import LINEARS, OPTIONS, SAMPLINGS, SITES

Ranks = list[dict[str, Any]]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


class TestTensorParallel:
    """The model computes in whole numbers, so equal masks give equal bits."""

    @pytest.mark.parametrize("order", ["before", "after"])
    @pytest.mark.parametrize("option", OPTIONS)
    @pytest.mark.parametrize("sampling", SAMPLINGS)
    def test_equals_one_process(self, job: Ranks, sampling: str, option: str, order: str) -> None:
        targets = SITES if sampling == "batch" else LINEARS
        model = apply_dropconnect(net(), targets, p=0.5, **SAMPLINGS[sampling], **OPTIONS[option])
        train_a_little(model)
        expected = step(model)
        for rank in job:
            assert_equal(rank["tensor_parallel"][f"{sampling} {option} {order}"], expected)

    def test_masks_act(self, job: Ranks) -> None:
        """Some gradients are zero where those of the plain model are not, about half of them."""
        model = net()
        train_a_little(model)
        plain = step(model)["up.weight"]
        found = job[0]["tensor_parallel"]["batch element before"]["up.weight"]
        dropped = (found == 0)[plain != 0].float().mean().item()
        assert 0.25 < dropped < 0.75

    @pytest.mark.parametrize("sampling", ["batch", "example"])
    def test_sequences_are_cut(self, job: Ranks, sampling: str) -> None:
        expected = step(apply_dropconnect(net(), LINEARS, p=0.5, **SAMPLINGS[sampling]))
        for rank in job:
            assert_equal(rank["sequence_parallel"][sampling], expected)

    @pytest.mark.parametrize("case", columns.CASES)
    def test_weights_stored_by_columns_and_of_experts(self, job: Ranks, case: str) -> None:
        """However they are cut; and the masks act."""
        module = columns.built(case)
        apply_dropconnect(module, columns.targets(case), p=0.5, **columns.CASES[case][1])
        train_a_little(module)
        expected = columns.passed(module, columns.inputs())
        assert not torch.equal(expected["output"], module.eval()(columns.inputs()))
        for rank in job:
            cuts = [key for key in rank["other_layers"] if key.rpartition(" ")[0] == case]
            assert len(cuts) == next(module.parameters()).ndim + 1
            for key in cuts:
                assert_equal(rank["other_layers"][key], expected)

    def test_strip_gives_the_same_parameters(self, job: Ranks) -> None:
        for rank in job:
            found = rank["around_shards"]
            assert found["same"]
            assert found["classes"] == [type(module).__name__ for module in net().modules()]
            model = apply_dropconnect(net(), TARGETS, toward="pretrained")
            assert found["raw keys"] == list(model.state_dict())

    def test_other_forwards(self, job: Ranks) -> None:
        """Held masks, samples and means in `eval()`, and the mean of samples."""
        model = apply_dropconnect(net(), TARGETS, p=0.5, toward="pretrained")
        first = step(model)["output"]
        mean = model.eval()(ids())
        predicted = mc_predict(model, ids(), samples=3, seed=5).mean
        for rank in job:
            found = rank["around_shards"]
            assert torch.equal(found["first"], first)
            for one in (*found["held"], found["sampled"]):
                assert torch.equal(one, first)
            assert torch.equal(found["mean"], mean)
            assert torch.allclose(found["predicted"], predicted, rtol=1e-6)

    @pytest.mark.parametrize("when", ["at apply", "in forward"])
    @pytest.mark.parametrize("mode", ["gaussian", "moments"])
    def test_noise_and_moments_are_refused(self, job: Ranks, mode: str, when: str) -> None:
        for rank in job:
            message = rank["shard_errors"][f"{mode} {when}"]
            assert mode in message
            assert "cut across processes" in message
            assert "use sampling='batch'" in message

    def test_different_seeds_are_an_error(self, job: Ranks) -> None:
        for rank in job:
            assert "have drawn different keys" in rank["shard_errors"]["seeds"]
            assert "torch.manual_seed" in rank["shard_errors"]["seeds"]


@pytest.mark.parametrize("way", ["ddp", "fsdp", "tp"])
class TestSharedCheckpoints:
    @pytest.mark.parametrize("reader", ["operated", "plain"])
    def test_two_processes_read_what_one_wrote(self, job: Ranks, way: str, reader: str) -> None:
        expected = content(*trained())
        if reader == "plain":
            expected = {name: one for name, one in expected.items() if "anchor" not in name}
        for rank in job:
            assert_equal(rank["sharded_checkpoints"][f"{way} {reader}"], expected)

    @pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
    @pytest.mark.parametrize("reader", ["operated", "plain"])
    def test_one_process_reads_what_two_wrote(
        self, job: Ranks, job_folder: Path, way: str, reader: str
    ) -> None:
        folder = job_folder / "checkpoints" / way
        model = net()
        if reader == "operated":
            load_dropconnect(model, folder)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
        step(model)
        optimizer.step()
        state, optim = get_plain_state_dict(model, optimizer)
        load({"model": state, "optimizer": optim}, checkpoint_id=folder, no_dist=True)
        set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=optim)
        expected = content(*trained())
        if reader == "plain":
            expected = {name: one for name, one in expected.items() if "anchor" not in name}
        assert_equal(content(model, optimizer), expected)

    def test_keys_are_plain(self, job: Ranks, way: str) -> None:
        assert set(job[0]["sharded_checkpoints"][f"{way} keys"]) == set(net().state_dict())
