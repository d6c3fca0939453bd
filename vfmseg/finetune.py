"""Fine-tuning: from a recipe to checkpoints. Also the script that `accelerate launch vfmseg/finetune.py` starts."""

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
from vfmseg.recipe import Recipe, dump_recipe, load_recipe
from vfmseg.terminal import keep_displays, say
from vfmseg.training.curves import Curves
from vfmseg.training.run_folder import segmenter_run
from vfmseg.training.script import run_script
from vfmseg.training.sitting import Sitting

if TYPE_CHECKING:
    from vfmseg.data.inputs import Inputs
    from vfmseg.model import Network
    from vfmseg.training.keeper import Product


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
    sitting = Sitting(segmenter_run(recipe.output_dir, recipe.name), resume, overwrite, accept_changed_data)
    return _train(recipe, sitting)


def _train(recipe: Recipe, sitting: Sitting) -> dict[str, Any]:
    with sitting.begun(recipe.train.precision, recipe.train.track) as accelerator:
        # torch-based rooms are imported here: a wrong recipe or output folder has been refused long before
        from vfmseg.build.data import inputs_of, metres_of, open_training
        from vfmseg.build.joint import joint_of
        from vfmseg.build.model import build_model
        from vfmseg.build.training import objectives_of, schedule_of, sources_of, validation_of, what_decides
        from vfmseg.data.traces import Traces
        from vfmseg.model import parameter_lines
        from vfmseg.training.keeper import Keeper
        from vfmseg.training.loop import Loop
        from vfmseg.training.objectives.segmentation import as_curves
        from vfmseg.training.resume import Origin, as_then, noted
        from vfmseg.training.step import Step

        traces, folder = Traces(), sitting.folder
        scenes = open_training(recipe, traces)
        inputs = inputs_of(recipe, scenes["train"])
        if sitting.known and sitting.accept_changed_data:
            inputs = as_then(inputs, folder.state)
        model = build_model(recipe, inputs, metres_of(scenes["train"]))
        say(parameter_lines(model))
        beside, more = joint_of(recipe, scenes["train"], inputs, model, traces)
        step = Step(model, {**objectives_of(recipe, inputs, model), **more})
        sources = {**sources_of(recipe, scenes["train"], inputs), **beside}
        validation = validation_of(recipe, model, scenes.get("val"), inputs)
        loop = Loop(accelerator, step, sources, schedule_of(recipe), validation)
        origin = Origin(what_decides(recipe), model.base_hash, noted(inputs), accelerator.num_processes, traces.found)
        curves = Curves(folder.curves, as_curves) if recipe.train.track == "tensorboard" else None
        keeper = Keeper(loop, folder, _segmenter(recipe, model, inputs), origin, dump_recipe(recipe), curves)
        return keeper.carry_out(sitting, _about(recipe, model))


def _segmenter(recipe: Recipe, model: Network, inputs: Inputs) -> Product:
    """What this verb makes: a segmenter folder."""
    from vfmseg.checkpoint.folder import saved_epoch
    from vfmseg.checkpoint.writing import save_segmenter
    from vfmseg.training.keeper import Product
    from vfmseg.training.objectives.segmentation import in_words

    def save(folder: Path, metrics: Mapping[str, Any]) -> None:
        save_segmenter(folder, model, recipe, inputs, metrics)

    return Product(save, saved_epoch, in_words)


def _about(recipe: Recipe, model: Network) -> dict[str, Any]:
    """What the result says of the run beside how far it came."""
    from vfmseg.checkpoint.writing import versions

    return {
        "name": recipe.name,
        "seed": recipe.seed,
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
