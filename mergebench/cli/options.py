"""Options shared by commands, each with its environment variable."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL...",
        help="Checkpoints, adapters, saved task vectors, or base+adapter; :0.3 after one is its "
        "weight.",
        show_default=False,
    ),
]
Base = Annotated[
    str | None,
    typer.Option("--base", "-b", help="The checkpoint everything was fine-tuned from."),
]
MethodName = Annotated[
    str | None,
    typer.Option(
        "--method",
        "-m",
        help="Merge method; see `mergebench methods`. linear, unless there are parts.",
        show_default=False,
    ),
]
Params = Annotated[
    list[str] | None,
    typer.Option(
        "--param",
        "-p",
        metavar="NAME=VALUE",
        help="Parameter of the method, repeatable; several values (lam=0.2,0.4) give several "
        "outputs from one reading.",
    ),
]
Then = Annotated[
    list[str] | None,
    typer.Option(
        "--then",
        metavar="OP[:K=V,...]",
        help="Op applied after the method, repeatable, in order; see `mergebench methods --ops`.",
    ),
]
MethodFor = Annotated[
    list[str] | None,
    typer.Option(
        "--method-for",
        metavar="SELECTOR:METHOD[:K=V,...]",
        help="Merge these tensors by a method of their own, repeatable, the first that matches "
        "wins; the others follow --method, and without it are the base's.",
    ),
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        metavar="SELECTOR:NAME=VALUE",
        help="Other values for selected tensors, repeatable, the first that matches wins: "
        "class=norm:lam=0, block=0-3:weight=1/0 or a regular expression.",
    ),
]
Task = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        metavar="NAME",
        help="Write only this model's result, repeatable, where every model has its own.",
    ),
]
Statistics = Annotated[
    list[str] | None,
    typer.Option(
        "--statistics",
        metavar="[MODEL=]FILE",
        help="What was collected of each model with data (`mergebench fit statistics`), one for "
        "every model in order, or named: for fisher, regmean and regmean_pp.",
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="SELECTOR",
        help="Merge only these tensors, repeatable: a regular expression, class=norm or "
        "block=0-3; the others come from the base.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="SELECTOR", help="Leave these tensors as in the base."),
]
BlockPattern = Annotated[
    str | None,
    typer.Option(
        "--block-pattern",
        metavar="REGEX",
        help="Finds numbered blocks in tensor names, with the groups stack and index, where the "
        "usual names do not fit.",
    ),
]
Compat = Annotated[
    str | None,
    typer.Option("--compat", help="Defaults of another implementation; explicit values win."),
]
Dtype = Annotated[
    str, typer.Option("--dtype", help="keep, bf16, f16, f32 or f64.", envvar="MERGEBENCH_DTYPE")
]
Form = Annotated[
    str,
    typer.Option(
        "--as",
        help="auto, model, lora or delta. auto: adapters give an adapter unless --base is given.",
    ),
]
ShardSize = Annotated[
    str | None,
    typer.Option("--shard-size", help="Largest file, such as 5GB.", envvar="MERGEBENCH_SHARD_SIZE"),
]
LoraAlpha = Annotated[
    float | None,
    typer.Option("--lora-alpha", help="Alpha of bare adapter files that do not name theirs."),
]
IgnoreSavedBase = Annotated[
    bool,
    typer.Option(
        "--ignore-saved-base",
        help="Drop copies of base parameters that an adapter carries; right only if the base has "
        "the same values.",
    ),
]
Part = Annotated[
    str | None,
    typer.Option(
        "--part",
        help="Read adapters for one model of a pipeline only: unet, transformer, text_encoder, "
        "text_encoder_2 or text_encoder_3.",
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        help="What a written LoRA is for: peft, vllm, sglang, lorax, kohya or diffusers; by "
        "default peft, or kohya where the inputs are.",
    ),
]
Rank = Annotated[
    int | None,
    typer.Option("--rank", min=1, help="Truncate a written LoRA to this rank where it is larger."),
]
Energy = Annotated[
    float | None,
    typer.Option(
        "--energy",
        help="Truncate each module of a written LoRA to the least rank that keeps this share of "
        "its squared norm, such as 0.99.",
    ),
]
Whole = Annotated[
    list[str] | None,
    typer.Option(
        "--whole",
        metavar="SELECTOR",
        help="Tensors that a written LoRA holds in full, as modules_to_save, repeatable: "
        "class=embedding.",
    ),
]
OnMismatch = Annotated[
    str,
    typer.Option(
        "--on-mismatch",
        help="Tensors that a model lacks or has in another shape: error; base, take the base's; "
        "skip, merge the other models; union, also add what only some models have.",
    ),
]
Vocab = Annotated[
    str,
    typer.Option(
        "--vocab",
        help="Different vocabularies: error; intersect, keep the base's and merge rows that all "
        "have; base, merge also rows that some lack; pad, keep all tokens.",
    ),
]
AllowBaseMismatch = Annotated[
    bool,
    typer.Option(
        "--allow-base-mismatch",
        help="Merge models that, by their configs and entries, were not made from the base.",
    ),
]
AllowNonfinite = Annotated[
    bool,
    typer.Option(
        "--allow-nonfinite",
        help="Let NaN and infinite entries of an input become NaN there, and change nothing else.",
    ),
]
Out = Annotated[
    str | None,
    typer.Option(
        "--out",
        "-o",
        help="A .safetensors file or a folder; merged.safetensors or merged/ by default.",
    ),
]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace an existing output.")]
Memory = Annotated[
    str,
    typer.Option(
        "--memory",
        help="Most memory to use, above the libraries; such as 512MiB.",
        envvar="MERGEBENCH_MEMORY",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers", min=1, help="Threads; all cores by default.", envvar="MERGEBENCH_WORKERS"
    ),
]


def _kernels(choice: str) -> str:
    """Hand a choice on to where kernels are loaded."""
    if choice not in ("auto", "on", "off"):
        raise typer.BadParameter(f"{choice!r} is none of auto, on, off")
    os.environ["MERGEBENCH_KERNELS"] = choice
    return choice


Kernels = Annotated[
    str,
    typer.Option(
        "--kernels",
        help="Compiled code for what it can do: auto, for merges of some size; on; off, to compare "
        "or to go round it.",
        envvar="MERGEBENCH_KERNELS",
        callback=_kernels,
    ),
]
Executor = Annotated[
    str,
    typer.Option(
        "--executor",
        help="threads, of this machine; dask, the workers of the cluster of --scheduler.",
        envvar="MERGEBENCH_EXECUTOR",
    ),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        help="Of a Dask cluster: an address such as tcp://10.0.0.1:8786, or its scheduler file.",
        envvar="MERGEBENCH_SCHEDULER",
        show_default=False,
    ),
]
Worker = Annotated[
    str | None,
    typer.Option(
        "--worker",
        help="i/N: be one of N that make one output on a shared disk; start 0/N to (N-1)/N.",
        show_default=False,
    ),
]
Wait = Annotated[
    float,
    typer.Option(
        "--wait", min=0, help="Seconds to wait for a worker that has not started.",
        envvar="MERGEBENCH_WAIT",
    ),
]  # fmt: skip


def _page_cache(size_: str) -> str:
    """Hand a limit on to where it is looked at."""
    if size_ != "auto":
        size("--page-cache", size_)
    os.environ["MERGEBENCH_PAGE_CACHE"] = size_
    return size_


PageCache = Annotated[
    str,
    typer.Option(
        "--page-cache",
        metavar="SIZE|auto",
        help="A merge that reads and writes more than this takes out of the system's page cache "
        "what it is done with; auto: half of the memory that is available.",
        envvar="MERGEBENCH_PAGE_CACHE",
        callback=_page_cache,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        help="Where methods are computed: cpu; cuda or cuda:1; auto, the first GPU if there is "
        "one; torch, as on a GPU but on the processor, to compare.",
        envvar="MERGEBENCH_DEVICE",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", "-n", help="Print the plan and stop.")]
Inputs = Annotated[
    Path | None,
    typer.Option(
        "--inputs",
        help="Folder that holds the inputs, if they are not where they were.",
        exists=True,
        file_okay=False,
    ),
]
Check = Annotated[
    bool,
    typer.Option("--check", help="Then try to load it, and show the drift: `mergebench check`."),
]
Report = Annotated[
    bool,
    typer.Option(
        "--report", help="List what the method reports, tensor by tensor; --json always does."
    ),
]
PrintRecipe = Annotated[
    bool, typer.Option("--print-recipe", help="Print the recipe and stop; nothing is opened.")
]
Cache = Annotated[
    str,
    typer.Option(
        "--cache",
        help="Models on the Hub: keep, download them into its cache; none, read them where they "
        "are.",
        envvar="MERGEBENCH_CACHE",
    ),
]
Shelf = Annotated[
    Path | None,
    typer.Option(
        "--shelf",
        help="The folder; mergebench/shelf below XDG_DATA_HOME by default.",
        envvar="MERGEBENCH_SHELF",
    ),
]


def _hush(wanted: bool) -> bool:
    """Keep the Hub's client from drawing bars of its own, which it would for transfers."""
    if wanted:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return wanted


