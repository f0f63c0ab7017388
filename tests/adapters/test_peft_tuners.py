"""Every kind of adapter that PEFT makes, on a small model: its weights are found by the name that PEFT
gives them, they drop, and the model comes back bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import surgery.adapters.conventions  # noqa: F401  the first plan loads it where it is installed
from surgery import (
    NoMatchError,
    SurgeryError,
    apply_dropconnect,
    dropconnect_sites,
    plan_dropconnect,
    set_p,
    strip_dropconnect,
)

from ..helpers import Snapshot

peft = pytest.importorskip("peft")
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of options and versions


class Net(nn.Module):
    """One layer of each class that PEFT adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"tie_word_embeddings": False}
        self.emb = nn.Embedding(9, 16)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.conv1d = Conv1D(16, 16)
        self.fc1 = nn.Linear(16, 16)
        self.fc2 = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (batch, length) -> (batch, length, 4)."""
        x = self.conv(self.emb(ids)[:, None]).mean(1)
        x = self.fc2(nn.functional.leaky_relu(self.fc1(self.conv1d(x))))
        return self.head(self.norm(x))


IDS = torch.arange(10).view(2, 5) % 9
FC = ["fc1", "fc2"]
ALL = ["emb", "conv", "conv1d", *FC]

TUNERS: dict[str, tuple[Callable[[], Any], dict[str, int]]] = {
    "lora": (
        lambda: peft.LoraConfig(target_modules=ALL, r=4),
        {"lora_A": 4, "lora_B": 4, "lora_embedding_A": 1, "lora_embedding_B": 1},
    ),
    "dora": (
        lambda: peft.LoraConfig(target_modules=ALL, r=4, use_dora=True),
        {"lora_A": 4, "lora_B": 4, "lora_embedding_A": 1, "lora_magnitude_vector": 5},
    ),
    "rslora and bias": (
        lambda: peft.LoraConfig(target_modules=FC, r=4, use_rslora=True, bias="lora_only"),
        {"lora_A": 2, "lora_B": 2},
    ),
    "ia3": (
        lambda: peft.IA3Config(target_modules=ALL[1:], feedforward_modules=["fc2"]),
        {"ia3_l": 4},
    ),
    "adalora": (
        lambda: peft.AdaLoraConfig(target_modules=FC, total_step=10),
        {"lora_A": 2, "lora_B": 2, "lora_E": 2},
    ),
    "vera": (
        lambda: peft.VeraConfig(target_modules=FC, r=4),
        {"vera_lambda_b": 2, "vera_lambda_d": 2},
    ),
    "loha": (
        lambda: peft.LoHaConfig(target_modules=["conv", *FC], r=4),
        {"hada_w1_a": 3, "hada_w1_b": 3, "hada_w2_a": 3, "hada_w2_b": 3},
    ),
    "lokr": (
        lambda: peft.LoKrConfig(target_modules=["conv", *FC], r=4),
        {"lokr_w1": 3, "lokr_w2": 3},
    ),
    "oft": (
        lambda: peft.OFTConfig(target_modules=["conv", *FC], oft_block_size=4),
        {"oft_R": 3},
    ),
    "hra": (lambda: peft.HRAConfig(target_modules=FC, r=4), {"hra_u": 2}),
    "fourierft": (
        lambda: peft.FourierFTConfig(target_modules=FC, n_frequency=16),
        {"fourierft_spectrum": 2},
    ),
    "vblora": (
        lambda: peft.VBLoRAConfig(target_modules=FC, r=4, num_vectors=8, vector_length=4, topk=2),
        {"vblora_logits_A": 2, "vblora_logits_B": 2, "vblora_vector_bank": 1},
    ),
    "layer norm": (lambda: peft.LNTuningConfig(target_modules=["norm"]), {}),
    "randlora": (
        lambda: peft.RandLoraConfig(target_modules=FC, r=4),
        {"randlora_lambda": 2, "randlora_gamma": 2},
    ),
    "shira": (lambda: peft.ShiraConfig(target_modules=FC, r=4), {"shira_weight": 2}),
    "c3a": (lambda: peft.C3AConfig(target_modules=FC, block_size=4), {"c3a_kernel": 2}),
    "road": (
        lambda: peft.RoadConfig(target_modules=FC, group_size=4),
        {"road_theta": 2, "road_alpha": 2},
    ),
    "trainable tokens": (
        lambda: peft.TrainableTokensConfig(target_modules=["emb"], token_indices=[1, 2]),
        {"trainable_tokens_delta": 1},
    ),
    "modules to save": (
        lambda: peft.LoraConfig(target_modules=FC, r=4, modules_to_save=["head"]),
        {"lora_A": 2, "modules_to_save": 1, "head": 1},
    ),
}
"""The config of an adapter, and how many sites each of its names has."""

NAMED = [(tuner, name) for tuner, (_, names) in TUNERS.items() for name in names]


def adapted(tuner: str) -> Any:
    """With weights that are all of some size: PEFT begins where an adapter does nothing."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Net(), TUNERS[tuner][0]())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.uniform_(0.2, 0.7)
    return model.train()


