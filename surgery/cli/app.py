"""The commands. Each imports what it calls when it is called: `inspect` and `strip` need no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from ..checkpoints.inspection import human, inspect_checkpoint
from ..checkpoints.strip import strip_checkpoint
from ..checkpoints.weights import WrongUse
from ..spec.errors import NoMatchError, SurgeryError, printable
from ..spec.forms import counted
from .progress import shown_on_terminals

WRONG_USE, REFUSED = 2, 3
"""Exit codes, beside 0 for what is done."""

app = typer.Typer(
    name="surgery",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="DropConnect in checkpoints and models: look, plan, take out, make permanent.",
    epilog="Exit codes: 0 done, 2 wrong use, 3 a file was refused.",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
In = Annotated[
    Path,
    typer.Argument(
        metavar="IN", help="A file, an index of several, or a folder with one checkpoint."
    ),
]
Out = Annotated[
    Path,
    typer.Argument(metavar="OUT", help="A new file *.safetensors, or a new folder if IN is one."),
]
Model = Annotated[
    Path, typer.Option("--model", metavar="DIR", help="A folder that transformers can load.")
]
Targets = Annotated[
    list[str],
    typer.Option(
        "--targets", "-t", help='A glob over modules, "re:...", or "all-linear". Can be repeated.'
    ),
]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", "-x", help="What not to drop, in the same forms.")
]
Unit = Annotated[
    str, typer.Option(help="What shares a mask entry: element, input, output, tensor.")
]
Toward = Annotated[str, typer.Option(help="Where dropped weights go: zero, pretrained.")]
Sampling = Annotated[str, typer.Option(help="How often a mask is drawn: batch, example, gaussian.")]
Inference = Annotated[str, typer.Option(help="What eval() does: mean, moments, sample.")]
Bias = Annotated[bool, typer.Option("--bias", help="Drop biases with their weights.")]


@contextmanager
def refusals(command: str = "") -> Iterator[None]:
    """Print an error that is no fault of ours as it is, and exit with its code.

    Args:
        command: one that imports torch, which the command line itself does without.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = f"{command} needs torch, which is not installed: pip install torch"
        _exit(ImportError(missing) if error.name == "torch" else error, WRONG_USE)
    except (WrongUse, NoMatchError, ImportError) as error:
        _exit(error, WRONG_USE)
    except BrokenPipeError:  # whoever read what is printed has seen enough
        raise
    except (SurgeryError, OSError) as error:
        _exit(error, REFUSED)
    except (ValueError, TypeError) as error:
        _exit(error, WRONG_USE)


def _exit(error: Exception, code: int) -> None:
    typer.echo(f"surgery: {error}", err=True)
    raise typer.Exit(code)


def _print(result: Any, as_json: bool, text: str | None = None) -> None:
    print(json.dumps(result.to_json(), indent=2) if as_json else text or result)


