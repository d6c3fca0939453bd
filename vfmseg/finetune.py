"""Fine-tuning: from a recipe to checkpoints. Also the script that `accelerate launch vfmseg/finetune.py` starts."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    # started as a script, Python puts vfmseg/ itself first on the import path; our files are no top-level modules
    sys.path.pop(0)

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from vfmseg.errors import RecipeError
from vfmseg.geo.trust import close_services
from vfmseg.heap import keep_freed
from vfmseg.launch import several
from vfmseg.recipe import Recipe, dump_recipe, load_recipe
from vfmseg.terminal import is_main_process, keep_displays, quiet_libraries, say
from vfmseg.training.curves import Curves, require_tensorboard
from vfmseg.training.processes import connect
from vfmseg.training.run_folder import BEST, RunFolder, segmenter_run
from vfmseg.training.script import run_script

if TYPE_CHECKING:
    from vfmseg.data.inputs import Inputs
    from vfmseg.model import Network
    from vfmseg.training.keeper import Product
    from vfmseg.training.loop import RunState


def finetune(
    recipe: Recipe, resume: bool = False, overwrite: bool = False, accept_changed_data: bool = False
) -> dict[str, Any]:
    """Train as the recipe says and return what was reached.

    Writes into `recipe.output_dir`: `best/` (chosen on validation only) and `last/` segmenter folders, `state.pt`
    to resume from, `metrics.jsonl` (a line per step and epoch), `metrics.json`, `recipe.yaml`, and `tensorboard/` if
    `train.track` asks for it. Returns the content of `metrics.json`. Under `accelerate launch` every process calls
    this; rank 0 writes. With `resume`, images and labels must be those that the run was started with, unless
    `accept_changed_data`.
    """
    quiet_libraries()
    folder = segmenter_run(recipe.output_dir, recipe.name)
    folder.require_place(resume, overwrite)
    if accept_changed_data and not resume:
        raise RecipeError("--accept-changed-data is about going on with a run: add --resume, or leave it out")
    with ExitStack() as stack:
        if is_main_process():
            stack.enter_context(folder.alone(several()))
        folder.require_own(resume, overwrite)
        if recipe.train.track == "tensorboard":
            require_tensorboard()
        return _train(recipe, folder, resume, accept_changed_data, stack)


def _train(
    recipe: Recipe, folder: RunFolder, resume: bool, accept_changed_data: bool, stack: ExitStack
) -> dict[str, Any]:
    accelerator = connect(recipe.train.precision)
    if not is_main_process():  # which has come as far, and so has the folder
        stack.enter_context(folder.with_the_others())
    # torch-based rooms are imported here: a wrong recipe or output folder has been refused long before
    from vfmseg.build.data import inputs_of, metres_of, open_training
    from vfmseg.build.joint import joint_of
    from vfmseg.build.model import build_model
    from vfmseg.build.training import objectives_of, schedule_of, sources_of, validation_of, what_decides
    from vfmseg.data.traces import Traces
    from vfmseg.model import parameter_lines
    from vfmseg.training.keeper import Keeper
    from vfmseg.training.loop import Loop
    from vfmseg.training.objectives.segmentation import as_curves, in_words
    from vfmseg.training.resume import Origin, as_then, load_run, noted
    from vfmseg.training.step import Step

    known = resume and folder.state.is_file()
    traces = Traces()
    scenes = open_training(recipe, traces)
    inputs = inputs_of(recipe, scenes["train"])
    if known and accept_changed_data:
        inputs = as_then(inputs, folder.state)
    model = build_model(recipe, inputs, metres_of(scenes["train"]))
    say(parameter_lines(model))
    beside, more = joint_of(recipe, scenes["train"], inputs, model, traces)
    step = Step(model, {**objectives_of(recipe, inputs, model), **more})
    sources = {**sources_of(recipe, scenes["train"], inputs), **beside}
    validation = validation_of(recipe, model, scenes.get("val"), inputs)
    loop = Loop(accelerator, step, sources, schedule_of(recipe), validation)
    origin = Origin(what_decides(recipe), model.base_hash, noted(inputs), accelerator.num_processes, traces.found)
    if known:
        load_run(folder.state, loop, origin, accept_changed_data)
    if loop.state.epoch:
        say(f"resuming after epoch {loop.state.epoch} of {recipe.train.epochs}")
    elif resume:
        say(f"{folder.path}: no epoch was finished there, so the run starts with the first one")
    curves = Curves(folder.curves, as_curves) if recipe.train.track == "tensorboard" else None
    keeper = Keeper(loop, folder, _segmenter(recipe, model, inputs), origin, dump_recipe(recipe), curves)
    if is_main_process():
        keeper.begin(known)
    state = keeper.run(known)
    result = _result(recipe, model, state)
    if is_main_process():
        keeper.finish(result)
        reached = f" ({in_words(result['validation'])})" if result["validation"] else ""
        say(f"done: best epoch {state.best_epoch}{reached}, segmenter in {folder.path / BEST}")
    accelerator.end_training()
    return result


def _segmenter(recipe: Recipe, model: Network, inputs: Inputs) -> Product:
    """What this verb makes: a segmenter folder."""
    from vfmseg.checkpoint.folder import saved_epoch
    from vfmseg.checkpoint.writing import save_segmenter
    from vfmseg.training.keeper import Product
    from vfmseg.training.objectives.segmentation import in_words

    def save(folder: Path, metrics: Mapping[str, Any]) -> None:
        save_segmenter(folder, model, recipe, inputs, metrics)

    return Product(save, saved_epoch, in_words)


def _result(recipe: Recipe, model: Network, state: RunState) -> dict[str, Any]:
    from vfmseg.checkpoint.writing import versions

    epochs = {r["epoch"]: r.get("validation") for r in state.records if r["kind"] == "epoch"}
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "best_epoch": state.best_epoch,
        "validation": epochs.get(state.best_epoch),
        "steps": state.step,
        "minutes": round(state.seconds / 60, 2),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "versions": versions(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of this script; returns the exit code."""
    example = "accelerate launch vfmseg/finetune.py recipes/oam_buildings.yaml train.epochs=5"
    return run_script("finetune.py", "Fine-tune a segmenter as a recipe says.", example, _verb, arguments)


def _verb(recipe: Path, overrides: Sequence[str], resume: bool, overwrite: bool, accept_changed_data: bool) -> None:
    finetune(load_recipe(recipe, overrides), resume, overwrite, accept_changed_data)


if __name__ == "__main__":
    keep_displays()
    close_services()
    keep_freed()
    sys.exit(main())
