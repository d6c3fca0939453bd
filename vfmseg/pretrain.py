"""Pretraining: unlabelled scenes to an encoder. Also the script that `accelerate launch vfmseg/pretrain.py` starts."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    # started as a script, Python puts vfmseg/ itself first on the import path; our files are no top-level modules
    sys.path.pop(0)

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vfmseg.geo.trust import close_services
from vfmseg.heap import keep_freed
from vfmseg.recipe import PretrainRecipe, dump_recipe, load_pretrain_recipe
from vfmseg.terminal import keep_displays, say
from vfmseg.training.curves import Curves
from vfmseg.training.run_folder import BEST, RunFolder, encoder_run
from vfmseg.training.script import run_script
from vfmseg.training.sitting import Sitting

if TYPE_CHECKING:
    from vfmseg.data.inputs import Inputs
    from vfmseg.model import Encoder
    from vfmseg.training.keeper import Product
    from vfmseg.training.loop import Loop
    from vfmseg.training.pictures import Pictures


def pretrain(
    recipe: PretrainRecipe, resume: bool = False, overwrite: bool = False, accept_changed_data: bool = False
) -> dict[str, Any]:
    """Train an encoder as the recipe says and return what was reached.

    Writes into `recipe.output_dir`: `best/` and `last/`, folders that any recipe takes as `model.encoder.checkpoint`,
    and what else a run keeps (see `finetune`). Under `accelerate launch` every process calls this; rank 0 writes. With
    `resume`, the scenes must be those that the run was started with, unless `accept_changed_data`.
    """
    sitting = Sitting(encoder_run(recipe.output_dir, recipe.name), resume, overwrite, accept_changed_data)
    result = _train(recipe, sitting)
    say(f"use it as model.encoder.checkpoint of a recipe: {sitting.folder.path / BEST}")
    return result


def _train(recipe: PretrainRecipe, sitting: Sitting) -> dict[str, Any]:
    with sitting.begun(recipe.train.precision, recipe.train.track) as accelerator:
        # torch-based rooms are imported here: a wrong recipe or output folder has been refused long before
        from vfmseg.build.pretraining import build_encoder, masking_of, measure_targets, objectives_of, statistics_of
        from vfmseg.build.probe import probe_of
        from vfmseg.build.training import augment_of, schedule_of, what_decides
        from vfmseg.build.unlabelled import band_draw_of, open_unlabelled, windows_of
        from vfmseg.data.traces import Traces
        from vfmseg.model import parameter_lines
        from vfmseg.training.keeper import Keeper
        from vfmseg.training.loop import Loop
        from vfmseg.training.probe import as_curves, validation_of
        from vfmseg.training.resume import Origin, as_then, noted
        from vfmseg.training.step import Step

        traces, folder = Traces(), sitting.folder
        opened = open_unlabelled(recipe.data, statistics_of(recipe), traces)
        inputs = opened.inputs
        if sitting.known and sitting.accept_changed_data:
            inputs = as_then(inputs, folder.state)
        drawn = band_draw_of(recipe.data, inputs)
        taken = inputs if drawn is None else drawn.shown()
        model = build_encoder(recipe, taken)
        say(parameter_lines(model))
        objectives = objectives_of(recipe, taken, model)
        step = Step(model, objectives)
        augment = augment_of(recipe.train.augment, taken)
        masking = masking_of(recipe.objectives.mae, model, recipe.data.tile, taken)
        sources = {"unlabelled": windows_of(recipe.data, opened, recipe.seed, augment, masking, drawn)}
        measure_targets(objectives, sources["unlabelled"])
        probe = probe_of(recipe, model, taken, opened.scenes, traces)
        # asked after the epoch, before it is counted
        validation = validation_of(probe, lambda: loop.state.epoch + 1)
        loop = Loop(accelerator, step, sources, schedule_of(recipe), validation)
        origin = Origin(what_decides(recipe), model.base_hash, noted(inputs), accelerator.num_processes, traces.found)
        curves = Curves(folder.curves, as_curves) if recipe.train.track == "tensorboard" else None
        pictures = _pictures(recipe, loop, model, folder)
        keeper = Keeper(loop, folder, _encoder(recipe, model, inputs), origin, dump_recipe(recipe), curves, pictures)
        return keeper.carry_out(sitting, {"name": recipe.name, "seed": recipe.seed})


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of this script; returns the exit code."""
    example = "accelerate launch vfmseg/pretrain.py my-encoder.yaml train.epochs=5"
    return run_script("pretrain.py", "Train an encoder on unlabelled scenes.", example, _verb, arguments)


def _verb(recipe: Path, overrides: Sequence[str], resume: bool, overwrite: bool, accept_changed_data: bool) -> None:
    pretrain(load_pretrain_recipe(recipe, overrides), resume, overwrite, accept_changed_data)


if __name__ == "__main__":
    keep_displays()
    close_services()
    keep_freed()
    sys.exit(main())
