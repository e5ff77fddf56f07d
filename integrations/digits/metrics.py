"""How good samples are, and how far two sets of samples from the same noise are apart."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch

from .classifier import DigitClassifier


@torch.no_grad()
def features(classifier: DigitClassifier, images: torch.Tensor) -> torch.Tensor:
    """Penultimate features of ``images`` ``[N, 1, 8, 8]``, clamped to ``[-1, 1]`` first: float64 ``[N, 64]``."""
    return classifier.features(images.float().clamp(-1, 1)).double()


def frechet_distance(features_a: torch.Tensor, features_b: torch.Tensor) -> float:
    """Frechet distance between Gaussians fitted to two feature sets, in float64.

    ``|m_a - m_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2))``, with means ``m`` and covariances ``C``: the FID of Heusel et
    al. 2017 (arXiv 1706.08500), here on this package's own classifier, so the values compare only among themselves. It
    is biased upwards for few samples: compare sets of the same size. Where a covariance is exactly singular, as for
    constant features, scipy warns; the value still is right.

    Args:
        features_a: ``[N_a, D]``.
        features_b: ``[N_b, D]``.

    Raises:
        ValueError: the sets are not two matrices of the same width with at least 2 rows each.
    """
    if features_a.ndim != 2 or features_b.ndim != 2 or features_a.shape[1] != features_b.shape[1]:
        raise ValueError(f"Expected [N, D] twice, got {list(features_a.shape)} and {list(features_b.shape)}.")
    if min(len(features_a), len(features_b)) < 2:
        raise ValueError("A covariance needs at least 2 samples.")
    a, b = features_a.double().cpu().numpy(), features_b.double().cpu().numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # Rounding may leave a tiny imaginary part where the covariances are nearly singular.
    root = np.real(scipy.linalg.sqrtm(cov_a @ cov_b))
    difference = a.mean(axis=0) - b.mean(axis=0)
    return float(difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root))


def mse_per_image(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of each pair of images, clamped to ``[-1, 1]``: ``[N, ...]`` twice -> float32 ``[N]``.

    Raises:
        ValueError: the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"Images of the same shape are needed, got {list(a.shape)} and {list(b.shape)}.")
    return (a.float().clamp(-1, 1) - b.float().clamp(-1, 1)).square().flatten(1).mean(1)


@torch.no_grad()
def label_accuracy(classifier: DigitClassifier, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of ``images`` ``[N, 1, 8, 8]``, clamped to ``[-1, 1]``, that the classifier reads as ``labels`` ``[N]``."""
    predicted = classifier(images.float().clamp(-1, 1)).argmax(1)
    return float((predicted == labels).double().mean())
