"""`DropConnectCallback` under `transformers.Trainer`: checkpoints, resuming, schedules."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from surgery import (
    DropConnectConfig,
    SurgeryError,
    apply_dropconnect,
    dropconnect_sites,
    load_dropconnect,
    plain_state_dict,
    set_p,
    strip_dropconnect,
)
from surgery.adapters.transformers import DropConnectCallback
from surgery.spec.saved import PLAN_FILE
from surgery.verbs.checkpoint import anchors

from ..internals import states_of


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in plain_state_dict(model).items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert list(one) == list(other)
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert different == []


@pytest.mark.parametrize("name", ["bert", "gpt2", pytest.param("t5", marks=pytest.mark.slow)])
@pytest.mark.parametrize("toward", ["zero", "pretrained"])
def test_resumes_bit_for_bit(tiny: Any, trainer: Any, name: str, toward: str) -> None:
    def callback() -> DropConnectCallback:
        return DropConnectCallback("all-linear", p=0.3, toward=toward, schedule="cosine")

    whole = tiny(name)
    trainer(whole, [callback()], save_strategy="steps", save_steps=3).train()
    checkpoint = next(Path(whole_dir(trainer, whole)).glob("checkpoint-3"))

    resumed = tiny(name)
    second = trainer(resumed, [callback()])
    second.train(resume_from_checkpoint=str(checkpoint))
    assert_same(weights(resumed), weights(whole))
    if toward == "pretrained":
        assert_same(anchors(resumed), anchors(whole))
        start = dict(tiny(name).named_parameters())
        assert_same(anchors(resumed), {k: start[k].detach() for k in anchors(resumed)})


def test_resumes_with_the_generator_of_the_checkpoint(
    tiny: Any, trainer: Any, tmp_path: Path
) -> None:
    """Torch's own generators give none of the masks, and the callback's begins anew."""

    def callback(**options: Any) -> DropConnectCallback:
        return DropConnectCallback("all-linear", p=0.3, generator=5, **options)

    whole = tiny("bert")
    trainer(whole, [callback()], save_strategy="steps", save_steps=3).train()
    where = tmp_path / "run" / "checkpoint-3"
    resumed = tiny("bert")
    trainer(resumed, [callback()]).train(resume_from_checkpoint=str(where))
    assert_same(weights(resumed), weights(whole))
    elsewhere = trainer(tiny("bert"), [callback()], output_dir=str(tmp_path / "elsewhere"))
    (where / PLAN_FILE).unlink()
    with pytest.raises(SurgeryError, match=r"with masks from a generator, but no checkpoint in"):
        elsewhere.train(resume_from_checkpoint=str(where))


def test_resumes_with_a_generator_and_without_the_callback(
    tiny: Any, trainer: Any, tmp_path: Path
) -> None:
    """Trainer knows nothing of it; `load_dropconnect` of the checkpoint brings its state."""
    whole = apply_dropconnect(tiny("bert"), "all-linear", p=0.3, generator=5)
    trainer(whole, save_strategy="steps", save_steps=3).train()
    where = tmp_path / "run" / "checkpoint-3"
    resumed = load_dropconnect(tiny("bert"), where)
    trainer(resumed).train(resume_from_checkpoint=str(where))
    assert_same(weights(resumed), weights(whole))
    anew = apply_dropconnect(tiny("bert"), "all-linear", p=0.3, generator=5)
    trainer(anew).train(resume_from_checkpoint=str(where))
    name = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.equal(weights(anew)[name], weights(whole)[name])


def test_targets_may_be_a_predicate(tiny: Any, trainer: Any) -> None:
    """Asked anew when training begins, also of a model that has some of the sites."""
    callback = DropConnectCallback(lambda name, module: name.endswith("query"), p=0.3)
    model = tiny("bert")
    first = next(name for name, _ in model.named_modules() if name.endswith("query"))
    apply_dropconnect(model, first, p=0.3)
    trainer(model, [callback], max_steps=1).train()
    assert len(dropconnect_sites(model)) > 1
    assert all(site.module.endswith("query") for site in dropconnect_sites(model))


def whole_dir(trainer: Any, model: nn.Module) -> str:
    return str(trainer(model).args.output_dir)


def test_resumes_when_applied_before_the_trainer(tiny: Any, trainer: Any) -> None:
    whole = apply_dropconnect(tiny("bert"), "all-linear", p=0.3, toward="pretrained")
    trainer(whole, save_strategy="steps", save_steps=3).train()
    resumed = apply_dropconnect(tiny("bert"), "all-linear", p=0.3, toward="pretrained")
    run = trainer(resumed)
    run.train(resume_from_checkpoint=str(Path(run.args.output_dir) / "checkpoint-3"))
    assert_same(weights(resumed), weights(whole))


def test_dropconnect_changes_the_training(tiny: Any, trainer: Any) -> None:
    with_it, without = tiny("bert"), tiny("bert")
    trainer(with_it, [DropConnectCallback("all-linear", p=0.3)]).train()
    trainer(without).train()
    name = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.equal(weights(with_it)[name], weights(without)[name])


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "mixtral"])
def test_every_checkpoint_is_plain(tiny: Any, trainer: Any, logits: Any, name: str) -> None:
    model = tiny(name)
    plain_names = set(model.state_dict())
    run = trainer(model, [DropConnectCallback(p=0.2)], save_strategy="steps", save_steps=2)
    run.train()
    for step in (2, 4, 6):
        folder = Path(run.args.output_dir) / f"checkpoint-{step}"
        loaded, info = type(tiny(name)).from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert not info["mismatched_keys"]
        assert set(loaded.state_dict()) == plain_names
        assert (folder / PLAN_FILE).is_file()
        assert not list(folder.glob("dropconnect_anchors*"))
    assert torch.equal(logits(loaded), logits(model))


def test_load_best_model_at_end(tiny: Any, trainer: Any) -> None:
    model = tiny("bert")
    run = trainer(
        model, [DropConnectCallback(p=0.2)], save_strategy="steps", save_steps=2,
        eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
    )  # fmt: skip
    run.train()
    best = load_file(Path(run.state.best_model_checkpoint) / "model.safetensors")
    assert len(dropconnect_sites(model)) > 0
    assert_same({k: weights(model)[k] for k in best}, best)


@pytest.mark.filterwarnings("ignore:mtime may not be reliable:UserWarning")  # transformers 5.0
def test_save_total_limit_with_anchors(tiny: Any, trainer: Any) -> None:
    model = tiny("bert")
    callback = DropConnectCallback(p=0.2, toward="pretrained")
    run = trainer(model, [callback], save_strategy="steps", save_steps=2, save_total_limit=1)
    run.train()
    left = sorted(path.name for path in Path(run.args.output_dir).glob("checkpoint-*"))
    assert left == ["checkpoint-6"]


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0.0, [0.4] * 6),
        ("linear", 0.0, [0.4 * (1 - i / 5) for i in range(6)]),
        ("cosine", 0.0, [0.2 * (1 + math.cos(math.pi * i / 5)) for i in range(6)]),
        ("constant", 0.4, [0.0, 0.2, 0.4, 0.4, 0.4, 0.4]),
        (lambda progress: progress / 2, 0.0, [0.4 * i / 10 for i in range(6)]),
    ],
    ids=["constant", "linear", "cosine", "warmup", "callable"],
)
def test_schedule_moves_and_logs_p(
    tiny: Any, trainer: Any, schedule: Any, warmup: float, expected: list[float]
) -> None:
    callback = DropConnectCallback(p=0.4, schedule=schedule, warmup=warmup)
    run = trainer(tiny("bert"), [callback])
    run.train()
    logged = [entry["dropconnect_p"] for entry in run.state.log_history if "loss" in entry]
    assert logged == pytest.approx(expected, abs=1e-12)


def test_schedule_keeps_the_proportion_between_sites(tiny: Any, trainer: Any) -> None:
    model, seen = tiny("bert"), set[tuple[float, ...]]()

    class Look(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            attention = model.bert.encoder.layer[0].attention.self
            parts = attention.query, attention.key
            seen.add(tuple(state.p for part in parts for state in states_of(part)))

    targets = {"*.query": 0.4, "*.key": 0.2}
    callback = DropConnectCallback(targets, schedule=lambda progress: 0.5)
    trainer(model, [callback, Look()]).train()
    assert seen == {(0.2, 0.1)}
    assert {site.p for site in dropconnect_sites(model)} == {0.4, 0.2}


def test_schedules_do_not_compound(tiny: Any, trainer: Any) -> None:
    """A second training starts from the full p, and so does what a checkpoint restores."""
    model = tiny("bert")
    first = trainer(
        model, [DropConnectCallback(p=0.4, schedule="linear")], save_strategy="steps", save_steps=3
    )
    first.train()
    folder = Path(first.args.output_dir) / "checkpoint-3"
    assert {site.p for site in dropconnect_sites(load_dropconnect(tiny("bert"), folder))} == {0.4}
    second = trainer(model, [DropConnectCallback(schedule="linear")])
    second.train()
    logged = [row["dropconnect_p"] for row in second.state.log_history if "loss" in row]
    assert logged == pytest.approx([0.4 * (1 - i / 5) for i in range(6)], abs=1e-12)


def test_config_brings_its_own_p() -> None:
    assert DropConnectCallback().training.config.p == 0.1
    assert DropConnectCallback(config=DropConnectConfig(p=0.3)).training.config.p == 0.3
    assert DropConnectCallback(p=0.2, config=DropConnectConfig(p=0.3)).training.config.p == 0.2


def test_bf16_then_strip(tiny: Any, trainer: Any) -> None:
    """accelerate keeps the bound forward from before strip_dropconnect."""
    model = apply_dropconnect(tiny("bert"), "all-linear", p=0.2)
    run = trainer(model, bf16=True)
    run.train()
    strip_dropconnect(model)
    assert "eval_loss" in run.evaluate()


def test_strip_at_end(tiny: Any, trainer: Any) -> None:
    model = tiny("bert")
    names = list(model.state_dict())
    trainer(model, [DropConnectCallback(p=0.2, strip_at_end=True)]).train()
    assert list(model.state_dict()) == names
    assert len(dropconnect_sites(model)) == 0


def test_resume_without_known_anchors_is_an_error(tiny: Any, trainer: Any, tmp_path: Path) -> None:
    model = tiny("bert")
    callback = DropConnectCallback(p=0.2, toward="pretrained")
    run = trainer(model, [callback], save_strategy="steps", save_steps=3)
    run.train()
    moved = tmp_path / "elsewhere"
    (Path(run.args.output_dir) / "checkpoint-3").rename(moved)
    lost = trainer(tiny("bert"), [DropConnectCallback(p=0.2, toward="pretrained")])
    with pytest.raises(SurgeryError, match=r"step 3 .*anchors_from"):
        lost.train(resume_from_checkpoint=str(moved))
    told = tiny("bert")
    hint = DropConnectCallback(p=0.2, toward="pretrained", anchors_from=moved)
    trainer(told, [hint]).train(resume_from_checkpoint=str(moved))
    assert_same(weights(told), weights(model))


class _Classifier(nn.Module):
    """Not a `PreTrainedModel`: Trainer writes its state dict itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(99, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, input_ids: Any, labels: Any = None) -> dict[str, Any]:
        scores = self.head(self.embed(input_ids).mean(1))
        return {"loss": nn.functional.cross_entropy(scores, labels % 2), "logits": scores}


