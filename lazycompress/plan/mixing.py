"""How a sampler makes images of the model's outputs, found by playing a tape back with some of them changed.

Any sampler that is affine in the outputs is described exactly, multistep ones and guidance included: each output of a call
belongs to an image, weighs so much in its prediction, and reaches so far into its final latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import InputError
from ..sampling import Sampler
from .calibration import Floats
from .runs import Denoise
from .tape import Tape, play_back


@dataclass(frozen=True, eq=False)
class Mixing:
    """What a sampler makes of the outputs. T calls, B images, Q samples of an output for each image.

    Attributes:
        samples: of the output that belong to an image, int64 [B, Q]: more than one where guidance is computed in one call.
        weights: of them in the image's prediction, float64 [T, Q].
        reach: of an error of the prediction, float64 [T]: mean squares of the final latents and of the prediction differ
            by its square.
    """

    samples: npt.NDArray[np.int64]
    weights: Floats
    reach: Floats

    def prediction(self, output: Tensor, call: int, final: Tensor) -> Tensor:
        """What counts of an output's first tensor [B * Q, ...], for latents like `final`: float32 [B, elements]."""
        counted = _counted(output, final).float().flatten(1)[torch.from_numpy(self.samples)]
        return torch.einsum("bqd,q->bd", counted, torch.from_numpy(self.weights[call]).float())


def mixing_of(tape: Tape, denoise: Denoise, sampler: Sampler) -> Mixing:
    """Change one output of each image at a time, all by the same direction, and see what comes of it.

    Raises:
        InputError: the batch of the outputs is no multiple of that of the latents, or no output reaches the latents.
    """
    samples = _samples(tape, denoise, sampler)
    images, many = samples.shape
    jobs = [(call, q) for call in range(len(tape.outputs)) for q in range(many)]
    generator = torch.Generator().manual_seed(0)
    # Float32 whatever a program has made torch's default, here and below.
    direction = torch.randn(_counted(tape.value(0), tape.final).shape[1:], generator=generator, dtype=torch.float32)
    base = play_back(tape, denoise, sampler).double()
    effects: list[Tensor] = []
    for begin in range(0, len(jobs), images):
        batch = jobs[begin : begin + images]
        changed: dict[int, Tensor] = {}
        sizes = []
        for image, (call, q) in enumerate(batch):
            value = changed.setdefault(call, tape.value(call).clone())
            sizes.append(_change(value, int(samples[image, q]), direction, tape.final))
        moved = (play_back(tape, denoise, sampler, changed).double() - base).flatten(1)
        effects += [moved[image] / size for image, size in enumerate(sizes)]
    # All effects are along one direction of the latents: that of the largest.
    largest = max(effects, key=lambda effect: float(effect.norm()))
    if float(largest.norm()) == 0 or not bool(torch.isfinite(largest).all()):
        raise InputError("no output of the model reaches the final latents: does the sampler call what it is given?")
    unit = largest / largest.norm()
    found = np.array([float(effect @ unit) for effect in effects]).reshape(-1, many) / float(direction.norm())
    found *= (direction.numel() / largest.numel()) ** 0.5
    return Mixing(samples, *_weights(found))


def _weights(found: Floats) -> tuple[Floats, Floats]:
    """Weights [T, Q] and reach [T] of effects [T, Q]: guidance has weights that add up to one."""
    reach = found.sum(axis=1)
    largest = np.take_along_axis(found, np.abs(found).argmax(axis=1)[:, None], axis=1)[:, 0]
    # Differences of equal outputs: nothing adds up. Any scale will do for them.
    reach = np.where(np.abs(reach) > 1e-3 * np.abs(largest), reach, largest)
    weights = np.divide(found, reach[:, None], out=np.full_like(found, 1.0 / found.shape[1]), where=reach[:, None] != 0)
    return weights, reach


def _samples(tape: Tape, denoise: Denoise, sampler: Sampler) -> npt.NDArray[np.int64]:
    """Samples of an output that belong to each image, int64 [B, Q]."""
    batch, images = tape.value(0).shape[0], tape.final.shape[0]
    if batch % images or any(tape.value(call).shape[0] != batch for call in range(len(tape.outputs))):
        raise InputError(
            f"the model's outputs have a batch of {batch} and the final latents one of {images}: planning needs the same "
            "number of outputs for each image at every call"
        )
    apart = np.arange(batch).reshape(batch // images, images).T  # all conditional ones, then all others
    if images == 1 or batch == images:
        return apart
    # Change the second sample at all calls: it belongs to the second image, unless the samples of an image are neighbours.
    changed = {}
    direction = torch.ones(_counted(tape.value(0), tape.final).shape[1:], dtype=torch.float32)
    for call in range(len(tape.outputs)):
        changed[call] = tape.value(call).clone()
        _ = _change(changed[call], 1, direction, tape.final)
    moved = (play_back(tape, denoise, sampler, changed).float() - tape.final.float()).flatten(1).norm(dim=1)
    return apart if int(moved.argmax()) == 1 or float(moved.max()) == 0 else np.arange(batch).reshape(images, -1)


def _change(value: Tensor, sample: int, direction: Tensor, final: Tensor) -> float:
    """Add to one sample, in place, what is large enough for the precision and small enough for a derivative."""
    counted = _counted(value, final)[sample]
    scale = float(counted.float().square().mean().sqrt()) or 1.0
    # Schedulers compute in float32, whatever they are given.
    size = scale * max(torch.finfo(value.dtype).eps, torch.finfo(torch.float32).eps) ** 0.5
    before = counted.float().clone()
    counted += (size * direction).to(value.dtype)
    # As rounded: what was added is not quite what was asked for.
    return float((counted.float() - before).flatten() @ direction.flatten() / direction.square().sum())


def _counted(output: Tensor, final: Tensor) -> Tensor:
    """A view of what the scheduler takes: some models predict a variance too, in a second half of the channels."""
    channels = final.shape[1] if final.dim() > 1 else 0
    return output[:, :channels] if output.dim() > 1 and output.shape[1] == 2 * channels else output
