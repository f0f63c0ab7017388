"""transformers models: saving plain, tying, resizing, and the kinds that only they have."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from surgery import (
    apply_dropconnect,
    dropconnect_sites,
    load_dropconnect,
    plan_dropconnect,
    set_p,
    strip_dropconnect,
)
from surgery.spec.saved import PLAN_FILE
from surgery.verbs.checkpoint import anchors

from ..expected import keep

ALL = ["bert", "gpt2", "t5", "llama", "mixtral", "mamba"]


@pytest.mark.parametrize("name", ALL)
def test_eval_and_strip_are_the_original(tiny: Any, logits: Any, name: str) -> None:
    model = tiny(name)
    before, names = logits(model), list(model.state_dict())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    apply_dropconnect(model, "all-linear", p=0.3)
    assert torch.equal(logits(model), before)
    strip_dropconnect(model)
    assert type(model) is type(tiny(name))
    assert list(model.state_dict()) == names
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[key] is value for key, value in parameters.items())


@pytest.mark.parametrize("name", ALL)
def test_every_site_drops_in_training(tiny: Any, inputs: Any, name: str) -> None:
    """The gradient of a raw weight is exactly 0 where it was dropped: a fifth of it at least."""
    model = tiny(name).train()
    apply_dropconnect(model, "all-linear", p=0.2, inference="sample")
    model(**inputs(model, rows=8)).loss.backward()
    for site in dropconnect_sites(model):
        raw = model.get_parameter(f"{site.name}_raw")
        assert raw.grad is not None, site.name
        zeros = (raw.grad == 0).float().mean().item()
        margin = 4 * (0.2 * 0.8 / raw.numel()) ** 0.5
        assert zeros > 0.2 - margin, site.name


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("toward", ["zero", "pretrained"])
def test_save_pretrained_is_plain(
    tiny: Any, logits: Any, inputs: Any, tmp_path: Path, name: str, toward: str
) -> None:
    model = apply_dropconnect(tiny(name), "all-linear", p=0.3, toward=toward)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save_pretrained(tmp_path)
    assert len(dropconnect_sites(model)) > 0
    loaded, info = type(tiny(name)).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(loaded), logits(model))
    assert bool(list(tmp_path.glob("dropconnect_anchors-*"))) is (toward == "pretrained")
    load_dropconnect(loaded, tmp_path)
    assert dropconnect_sites(loaded) == dropconnect_sites(model)
    for key, value in anchors(model).items():
        assert torch.equal(anchors(loaded)[key], value)
    results = []
    for one in (model, loaded):
        torch.manual_seed(5)
        results.append(one.train()(**inputs(one)).loss)
    assert torch.equal(*results)


def test_saved_model_loads_where_surgery_is_not_installed(
    tiny: Any, logits: Any, tmp_path: Path
) -> None:
    model = apply_dropconnect(tiny("bert"), "all-linear", p=0.3).eval()
    model.save_pretrained(tmp_path)
    code = (
        "import sys, torch; sys.modules['surgery'] = None\n"
        "from transformers import AutoModelForSequenceClassification as A\n"
        "ids = torch.randint(0, 99, (4, 6), generator=torch.Generator().manual_seed(0))\n"
        f"print(A.from_pretrained({str(tmp_path)!r}).eval()(input_ids=ids).logits.tolist())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip().splitlines()[-1] == str(logits(model).tolist())


def test_save_keeps_masks_states_and_graph(tiny: Any, inputs: Any, tmp_path: Path) -> None:
    """Saving between forward and backward changes neither the gradient nor what comes after."""
    gradients = []
    for saves in (False, True):
        model = apply_dropconnect(tiny("bert").train(), "all-linear", p=0.3)
        torch.manual_seed(0)
        loss = model(**inputs(model)).loss
        if saves:
            model.save_pretrained(tmp_path)
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients) if a is not None)


def test_given_state_dict_is_renamed(tiny: Any, logits: Any, tmp_path: Path) -> None:
    model = apply_dropconnect(tiny("bert"), "all-linear", p=0.3)
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    _, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


@pytest.mark.parametrize("part", ["bert", "bert.encoder"])
def test_operating_on_a_part_saves_the_whole_plain(
    tiny: Any, logits: Any, tmp_path: Path, part: str
) -> None:
    model = tiny("bert")
    apply_dropconnect(model.get_submodule(part), "all-linear", p=0.3)
    model.save_pretrained(tmp_path)
    loaded, info = type(tiny("bert")).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(loaded), logits(model))


def test_unpickled_model_saves_plain_in_a_fresh_process(tiny: Any, tmp_path: Path) -> None:
    torch.save(apply_dropconnect(tiny("bert"), "all-linear", p=0.3), tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "torch.load(sys.argv[1] + '/model.pt', weights_only=False).save_pretrained(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    _, info = type(tiny("bert")).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_submodel_saves_plain_too(tiny: Any, tmp_path: Path) -> None:
    model = apply_dropconnect(tiny("bert"), "all-linear", p=0.3)
    model.bert.save_pretrained(tmp_path)
    _, info = type(tiny("bert").bert).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert (tmp_path / PLAN_FILE).is_file()


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_deepcopy_and_pickle(tiny: Any, logits: Any, name: str) -> None:
    model = apply_dropconnect(tiny(name), "all-linear", p=0.3)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), logits(model))
        strip_dropconnect(twin)
        assert type(twin) is type(tiny(name))
    assert len(dropconnect_sites(model)) > 0


def test_all_linear_is_as_peft_resolves_it(tiny: Any) -> None:
    assert {s.kind for s in plan_dropconnect(tiny("gpt2"), "all-linear")} == {"conv1d"}
    names = [site.name for site in plan_dropconnect(tiny("llama"), "all-linear")]
    assert len(names) == 2 * 7
    assert not any("lm_head" in name for name in names)
    assert not any("classifier" in s.name for s in plan_dropconnect(tiny("bert"), "all-linear"))


@pytest.mark.parametrize(("unit", "shape"), [("input", (50, 1)), ("output", (1, 30))])
def test_conv1d_units(unit: str, shape: tuple[int, int], keys: list[torch.Tensor]) -> None:
    layer = apply_dropconnect(Conv1D(30, 50), "*", p=0.4, unit=unit)
    x = torch.randn(4, 50)
    out = layer(x)
    mask = keep(keys[0], 0.4, *shape).float()
    assert 0 < mask.sum() < mask.numel()
    used = layer.weight_raw * mask / 0.6
    torch.testing.assert_close(out, x @ used + layer.bias)


class TestTying:
    def test_plan_shows_all_users(self, tiny: Any) -> None:
        (site,) = plan_dropconnect(tiny("gpt2"), "*.wte", p=0.1)
        assert site.name == "transformer.wte.weight"
        assert site.shared_with == ("lm_head.weight",)

    def test_both_ends_stay_one_parameter(self, tiny: Any, tmp_path: Path) -> None:
        model = apply_dropconnect(tiny("gpt2"), "*.wte", p=0.1)
        assert model.lm_head.weight_raw is model.transformer.wte.weight_raw
        model.tie_weights()
        assert model.lm_head.weight_raw is model.transformer.wte.weight_raw
        model.save_pretrained(tmp_path)
        strip_dropconnect(model)
        assert model.lm_head.weight is model.transformer.wte.weight

    def test_one_end_only(self, tiny: Any) -> None:
        model = apply_dropconnect(tiny("gpt2"), "*.wte", p=0.1, exclude="lm_head")
        assert model.lm_head.weight is model.transformer.wte.weight_raw
        assert "lm_head.weight" in model.state_dict()

    @pytest.mark.parametrize("size", [120, 60])
    @pytest.mark.parametrize("toward", ["zero", "pretrained"])
    def test_resize(self, tiny: Any, inputs: Any, size: int, toward: str) -> None:
        model = apply_dropconnect(tiny("gpt2"), "*.wte", p=0.1, toward=toward)
        old = model.transformer.wte.weight.detach().clone()
        model.resize_token_embeddings(size)
        (site,) = dropconnect_sites(model)
        assert site.shape == (size, 32)
        assert site.shared_with == ("lm_head.weight",)
        assert model.lm_head.weight_raw is model.transformer.wte.weight_raw
        if toward == "pretrained":
            rows = min(size, len(old))
            assert torch.equal(anchors(model)[site.name][:rows], old[:rows])
        data = {key: value % 50 for key, value in inputs(model).items()}
        model.train()(**data).loss.backward()
        assert model.transformer.wte.weight_raw.grad.shape == (size, 32)

    def test_an_excluded_end_stays_so_when_resized(self, tiny: Any, tmp_path: Path) -> None:
        model = apply_dropconnect(tiny("gpt2"), "*.wte", p=0.1, exclude="lm_head")
        model.resize_token_embeddings(120)
        model.save_pretrained(tmp_path)
        (site,) = dropconnect_sites(model)
        assert (site.shape, site.shared_with) == ((120, 32), ())
        assert type(model.lm_head) is torch.nn.Linear
        assert model.lm_head.weight is model.transformer.wte.weight_raw


class TestReadByAParent:
    def test_mamba_mixer_draws_for_dt_proj(self, tiny: Any) -> None:
        plan = plan_dropconnect(tiny("mamba"), "*.dt_proj")
        assert all(site.drawn_by == (site.module.rpartition(".")[0],) for site in plan)

    def test_experts_and_router(self, tiny: Any, inputs: Any) -> None:
        model = tiny("mixtral").train()
        plan = plan_dropconnect(model, ["*.gate_up_proj", "*.down_proj", "*.gate.weight"])
        assert {site.kind for site in plan} == {"other"}
        assert {len(site.shape) for site in plan} == {2, 3}
        apply_dropconnect(model, plan)
        model(**inputs(model)).loss.backward()
        for site in plan:
            grad = model.get_parameter(f"{site.name}_raw").grad
            assert (grad == 0).float().mean() > 0.4, site.name


@pytest.mark.parametrize(
    "name",
    ["bert", "llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("t5", "mixtral"))],
)
def test_compiles_as_one_graph_without_recompiling(
    tiny: Any, inputs: Any, traced_experts: str, name: str
) -> None:
    model = apply_dropconnect(tiny(name).train(), "all-linear", p=0.3)
    model.config._experts_implementation = traced_experts
    if transformers.__version__.startswith("5.0."):
        model.config.use_cache = False  # its cache breaks the graph of a plain T5
    data = inputs(model)
    model(**data)  # Bert notes its problem type at the first call
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(**data).loss.backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        set_p(model, 0.6)
        losses = []
        for run in (compiled, model):
            torch.manual_seed(0)
            losses.append(run(**data).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
