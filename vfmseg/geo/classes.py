"""Class ids as files hold them, and the indexes 0..K-1 that they have inside; numbers alone, no files.

With the ids (10, 30, 100) and ignore_index 0 the array [[10, 100], [0, 30]] becomes [[0, 2], [-1, 1]]. An id that
nobody declared is an error with its count, never a class: neither clamped, wrapped nor turned into 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vfmseg.errors import DataError

IGNORE = -1
"""The index of unlabelled pixels everywhere inside; files have their own number for it (`data.ignore_index`)."""

_EXACT = 2.0**53
"""Up to here float64 holds every whole number."""


@dataclass(frozen=True)
class LabelMap:
    """Class ids as files hold them (sorted, may be sparse or negative), and the id that means unlabelled."""

    ids: tuple[int, ...]
    ignore_index: int

    def __post_init__(self) -> None:
        if list(self.ids) != sorted(set(self.ids)) or not self.ids:
            raise DataError(f"class ids {list(self.ids)} must be ascending, each once, and at least one")
        if self.ignore_index in self.ids:
            raise DataError(
                f"ignore_index {self.ignore_index} is also a class id {list(self.ids)}; choose a number that "
                "no class has"
            )

    def to_index(self, array: np.ndarray, place: str, unlabelled: np.ndarray | None = None) -> np.ndarray:
        """Indexes int64 of the ids in `array` (any shape and real type); ignore_index and NaN become IGNORE.

        unlabelled: bool of the same shape, pixels whose id does not count (masked, nodata); they become IGNORE.
        place: names the file in errors. DataError if ids are no whole numbers or unknown, with their counts.
        """
        ids, hidden = _whole_numbers(np.asarray(array), place, unlabelled)
        known = np.array(self.ids, dtype=np.int64)
        index = np.searchsorted(known, ids).clip(max=len(known) - 1).astype(np.int64)
        declared = known[index] == ids
        strange = ~declared & (ids != self.ignore_index) & ~hidden
        if strange.any():
            raise DataError(self._unknown(ids[strange], place))
        index[~declared | hidden] = IGNORE
        return index

    def _unknown(self, ids: np.ndarray, place: str) -> str:
        found, counts = np.unique(ids, return_counts=True)
        named = ", ".join(f"{i} ({n} pixels)" for i, n in zip(found[:5], counts[:5], strict=True))
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        classes = ", ".join(str(i) for i in self.ids)
        return (
            f"{place}: unknown label ids {named}{more}; expected the classes {classes} or ignore_index "
            f"{self.ignore_index}; add them to data.classes or correct the labels"
        )


def _whole_numbers(array: np.ndarray, place: str, unlabelled: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Ids int64, and bool where they do not count."""
    hidden = np.zeros(array.shape, dtype=bool) if unlabelled is None else unlabelled.astype(bool)
    if array.dtype.kind in "iub" and array.dtype != np.uint64:  # the upper half of uint64 would wrap to -1 and below
        return array.astype(np.int64), hidden
    if array.dtype.kind not in "fu":
        raise DataError(f"{place}: labels of type {array.dtype}; expected whole numbers")
    hidden = hidden | np.isnan(array)
    numbers = np.where(hidden, 0, array).astype(np.float64)
    wrong = ~(np.abs(numbers) <= _EXACT) | (numbers != np.floor(numbers))
    if wrong.any():
        raise DataError(
            f"{place}: {int(wrong.sum())} labels are not whole numbers, such as {numbers[wrong][0]:g}; "
            "expected class ids (are these probabilities or an image?); write the id of a class to each pixel"
        )
    return numbers.astype(np.int64), hidden
