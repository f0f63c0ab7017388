"""PEFT: adapter files of an operated model are plain, and plain adapters are read into it."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from surgery import apply_dropconnect, dropconnect_sites, plan_dropconnect, strip_dropconnect
from surgery.adapters.transformers import DropConnectCallback
from surgery.spec.saved import PLAN_FILE
from surgery.verbs.checkpoint import anchors

from ..internals import set_constant

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

LORA = ["*.lora_A.*", "*.lora_B.*"]
WHERE = ["query", "value"]

CASES: dict[str, tuple[Any, list[str]]] = {
    "lora": (lambda: peft.LoraConfig(target_modules=WHERE), LORA),
    "modules_to_save": (
        lambda: peft.LoraConfig(target_modules=WHERE, modules_to_save=["classifier"]),
        [*LORA, "*.modules_to_save.*"],
    ),
    "bias": (lambda: peft.LoraConfig(target_modules=WHERE, bias="lora_only"), LORA),
    "embedding": (
        lambda: peft.LoraConfig(target_modules=["word_embeddings", *WHERE]),
        ["*.lora_embedding_A.*", *LORA],
    ),
    "dora": (lambda: peft.LoraConfig(target_modules=WHERE, use_dora=True), LORA),
    "adalora": (lambda: peft.AdaLoraConfig(target_modules=WHERE, total_step=10), LORA),
    "ia3": (
        lambda: peft.IA3Config(target_modules=["query", "dense"], feedforward_modules=["dense"]),
        ["*.ia3_l.*"],
    ),
    "prompt": (
        lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
        ["*prompt_encoder.*"],
    ),
    "prefix": (
        lambda: peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
        ["*prompt_encoder.*"],
    ),
}


@pytest.fixture
def adapt(tiny: Any) -> Any:
    """A tiny BERT with an adapter whose trainable weights are random, by seed."""

    def build(config: Any, seed: int = 0) -> Any:
        model = peft.get_peft_model(tiny("bert"), config)
        return randomize(model, seed)

    return build


@pytest.fixture
def lora(adapt: Any) -> Any:
    """A tiny BERT with LoRA, by seed; by default operated on."""

    def build(seed: int = 0, operated: bool = True, r: int = 8, **options: Any) -> Any:
        model = adapt(peft.LoraConfig(target_modules=WHERE, r=r), seed)
        return apply_dropconnect(model, LORA, p=0.3, **options) if operated else model

    return build


def randomize(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(generator=generator)
    return model


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trainable weights under their plain names."""
    named = model.named_parameters()
    return {n.removesuffix("_raw"): p.detach().clone() for n, p in named if p.requires_grad}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert list(one) == list(other)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_all_linear_takes_base_layers_and_no_adapters(lora: Any) -> None:
    names = [site.name for site in plan_dropconnect(lora(operated=False), "all-linear")]
    assert any(name.endswith("query.base_layer.weight") for name in names)
    assert not any("lora_" in name for name in names)


@pytest.mark.parametrize("toward", ["zero", "pretrained"])
@pytest.mark.parametrize("case", CASES)
def test_adapters_are_written_and_read_plain(
    adapt: Any, tmp_path: Path, case: str, toward: str
) -> None:
    """Between an operated and a plain model in both directions, by file and by state dict."""
    config, targets = CASES[case]
    plain, model = adapt(config(), 1), adapt(config(), 2)
    apply_dropconnect(model, targets, p=0.3, toward=toward)
    if case == "lora":  # frozen weights of the base too
        apply_dropconnect(model, "*.base_layer", p=0.3)
    kept, sites = {k: v.clone() for k, v in anchors(model).items()}, dropconnect_sites(model)
    plain.save_pretrained(tmp_path / "plain")
    model.load_adapter(tmp_path / "plain", "default", is_trainable=True)
    assert_same(trained(model), trained(plain))
    state = peft.get_peft_model_state_dict
    assert_same(state(model), state(plain))
    assert_same(state(model, state_dict=model.state_dict()), state(plain))

    peft.set_peft_model_state_dict(model, state(randomize(plain, 3)))
    assert_same(trained(model), trained(plain))
    assert dropconnect_sites(model) == sites
    assert_same(anchors(model), kept)

    model.save_pretrained(tmp_path / "operated")
    assert (tmp_path / "operated" / PLAN_FILE).is_file()
    fresh = adapt(config(), 4)
    fresh.load_adapter(tmp_path / "operated", "default", is_trainable=True)
    assert_same(trained(fresh), trained(plain))
    assert_same(trained(strip_dropconnect(model)), trained(plain))


def test_raw_adapter_keys_are_read_too(lora: Any) -> None:
    plain, model = lora(1, operated=False), lora(2, toward="pretrained")
    given = {
        key.replace(".weight", ".weight_raw"): value
        for key, value in peft.get_peft_model_state_dict(plain).items()
    }
    assert not peft.set_peft_model_state_dict(model, given).unexpected_keys
    assert_same(trained(model), trained(plain))