def test_plain_torch_model_under_trainer(trainer: Any) -> None:
    model = _Classifier()
    plain_names = set(model.state_dict())
    labelled = trainer(model, [DropConnectCallback(["embed", "head"], p=0.2)])
    labelled.train_dataset = [
        {"input_ids": row["input_ids"], "labels": row["input_ids"][0]}
        for row in labelled.train_dataset
    ]
    labelled.args.save_strategy = "steps"
    labelled.args.save_steps = labelled.state.save_steps = 3
    labelled.train()
    stored = load_file(Path(labelled.args.output_dir) / "checkpoint-6" / "model.safetensors")
    assert set(stored) == plain_names
    assert_same({k: stored[k] for k in weights(model)}, weights(model))


def test_a_site_that_is_never_used_is_reported(tiny: Any, trainer: Any) -> None:
    model = tiny("bert")
    model.spare = nn.Linear(4, 4)
    with pytest.warns(UserWarning, match=r"1 DropConnect site,.*'spare\.weight'"):
        trainer(model, [DropConnectCallback("*.spare", p=0.2)]).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 1.5}, "p is the probability of dropping and must be in"),
        ({"schedule": "steps"}, "schedule must be one of"),
        ({"warmup": 1.0}, "warmup is a fraction"),
        ({"schedule": lambda x: x, "warmup": 0.5}, "callable decides"),
        ({"unit": "row"}, "unit must be one of"),
    ],
    ids=["p", "schedule", "warmup", "callable-warmup", "unit"],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DropConnectCallback(**options)


