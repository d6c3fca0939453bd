"""The table of a comparison: means and spreads over seeds, which cell is best, and whether that can be said."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from vfmseg.metrics import comparable, mean_text

Scores = Mapping[str, Any]
"""As `Confusion.scores` gives them."""


def summary(scores: Mapping[int, Scores]) -> dict[str, Any]:
    """{seed: scores} -> mean and spread of the mean IoU, and that of each seed in figures and in words.

    spread: the sample standard deviation, None for one seed. Both are None if a seed has no mean IoU.
    """
    values = [one["miou"] for one in scores.values()]
    whole = None not in values
    return {
        "mean": statistics.mean(values) if whole else None,
        "spread": statistics.stdev(values) if whole and len(values) > 1 else None,
        "seeds": {str(seed): one["miou"] for seed, one in scores.items()},
        "words": {str(seed): mean_text(one) for seed, one in scores.items()},
    }


def verdict(validation: Mapping[str, Mapping[int, Scores]]) -> dict[str, Any]:
    """{cell: {seed: validation scores}} -> {best, not_told_apart, words}: which cell is best, if that can be said.

    Cells are compared as epochs are, by the mean IoU of the classes that have labels. `best` is None unless its
    interval, mean ± spread, overlaps that of no other cell; `not_told_apart` then names the highest and all that
    overlap with it. One seed has no interval, so that nothing is said of it.
    """
    found = {cell: [comparable(one) for one in by_seed.values()] for cell, by_seed in validation.items()}
    values = {cell: [one for one in some if one is not None] for cell, some in found.items()}
    if any(len(values[cell]) < len(found[cell]) for cell in found):
        words = "no cell is called best: in data.val there is only one class with labels, and all of it can be guessed"
        return {"best": None, "not_told_apart": list(found), "words": words}
    means = {cell: statistics.mean(some) for cell, some in values.items()}
    order = sorted(means, key=lambda cell: -means[cell])
    first = order[0]
    if min(map(len, values.values())) < 2:
        words = (
            f"highest on validation: {first} ({means[first]:.3f}); one seed shows no spread, so none is called best: "
            "take --seeds 3 or more"
        )
        return {"best": None, "not_told_apart": order, "words": words}
    spreads = {cell: statistics.stdev(some) for cell, some in values.items()}

    def shown(cell: str) -> str:
        return f"{cell} ({means[cell]:.3f} ± {spreads[cell]:.3f})"

    near = [cell for cell in order[1:] if means[first] - means[cell] <= spreads[first] + spreads[cell]]
    if near:
        words = (
            f"highest on validation: {shown(first)}; no difference is seen at these seeds between it and "
            f"{', '.join(map(shown, near))}"
        )
        return {"best": None, "not_told_apart": [first, *near], "words": words}
    return {"best": first, "not_told_apart": [], "words": f"best on validation: {shown(first)}, then {shown(order[1])}"}


def text(content: Mapping[str, Any]) -> str:
    """The content of compare.json as a table for people, with what must be known to read it below."""
    cells = content["cells"]
    with_test = content["test"]
    gone = list(dict.fromkeys(name for cell in cells for name in cell["missing"] or ()))
    tested = [*(["test mIoU"] if with_test else []), *(f"without {name}" for name in gone)]
    titles = ["cell", "val mIoU", *tested, "trainable", "total", "ms/tile", "MiB", ""]
    most = max(cell["trainable_parameters"] for cell in cells)
    rows = [_row(cell, with_test, gone, most) for cell in cells]
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    lines = [
        "  ".join(
            part.ljust(width) if number == 0 else part.rjust(width)
            for number, (part, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (titles, *rows)
    ]
    lines += _remarks(cells, with_test)
    lines.append(
        f"{content['machine']}, torch {content['torch']}; seeds {_numbers(content['seeds'])}; ± is the sample standard "
        "deviation over seeds"
        if len(content["seeds"]) > 1
        else f"{content['machine']}, torch {content['torch']}; one seed ({content['seeds'][0]})"
    )
    lines.append("ms/tile and MiB: one forward of one tile of data.tile pixels, without weights")
    if content["equal"]:
        lines.append(f"trained parameters are made equal to those of {content['equal']}, the cell that trains the most")
    if gone:
        lines.append("without NAME: the test split as if its scenes had no such modality")
    lines.append(content["verdict"]["words"])
    if not with_test:
        lines.append("epochs and cells are chosen on validation, which flatters: report the test split (--test)")
    return "\n".join(lines)


def _row(cell: Mapping[str, Any], with_test: bool, gone: Sequence[str], most: int) -> list[str]:
    missing = cell["missing"] or {}
    cost, fewer = cell["cost"], 100 * (1 - cell["trainable_parameters"] / most)
    return [
        cell["name"],
        _mean(cell["validation"]),
        *([_mean(cell["test"])] if with_test else []),
        *(_mean(missing[name]) if name in missing else "-" for name in gone),
        f"{cell['trainable_parameters']:,}",
        f"{cell['total_parameters']:,}",
        f"{cost['ms']:.1f}",
        "-" if cost["mib"] is None else f"{cost['mib']:.1f}",
        f"not equal: {fewer:.0f} % fewer" if cell["equal"] is False else "",
    ]


def _mean(scores: Mapping[str, Any]) -> str:
    """`0.812 ± 0.004`; with a `*` if some mean is over fewer classes than there are."""
    if scores["mean"] is None:
        return "none*"
    spread = "" if scores["spread"] is None else f" ± {scores['spread']:.3f}"
    return f"{scores['mean']:.3f}{spread}{'*' * bool(_partial(scores))}"


def _partial(scores: Mapping[str, Any]) -> dict[str, str]:
    """{seed: in words} of those whose mean IoU is not that of all classes."""
    return {seed: words for seed, words in scores["words"].items() if " " in words or words == "none"}


def _remarks(cells: Sequence[Mapping[str, Any]], with_test: bool) -> list[str]:
    """A line for each mean that is over fewer classes."""
    found = []
    for cell in cells:
        splits = {"validation": cell["validation"], **({"test": cell["test"]} if with_test else {})}
        splits |= {f"test without {name}": scores for name, scores in (cell["missing"] or {}).items()}
        for split, scores in splits.items():
            found += [f"* {cell['name']}, {split}, seed {seed}: {words}" for seed, words in _partial(scores).items()]
    return found


def _numbers(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
