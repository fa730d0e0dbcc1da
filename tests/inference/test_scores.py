"""Top-1, top-5 and loss of known scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastnet.inference.scores import count_score_hits


def test_counts_and_loss_of_known_scores() -> None:
    scores = torch.tensor(
        [
            [0.05, 0.60, 0.15, 0.10, 0.06, 0.04],  # label 1 comes first
            [0.05, 0.60, 0.15, 0.10, 0.06, 0.04],  # label 0 comes fifth
            [0.05, 0.60, 0.15, 0.10, 0.06, 0.04],  # label 5 comes last
            [1.00, 0.00, 0.00, 0.00, 0.00, 0.00],  # label 4, given no probability at all
        ]
    )
    result = count_score_hits(scores, np.array([1, 0, 5, 4]))
    assert (result.images, result.correct1, result.correct5) == (4, 1, 3)
    assert (result.top1, result.top5) == (0.25, 0.75)
    least = np.finfo(np.float32).tiny
    # Scores are float32: a relative error of 2^-24 each is an absolute one of their logarithm.
    expected = -np.log([0.60, 0.05, 0.04, least]).mean()
    assert result.mean_loss == pytest.approx(expected, abs=2**-23)


def test_equal_scores_count_as_argmax_has_them() -> None:
    scores = torch.full((10, 10), 0.1)
    result = count_score_hits(scores, np.arange(10))
    assert (result.correct1, result.correct5) == (1, 5), (
        "the first class is first, five of ten are among five"
    )
    assert result.correct1 == (scores.argmax(dim=1) == torch.arange(10)).sum()


def test_fewer_classes_than_five_are_all_among_five() -> None:
    assert count_score_hits(torch.tensor([[0.2, 0.5, 0.3]] * 3), np.arange(3)).correct5 == 3
