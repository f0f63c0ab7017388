"""Raw checkpoints as people have them: of an operated model, in one file, or several with an index."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from surgery import apply_dropconnect, plain_state_dict, save_dropconnect
from surgery.verbs.raw_files import quiet


class Net(nn.Module):
    """Sites of several kinds and dtypes, one of them tied, and weights that are no sites."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.norm = nn.LayerNorm(8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.half = nn.Linear(8, 3, dtype=torch.bfloat16)
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(torch.relu(self.fc(self.lstm(self.norm(self.embed(words)))[0])))


def operated(toward: str = "pretrained") -> Net:
    """A model that was trained since surgery, so that anchors and weights differ."""
    torch.manual_seed(2)
    model = Net()
    targets = [nn.Embedding, nn.LSTM, nn.Linear]
    apply_dropconnect(model, targets, p=0.3, toward=toward)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    return model


def apart(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, as safetensors writes them, and which key was left out for which."""
    kept: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    left: dict[str, str] = {}
    for key, tensor in tensors.items():
        first = names.setdefault(tensor.data_ptr(), key)
        if first == key:
            kept[key] = tensor.contiguous()
        else:
            left[key] = first
    return kept, left


def expected(model: nn.Module) -> dict[str, Tensor]:
    """What the plain file holds."""
    return {key: tensor.clone() for key, tensor in apart(plain_state_dict(model))[0].items()}


@quiet()
def write(model: nn.Module, folder: Path, shards: int = 1, plan: bool = True) -> Path:
    """Write the raw state dict; returns the folder."""
    folder.mkdir(exist_ok=True)
    tensors, left = apart(dict(model.state_dict()))
    metadata = {"format": "pt", "note": "kept as it is", **left}
    if plan:
        save_dropconnect(model, folder)
    (folder / "config.json").write_text("{}")
    (folder / "optimizer.pt").write_text("")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata=metadata)
        return folder
    keys, weight_map = list(tensors), {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {key: tensors[key] for key in keys[number::shards]}
        save_file(part, folder / name, metadata=metadata)
        weight_map |= dict.fromkeys(part, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    form = {"metadata": {"total_size": total, "note": "kept"}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(form))
    return folder


def read(path: Path) -> dict[str, Tensor]:
    """What a reader finds: the file, or those that the index names, or the one in the folder."""
    if path.is_file():
        return load_file(path)
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return load_file(path / "model.safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    found: dict[str, Tensor] = {}
    for name in dict.fromkeys(weight_map.values()):
        for key, tensor in load_file(path / name).items():
            assert weight_map[key] == name
            found[key] = tensor
    assert found.keys() == weight_map.keys()
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether both have the same keys and the same bits."""
    if one.keys() != other.keys():
        return False
    return all(
        tensor.dtype == other[key].dtype and torch.equal(tensor, other[key])
        for key, tensor in one.items()
    )


def names(folder: Path) -> list[str]:
    """What lies in a folder."""
    return sorted(os.listdir(folder))
