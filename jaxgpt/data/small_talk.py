"""Small talk made by rule: conversations for a first chatbot, nothing downloaded.

Sums of two numbers up to 20, what animals say, opposites, spelling, capitals, and names: who says theirs and is asked
for it later gets it back, which takes a memory of the turns before. Some 3,000 conversations of one to three turns.
"""

from __future__ import annotations

import random

Turn = tuple[str, str]  # (what a person says, the answer)

SEED = 1966  # the year of ELIZA
TRAIN, HELD_OUT = 3_000, 200
NAMES = [
    "Ada", "Alan", "Amir", "Ana", "Ben", "Carla", "Chen", "Dora", "Emil", "Eva", "Fay", "Finn", "Gita", "Hugo", "Ida",
    "Ivan", "Jack", "Kim", "Lena", "Leo", "Lin", "Mara", "Max", "Mia", "Nina", "Noah", "Olga", "Omar", "Paul", "Rosa",
    "Sam", "Sara", "Tara", "Tim", "Uma", "Vera", "Wim", "Yara", "Zoe",
]  # fmt: skip
ANIMALS = {
    "cat": "meow", "dog": "woof", "cow": "moo", "duck": "quack", "sheep": "baa", "horse": "neigh", "pig": "oink",
    "frog": "ribbit", "owl": "hoot", "lion": "roar", "bee": "buzz", "snake": "hiss",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "old": "new", "light": "dark", "high": "low", "open": "closed",
    "early": "late", "hard": "soft", "full": "empty", "wet": "dry", "loud": "quiet",
}  # fmt: skip
CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo",
    "Peru": "Lima", "Kenya": "Nairobi", "Norway": "Oslo", "Greece": "Athens", "Cuba": "Havana", "India": "New Delhi",
}  # fmt: skip
WORDS = [*ANIMALS, *OPPOSITES, *OPPOSITES.values()]


def small_talk() -> tuple[list[list[Turn]], list[list[Turn]]]:
    """Make all conversations, the same at every call: those to train on and those held out. None occurs twice."""
    generator = random.Random(SEED)
    made: dict[tuple[Turn, ...], None] = {}
    while len(made) < TRAIN + HELD_OUT:
        made[tuple(_conversation(generator))] = None
    everything = [list(turns) for turns in made]
    generator.shuffle(everything)
    return everything[:TRAIN], everything[TRAIN:]


def _conversation(generator: random.Random) -> list[Turn]:
    if generator.random() < 0.4:
        name = generator.choice(NAMES)
        hello = generator.choice(["my name is", "i am", "hello, i am"])
        ask = generator.choice(["what is my name?", "do you know my name?", "who am i?"])
        between = [_question(generator)] if generator.random() < 0.5 else []
        return [(f"{hello} {name}", f"Nice to meet you, {name}!"), *between, (ask, f"Your name is {name}.")]
    return [_question(generator) for _ in range(generator.choice([1, 1, 2, 3]))]


def _question(generator: random.Random) -> Turn:
    kind = generator.choice(["sum", "animal", "opposite", "spell", "capital", "hello"])
    if kind == "sum":
        a, b = generator.randint(0, 20), generator.randint(0, 20)
        return generator.choice([f"what is {a} plus {b}?", f"{a} + {b}"]), f"{a} plus {b} is {a + b}."
    if kind == "animal":
        animal = generator.choice(list(ANIMALS))
        return f"what does the {animal} say?", f"The {animal} says {ANIMALS[animal]}."
    if kind == "opposite":
        word = generator.choice(list(OPPOSITES))
        return f"what is the opposite of {word}?", f"The opposite of {word} is {OPPOSITES[word]}."
    if kind == "spell":
        word = generator.choice(WORDS)
        return f"how do you spell {word}?", "-".join(word.upper())
    if kind == "capital":
        country = generator.choice(list(CAPITALS))
        return f"what is the capital of {country}?", f"{CAPITALS[country]} is the capital of {country}."
    return generator.choice(["hello", "hi", "good morning"]), "Hello! Ask me something."
