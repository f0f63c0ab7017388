"""The commands as people and scripts call them: what they print, where, and with which exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import surgery
from surgery import apply_dropconnect, plan_dropconnect, save_dropconnect
from surgery.stored.header import TensorType, encoded, placed

pytest.importorskip("typer")

from ..checkpoints.raw import expected, operated, read, same, write
from .running import call

ROOT = Path(__file__).parents[2]


def cold(code: str, *args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """A process of its own, which begins without torch."""
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def module(*args: object) -> subprocess.CompletedProcess[str]:
    """`python -m surgery`."""
    command = [sys.executable, "-m", "surgery", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def test_inspect(tmp_path: Path) -> None:
    folder = write(operated(), tmp_path / "raw", shards=2)
    result = call("inspect", folder)
    assert result.exit_code == 0
    assert "15 tensors (4 raw, 7 plain, 4 anchor)" in result.output
    assert re.search(r"^fc\.weight_raw +raw +F32 +8x8 +256 B +model-0000", result.output, re.M)
    assert re.search(r"^half\.weight_raw +raw +BF16 +3x8 +48 B", result.output, re.M)
    assert "4 sites, " in result.output
    form = json.loads(call("inspect", folder, "--json").output)
    assert form["counts"] == {"plain": 7, "raw": 4, "anchor": 4}
    tensors = {one["key"]: one for one in form["tensors"]}
    assert tensors["half.weight_anchor"]["role"] == "anchor"
    assert tensors["half.weight_anchor"]["shape"] == [3, 8]
    assert surgery.Plan.from_json(form["plan"]) == surgery.dropconnect_sites(operated())


def test_strip_in_place_and_to_a_folder(tmp_path: Path) -> None:
    folder = write(operated(), tmp_path / "raw")
    result = call("strip", folder, tmp_path / "out")
    assert result.exit_code == 0
    assert "4 raw keys made plain, 4 anchors left out" in result.output
    assert result.output.rstrip().endswith("copied and compared")
    form = json.loads(call("strip", folder, "--json", "--no-verify").output)
    assert (form["raw"], form["anchors"], form["verified"]) == (4, 4, False)
    assert same(read(folder), expected(operated()))
    assert same(read(tmp_path / "out"), expected(operated()))


def test_convert(tmp_path: Path) -> None:
    torch.save({"a.module.w_raw": torch.ones(2), "a.module.w": torch.ones(2)}, tmp_path / "in.pt")
    out = tmp_path / "out.safetensors"
    result = call("convert", tmp_path / "in.pt", out, "--from", "awd-lstm")
    assert result.exit_code == 0
    assert "a.module.w_raw -> a.w\n" in result.output
    assert "a.module.w left out: a masked copy of the raw weight\n" in result.output
    assert set(load_file(out)) == {"a.w"}
    assert (
        call("convert", tmp_path / "in.pt", tmp_path / "x.safetensors", "--from", "x").exit_code
        == 2
    )


def test_bake(tmp_path: Path) -> None:
    for name in ("tuned", "pretrained"):
        save_file({"w": torch.full((50,), float(len(name)))}, tmp_path / f"{name}.safetensors")
    args = ["bake", tmp_path / "tuned.safetensors", tmp_path / "out.safetensors", "--seed", 3]
    args += ["--toward", tmp_path / "pretrained.safetensors", "-p", "0.5"]
    form = json.loads(call(*args, "--json").output)
    assert form["baked"] == ["w"]
    assert set(load_file(tmp_path / "out.safetensors")["w"].tolist()) == {0.0, 10.0}
    result = call(*args)
    assert result.exit_code == 2
    assert "is there already" in result.stderr
    (tmp_path / "out.safetensors").unlink()
    assert "1 of 1 tensor masked, seed 3" in call(*args).output


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    from ..docs.given import bert_folder

    return Path(bert_folder(str(tmp_path_factory.mktemp("bert") / "bert")))


def test_plan_prints_what_plan_dropconnect_does(bert: Path) -> None:
    from transformers import BertForSequenceClassification

    args = [
        "plan",
        "--model",
        bert,
        "-t",
        "*.query",
        "--targets",
        "*.key",
        "-x",
        "*.1.*",
        "--p",
        0.2,
    ]
    args += ["--toward", "pretrained", "--unit", "output"]
    model = BertForSequenceClassification.from_pretrained(bert)
    options: Any = {"toward": "pretrained", "unit": "output"}
    plan = plan_dropconnect(model, ["*.query", "*.key"], 0.2, exclude="*.1.*", **options)
    assert len(plan) == 2
    result = call(*args)
    assert result.exit_code == 0
    assert result.stdout == f"{plan}\n"
    assert surgery.Plan.from_json(json.loads(call(*args, "--json").stdout)) == plan


def test_a_model_without_weights_is_planned_from_its_config(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((bert / "config.json").read_text())
    bare = call("plan", "--model", tmp_path, "-t", "all-linear")
    assert bare.exit_code == 0
    assert bare.stdout == call("plan", "--model", bert, "-t", "all-linear").stdout


def test_draw(bert: Path, tmp_path: Path) -> None:
    pytest.importorskip("pygraphviz")
    result = call("draw", "--model", bert, "-t", "*.query", tmp_path / "x.svg")
    assert result.exit_code == 0
    assert "2 sites marked" in result.stdout
    marked = (tmp_path / "x.svg").read_text()
    assert call("draw", "--model", bert, tmp_path / "y.svg", "--json").exit_code == 0
    assert marked.startswith("<svg")
    assert marked != (tmp_path / "y.svg").read_text()


def test_a_picture_goes_into_a_new_svg(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "there.svg").write_text("mine")
    (tmp_path / "link.svg").symlink_to("there.svg")
    for out, words in {
        "x.png": "x.png must end in .svg: that is what is written",
        "x": "x must end in .svg: that is what is written",
        "there.svg": "there.svg is there already; name one that is not, or remove it",
        "link.svg": "link.svg is a link, to there.svg; name a path that is none, or remove it",
        "no/x.svg": f"there is no folder {tmp_path}/no; make it first, or name another",
    }.items():
        result = call("draw", "--model", bert, tmp_path / out)
        assert result.exit_code == 2, out
        assert result.stderr.endswith(f"{words}\n"), result.stderr
    assert sorted(os.listdir(tmp_path)) == ["link.svg", "there.svg"]
    assert (tmp_path / "there.svg").read_text() == "mine"


def test_exit_codes_and_one_line_on_stderr(bert: Path, tmp_path: Path) -> None:
    plain, bad = tmp_path / "plain.safetensors", tmp_path / "bad.safetensors"
    save_file({"w": torch.ones(1)}, plain)
    bad.write_bytes(b"\xff" * 100)
    for code, args, words in (
        (3, ["strip", plain], "it is plain already"),
        (3, ["inspect", bad], "is no safetensors file, or damaged"),
        (3, ["convert", bad, tmp_path / "x.safetensors", "--from", "torchnlp"], "or damaged"),
        (2, ["strip", tmp_path / "none"], "there is no"),
        (2, ["bake", plain, tmp_path / "x.safetensors"], "there is no dropconnect.json beside"),
        (2, ["bake", plain, tmp_path / "x.safetensors", "-p", "2"], "must be in [0, 1]"),
        (2, ["plan", "--model", tmp_path, "-t", "*"], "has no config.json"),
        (2, ["plan", "--model", bert, "-t", "nothing"], "matches no module and no parameter"),
        (2, ["plan", "--model", bert, "-t", "*", "--unit", "row"], "unit must be one of"),
    ):
        result = call(*args)
        assert (result.exit_code, words in result.stderr) == (code, True), (args, result.output)
        assert result.stdout == ""
        assert result.stderr.startswith("surgery: ")
        assert result.stderr.count("\n") == 1
    wrong: list[list[Any]] = [["strip"], ["unknown"], ["convert", plain, plain], ["plan"], ["draw"]]
    for args in wrong:
        assert call(*args).exit_code == 2, args
    assert not (tmp_path / "x.safetensors").exists()


def test_help_of_every_command_has_examples() -> None:
    listed = call("--help").output
    assert "0 done, 2 wrong use, 3 a file was refused" in listed
    assert len(re.findall(r"^ +surgery plan ", call("plan", "-h").output, re.M)) == 2
    for command in ("inspect", "strip", "convert", "plan", "draw", "bake"):
        assert re.search(rf"^ +{command} ", listed, re.M)
        shown = call(command, "-h").output
        assert re.search(rf"^ +surgery {command} ", shown, re.M), shown
        assert "--json" in shown
    assert call("--version").output == f"dropconnect-surgery {surgery.__version__}\n"


def test_python_m_surgery(tmp_path: Path) -> None:
    folder = write(operated(), tmp_path / "raw")
    assert module("inspect", folder).stdout == call("inspect", folder).output
    assert module("strip", folder).returncode == 0
    again = module("strip", folder)
    assert (again.returncode, again.stdout) == (3, "")
    assert again.stderr == f"surgery: {folder} has no raw keys: it is plain already\n"
    assert module("strip").returncode == 2


def test_a_reader_that_has_seen_enough(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({f"layer.{number}.weight": torch.ones(1) for number in range(5000)}, path)
    command = [sys.executable, "-m", "surgery", "inspect", str(path)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout.readline().startswith("key")
    run.stdout.close()
    assert run.stderr.read() == ""
    run.stderr.close()
    assert run.wait() == 1


def test_without_typer_the_base_install_names_the_extra() -> None:
    code = "import sys; sys.modules['typer'] = None; from surgery.cli import main; main()"
    result = cold(code)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        'surgery: the command line needs typer: pip install "dropconnect-surgery[cli]"'
    ]


WITHOUT_TORCH = """
import sys

