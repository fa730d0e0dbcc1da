"""What a run gets wrong: by class, by pair of classes, and by image.

Shapes: N images, K classes. A confusion matrix is [K, K] int64; its rows are true classes, its columns predictions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ClassResult:
    """How often a class was recognised. `rival` is the class that it was most often taken for, if any."""

    label: int
    images: int
    correct: int
    rival: int | None
    rival_count: int

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.images if self.images else None


@dataclass(frozen=True)
class Pair:
    """Two classes that were taken for each other, and how often in each direction."""

    one: int
    other: int
    one_as_other: int
    other_as_one: int

    @property
    def count(self) -> int:
        return self.one_as_other + self.other_as_one


@dataclass(frozen=True)
class Mistake:
    """An image with the wrong class predicted. Both probabilities are the softmax scores of the run."""

    image: int
    label: int
    predicted: int
    label_probability: float
    predicted_probability: float


def confusion_matrix(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[K, K] int64 from logits [N, K] and labels [N]. Among equal logits the lower class counts, as in top-1."""
    classes = logits.shape[1]
    cells = labels * classes + logits.argmax(axis=1)  # [N]
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def class_results(matrix: np.ndarray) -> list[ClassResult]:
    """Every class, the least often recognised first; classes without images last."""
    results = []
    for label, row in enumerate(matrix):
        others = row.copy()
        others[label] = 0
        rival = int(others.argmax())
        count = int(others[rival])
        results.append(ClassResult(label, int(row.sum()), int(row[label]), rival if count else None, count))
    return sorted(results, key=lambda result: 2.0 if result.accuracy is None else result.accuracy)


def confused_pairs(matrix: np.ndarray, limit: int) -> list[Pair]:
    """At most `limit` pairs of classes, those with the most mistakes first."""
    both = np.triu(matrix + matrix.T, k=1)  # [K, K], each pair once
    order = np.argsort(-both, axis=None, kind="stable")[:limit]
    found = [divmod(int(cell), len(matrix)) for cell in order]
    return [Pair(i, j, int(matrix[i, j]), int(matrix[j, i])) for i, j in found if both[i, j]]


def surest_mistakes(logits: np.ndarray, labels: np.ndarray, limit: int) -> list[Mistake]:
    """At most `limit` mistakes among logits [N, K] for labels [N], by falling probability of the prediction."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    scores = np.exp(shifted)
    scores /= scores.sum(axis=1, keepdims=True)
    predicted = logits.argmax(axis=1)  # [N]
    wrong = np.flatnonzero(predicted != labels)
    order = wrong[np.argsort(-scores[wrong, predicted[wrong]], kind="stable")][:limit]
    return [
        Mistake(
            image=int(i),
            label=int(labels[i]),
            predicted=int(predicted[i]),
            label_probability=float(scores[i, labels[i]]),
            predicted_probability=float(scores[i, predicted[i]]),
        )
        for i in order
    ]
