"""Short film reviews made by rule, each positive or negative: labelled text for a first classifier, nothing downloaded.

Eight forms of sentence, of 48 adjectives, 16 verbs and 12 things that a film has. In five of them the word that says
most is not what counts: it is denied ("nobody could call the plot dull"), or outweighed by what comes after ("i
expected a thrilling film and got a tedious one"), so that a list of good and bad words does not suffice.
"""

from __future__ import annotations

import random
from collections.abc import Callable

Labelled = tuple[str, str]  # (text, label)

SEED = 1977
TRAIN, HELD_OUT = 4_000, 500
POSITIVE, NEGATIVE = "positive", "negative"
THINGS = [
    "film",
    "plot",
    "acting",
    "script",
    "music",
    "ending",
    "cast",
    "dialogue",
    "pacing",
    "story",
    "humour",
    "direction",
]
ADJECTIVES = {
    POSITIVE: [
        "brilliant",
        "charming",
        "clever",
        "delightful",
        "dazzling",
        "elegant",
        "engaging",
        "enjoyable",
        "entertaining",
        "fresh",
        "funny",
        "gripping",
        "honest",
        "hilarious",
        "imaginative",
        "inspired",
        "lovely",
        "memorable",
        "moving",
        "powerful",
        "superb",
        "tender",
        "thrilling",
        "witty",
    ],
    NEGATIVE: [
        "annoying",
        "awful",
        "bland",
        "boring",
        "clumsy",
        "confusing",
        "dismal",
        "dreary",
        "dull",
        "flat",
        "forgettable",
        "hollow",
        "lame",
        "lifeless",
        "messy",
        "painful",
        "pointless",
        "predictable",
        "shallow",
        "silly",
        "stale",
        "tedious",
        "terrible",
        "ugly",
    ],
}
VERBS = {
    POSITIVE: ["loved", "enjoyed", "admired", "adored", "liked", "treasured", "praised", "recommend"],
    NEGATIVE: ["hated", "disliked", "loathed", "despised", "regret", "endured", "detested", "resent"],
}
DEGREES = ["", "really ", "quite ", "so ", "very ", "truly "]
OPENERS = ["", "honestly , ", "in the end ", "to my surprise ", "as always ", "this time "]


def reviews() -> tuple[list[Labelled], list[Labelled]]:
    """Make all reviews, the same at every call.

    Returns:
        The reviews to train on and the reviews held out. No text occurs twice, and as many are positive as negative.
    """
    generator = random.Random(SEED)
    made: dict[str, str] = {}
    for number in range(TRAIN + HELD_OUT):
        label = (POSITIVE, NEGATIVE)[number % 2]
        text = _review(generator, label)
        while text in made:
            text = _review(generator, label)
        made[text] = label
    everything = list(made.items())
    generator.shuffle(everything)
    return everything[:TRAIN], everything[TRAIN:]


def _review(generator: random.Random, label: str) -> str:
    other = NEGATIVE if label == POSITIVE else POSITIVE
    thing, second = generator.sample(THINGS, 2)
    degree, verb = generator.choice(DEGREES), generator.choice(VERBS[label])
    fitting, opposite = generator.choice(ADJECTIVES[label]), generator.choice(ADJECTIVES[other])
    forms: list[Callable[[], str]] = [
        lambda: f"the {thing} is {degree}{fitting}",
        lambda: f"i {verb} the {thing} and the {second}",
        lambda: f"rarely have i seen {_article(fitting)} {fitting} {thing}",
        lambda: f"the {thing} is not {degree}{opposite}",
        lambda: f"nobody could call the {thing} {opposite}",
        lambda: f"the {thing} is {opposite} , but the {second} is {degree}{fitting}",
        lambda: f"i expected {_article(opposite)} {opposite} {thing} and got {_article(fitting)} {fitting} one",
        lambda: f"far from {opposite} , the {thing} is {degree}{fitting}",
    ]
    return generator.choice(OPENERS) + generator.choice(forms)()


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" or word == "honest" else "a"