class Missing:
    def find_spec(self, name, *args):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

sys.meta_path.insert(0, Missing())
from surgery.cli import main
main()
"""


def test_without_torch_the_commands_that_need_it_say_so(tmp_path: Path) -> None:
    folder = write(operated(), tmp_path / "raw")
    model = folder / "model.safetensors"
    commands: list[list[object]] = [
        ["convert", model, tmp_path / "x.safetensors", "--from", "surgery"],
        ["bake", folder, tmp_path / "x"],
        ["plan", "--model", folder, "-t", "*"],
        ["draw", "--model", folder, tmp_path / "x.svg"],
    ]
    for command in commands:
        result = cold(WITHOUT_TORCH, *command)
        assert (result.returncode, result.stdout) == (2, "")
        words = f"surgery: {command[0]} needs torch, which is not installed: pip install torch\n"
        assert result.stderr == words
    commands = [["--help"], ["inspect", folder], ["strip", folder, tmp_path / "plain"]]
    assert [cold(WITHOUT_TORCH, *command).returncode for command in commands] == [0, 0, 0]


def test_names_from_files_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    torch.save({"a.module.\x1b[2J\nw_raw": torch.ones(2)}, tmp_path / "in.pt")
    out = tmp_path / "out.safetensors"
    result = call("convert", tmp_path / "in.pt", out, "--from", "awd-lstm")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == r"a.module.\x1b[2J\nw_raw -> a.\x1b[2J\nw"
    save_file({"v\x1b[2J": torch.ones(2), "w": torch.ones(2, 2)}, tmp_path / "tuned.safetensors")
    save_file({"w": torch.ones(2, 2)}, tmp_path / "before.safetensors")
    args = ["bake", tmp_path / "tuned.safetensors", tmp_path / "baked.safetensors", "-p", 0.5]
    result = call(*args, "--toward", tmp_path / "before.safetensors")
    assert result.exit_code == 0
    assert result.stdout.startswith(r"v\x1b[2J is as it was")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are text")
def test_names_of_files_need_not_be_text(tmp_path: Path) -> None:
    """Bytes that are no UTF-8: said with escapes, on stdout and on stderr."""
    source = write(operated(), tmp_path / "raw").rename(
        os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    )
    command = [sys.executable, "-m", "surgery", "strip", str(source)]
    for code in (0, 3):
        result = subprocess.run(command, capture_output=True)
        assert result.returncode == code, result.stderr
        assert rb"/\udcff" in (result.stderr if code else result.stdout)


def test_the_script_is_declared() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert '[project.scripts]\nsurgery = "surgery.cli:main"' in text


LOADED = """
import sys
from surgery.cli import main
try:
    main()