def found(model: Any, targets: Any) -> list[str]:
    names = [site.name for site in plan_dropconnect(model, targets)]
    return [name.removeprefix("base_model.model.") for name in names]


@pytest.mark.parametrize(("tuner", "name"), NAMED)
def test_named_as_peft_names_them(tuner: str, name: str) -> None:
    """Without `.default`: plan, train, drop everything, and back."""
    model = adapted(tuner)
    names = found(model, f"*{name}*") if name != "head" else found(model, "*.head")
    assert len(names) == TUNERS[tuner][1][name]
    assert found(model, f"*.{name}") == names
    assert not [one for one in names if "original_module" in one]
    before, eval_before = Snapshot(model), model.eval()(IDS)
    apply_dropconnect(model.train(), f"*.{name}", p=0.5, unit="element")
    outputs = [model(IDS) for _ in range(8)]
    assert len({float(one.detach().sum()) for one in outputs}) > 1
    outputs[0].square().sum().backward()
    own = [p for n, p in model.named_parameters() if n.endswith("_raw")]
    assert len(own) == len(names)
    assert all(parameter.grad is not None for parameter in own)
    model.zero_grad(set_to_none=True)
    assert torch.equal(model.eval()(IDS), eval_before)
    strip_dropconnect(model.train())  # warns, as an error, of sites that never dropped
    assert Snapshot(model) == before


PROMPTS = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8
    ),
}


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@pytest.mark.parametrize("prompt", PROMPTS)
def test_learned_prompts(tiny: Any, inputs: Any, prompt: str) -> None:
    """They are no layers, but what goes in before the text."""
    model = peft.get_peft_model(tiny("gpt2"), PROMPTS[prompt]()).train()
    before, batch = Snapshot(model), inputs(model)
    names = [site.name for site in plan_dropconnect(model, "*prompt_encoder*")]
    assert names
    assert all(name.startswith("prompt_encoder.default.") for name in names)
    apply_dropconnect(model, "*prompt_encoder*", p=0.5)
    losses = {float(model(**batch).loss.detach()) for _ in range(4)}
    assert len(losses) > 1
    model(**batch).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.endswith("_raw"))
    model.zero_grad(set_to_none=True)
    strip_dropconnect(model)
    assert Snapshot(model) == before


@pytest.mark.parametrize("tuner", ["lora", "ia3", "adalora"])
def test_everything_dropped_is_the_model_without_the_adapter(tuner: str) -> None:
    """p = 1 of what is added to a layer; an IA3 vector multiplies, and leaves nothing."""
    model = adapted(tuner)
    with model.disable_adapter():
        plain = model(IDS)
    names = {"lora": ["*.lora_B", "*.lora_embedding_B"], "ia3": "*.ia3_l", "adalora": "*lora_E*"}
    apply_dropconnect(model, names[tuner], p=1.0)
    if tuner == "ia3":
        output = model(IDS)  # of biases alone: every token the same
        assert torch.equal(output, output[:, :1].expand_as(output))
    else:
        assert torch.equal(model(IDS), plain)
        set_p(model, 0.0)
        assert not torch.equal(model(IDS), plain)


def test_a_norm_is_not_dropped_by_its_name() -> None:
    with pytest.raises(NoMatchError, match="none has weights that are dropped by default"):
        found(adapted("layer norm"), "*ln_tuning_layers*")