def test_wrong_targets_leave_the_model_alone(tiny: Any, trainer: Any) -> None:
    model = tiny("bert")
    names = list(model.state_dict())
    with pytest.raises(SurgeryError, match=r"'\*\.fc' matches no module"):
        trainer(model, [DropConnectCallback("*.fc")]).train()
    assert list(model.state_dict()) == names


def test_two_callbacks_and_a_model_that_was_operated_on(tiny: Any, trainer: Any) -> None:
    """Sites are added; what is in place with other options is an error; the same again is nothing."""
    model = tiny("bert")
    callback = DropConnectCallback("*.attention.self.*", p=0.2)
    others = DropConnectCallback({"*.intermediate.dense": 0.3})
    run = trainer(model, [callback, others])
    run.train()
    found = {site.name: site.p for site in dropconnect_sites(model)}
    assert sorted(set(found.values())) == [0.2, 0.3]
    set_p(model, 0.1)
    run.train()  # what these callbacks put in place may be changed since
    assert {site.p for site in dropconnect_sites(model)} == {0.1}
    trainer(model, [DropConnectCallback(schedule="linear")]).train()
    for wrong in (
        DropConnectCallback("*.intermediate.dense", p=0.3),
        DropConnectCallback("*.dense", p=0.1, unit="input"),
        DropConnectCallback(p=0.3),
    ):
        with pytest.raises(
            SurgeryError, match=r"has DropConnect already, with .*strip_dropconnect"
        ):
            trainer(model, [wrong]).train()
    assert set(found) == {site.name for site in dropconnect_sites(model)}
