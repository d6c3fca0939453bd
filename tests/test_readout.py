"""What features say of classes: a linear fit, neighbours, effective rank, and the labels of cells."""

from __future__ import annotations

import pytest
import torch

from vfmseg.data.labelled_cells import cell_labels
from vfmseg.geo.classes import IGNORE
from vfmseg.metrics import Confusion
from vfmseg.training.readout import effective_rank, linear, nearest_neighbours


def miou(guess: torch.Tensor, labels: torch.Tensor, classes: int) -> float:
    confusion = Confusion(classes)
    confusion.update(guess, labels)
    return float(confusion.scores([str(i) for i in range(classes)])["miou"])


def planted(seed: int, cells: int, said: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise of 12 channels, and classes that three of them say, among loud others, or that nothing says."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (cells,), generator=draws)
    features = torch.randn(cells, 12, generator=draws)
    if said:
        features[:, :3] += 12 * torch.eye(3)[labels]
    return features, labels


@pytest.mark.parametrize("kind", ["linear", "knn"])
def test_a_planted_signal_is_found_and_one_that_is_not_there_is_not(kind: str) -> None:
    def score(said: bool) -> float:
        (train, labels), (val, truth) = planted(0, 600, said), planted(1, 600, said)
        if kind == "linear":
            return miou(linear(train, labels, val, 3), truth, 3)
        return miou(nearest_neighbours(train, labels, val, 3, 20), truth, 3)

    assert score(True) > 0.97
    assert 0.1 < score(False) < 0.3  # a third of the guesses is right: 1/3 / (1/3 + 2/3 + ...) = 0.2


def test_the_linear_score_is_that_of_a_converged_fit_whatever_the_scale_of_a_channel() -> None:
    from sklearn.linear_model import LogisticRegression

    (train, labels), (val, truth) = planted(0, 400, True), planted(1, 400, True)
    for features, classes in ((train, labels), (val, truth)):
        features[:, :3] -= 11 * torch.eye(3)[classes]  # one standard deviation is left between them
    mean, std = train.mean(0), train.std(0, correction=0)
    other = LogisticRegression(C=1 / (1e-3 * len(train)), max_iter=1000).fit((train - mean) / std, labels)
    expected = torch.from_numpy(other.predict((val - mean) / std))
    scales = torch.tensor([1e-4, 1e-3, *[1.0] * 9, 1e4])
    assert (linear(train * scales, labels, val * scales, 3) == expected).float().mean() > 0.99


def test_neighbours_vote_with_their_cosine() -> None:
    train = torch.tensor([[1.0, 0.0], [3.0, 10.0], [0.35, 1.0], [-1.0, -1.0]])
    labels = torch.tensor([0, 1, 1, 2])
    assert nearest_neighbours(train, labels, torch.tensor([[5.0, 0.0]]), 3, 1).tolist() == [0]
    assert nearest_neighbours(train, labels, torch.tensor([[5.0, 0.0]]), 3, 3).tolist() == [
        0
    ]  # 1.00 against 0.29 + 0.33
    assert nearest_neighbours(train, labels, torch.tensor([[1.0, 1.0]]), 3, 3).tolist() == [1]


@pytest.mark.pitfall("K20")
def test_rank_and_scores_tell_an_encoder_that_has_collapsed() -> None:
    draws = torch.Generator().manual_seed(0)
    assert effective_rank(torch.randn(4000, 16, generator=draws)) == pytest.approx(16, abs=0.1)
    flat = torch.randn(4000, 3, generator=draws) @ torch.linalg.qr(torch.randn(16, 16, generator=draws))[0][:3]
    assert effective_rank(flat) == pytest.approx(3, abs=0.05)
    constant = torch.randn(1, 16, generator=draws).expand(300, -1)
    assert effective_rank(constant) == pytest.approx(1, abs=1e-3)
    labels = torch.arange(300) % 3
    assert miou(linear(constant, labels, constant, 3), labels, 3) <= 0.34
    assert miou(nearest_neighbours(constant, labels, constant, 3, 20), labels, 3) <= 0.34
    # singular values 2 and 1: shares 2/3 and 1/3
    known = 3 / 2 ** (2 / 3)
    assert effective_rank(torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])) == pytest.approx(known)


def test_a_cell_is_of_the_class_of_most_of_its_labelled_pixels() -> None:
    labels = torch.zeros(8, 10, dtype=torch.int64)
    labels[:4, :4] = torch.tensor([1, 1, 1, 0])  # 12 of 16 pixels
    labels[:4, 4:8] = torch.tensor([0, 0, 1, 1])  # as many of both
    labels[4:, :4] = torch.tensor([[1], [1], [IGNORE], [IGNORE]])  # all of the labelled half
    labels[4:, 4:8] = IGNORE
    labels[4:6, 4:7] = 2  # 6 of 16 are labelled
    # the third column reaches beyond the image by half
    assert cell_labels(labels, (2, 3), 4).tolist() == [[1, IGNORE, 0], [1, IGNORE, 0]]
