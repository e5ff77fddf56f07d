"""From an emoji's official name to a short prompt of words, and which combinations of words training never sees."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

MAX_WORDS = 10
"""A prompt's length; with the start and end tokens that makes the tokenizer's 12."""

SKIN_TONES = {
    "1F3FB": "light skin",
    "1F3FC": "medium light skin",
    "1F3FD": "medium skin",
    "1F3FE": "medium dark skin",
    "1F3FF": "dark skin",
}
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white", "pink", "grey")
PERSONS = ("man", "woman", "person")
HELD_OUT_PER_KIND = ((COLOURS, 8), (PERSONS, 16), (tuple(SKIN_TONES.values()), 16))


def name_words(name: str) -> list[str]:
    """Lower-case words of a name; a digit is a word of its own, as it is to CLIP's tokenizer."""
    return re.findall(r"[a-z]+|[0-9]", name.lower().replace("'", ""))


def to_prompt(name: str, tones: Sequence[str] = ()) -> str:
    """``"WOMAN MAGE", ["1F3FF"]`` -> ``"woman mage dark skin"``: the name is cut where both do not fit.

    Raises:
        KeyError: an unknown skin tone.
    """
    skin = " ".join(SKIN_TONES[tone] for tone in tones).split()
    return " ".join(name_words(name)[: MAX_WORDS - len(skin)] + skin)


def split_attribute(prompt: str, attributes: Sequence[str]) -> tuple[str, str] | None:
    """The rest of a prompt and its attribute, if exactly one of ``attributes`` is in it as whole words.

    Longer attributes are looked for first: "medium dark skin" is not "dark skin".
    """
    rest, found = f" {prompt} ", []
    for attribute in sorted(attributes, key=len, reverse=True):
        count = rest.count(f" {attribute} ")
        found += [attribute] * count
        rest = rest.replace(f" {attribute} ", " _ ")
    return (rest.strip(), found[0]) if len(found) == 1 else None


def choose_held_out(prompts: Iterable[str]) -> list[str]:
    """About 40 combinations of a thing and an attribute (a colour, a person, a skin tone) to keep out of training.

    A combination may be held out if its thing stays with at least two other attributes of the kind, and its attribute
    with at least three other things. Of those, the ones with the smallest SHA-256 are taken, at most one for a thing.
    """
    prompts = sorted(set(prompts))
    chosen: list[str] = []
    for attributes, count in HELD_OUT_PER_KIND:
        pairs = {prompt: pair for prompt in prompts if (pair := split_attribute(prompt, attributes))}
        attributes_of, things_of = defaultdict(set), defaultdict(set)
        for thing, attribute in pairs.values():
            attributes_of[thing].add(attribute)
            things_of[attribute].add(thing)
        used: set[str] = set()
        ranked = sorted(pairs, key=lambda prompt: hashlib.sha256(prompt.encode()).hexdigest())
        taken = 0
        for prompt in ranked:
            thing, attribute = pairs[prompt]
            plain = attributes is not PERSONS or not thing.endswith("skin")
            if plain and thing not in used and len(attributes_of[thing]) > 2 and len(things_of[attribute]) > 3:
                used.add(thing)
                chosen.append(prompt)
                taken += 1
            if taken == count:
                break
    return sorted(set(chosen))


def is_held_out(prompt: str, held_out: Iterable[str]) -> bool:
    """Whether a prompt is one of ``held_out``, or one of them with a skin tone."""
    tone = {word for tone in SKIN_TONES.values() for word in tone.split()}
    return any(
        prompt == other or (prompt.startswith(other + " ") and tone.issuperset(prompt[len(other) :].split()))
        for other in held_out
    )