Json = Annotated[bool, typer.Option("--json", help="Print JSON.", callback=_hush)]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="No progress, no summary.",
        envvar="MERGEBENCH_QUIET",
        callback=_hush,
    ),
]


def size(option: str, text: str) -> int:
    """Bytes of a text such as ``512MiB``.

    Raises
    ------
    ParameterError
        Naming the option.
    """
    from mergebench.checkpoints.sizes import parse_size
    from mergebench.core.errors import ParameterError

    try:
        return parse_size(text)
    except ParameterError as error:
        raise ParameterError(
            f"{option}: {error.what}", got=error.got, expected=error.expected
        ) from None


def streams(cache: str) -> bool:
    """Whether models on the Hub are read where they are.

    Raises
    ------
    ParameterError
    """
    from mergebench.core.errors import ParameterError

    if cache not in ("keep", "none"):
        raise ParameterError("--cache", got=repr(cache), expected="keep or none")
    return cache == "none"


def variables() -> list[str]:
    """Environment variables that the command line reads."""
    found = {"MERGEBENCH_DEBUG"}
    for each in list(globals().values()):
        for option in getattr(each, "__metadata__", ()):
            named = getattr(option, "envvar", None)
            found.update([named] if isinstance(named, str) else named or [])
    return sorted(found)
