"""The command line. Each verb imports what it needs when it runs, so `vfmseg --help` answers at once."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vfmseg.errors import RecipeError
from vfmseg.geo.trust import close_services
from vfmseg.heap import keep_freed
from vfmseg.launch import several
from vfmseg.terminal import deliver, guarded, is_main_process, keep_displays, quiet_libraries, say

app = typer.Typer(
    name="vfmseg",
    help="Turn a vision foundation model into a segmentation model for overhead imagery.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _end(verb: Callable[[], None], resume_line: str | None = None) -> None:
    code = guarded(verb, resume_line)
    if code:
        raise typer.Exit(code)


@app.command(epilog="Example: vfmseg finetune recipes/oam_buildings.yaml train.epochs=5 --overwrite")
def finetune(
    recipe: Annotated[Path, typer.Argument(help="Recipe (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it, as key.path=value.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last finished epoch.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in output_dir.")] = False,
    accept_changed_data: Annotated[
        bool, typer.Option("--accept-changed-data", help="With --resume: go on with other images or labels.")
    ] = False,
) -> None:
    """Train a segmenter as a recipe says. On several devices: accelerate launch vfmseg/finetune.py RECIPE ..."""

    def verb() -> None:
        from vfmseg.finetune import finetune as train
        from vfmseg.recipe import load_recipe

        chosen = load_recipe(recipe, overrides or [])
        train(chosen, resume=resume, overwrite=overwrite, accept_changed_data=accept_changed_data)

    again = shlex.join(["vfmseg", "finetune", str(recipe), *(overrides or []), "--resume"])
    _end(verb, again)


@app.command(epilog="Example: vfmseg pretrain my-encoder.yaml train.epochs=5 --overwrite")
def pretrain(
    recipe: Annotated[Path, typer.Argument(help="Recipe (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it, as key.path=value.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last finished epoch.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in output_dir.")] = False,
    accept_changed_data: Annotated[
        bool, typer.Option("--accept-changed-data", help="With --resume: go on with other scenes.")
    ] = False,
) -> None:
    """Train an encoder on scenes without labels. On several devices: accelerate launch vfmseg/pretrain.py RECIPE ..."""

    def verb() -> None:
        from vfmseg.pretrain import pretrain as train
        from vfmseg.recipe import load_pretrain_recipe

        chosen = load_pretrain_recipe(recipe, overrides or [])
        train(chosen, resume=resume, overwrite=overwrite, accept_changed_data=accept_changed_data)

    again = shlex.join(["vfmseg", "pretrain", str(recipe), *(overrides or []), "--resume"])
    _end(verb, again)


# the options of `predict`, one line each below
_Checkpoint = Annotated[str, typer.Argument(help="Segmenter: a folder or a hub id.")]
_Scene = Annotated[
    str,
    typer.Argument(
        help="Any path that GDAL reads; or a folder, pattern, list (.txt) or STAC file (.json) of scenes that have one "
        "modality. It is the model's first modality; name=path names another."
    ),
]
_Output = Annotated[str, typer.Option("--output", "-o", help="GeoTIFF to write; for several scenes a folder.")]
_Modality = Annotated[
    list[str] | None,
    typer.Option("--modality", help="Further modality of a single scene as name=path; on any grid. Repeat it."),
]
_Bands = Annotated[
    list[str] | None,
    typer.Option(metavar="[NAME=]1,2,3", help="Which bands of the scene are those of the model, in its order."),
]
_Encoder = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[NAME=]FOLDER", help="Base encoder, if it has moved; with a name that of a modality. Repeat it."
    ),
]
_Tile = Annotated[int | None, typer.Option(help="Tile in pixels.")]
_Overlap = Annotated[float | None, typer.Option(help="Overlap as a share of the tile, 0 to below 0.9.")]
_Blend = Annotated[str | None, typer.Option(help="hann, gaussian, average or none.")]
_BatchSize = Annotated[int | None, typer.Option(help="Tiles run at a time.")]
_Average = Annotated[str | None, typer.Option(help="What is averaged: probabilities or logits.")]
_Tta = Annotated[str | None, typer.Option(help="Test-time augmentation: none, flips or d4.")]
_Scales = Annotated[str | None, typer.Option(help="Sizes at which the model looks, such as 0.75,1,1.5.")]
_Confidence = Annotated[bool, typer.Option("--confidence", help="Also write the label's probability.")]
_Uncertainty = Annotated[bool, typer.Option("--uncertainty", help="Also write the entropy.")]
_Probabilities = Annotated[bool, typer.Option("--probabilities", help="Also write all probabilities.")]
_Cog = Annotated[bool, typer.Option("--cog", help="Write cloud-optimised GeoTIFFs with overviews.")]
_Compress = Annotated[str, typer.Option(help="Compression of the maps: deflate, zstd or lzw.")]
_Polygons = Annotated[
    str | None, typer.Option(help="Also write polygons: .gpkg, .geojson or .fgb (needs vfmseg[vector]).")
]
_MinArea = Annotated[float, typer.Option(help="Smallest polygon, in square units of the CRS.")]
_Simplify = Annotated[float, typer.Option(help="Tolerance of the outlines, in units of the CRS.")]
_Area = Annotated[str | None, typer.Option(help="Polygons of the area to label (GeoJSON, GeoPackage).")]
_Bounds = Annotated[
    str | None, typer.Option(help="Bounds of the area to label: west,south,east,north in the scene's CRS.")
]
_Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted labelling.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
_SkipUnreadable = Annotated[
    bool, typer.Option("--skip-unreadable", help="Damaged blocks become nodata instead of an error.")
]
_Readers = Annotated[int | None, typer.Option(help="Threads that read files.")]
_MemoryLimit = Annotated[int | None, typer.Option(help="MiB for the buffers of a strip.")]
_Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")]
_Dtype = Annotated[str, typer.Option(help="fp32, fp16 or bf16.")]
_Compile = Annotated[bool, typer.Option("--compile", help="torch.compile; for long runs.")]
_AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


@app.command(epilog="Example: vfmseg predict runs/oam_buildings/best scene.tif -o labels.tif --confidence --cog")
def predict(
    context: typer.Context,
    checkpoint: _Checkpoint,
    scene: _Scene,
    output: _Output,
    modality: _Modality = None,
    bands: _Bands = None,
    encoder: _Encoder = None,
    tile: _Tile = None,
    overlap: _Overlap = None,
    blend: _Blend = None,
    batch_size: _BatchSize = None,
    average: _Average = None,
    tta: _Tta = None,
    scales: _Scales = None,
    confidence: _Confidence = False,
    uncertainty: _Uncertainty = False,
    probabilities: _Probabilities = False,
    cog: _Cog = False,
    compress: _Compress = "deflate",
    polygons: _Polygons = None,
    min_area: _MinArea = 0.0,
    simplify: _Simplify = 0.0,
    area: _Area = None,
    bounds: _Bounds = None,
    resume: _Resume = False,
    overwrite: _Overwrite = False,
    skip_unreadable: _SkipUnreadable = False,
    readers: _Readers = None,
    memory_limit: _MemoryLimit = None,
    device: _Device = None,
    dtype: _Dtype = "fp32",
    compile: _Compile = False,
    as_json: _AsJson = False,
) -> None:
    """Label scenes of any size. On several devices: accelerate launch -m vfmseg.cli predict ..."""
    given = context.params  # what stands above, by name
    _end(lambda: _predict(given), _resumed())


_HOW = ("tile", "overlap", "blend", "batch_size", "average", "tta", "readers", "memory_limit")
_OUTPUT = ("cog", "compress", "polygons", "min_area", "simplify", "resume", "overwrite", "skip_unreadable")
_EXTRAS = ("confidence", "uncertainty", "probabilities")


def _predict(given: Mapping[str, Any]) -> None:
    """Label as the options of `predict` say, {name: value}, and tell of it."""
    import gc

    quiet_libraries()
    others = _inputs(given["modality"] or [])
    if given["area"] is not None and given["bounds"] is not None:
        raise RecipeError("--area and --bounds exclude each other: give polygons, or a rectangle")
    if given["polygons"] is None and (given["min_area"] or given["simplify"]):
        raise RecipeError("--min-area and --simplify are used by polygons alone; add --polygons, or leave them out")
    # importing makes millions of objects that live to the end; looking for garbage among them costs half a second
    gc.disable()
    from vfmseg.inference.output import Output
    from vfmseg.inference.worklist import scenes_of
    from vfmseg.predict import modality_named, require_all, summary
    from vfmseg.predict import predict as label
    from vfmseg.segmenter import Segmenter

    model = {name: given[name] for name in ("device", "dtype", "compile")} | {"encoder": _bases(given["encoder"])}
    segmenter = Segmenter.from_pretrained(given["checkpoint"], **model)
    gc.freeze()
    gc.enable()
    how = {name: given[name] for name in _HOW} | {"scales": _numbers("--scales", given["scales"])}
    output = Output(
        given["output"],
        extras=tuple(name for name in _EXTRAS if given[name]),
        area=_numbers("--bounds", given["bounds"], 4) if given["area"] is None else os.path.expanduser(given["area"]),
        **{name: given[name] for name in _OUTPUT},
    )
    first, path = modality_named(given["scene"], segmenter.inputs)
    bands = _bands(given["bands"] or [], first)
    scenes = scenes_of(path)
    records = label(segmenter, scenes or path, output, how, others, bands, first)
    if given["as_json"] and records:
        deliver(json.dumps({"scenes": records} if scenes else records[0]) + "\n")
    elif records:
        say(summary(records))
    require_all(records, len(scenes or [path]))


def _resumed() -> str:
    """The command that goes on with what this one began."""
    if several():
        return "the same command with --resume"  # only the launcher knows how it was started
    module = Path(sys.argv[0]).name == "cli.py"
    return shlex.join([*([sys.executable, "-m", "vfmseg.cli"] if module else sys.argv[:1]), *sys.argv[1:], "--resume"])


def _numbers(name: str, text: str | None, count: int | None = None) -> tuple[float, ...] | None:
    """Numbers of a comma-separated option; None if it was not given."""
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or (count is not None and len(numbers) != count):
        raise RecipeError(f"{name} {text}: expected {count or 'some'} numbers with commas between them")
    return numbers


def _bands(given: Sequence[str], first: str) -> dict[str, tuple[int, ...]]:
    """{modality: numbers of bands} of --bands 1,2,3 (of the modality `first`) and --bands NAME=1,2,3."""
    chosen: dict[str, tuple[int, ...]] = {}
    for text in given:
        name, sign, numbers = text.rpartition("=")
        try:
            chosen[name if sign else first] = tuple(int(number) for number in numbers.split(","))
        except ValueError:
            raise RecipeError(f"--bands {text}: expected numbers of bands, such as 3,2,1 or {first}=3,2,1") from None
    return chosen


def _bases(given: Sequence[str] | None) -> dict[str, str]:
    """{modality: folder} of --encoder NAME=FOLDER; that of --encoder FOLDER has an empty name."""
    found: dict[str, str] = {}
    for text in given or ():
        name, sign, folder = text.partition("=")
        named = bool(sign) and name.isidentifier() and not os.path.exists(text)
        key, value = (name, folder) if named else ("", text)
        if not value:
            raise RecipeError(f"--encoder {text}: expected a folder or hub id, or name=folder, such as sar=FOLDER")
        if key in found:
            raise RecipeError(f"--encoder {text}: is given twice{f' for {key}' if key else ''}; expected one folder")
        found[key] = value
    return found


def _inputs(modality: Sequence[str]) -> dict[str, str]:
    pairs = [item.partition("=") for item in modality]
    for item, (name, sign, path) in zip(modality, pairs, strict=True):
        if not (name and sign and path):
            raise RecipeError(f"--modality {item}: expected name=path, such as dem=dem.tif")
        if [other for other, _, _ in pairs].count(name) > 1:
            raise RecipeError(f"--modality {name}=... is given twice; expected one path for each modality")
    return {name: path for name, _, path in pairs}


@app.command(epilog="Example: vfmseg evaluate runs/oam_buildings/best recipes/oam_buildings.yaml --split test --json")
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="Segmenter: a folder or a hub id.")],
    recipe: Annotated[Path, typer.Argument(help="Recipe that names the labelled scenes.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it, as key.path=value.")] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    encoder: _Encoder = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME[,NAME]", help="Modalities to use, as if scenes had no others.")
    ] = None,
    subsets: Annotated[bool, typer.Option("--subsets", help="Measure with each subset of the modalities.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Measure a segmenter on the labelled scenes of a recipe."""

    def verb() -> None:
        quiet_libraries()
        names = [name.strip() for text in only or [] for name in text.split(",")]
        if names and subsets:
            raise RecipeError("--only and --subsets exclude each other: name one subset, or measure all")
        from vfmseg.recipe import load_recipe

        chosen = load_recipe(recipe, overrides or [])
        from vfmseg.progress import SceneProgress
        from vfmseg.segmenter import Segmenter

        segmenter = Segmenter.from_pretrained(checkpoint, device=device, encoder=_bases(encoder))
        with SceneProgress(f"{split} scenes") as progress:
            from vfmseg.metrics import scores_text, subsets_text

            if subsets:
                found = segmenter.evaluate_subsets(chosen, split, progress)
                text = json.dumps({"subsets": found, "split": split}) if as_json else subsets_text(found)
            else:
                result = segmenter.evaluate(chosen, split, progress, names or None)
                text = json.dumps(result) if as_json else scores_text(result)
        if is_main_process():
            deliver(text + "\n")

    _end(verb)


