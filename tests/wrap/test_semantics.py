"""What wrapped files give, call by call: what the plan says, on what the dense file gives, image by image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lazycompress.plan.plan import Plan, dense, even

from .conftest import Pair
from .models import CHANNELS, WIDTH, Arrays
from .reference import Reference

TIMES = tuple(980.0 - 20 * k for k in range(20))

Make = Callable[..., Pair]
Steps = Iterator[tuple[Arrays, Callable[[Any], None]]]


def prompt(seed: int, batch: int = 2, tokens: int = 3) -> Any:
    return np.random.default_rng(1000 + seed).normal(size=(batch, tokens, WIDTH)).astype(np.float32)


def noise(seed: int, batch: int = 2, *sizes: int) -> Any:
    return np.random.default_rng(seed).normal(size=(batch, CHANNELS, *sizes)).astype(np.float32)


class Image:
    """One run of an Euler sampler, a call at a time."""

    def __init__(
        self, seed: int, words: Any, times: Sequence[float] = TIMES, size: int = 6, frames: int = 0, pace: float = 0.05
    ) -> None:
        sizes = (frames, size, size) if frames else (size, size)
        self.latents, self.words, self.times = noise(seed, len(words), *sizes), words, list(times)
        self.pace = np.float32(pace)

    @property
    def over(self) -> bool:
        return not self.times

    def inputs(self, words: Any = None) -> Arrays:
        time = np.full(len(self.latents), self.times[0], np.float32)
        words = self.words if words is None else words
        return {"hidden_states": self.latents, "timestep": time, "encoder_hidden_states": words}

    def step(self, output: Any) -> None:
        self.times.pop(0)
        self.latents = (self.latents - self.pace * output).astype(np.float32)


class Compared:
    """A wrapped file and the reference, called alike."""

    def __init__(self, pair: Pair, plan: Plan, streams: int = 2) -> None:
        self.lazy, self.dense = pair
        self.reference = Reference(self.dense, plan, streams)

    def call(self, inputs: Arrays) -> Any:
        expected = self.reference(**inputs)
        found = self.lazy(**inputs)
        assert found.shape == expected.shape
        if self.reference.computed[-1]:
            np.testing.assert_array_equal(found, expected)
        else:
            assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
        return found

    def run(self, image: Image, calls: int | None = None) -> list[bool]:
        """Sample on; what was computed."""
        before = len(self.reference.computed)
        for _ in range(len(image.times) if calls is None else calls):
            image.step(self.call(image.inputs()))
        return self.reference.computed[before:]


def fitted(plan: Plan, seed: int = 0) -> Plan:
    """With weights that no polynomial has."""
    random, past = np.random.default_rng(seed), []
    found: list[tuple[float, ...]] = []
    for timestep, computes in zip(plan.timesteps, plan.computes, strict=True):
        parts = [] if computes else plan.forecast(past, timestep)
        found.append(tuple(0.9 * weight + 0.1 * random.random() for _, weight in parts))
        past += [timestep] if computes else []
    return replace(plan, fitted=tuple(found))


@pytest.mark.parametrize("own_weights", [False, True])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_images_follow_the_plan(pair: Make, order: int, own_weights: bool) -> None:
    plan = fitted(even(TIMES, 0.4, order)) if own_weights else even(TIMES, 0.4, order)
    both = Compared(pair(plan), plan)
    assert both.run(Image(1, prompt(1))) == list(plan.computes)
    assert both.run(Image(2, prompt(1))) == list(plan.computes)  # the same prompt
    both.run(Image(2, prompt(2)), calls=7)  # cut off
    assert both.run(Image(3, prompt(2))) == list(plan.computes)
    assert both.run(Image(4, prompt(3, 1, 5))) == list(plan.computes)  # another batch, a longer prompt
    both.run(Image(5, prompt(3, 1, 5), size=8), calls=5)
    assert both.run(Image(6, prompt(2))) == list(plan.computes)


def test_a_plan_that_computes_everything_gives_what_the_dense_file_gives(pair: Make) -> None:
    lazy, full = pair(dense(TIMES))
    image = Image(1, prompt(1))
    while not image.over:
        output = lazy(**image.inputs())
        np.testing.assert_array_equal(output, full(**image.inputs()))
        image.step(output)


@pytest.mark.parametrize("calls", [9, 13, 40, 77])
def test_any_number_of_steps_gets_its_share(pair: Make, calls: int) -> None:
    plan = fitted(even(TIMES, 0.4, 1))
    both = Compared(pair(plan), plan)
    times = np.linspace(TIMES[0] + 3, TIMES[-1] - 3, calls).tolist()
    computed = both.run(Image(1, prompt(1), times))
    assert abs(sum(computed) - 0.4 * calls) <= 2
    assert max(len(run) for run in "".join("c" if c else "l" for c in computed).split("c")) <= 4  # not all at one end


def test_an_image_may_begin_within_the_plan(pair: Make) -> None:
    plan = even(TIMES, 0.25, 1)
    both = Compared(pair(plan), plan)
    computed = both.run(Image(1, prompt(1), TIMES[6:]))
    assert computed[0]
    assert computed[1:] == list(plan.computes[7:])


def test_timesteps_may_grow(pair: Make) -> None:
    plan = fitted(even([k / 10 for k in range(10)], 0.5, 2))
    both = Compared(pair(plan), plan)
    for seed in (1, 2):
        assert both.run(Image(seed, prompt(1), plan.timesteps)) == list(plan.computes)


@pytest.mark.parametrize("known", [True, False])
def test_samplers_may_call_twice_at_a_timestep(pair: Make, known: bool) -> None:
    times = [TIMES[0], *(t for t in TIMES[1:] for _ in range(2))]
    plan = even(times if known else TIMES, 0.5, 1)
    both = Compared(pair(plan), plan)
    computed = both.run(Image(1, prompt(1), times))
    if known:
        assert computed == list(plan.computes)
    assert 0.4 <= np.mean(computed) <= 0.65


def test_each_token_may_have_a_timestep(pair: Make) -> None:
    """As where a video goes on from its first frame, whose tokens are done."""

    def of_tokens(runner: Any) -> Any:
        return lambda timestep, **inputs: runner(timestep=np.stack([0 * timestep, timestep], axis=1), **inputs)

    plan = even(TIMES, 0.4, 1)
    lazy, full = pair(plan, {"per_token": True})
    both = Compared((of_tokens(lazy), of_tokens(full)), plan)
    for seed in (1, 2):
        assert both.run(Image(seed, prompt(1))) == list(plan.computes)


@pytest.mark.parametrize("sizes", [{"size": 6}, {"size": 6, "tokens": 3}])
def test_another_batch_where_other_sizes_are_fixed(pair: Make, sizes: dict[str, int]) -> None:
    plan = even(TIMES, 0.4, 2)
    both = Compared(pair(plan, sizes), plan)
    for batch in (2, 1, 2, 3):
        both.run(Image(1, prompt(1, batch)), calls=5)
        assert both.run(Image(2, prompt(1, batch))) == list(plan.computes)


@pytest.mark.parametrize("order", [0, 2])
def test_videos(pair: Make, order: int) -> None:
    """Five dimensions, and seven of what is kept. Outputs of another frame count leave nothing of the ones before."""
    plan = even(TIMES, 0.4, order)
    both = Compared(pair(plan, {"video": True}), plan)
    for frames in (3, 5, 3):
        image = Image(
            1, prompt(1), frames=frames, size=4, pace=0.3
        )  # far enough to need outputs to explain the next latents
        assert both.run(image) == list(plan.computes)
    both.run(Image(2, prompt(1), frames=3, size=4), calls=5)
    assert both.run(Image(3, prompt(1, batch=1), frames=3, size=4)) == list(plan.computes)


def test_one_sample_that_has_to_compute_has_all_compute(pair: Make) -> None:
    plan = even(TIMES, 0.5, 1)
    both = Compared(pair(plan), plan)
    image = Image(1, prompt(1))
    both.run(image, calls=3)
    image.latents[1] = noise(9, 2, 6, 6)[1]  # another image takes the place of the second sample
    assert both.run(image, calls=1) == [True]
    assert not plan.computes[3]
    both.run(image)


@pytest.mark.parametrize("calls", [1, 4, 5, 12])
def test_a_run_that_was_stopped_is_repeated(pair: Make, calls: int) -> None:
    """With the same noise: from where it was stopped, two streams are of one image."""
    plan = even(TIMES, 0.4, 1)
    both = Compared(pair(plan), plan)
    alone = Image(1, prompt(1))
    both.run(alone)
    for _ in range(2):
        both.run(Image(1, prompt(1)), calls)
        image = Image(1, prompt(1))
        assert both.run(image) == list(plan.computes)
        np.testing.assert_array_equal(image.latents, alone.latents)


def test_passes_that_nothing_but_their_order_tells_apart(pair: Make) -> None:
    """As where guidance perturbs the model itself: the passes have the same latents and conditions."""
    plan = even(TIMES, 0.5, 1)
    (known, _), (unknown, _) = pair(plan), pair(plan, moving=("encoder_hidden_states",))
    image, nothing = Image(1, prompt(1)), prompt(99)
    while not image.over:
        outputs = [known(**image.inputs()), known(**image.inputs(nothing))]
        for inputs, output in zip((image.inputs(), image.inputs(nothing)), outputs, strict=True):
            np.testing.assert_allclose(unknown(**inputs), output, rtol=0, atol=1e-5)
        image.step(outputs[1] + 3.0 * (outputs[0] - outputs[1]))


@pytest.mark.parametrize("streams", [1, 2, 3])
def test_guidance_in_calls_of_its_own(pair: Make, streams: int) -> None:
    plan = even(TIMES, 0.5, 1)
    both = Compared(pair(plan, streams=streams), plan, streams)
    for seed in (1, 2):
        image, nothing = Image(seed, prompt(seed)), prompt(99)
        while not image.over:
            with_words, without = both.call(image.inputs()), both.call(image.inputs(nothing))
            image.step(without + 3.0 * (with_words - without))
    share = np.mean(both.reference.computed)
    assert share == (1.0 if streams == 1 else 0.5)


def test_guidance_in_one_batch(pair: Make) -> None:
    plan = even(TIMES, 0.5, 2)
    both = Compared(pair(plan), plan)
    image = Image(1, prompt(1, 1))
    while not image.over:
        inputs = {name: np.repeat(value, 2, 0) for name, value in image.inputs().items()}
        inputs["encoder_hidden_states"][0] = prompt(99, 1)[0]
        without, with_words = both.call(inputs)
        image.step((without + 5.0 * (with_words - without))[None])
    assert both.reference.computed == list(plan.computes)


def test_two_images_of_one_prompt_take_turns(pair: Make) -> None:
    plan = even(TIMES, 0.5, 1)
    both = Compared(pair(plan), plan)
    images = [Image(seed, prompt(1)) for seed in (1, 2)]
    for k, turn in enumerate(np.random.default_rng(0).permutation([0, 1] * len(TIMES))):
        assert len(both.reference.computed) == k
        both.run(images[turn], calls=1)
    assert np.mean(both.reference.computed) == 0.5


@pytest.mark.parametrize("seed", range(3))
def test_whatever_comes_in_whatever_order(pair: Make, seed: int) -> None:
    """Images are begun, left and gone on with at random: no call gives anything but what its own image has."""
    random = np.random.default_rng(seed)
    plan = fitted(Plan(TIMES, (True, *(random.random(len(TIMES) - 1) < 0.4).tolist()), int(random.integers(3))))
    both = Compared(pair(plan, streams=3), plan, 3)
    images: list[Image] = []
    for _ in range(60):
        images = [image for image in images if not image.over]
        if not images or random.random() < 0.08:
            words = prompt(int(random.integers(2)), tokens=int(random.integers(2, 4)))
            images.append(Image(int(random.integers(1 << 30)), words, TIMES[int(random.integers(4)) :]))
        both.run(images[int(random.integers(len(images)))], calls=1)


def test_what_is_not_a_number_stays_in_its_image(pair: Make) -> None:
    plan = even(TIMES, 0.5, 2)
    (lazy, full), (clean, _) = pair(plan), pair(plan)
    bad = Image(1, prompt(1))
    for k in range(len(TIMES)):
        if k == 4:
            bad.latents[1] = np.nan
        inputs = bad.inputs()
        output = lazy(**inputs)
        if k >= 4:  # the second sample has to compute again and again
            np.testing.assert_array_equal(output[0], full(**inputs)[0])
        assert np.isfinite(output[0]).all()
        bad.step(output)
    after, expected = Image(5, prompt(1)), Image(5, prompt(1))
    for _ in range(len(TIMES)):
        ours, theirs = lazy(**after.inputs()), clean(**expected.inputs())
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
        after.step(ours)
        expected.step(theirs)


def test_inputs_that_move_are_no_conditions(pair: Make) -> None:
    plan = even(TIMES, 0.5, 1)
    shares = []
    for moving in ((), ("encoder_hidden_states",)):
        lazy, full = pair(plan, moving=moving)
        image, equal = Image(1, prompt(1)), []
        while not image.over:
            image.words = image.words + np.float32(0.01)
            output = lazy(**image.inputs())
            equal.append(np.array_equal(output, full(**image.inputs())))
            image.step(output)
        shares.append(np.mean(equal))
    assert shares == [1.0, 0.5]
