"""Fine-tuning: from a recipe to checkpoints. Also the script that `accelerate launch vfmseg/finetune.py` starts."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    # started as a script, Python puts vfmseg/ itself first on the import path; our files are no top-level modules
    sys.path.pop(0)

import argparse
import json
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from vfmseg.disk.files import whole_file, write_json
from vfmseg.errors import RecipeError
from vfmseg.geo.trust import close_services
from vfmseg.launch import several
from vfmseg.progress import TrainingProgress
from vfmseg.recipe import Recipe, dump_recipe, load_recipe
from vfmseg.recipe.train import PredictSection
from vfmseg.terminal import guarded, is_main_process, keep_displays, quiet_libraries, say
from vfmseg.training.curves import Curves, remove_curves
from vfmseg.training.processes import connect, launch_command
from vfmseg.training.run_folder import (
    CURVES_FOLDER,
    STATE_FILE,
    alone,
    check_output,
    check_place,
    forget_beginning,
    remove_leftovers,
    require_best,
    with_the_others,
)

if TYPE_CHECKING:
    from vfmseg.model import Network
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
    check_place(recipe.output_dir, resume, overwrite)
    if accept_changed_data and not resume:
        raise RecipeError("--accept-changed-data is about going on with a run: add --resume, or leave it out")
    with ExitStack() as stack:
        if is_main_process():
            stack.enter_context(alone(recipe.output_dir, recipe.name, several()))
        check_output(recipe.output_dir, resume, overwrite)
        return _train(recipe, resume, accept_changed_data, stack)


def _train(recipe: Recipe, resume: bool, accept_changed_data: bool, stack: ExitStack) -> dict[str, Any]:
    output = recipe.output_dir
    curves = Curves(output / CURVES_FOLDER) if recipe.train.track == "tensorboard" else None
    accelerator = connect(recipe.train.precision)
    if not is_main_process():  # which has come as far, and so has the folder
        stack.enter_context(with_the_others(output, recipe.name))
    # torch-based rooms are imported here: a wrong recipe or output folder has been refused long before
    from vfmseg.build.data import inputs_of, open_training, value_ranges
    from vfmseg.build.model import build_model, rule_of
    from vfmseg.checkpoint.folder import saved_epoch
    from vfmseg.checkpoint.writing import save_segmenter
    from vfmseg.data.augment import Augment, Radiometry
    from vfmseg.data.dataset import CoverWindows, TrainingWindows
    from vfmseg.data.traces import Traces
    from vfmseg.metrics import mean_text
    from vfmseg.training.loop import Loop, Schedule, StepReport, score_windows
    from vfmseg.training.objectives.segmentation import Segmentation, class_weight_tuple
    from vfmseg.training.resume import Origin, as_then, load_run, noted, save_run

    known = resume and (output / STATE_FILE).is_file()
    traces = Traces()
    scenes = open_training(recipe, traces)
    inputs = inputs_of(recipe, scenes["train"])
    if known and accept_changed_data:  # the weights were learned from values that were normalised as they were then
        inputs = as_then(inputs, output / STATE_FILE)
    model = build_model(recipe, inputs)
    say(_parameter_lines(model))
    section = recipe.train
    augment = Augment(
        flip=section.augment.flip,
        rotate90=section.augment.rotate90,
        scale=section.augment.scale,
        rotate=section.augment.rotate,
        radiometry={
            name: Radiometry(r.brightness, r.contrast, r.saturation, r.hue)
            for name, r in section.augment.radiometry.items()
        },
        value_range=value_ranges(inputs),
    )
    ids = tuple(sorted(recipe.data.classes))
    names = [recipe.data.classes[i].name for i in ids]
    gamma = 2.0 if section.focal_gamma is None else section.focal_gamma
    cover = CoverWindows(scenes["val"], recipe.data.tile) if "val" in scenes else None
    if cover is None:
        say("no validation split: the last epoch is kept as best; add data.val to choose on unseen scenes")

    def validate() -> dict[str, Any] | None:
        if cover is None:
            return None
        return score_windows(accelerator, model, cover, len(ids), section.batch_size, rule_of(recipe)).scores(names)

    def save(name: str, state: RunState) -> None:
        metrics = {"epoch": state.epoch, "validation": state.records[-1].get("validation")}
        save_segmenter(output / name, model, recipe, inputs, metrics)

    def keep(state: RunState) -> None:
        save("last", state)
        _write_records(output / "metrics.jsonl", state)
        with whole_file(output / "recipe.yaml") as aside:
            aside.write_text(dump_recipe(recipe), encoding="utf-8")

    def on_step(report: StepReport) -> None:
        progress.step(report.step, report.epoch, report.loss, report.images)
        if curves and curves.started:
            curves.update(loop.state.records)

    def on_epoch(state: RunState, improved: bool) -> None:
        scores = state.records[-1].get("validation")
        progress.epoch(state.step, state.epoch, scores)
        if is_main_process():
            if state.epoch == 1:  # of an earlier run, whose segmenter is replaced now
                (output / "metrics.json").unlink(missing_ok=True)
                remove_curves(output / CURVES_FOLDER)
            keep(state)
            save_run(output / STATE_FILE, loop, origin)
            if improved:  # after the state, from which it can be made again if the run is stopped in between
                save("best", state)
            if curves:  # not before there is a run to go on with: until then the folder may hold another one's
                curves.update(state.records)
        accelerator.wait_for_everyone()

    loop = Loop(
        accelerator,
        model,
        Segmentation(
            dict(section.loss.items()), rule_of(recipe), class_weight_tuple(section.class_weights, ids), gamma
        ),
        TrainingWindows(
            scenes["train"], recipe.data.tile, recipe.seed, augment, rule_of(recipe), recipe.data.samples_per_epoch
        ),
        Schedule(
            epochs=section.epochs,
            batch_size=section.batch_size,
            accumulate=section.accumulate,
            clip=section.clip,
            lr=section.optimizer.lr,
            encoder_lr=section.optimizer.encoder_lr,
            weight_decay=section.optimizer.weight_decay,
            warmup=section.optimizer.warmup,
            seed=recipe.seed,
            workers=recipe.data.workers,
        ),
        validate,
        on_step,
        on_epoch,
    )
    origin = Origin(
        _what_decides(recipe), model.backbone.base.sha256, noted(inputs), accelerator.num_processes, traces.found
    )
    if known:
        load_run(output / STATE_FILE, loop, origin, accept_changed_data)
    if loop.state.epoch:
        say(f"resuming after epoch {loop.state.epoch} of {section.epochs}")
    elif resume:
        say(f"{output}: no epoch was finished there, so the run starts with the first one")
    if is_main_process():
        remove_leftovers(output)
        texts = all((output / name).is_file() for name in ("metrics.jsonl", "recipe.yaml"))
        if loop.state.epoch and not (texts and saved_epoch(output / "last") == loop.state.epoch):
            keep(loop.state)
        there = saved_epoch(output / "best")
        if loop.state.epoch and loop.state.epoch == loop.state.best_epoch != there:
            save("best", loop.state)
        elif loop.state.epoch and there is None:
            require_best(output, there, loop.state.best_epoch, loop.state.epoch)
        if not known:
            # first of all, so that --resume goes on with this run wherever it is stopped; what an earlier one has
            # reached stays until the first epoch ends
            save_run(output / STATE_FILE, loop, origin)
    progress = TrainingProgress(loop.steps_total, section.epochs, loop.state.step)
    try:
        state = loop.run()
    except BaseException:
        if is_main_process() and not known:
            forget_beginning(output)
        raise
    finally:
        progress.close()
        if curves:
            curves.close()
    result = _result(recipe, model, state)
    if is_main_process():
        require_best(output, saved_epoch(output / "best"), state.best_epoch, state.epoch)
        write_json(output / "metrics.json", result)
        reached = f" (val mIoU {mean_text(result['validation'])})" if result["validation"] else ""
        say(f"done: best epoch {state.best_epoch}{reached}, segmenter in {output / 'best'}")
    accelerator.end_training()
    return result


def _what_decides(recipe: Recipe) -> str:
    """The recipe without what may change between sittings: it decides no weight."""
    train = recipe.train.model_copy(update={"track": "none"})
    data = recipe.data.model_copy(update={"workers": 0})
    update = {"train": train, "data": data, "predict": PredictSection(), "output_dir": Path()}
    return dump_recipe(recipe.model_copy(update=update))


def _parameter_lines(model: Network) -> str:
    from vfmseg.model import parameter_table

    rows = parameter_table(model)
    lines = [f"{'part':<10}{'trainable':>14}{'total':>14}"]
    lines += [f"{part:<10}{trainable:>14,}{total:>14,}" for part, trainable, total in rows]
    sites = model.attached.sites
    if sites:
        lines.append(f"adapter {model.attached.name} on {len(sites)} layers: {sites[0]} ... {sites[-1]}")
    return "\n".join(lines)


def _write_records(path: Path, state: RunState) -> None:
    with whole_file(path) as aside:
        aside.write_text("".join(json.dumps(record) + "\n" for record in state.records), encoding="utf-8")


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
    parser = argparse.ArgumentParser(
        prog="finetune.py",
        description="Fine-tune a segmenter as a recipe says.",
        epilog="example: accelerate launch vfmseg/finetune.py recipes/oam_buildings.yaml train.epochs=5",
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="go on after the last finished epoch")
    group.add_argument("--overwrite", action="store_true", help="replace the run in output_dir")
    parser.add_argument("--accept-changed-data", action="store_true", help="with --resume: go on with other data")
    options = parser.parse_intermixed_args(arguments)  # overrides may follow an option

    def verb() -> None:
        chosen = load_recipe(options.recipe, options.overrides)
        finetune(chosen, options.resume, options.overwrite, options.accept_changed_data)

    again = [*launch_command(), "vfmseg/finetune.py", str(options.recipe), *options.overrides, "--resume"]
    return guarded(verb, shlex.join(again))


if __name__ == "__main__":
    keep_displays()
    close_services()
    sys.exit(main())
