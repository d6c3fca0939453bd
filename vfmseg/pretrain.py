"""Pretraining: unlabelled scenes to an encoder. Also the script that `accelerate launch vfmseg/pretrain.py` starts."""

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
from vfmseg.recipe import PretrainRecipe, dump_recipe, load_pretrain_recipe
from vfmseg.terminal import is_main_process, keep_displays, quiet_libraries, say
from vfmseg.training.curves import Curves, require_tensorboard
from vfmseg.training.processes import connect
from vfmseg.training.run_folder import BEST, RunFolder, encoder_run
from vfmseg.training.script import run_script

if TYPE_CHECKING:
    from vfmseg.data.inputs import Inputs
    from vfmseg.model import Encoder
    from vfmseg.training.keeper import Product
    from vfmseg.training.loop import Loop, RunState
    from vfmseg.training.pictures import Pictures


def pretrain(
    recipe: PretrainRecipe, resume: bool = False, overwrite: bool = False, accept_changed_data: bool = False
) -> dict[str, Any]:
    """Train an encoder as the recipe says and return what was reached.

    Writes into `recipe.output_dir`: `best/` and `last/`, folders that any recipe takes as `model.encoder.checkpoint`,
    and what else a run keeps (see `finetune`). Under `accelerate launch` every process calls this; rank 0 writes. With
    `resume`, the scenes must be those that the run was started with, unless `accept_changed_data`.
    """
    quiet_libraries()
    folder = encoder_run(recipe.output_dir, recipe.name)
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
    recipe: PretrainRecipe, folder: RunFolder, resume: bool, accept_changed_data: bool, stack: ExitStack
) -> dict[str, Any]:
    accelerator = connect(recipe.train.precision)
    if not is_main_process():  # which has come as far, and so has the folder
        stack.enter_context(folder.with_the_others())
    # torch-based rooms are imported here: a wrong recipe or output folder has been refused long before
    from vfmseg.build.pretraining import build_encoder, masking_of, objectives_of, statistics_of
    from vfmseg.build.probe import probe_of
    from vfmseg.build.training import augment_of, schedule_of, what_decides
    from vfmseg.build.unlabelled import open_unlabelled, windows_of
    from vfmseg.data.traces import Traces
    from vfmseg.model import parameter_lines
    from vfmseg.training.keeper import Keeper
    from vfmseg.training.loop import Loop
    from vfmseg.training.probe import as_curves, in_words, validation_of
    from vfmseg.training.resume import Origin, as_then, load_run, noted
    from vfmseg.training.step import Step

    known = resume and folder.state.is_file()
    traces = Traces()
    opened = open_unlabelled(recipe.data, statistics_of(recipe), traces)
    inputs = opened.inputs
    if known and accept_changed_data:
        inputs = as_then(inputs, folder.state)
    model = build_encoder(recipe, inputs)
    say(parameter_lines(model))
    step = Step(model, objectives_of(recipe, inputs, model))
    augment, masking = augment_of(recipe.train.augment, inputs), masking_of(recipe.objectives.mae, model.backbone.patch)
    sources = {"unlabelled": windows_of(recipe.data, opened, recipe.seed, augment, masking)}
    probe = probe_of(recipe, model, inputs, opened.scenes, traces)
    # asked after the epoch, before it is counted
    validation = validation_of(probe, lambda: loop.state.epoch + 1)
    loop = Loop(accelerator, step, sources, schedule_of(recipe), validation)
    origin = Origin(what_decides(recipe), model.base_hash, noted(inputs), accelerator.num_processes, traces.found)
    if known:
        load_run(folder.state, loop, origin, accept_changed_data)
    if loop.state.epoch:
        say(f"resuming after epoch {loop.state.epoch} of {recipe.train.epochs}")
    curves = Curves(folder.curves, as_curves) if recipe.train.track == "tensorboard" else None
    pictures = _pictures(recipe, loop, model, folder)
    keeper = Keeper(loop, folder, _encoder(recipe, model, inputs), origin, dump_recipe(recipe), curves, pictures)
    if is_main_process():
        keeper.begin(known)
    state = keeper.run(known)
    result = _result(recipe, state)
    if is_main_process():
        keeper.finish(result)
        found = result["validation"]
        reached = f"best epoch {state.best_epoch} ({in_words(found)}), " if found else ""
        say(f"done: {reached}encoder in {folder.path / BEST}; use it as model.encoder.checkpoint of a recipe")
    accelerator.end_training()
    return result


def _encoder(recipe: PretrainRecipe, model: Encoder, inputs: Inputs) -> Product:
    """What this verb makes: the folder of an encoder."""
    from vfmseg.checkpoint.encoder import encoder_epoch, save_encoder
    from vfmseg.training.keeper import Product
    from vfmseg.training.probe import in_words

    def save(folder: Path, metrics: Mapping[str, Any]) -> None:
        save_encoder(folder, model, recipe, inputs, metrics)

    return Product(save, encoder_epoch, in_words)


def _pictures(recipe: PretrainRecipe, loop: Loop, model: Encoder, folder: RunFolder) -> Pictures | None:
    """What draws the masked autoencoder, if the recipe asks for it."""
    from vfmseg.training.objectives.mae import MaskedAutoencoder
    from vfmseg.training.pictures import Pictures

    if not recipe.pictures:
        return None
    objective = loop.step.objectives["mae"]
    assert isinstance(objective, MaskedAutoencoder)
    every = 1 if recipe.probe is None else recipe.probe.every
    windows = loop.sources[objective.source]
    return Pictures(
        loop.accelerator, model, objective, windows, recipe.pictures, every, recipe.train.epochs, folder.pictures
    )


def _result(recipe: PretrainRecipe, state: RunState) -> dict[str, Any]:
    scores = {one["epoch"]: one.get("validation") for one in state.records if one["kind"] == "epoch"}
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "best_epoch": state.best_epoch,
        "validation": scores.get(state.best_epoch),
        "steps": state.step,
        "minutes": round(state.seconds / 60, 2),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of this script; returns the exit code."""
    example = "accelerate launch vfmseg/pretrain.py recipes/builtin.yaml train.epochs=5"
    return run_script("pretrain.py", "Train an encoder on unlabelled scenes.", example, _verb, arguments)


def _verb(recipe: Path, overrides: Sequence[str], resume: bool, overwrite: bool, accept_changed_data: bool) -> None:
    pretrain(load_pretrain_recipe(recipe, overrides), resume, overwrite, accept_changed_data)


if __name__ == "__main__":
    keep_displays()
    close_services()
    keep_freed()
    sys.exit(main())