def _version(asked: bool) -> None:
    if asked:
        print(f"dropconnect-surgery {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of `surgery` itself."""


@app.command()
def inspect(source: In, as_json: Json = False) -> None:
    """Say what a checkpoint holds: which keys are raw, plain and anchors, and the plan beside it.

    Reads headers only.

    \b
    surgery inspect out/
    surgery inspect model.safetensors --json
    """
    with refusals():
        _print(inspect_checkpoint(source), as_json)


@app.command()
def strip(
    source: In,
    out: Annotated[
        Path | None,
        typer.Argument(
            metavar="OUT",
            help="A new file *.safetensors, or a new folder if IN is one. Without: in place.",
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option(help="Read what was written again, and compare it.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Make a checkpoint with raw keys plain, without a model: any size, in little memory.

    Whenever it is cut off, the old checkpoint or the new one is whole.

    \b
    surgery strip out/                         # in place
    surgery strip raw.safetensors plain.safetensors
    """
    with refusals(), shown_on_terminals("strip") as progress:
        done = strip_checkpoint(source, out, verify=verify, progress=progress)
        left = f", {counted(done.anchors, 'anchor')} left out" if done.anchors else ""
        made = f"{done.out}: {counted(done.raw, 'raw key')} made plain{left}"
        text = f"{made}, {human(done.bytes)} copied"
        _print(done, as_json, text + (" and compared" if done.verified else ""))


@app.command()
def convert(
    source: In,
    out: Out,
    convention: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="LIBRARY",
            help="torchnlp, awd-lstm, fastai, parametrize, mixout, probly, or surgery.",
        ),
    ],
    as_json: Json = False,
) -> None:
    """Write the checkpoint of another library under the names of plain torch modules, as safetensors.

    Files that torch.save wrote are read with weights_only=True.

    \b
    surgery convert awd.pt lstm.safetensors --from awd-lstm
    """
    with refusals("convert"), shown_on_terminals("convert") as progress:
        from ..checkpoints.convert import convert_checkpoint

        done = convert_checkpoint(source, out, convention, progress=progress)
        lines = [f"{key} -> {new}" for key, new in done.renamed.items()]
        lines += [f"{key} left out: {why}" for key, why in done.left_out.items()]
        lines += [f"{key} is as it was, and looks like no plain key" for key in done.unmatched]
        lines.append(f"{done.out}: {counted(done.tensors, 'tensor')}, {len(done.renamed)} renamed")
        _print(done, as_json, "\n".join(map(printable, lines)))


@app.command()
def plan(
    model: Model,
    targets: Targets,
    p: Annotated[float | None, typer.Option("--p", "-p", help="Probability of dropping.")] = None,
    exclude: Exclude = None,
    unit: Unit = "element",
    toward: Toward = "zero",
    sampling: Sampling = "batch",
    inference: Inference = "mean",
    bias: Bias = False,
    as_json: Json = False,
) -> None:
    """Print the sites that DropConnect would have in a model: what `plan_dropconnect` returns.

    \b
    surgery plan --model bert/ --targets all-linear --p 0.1
    surgery plan --model gpt2/ -t "*.mlp.*" -x "*.c_proj" --toward pretrained
    """
    options = dict(unit=unit, toward=toward, sampling=sampling, inference=inference, bias=bias)
    with refusals("plan"):
        from .models import planned

        _print(planned(model, targets, p, exclude, options)[1], as_json)


@app.command()
def draw(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The picture: a new file *.svg.")],
    targets: Annotated[
        list[str] | None, typer.Option("--targets", "-t", help="Sites to mark, as in `plan`.")
    ] = None,
    p: Annotated[float | None, typer.Option("--p", "-p", help="Probability of dropping.")] = None,
    exclude: Exclude = None,
    as_json: Json = False,
) -> None:
    """Draw a model, with the sites marked that DropConnect would have.

    \b
    surgery draw --model bert/ --targets all-linear bert.svg
    """
    with refusals("draw"):
        from .models import drawn

        sites = drawn(model, out, targets, p, exclude)
        text = f"{out}: {counted(sites, 'site')} marked"
        print(json.dumps({"out": str(out), "sites": sites}, indent=2) if as_json else text)


@app.command()
def bake(
    source: In,
    out: Out,
    seed: Annotated[int | None, typer.Option(help="Of the masks; without, one is drawn.")] = None,
    toward: Annotated[
        Path | None, typer.Option(help="The pretrained checkpoint: dropped weights go there.")
    ] = None,
    p: Annotated[float | None, typer.Option("--p", "-p", help="Probability of dropping.")] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--targets",
            "-t",
            help="Globs over keys. Without: all of two or more dimensions, and with --toward all that "
            "both have. Can be repeated.",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", "-x", help="Keys that stay as they are, in the same forms."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw one mask and make it permanent. Without --p, the plan beside IN says where.

    With --toward this is DARE: of what fine-tuning changed a part is dropped, the rest is rescaled.
    Weights that are stored twice (tied ones) get one mask, and stay equal.

    \b
    surgery bake out/ baked/ --seed 0
    surgery bake finetuned/ dare/ --toward pretrained/ --p 0.9 --seed 0
    """
    with refusals("bake"), shown_on_terminals("bake") as progress:
        from ..checkpoints.bake import bake_checkpoint

        done = bake_checkpoint(
            source,
            out,
            seed,
            toward=toward,
            p=p,
            targets=targets or None,
            exclude=exclude or None,
            progress=progress,
        )
        lines = [f"{key} is as it was: {toward} has none" for key in done.unlike]
        masked = f"{len(done.baked)} of {counted(done.tensors, 'tensor')} masked"
        lines.append(f"{out}: {masked}, seed {done.seed}")
        _print(done, as_json, "\n".join(map(printable, lines)))