@app.command(epilog="Example: vfmseg compare recipes/oam_buildings.yaml model.decoder.name=linear,fpn --seeds 3")
def compare(
    recipe: Annotated[Path, typer.Argument(help="Recipe (YAML).")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(help="Alternatives as key.path=a,b; several keys make a grid. Others as usual."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each cell, with the recipe's seed and those after it.")] = 3,
    test: Annotated[bool, typer.Option("--test", help="Measure the test split too.")] = False,
    equal: Annotated[
        bool, typer.Option("--equal", help="Widen decoders or adapters until all train as many parameters.")
    ] = False,
    singles: Annotated[bool, typer.Option("--singles", help="Train each modality alone too.")] = False,
    missing: Annotated[
        bool, typer.Option("--missing", help="Measure the test split too, also without each modality.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of all runs.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Train a recipe in several forms with several seeds, and put them into one table. Goes on where it was stopped."""

    def verb() -> None:
        from vfmseg.compare.comparison import compare as train_all

        content = train_all(recipe, changes or [], seeds, test, equal, output, singles, missing)
        from vfmseg.compare.table import text

        deliver((json.dumps(content) if as_json else text(content)) + "\n")

    flags = {"--test": test, "--equal": equal, "--singles": singles, "--missing": missing, "--json": as_json}
    again = ["vfmseg", "compare", str(recipe), *(changes or []), "--seeds", str(seeds)]
    again += [*(["--output", str(output)] if output else []), *(flag for flag, given in flags.items() if given)]
    _end(verb, shlex.join(again))


@app.command(epilog="Example: vfmseg demo --output runs/demo")
def demo(
    output: Annotated[Path, typer.Option(help="Folder to write into.")] = Path("runs/demo"),
    encoder: Annotated[
        str | None, typer.Option(help="Encoder folder or hub id (SAM, DINOv2 or CLIP) instead of the built-in one.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo in that folder.")] = False,
) -> None:
    """Train on real imagery, measure on an unseen place, label it: labels.tif, preview.png, metrics.json."""

    def verb() -> None:
        quiet_libraries()
        from vfmseg.demo import run_demo

        run_demo(output, encoder=encoder, overwrite=overwrite)

    again = ["vfmseg", "demo", "--output", str(output), *(["--encoder", encoder] if encoder else []), "--overwrite"]
    _end(verb, shlex.join(again))


def main() -> None:
    """Entry point of the `vfmseg` command."""
    keep_displays()
    close_services()
    keep_freed()
    app()


if __name__ == "__main__":
    main()