@pytest.mark.parametrize("case", ["modules_to_save", "embedding", "ia3"])
def test_while_the_classes_cannot_change(
    adapt: Any, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under `fully_shard`: then only the keys can be plain."""
    config, targets = CASES[case]
    plain, model = adapt(config(), 1), adapt(config(), 2)
    apply_dropconnect(model, targets, p=0.3, toward="pretrained")
    set_constant(monkeypatch, "can classes change", lambda _: False)
    given = peft.get_peft_model_state_dict(plain)
    assert list(peft.get_peft_model_state_dict(model)) == list(given)
    peft.set_peft_model_state_dict(model, given)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == set(given)
    assert_same(trained(strip_dropconnect(model)), trained(plain))


def test_adalora_pairs_its_matrices(adapt: Any, inputs: Any) -> None:
    """It allocates ranks by the names of parameters, and saves the names."""
    config = {"init_r": 8, "target_r": 2, "total_step": 6, "tinit": 0, "tfinal": 2, "deltaT": 1}
    found = []
    for targets in (None, ["*.lora_A.*"], ["*.lora_A.*", "*.lora_B.*", "*.lora_E.*"]):
        model = adapt(peft.AdaLoraConfig(target_modules=WHERE, **config), 1).train()
        if targets is not None:
            apply_dropconnect(model, targets, p=0.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for step in range(6):
            torch.manual_seed(step)
            model(**inputs(model)).loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
        found.append((model.peft_config["default"].rank_pattern, trained(model)))
    for pattern, weights in found[1:]:
        assert pattern == found[0][0]
        assert_same(weights, found[0][1])


@pytest.mark.parametrize("low", [False, True], ids=["", "low_cpu_mem_usage"])
def test_several_adapters(lora: Any, tmp_path: Path, low: bool) -> None:
    """Load beside an operated adapter and over it, switch, delete, merge, unload."""
    second, model = lora(1, operated=False), lora(2)
    apply_dropconnect(model, "*.base_layer", p=0.3)
    second.save_pretrained(tmp_path)
    first = trained(model)
    model.load_adapter(tmp_path, "second", low_cpu_mem_usage=low)
    state = peft.get_peft_model_state_dict
    assert_same(state(model, adapter_name="second"), state(second))
    assert_same(trained(model), first)
    model.load_adapter(tmp_path, "default", is_trainable=True, low_cpu_mem_usage=low)
    assert_same(trained(model), trained(second))
    model.set_adapter("second")
    model.delete_adapter("default")
    assert {site.module.rpartition(".")[2] for site in dropconnect_sites(model)} == {"base_layer"}
    merged = model.merge_and_unload()
    assert {site.module.rpartition(".")[2] for site in dropconnect_sites(merged)} == set(WHERE)
    plain = second.merge_and_unload()
    assert_same(dict(strip_dropconnect(merged).state_dict()), dict(plain.state_dict()))


def test_merging_and_mixing_is_that_of_the_plain_model(lora: Any, logits: Any) -> None:
    plain, model = lora(1, operated=False), lora(1)
    apply_dropconnect(model, "*.base_layer", p=0.3)
    seen = []
    for one in (plain, model):
        torch.manual_seed(0)
        one.add_adapter("second", peft.LoraConfig(target_modules=WHERE))
        one.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mixed", "linear")
        outputs = []
        for change, *arguments in (
            (one.set_adapter, "mixed"),
            (one.merge_adapter,),
            (one.unmerge_adapter,),
            (one.set_adapter, "default"),
        ):
            change(*arguments)
            outputs.append(logits(one))
        with one.disable_adapter():
            outputs.append(logits(one))
        outputs.append(logits(one.unload()))
        seen.append(outputs)
    assert all(map(torch.equal, *seen))


def test_adapter_on_an_operated_base(tiny: Any, lora: Any, tmp_path: Path, logits: Any) -> None:
    """`PeftModel.from_pretrained` wraps operated layers: they stay operated."""
    plain = lora(1, operated=False)
    plain.save_pretrained(tmp_path)
    base = apply_dropconnect(tiny("bert"), "all-linear", p=0.3, toward="pretrained")
    count = len(dropconnect_sites(base))
    model = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    assert len(dropconnect_sites(model)) == count
    assert torch.equal(logits(model), logits(plain))
    assert_same(dict(strip_dropconnect(model).state_dict()), dict(plain.state_dict()))


class TestHotswap:
    @pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
    def test_swaps(self, lora: Any, tmp_path: Path, compiled: bool) -> None:
        plain, model = lora(1, operated=False), lora(2, toward="pretrained")
        kept = {k: v.clone() for k, v in anchors(model).items()}
        plain.save_pretrained(tmp_path)
        given = torch.compile(model, backend="eager") if compiled else model
        peft.utils.hotswap.hotswap_adapter(given, tmp_path, "default", torch_device="cpu")
        assert_same(trained(model), trained(plain))
        assert_same(anchors(model), kept)

    def test_padded_matrices_stay_operated(
        self, lora: Any, tmp_path: Path, logits: Any, inputs: Any
    ) -> None:
        plain, model = lora(1, operated=False, r=4), lora(2)
        names = [site.name for site in dropconnect_sites(model)]
        plain.save_pretrained(tmp_path)
        peft.utils.hotswap.prepare_model_for_compiled_hotswap(model, target_rank=16)
        assert [site.name for site in dropconnect_sites(model)] == names
        peft.utils.hotswap.hotswap_adapter(model, tmp_path, "default", torch_device="cpu")
        assert torch.allclose(logits(model), logits(plain), atol=1e-6)
        model(**inputs(model)).loss.backward()


def test_base_weights_by_their_own_names(lora: Any, tiny: Any) -> None:
    functions = peft.utils.save_and_load
    if not hasattr(functions, "set_base_model_state_dict"):
        pytest.skip("this version of PEFT lacks it")
    model = apply_dropconnect(lora(), "*.base_layer", p=0.3)
    wanted = randomize(tiny("bert"), 5).state_dict()
    functions.set_base_model_state_dict(model, wanted)
    assert_same(functions.get_base_model_state_dict(model), wanted)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_transformers_own_integration(
    tiny: Any, lora: Any, tmp_path: Path, logits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`PreTrainedModel.load_adapter` would initialise again what it does not find."""
    integration = pytest.importorskip("transformers.integrations.peft")
    monkeypatch.setattr(integration, "check_peft_version", lambda **_: None)
    plain = lora(1, operated=False)
    plain.save_pretrained(tmp_path / "adapter")
    untouched = tiny("bert")
    untouched.load_adapter(tmp_path / "adapter")
    if not torch.equal(logits(untouched), logits(plain)):
        pytest.skip("this transformers does not load the adapter into a plain model either")
    model = apply_dropconnect(tiny("bert"), "all-linear", p=0.3, toward="pretrained")
    model.load_adapter(tmp_path / "adapter", is_trainable=True)
    apply_dropconnect(model, LORA, p=0.3)
    sites, before = dropconnect_sites(model), copy.deepcopy(model)
    model.load_adapter(tmp_path / "adapter", adapter_name="second", is_trainable=True)
    assert dropconnect_sites(model) == sites
    state = {name: value for name, value in model.state_dict().items() if ".second" not in name}
    assert_same(state, dict(before.state_dict()))
    assert torch.equal(logits(before), logits(plain))
    before.save_pretrained(tmp_path / "saved")
    again = tiny("bert")
    again.load_adapter(tmp_path / "saved")
    assert torch.equal(logits(again), logits(plain))


def test_the_functions_stay_the_objects_that_others_hold() -> None:
    function = peft.set_peft_model_state_dict
    assert function is peft.utils.save_and_load.set_peft_model_state_dict
    assert pickle.loads(pickle.dumps(function)) is function
    assert next(iter(inspect.signature(function).parameters)) == "model"


@pytest.mark.parametrize("toward", ["zero", "pretrained"])
@pytest.mark.parametrize("by", ["verb", "callback"])
def test_a_resumed_run_goes_on_exactly(
    adapt: Any, trainer: Any, tmp_path: Path, toward: str, by: str
) -> None:
    def run(**changes: Any) -> tuple[Any, Any]:
        config, targets = CASES["modules_to_save"]
        model, callbacks = adapt(config(), 1), []
        if by == "verb":
            apply_dropconnect(model, targets, p=0.3, toward=toward)
        else:
            where = tmp_path / "run" / "checkpoint-3"
            callbacks = [DropConnectCallback(targets, p=0.3, toward=toward, anchors_from=where)]
        return model, trainer(model, callbacks, **changes)

    whole, first = run(save_strategy="steps", save_steps=3)
    first.train()
    resumed, second = run(output_dir=str(tmp_path / "elsewhere"))
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert_same(trained(resumed), trained(whole))
    assert_same(anchors(resumed), anchors(whole))


def test_another_adapter_is_not_taken_for_the_resumed_one(lora: Any, tmp_path: Path) -> None:
    from surgery.adapters.peft import holds_adapters

    model = lora(1, toward="pretrained")
    model.save_pretrained(tmp_path)
    assert holds_adapters(tmp_path, model)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    weights[next(iter(weights))][0, 0] += 1
    save_file(weights, file)
    assert not holds_adapters(tmp_path, model)
    assert not holds_adapters(tmp_path / "missing", model)


def test_load_best_model_at_end(lora: Any, trainer: Any) -> None:
    model = lora(1)
    run = trainer(
        model, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
        learning_rate=1e-1,
    )  # fmt: skip
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.name != "checkpoint-6"
    found = peft.get_peft_model_state_dict(model)
    stored = load_file(best / "adapter_model.safetensors")
    assert set(found) == set(stored)
    assert [name for name in stored if not torch.equal(found[name], stored[name])] == []