def test_several_adapters_are_all_meant() -> None:
    model = adapted("lora")
    model.add_adapter("second", TUNERS["lora"][0]())
    assert len(found(model, "*.lora_A")) == 8
    assert len(found(model, "*.lora_A.second")) == 4


def test_keys_of_adapter_files_are_names() -> None:
    """`adapter_model.safetensors` has neither `.default` nor `modules_to_save` in its keys."""
    model = adapted("lora")
    assert found(model, "*lora_B.weight") == found(model, "*.lora_B.default.weight")
    model.add_adapter("second", TUNERS["lora"][0]())
    assert found(model, "*.lora_B.weight") == found(model, "*.lora_B")
    assert found(model, "*.lora_B.second.weight") == found(model, "*.lora_B.second")
    with pytest.raises(NoMatchError, match=r"Nearest names: [^ ]*lora_B\.weight, "):
        found(model, "*lora_C.weight")
    apply_dropconnect(model, "*lora_?.weight", p=0.5, exclude="*.lora_B.weight")
    dropped = [site.name.rpartition(".lora_A.")[1] for site in dropconnect_sites(model)]
    assert dropped == [".lora_A."] * 8


@pytest.mark.parametrize("kind", ["lora", "modules to save", "ia3"])
def test_every_key_of_an_adapter_file_is_a_name(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    model.save_pretrained(tmp_path)
    for key in load_file(tmp_path / "adapter_model.safetensors"):
        assert found(model, key), key


def test_exclude_takes_the_same_names() -> None:
    model = adapted("lora")
    assert found(model, "*") != [one for one in found(model, "*") if "lora_" not in one]
    apply_dropconnect(
        model, "*", exclude=["*.lora_A", "*.lora_B", "*.lora_embedding_A", "*.lora_embedding_B"]
    )
    assert not [site for site in dropconnect_sites(model) if "lora_" in site.name]


class TestModulesToSave:
    """PEFT trains a copy, and keeps the original beside it, frozen and unused."""

    COPY = "head.modules_to_save.default.weight"

    @pytest.mark.parametrize(
        "targets",
        ["*head*", "*.head", nn.Linear, "all-linear", lambda n, m: "head" in n, "re:.*head.*"],
        ids=["glob", "name", "class", "all-linear", "predicate", "regex"],
    )
    def test_the_copy_is_meant(self, targets: Any) -> None:
        names = found(adapted("modules to save"), targets)
        assert [name for name in names if "head" in name] == [self.COPY]

    def test_a_parameter_pattern_too(self) -> None:
        names = found(adapted("modules to save"), "*.weight")
        assert [name for name in names if "head" in name] == [self.COPY]

    def test_the_original_is_dropped_if_it_is_spelled(self) -> None:
        names = found(adapted("modules to save"), "*.head.original_module")
        assert names == ["head.original_module.weight"]

    def test_a_target_that_means_only_the_original_is_an_error(self) -> None:
        model = adapted("modules to save")
        with pytest.raises(
            NoMatchError, match=r"in whose place trained copies run, .*original_mod"
        ):
            found(model, lambda name, module: name.endswith("head.original_module"))

    def test_a_training_step_drops_only_what_is_trained(self) -> None:
        model = adapted("modules to save")
        original = copy.deepcopy(model.base_model.model.head.original_module.state_dict())
        apply_dropconnect(model, "*head*", p=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(IDS).sum().backward()
        optimizer.step()
        strip_dropconnect(model)
        after = model.base_model.model.head.original_module.state_dict()
        assert all(torch.equal(after[name], value) for name, value in original.items())

    def test_a_plan_that_lists_the_original_keeps_it(self) -> None:
        model = adapted("modules to save")
        plan = plan_dropconnect(model, "*original_module*")
        assert plan_dropconnect(model, plan) == plan


def test_what_an_adapter_computes_its_weight_from_is_told() -> None:
    """A name of bookkeeping that PEFT does not list is refused with what to write."""
    with pytest.raises(SurgeryError, match=r"name it: 'base_model.model.fc1.ranknum.default'"):
        found(adapted("adalora"), "*ranknum*")