except SystemExit as error:
    assert not error.code, error.code
print(*sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def test_inspect_and_strip_import_neither_torch_nor_anything_slow(tmp_path: Path) -> None:
    folder = write(operated(), tmp_path / "raw")
    for command in ("inspect", "strip"):
        result = cold(LOADED, command, folder)
        assert result.returncode == 0, result.stderr
        loaded = result.stderr.split()
        assert "surgery" in loaded
        assert not {"torch", "numpy", "safetensors", "transformers"} & set(loaded)


def test_bake_and_convert_import_no_transformers(tmp_path: Path) -> None:
    folder = write(operated(), tmp_path / "raw")
    result = cold(LOADED, "bake", folder, tmp_path / "out", "--seed", 1)
    assert result.returncode == 0, result.stderr
    assert "torch" in result.stderr.split()
    assert "transformers" not in result.stderr.split()


def test_import_surgery_before_torch_knows_its_operators() -> None:
    """`torch.export.load` of a program with one of them must find it."""
    code = """
import surgery, sys
assert "surgery.ops" not in sys.modules
import torch
assert "apply_dropconnect" in vars(surgery)
print(torch.ops.surgery.example_product.default)
"""
    result = cold(code)
    assert result.stdout == "surgery.example_product.default\n", result.stderr


def test_import_surgery_has_its_names_when_they_are_asked_for() -> None:
    code = """
import sys
import surgery
assert "torch" not in sys.modules
assert surgery.__version__ and "torch" not in sys.modules
assert not hasattr(surgery, "__wrapped__") and "torch" not in sys.modules
assert surgery.SurgeryError.__module__ == "surgery.spec.errors"
from surgery import *
assert set(surgery.__all__) <= set(globals()) | {"surgery"}
assert set(surgery.__all__) <= set(dir(surgery))
assert surgery.ops.drop_weight and surgery.verbs.apply.apply_dropconnect is apply_dropconnect
try:
    surgery.nothing
except AttributeError as error:
    print(error)
"""
    result = cold(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "module 'surgery' has no attribute 'nothing'\n"


LIMITED = """
import resource, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
from surgery.cli import main
try:
    main()
except SystemExit as error:
    assert not error.code, error.code
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak.split()[1], file=sys.stderr)
"""


def sparse(path: Path, *tensors: tuple[str, int]) -> None:
    """A file of such (key, bytes) that takes no room on the disk."""
    entries = placed({key: TensorType("U8", (size,)) for key, size in tensors})
    head = encoded(entries, {"format": "pt"})
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(size for _, size in tensors))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(("anchors", "by_kernel"), [(False, True), (True, False)])
def test_strip_takes_little_memory(anchors: bool, by_kernel: bool, tmp_path: Path) -> None:
    """A file that is longer than what the process may have."""
    path = tmp_path / "model.safetensors"
    size = 150_000_000
    sparse(path, ("b", 1000), ("w_raw", size), ("w_anchor" if anchors else "v_raw", size))
    code = LIMITED
    if not by_kernel:
        code = f"import os; del os.copy_file_range\n{LIMITED}"
    result = cold(code, 100_000_000, "strip", path, "--json")
    assert result.returncode == 0, result.stderr
    assert int(result.stderr) * 1024 < 100_000_000
    form = json.loads(result.stdout)
    assert (form["raw"], form["anchors"]) == ((1, 1) if anchors else (2, 0))
    assert path.stat().st_size > size


def test_a_bar_is_for_terminals_and_long_files(monkeypatch) -> None:
    from surgery.checkpoints.copying import nobody
    from surgery.cli.progress import LONG, shown_on_terminals

    with shown_on_terminals("strip") as start:
        assert start(LONG) is nobody  # stderr is no terminal here
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with shown_on_terminals("strip") as start:
        assert start(LONG - 1) is nobody
        advance = start(LONG)
        assert advance is not nobody
        advance(LONG // 2)


def test_plans_of_saved_models_are_shown(tmp_path: Path) -> None:
    model = apply_dropconnect(nn.Sequential(nn.Linear(2, 2)), "0", p=0.25)
    save_dropconnect(model, tmp_path)
    save_file({"0.bias": torch.ones(2)}, tmp_path / "model.safetensors")
    output = call("inspect", tmp_path).output
    assert "0.weight  linear  2x2    0.25" in output
    assert "note: the plan has 1 site of which nothing is stored: ['0.weight']" in output
