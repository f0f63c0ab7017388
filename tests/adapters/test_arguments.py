"""`with_dropconnect`: DropConnect as arguments of a Trainer."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from surgery import dropconnect_sites, plain_state_dict
from surgery.adapters.transformers import DropConnectCallback, with_dropconnect

Arguments = with_dropconnect(transformers.TrainingArguments)


def trained(tiny: Any, trainer: Any, args: Any, *callbacks: Any) -> Any:
    """The Trainer of the fixture's settings after its run, with other arguments if there are any."""
    model = tiny("bert")
    run = trainer(model, list(callbacks))
    if args is not None:
        run = transformers.Trainer(model=model, args=args, train_dataset=run.train_dataset)
    run.train()
    return run


def arguments(trainer: Any, tiny: Any, **changes: Any) -> Any:
    own = trainer(tiny("bert"), []).args
    names = ("output_dir", "max_steps", "per_device_train_batch_size", "learning_rate", "seed")
    settings = {name: getattr(own, name) for name in names}
    return Arguments(
        **settings, report_to=[], use_cpu=True, logging_steps=1, disable_tqdm=True, **changes
    )


def test_it_is_the_callback(tiny: Any, trainer: Any) -> None:
    args = arguments(
        trainer, tiny, dropconnect_p=0.3, dropconnect_schedule="cosine", save_strategy="no"
    )
    by_args = trained(tiny, trainer, args)
    by_hand = trained(tiny, trainer, None, DropConnectCallback(p=0.3, schedule="cosine"))
    one, other = plain_state_dict(by_args.model), plain_state_dict(by_hand.model)
    assert list(one) == list(other)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    moved = [log["dropconnect_p"] for log in by_args.state.log_history if "loss" in log]
    assert moved == [log["dropconnect_p"] for log in by_hand.state.log_history if "loss" in log]
    assert moved[0] == 0.3
    assert moved[-1] == pytest.approx(0.0, abs=1e-12)


def test_off_unless_asked_for(tiny: Any, trainer: Any) -> None:
    run = trained(tiny, trainer, arguments(trainer, tiny, save_strategy="no"))
    assert not dropconnect_sites(run.model)


def test_targets_alone(tiny: Any, trainer: Any) -> None:
    args = arguments(trainer, tiny, dropconnect_targets=["*.query"], save_strategy="no")
    run = trained(tiny, trainer, args)
    sites = dropconnect_sites(run.model)
    assert {site.name.split(".")[-2] for site in sites} == {"query"}
    assert {site.config.p for site in sites} == {0.1}


def test_command_line(tmp_path: Path) -> None:
    line = f"--output_dir {tmp_path} --dropconnect_p 0.2 --dropconnect_targets *.query *.key"
    (args,) = transformers.HfArgumentParser(Arguments).parse_args_into_dataclasses(
        [*line.split(), "--dropconnect_toward", "pretrained"]
    )
    assert args.output_dir == str(tmp_path)
    assert (args.dropconnect_p, args.dropconnect_targets) == (0.2, ["*.query", "*.key"])
    assert args.dropconnect_toward == "pretrained"


def test_pickles(tiny: Any, trainer: Any) -> None:
    args = arguments(trainer, tiny, dropconnect_p=0.3, save_steps=6)
    run = trained(tiny, trainer, args)
    file = Path(run.args.output_dir) / "checkpoint-6" / "training_args.bin"
    kept = torch.load(file, weights_only=False)
    assert type(kept) is Arguments
    assert kept.to_dict() == args.to_dict()
    assert type(pickle.loads(pickle.dumps(args))) is Arguments


def test_arguments_stay_at_their_places(tmp_path: Path) -> None:
    assert Arguments(str(tmp_path)).output_dir == str(tmp_path)
    assert with_dropconnect(transformers.TrainingArguments) is Arguments
    assert issubclass(Arguments, transformers.TrainingArguments)
