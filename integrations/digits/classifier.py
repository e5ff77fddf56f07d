"""A small CNN that reads the digits: it labels samples, and its features are the space of the Frechet distance."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from .data import NUM_CLASSES, Digits
from .model import WEIGHTS_DIR

CLASSIFIER_FILE = "classifier.safetensors"
FEATURE_DIM = 64


class DigitClassifier(nn.Module):
    """Two convolutions, one hidden layer of 64 features, ten logits (38,282 parameters)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv_2 = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.hidden = nn.Linear(32 * 4 * 4, FEATURE_DIM)
        self.head = nn.Linear(FEATURE_DIM, NUM_CLASSES)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Penultimate features: images ``[N, 1, 8, 8]`` -> ``[N, 64]``."""
        x = F.gelu(self.conv_1(images))
        x = F.gelu(self.conv_2(x))
        return F.gelu(self.hidden(x.flatten(1)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits: images ``[N, 1, 8, 8]`` -> ``[N, 10]``."""
        logits: torch.Tensor = self.head(self.features(images))
        return logits


def train_classifier(train: Digits, epochs: int = 60, batch: int = 64, seed: int = 0) -> DigitClassifier:
    """Trains on ``train`` for a few seconds on a CPU and returns the classifier in evaluation mode.

    The same seed gives the same weights on the same machine; the caller's random state is left alone.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = DigitClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(train.labels), generator=generator), batch):
            loss = F.cross_entropy(classifier(train.images[rows]), train.labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
    return classifier.eval()


def save_classifier(classifier: DigitClassifier, directory: Path) -> None:
    """Writes the float32 weights into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(classifier.state_dict(), directory / CLASSIFIER_FILE)


def load_classifier(directory: Path = WEIGHTS_DIR) -> DigitClassifier:
    """The bundled classifier, or the one in ``directory``: float32, on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: ``directory`` holds no classifier.
    """
    classifier = DigitClassifier()
    classifier.load_state_dict(load_file(directory / CLASSIFIER_FILE))
    return classifier.eval()
