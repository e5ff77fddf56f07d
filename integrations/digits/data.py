"""Scikit-learn's handwritten digits as tensors: 1,797 real 8x8 scans that come with scikit-learn, so no download."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

IMAGE_SIZE = 8
NUM_CLASSES = 10
_MAX_VALUE = 16.0  # the scans count set pixels in 4x4 blocks of a larger bitmap: 0..16


class Digits(NamedTuple):
    """Images and their labels, row by row."""

    images: torch.Tensor
    """float32 ``[N, 1, 8, 8]`` in ``[-1, 1]``; -1 is empty paper."""
    labels: torch.Tensor
    """int64 ``[N]`` in ``0..9``."""


def all_digits() -> Digits:
    """All 1,797 scans in scikit-learn's order."""
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.float32) / (_MAX_VALUE / 2) - 1
    return Digits(images.unsqueeze(1), torch.from_numpy(bunch.target).to(torch.int64))


def train_test_digits() -> tuple[Digits, Digits]:
    """The fixed split used for both bundled models: 1,437 scans to train on, 360 held out, stratified by label."""
    digits = all_digits()
    train, test = train_test_split(range(len(digits.labels)), test_size=0.2, random_state=0, stratify=digits.labels)
    return Digits(digits.images[train], digits.labels[train]), Digits(digits.images[test], digits.labels[test])
