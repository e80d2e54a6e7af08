"""Options that decide what a merge computes; a recipe keeps them."""

from __future__ import annotations

from typing import Annotated

import typer

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
