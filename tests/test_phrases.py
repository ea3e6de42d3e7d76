"""Phrases made by rule: read back by a reader that shares nothing with the writer, both sides say the same."""

import os
import re
import subprocess
import sys
import zlib
from collections import Counter

import pytest
from program import ROOT

from jaxgpt.data.phrases import phrases

TRAIN, HELD_OUT = phrases()
PAIRS = TRAIN + HELD_OUT


def numbered(words: str, first: int, step: int = 1) -> dict[str, int]:
    return {word: first + index * step for index, word in enumerate(words.split())}


ENGLISH = {
    **numbered("zero one two three four five six seven eight nine ten eleven twelve", 0),
    **numbered("thirteen fourteen fifteen sixteen seventeen eighteen nineteen", 13),
    **numbered("twenty thirty forty fifty sixty seventy eighty ninety", 20, 10),
}
ENGLISH_DAYS = {
    **numbered("first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth", 1),
    **numbered("thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth", 13),
    **numbered("twentieth thirtieth", 20, 10),
}
GERMAN_ONES = numbered("ein zwei drei vier fünf sechs sieben acht neun", 1)
GERMAN_TEENS = numbered("zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn achtzehn neunzehn", 10)
GERMAN_TENS = numbered("zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig", 20, 10)
GERMAN_DAYS = numbered("erste zweite dritte vierte fünfte sechste siebte achte neunte zehnte elfte zwölfte", 1)
MONTHS = numbered("January February March April May June July August September October November December", 1)
GERMAN_MONTHS = numbered("Januar Februar März April Mai Juni Juli August September Oktober November Dezember", 1)
WEEKDAYS = numbered("Monday Tuesday Wednesday Thursday Friday Saturday Sunday", 1)
GERMAN_WEEKDAYS = numbered("Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag", 1)
LONGEST = (0, 31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)

Date = tuple[int, int, int | None]


def read_english(text: str) -> int:
    """A number in English words; "and" must stand just where the British put it."""
    if "thousand" in text:
        count, rest = re.fullmatch(r"(.+?) thousand( .+)?", text).groups()
        return 1000 * read_english(count) + read_rest(rest, required="hundred" not in (rest or ""))
    if "hundred" in text:
        count, rest = re.fullmatch(r"(\S+) hundred( .+)?", text).groups()
        return 100 * ENGLISH[count] + read_rest(rest, required=True)
    tens, hyphen, ones = text.partition("-")
    assert not hyphen or (ENGLISH[tens] >= 20 and 1 <= ENGLISH[ones] <= 9)
    return ENGLISH[tens] + (ENGLISH[ones] if hyphen else 0)


def read_rest(text: str | None, required: bool) -> int:
    if text is None:
        return 0
    assert text.startswith(" and ") == required, text
    return read_english(text.removeprefix(" and").removeprefix(" "))


def read_german(text: str, end: bool = True) -> int:
    """A number in a German word; `end` says that "eins" and not "ein" is right."""
    for name, unit in (("tausend", 1000), ("hundert", 100)):
        if name in text:
            count, _, rest = text.partition(name)
            return unit * read_german(count, end=False) + (read_german(rest, end) if rest else 0)
    if text in ("ein", "eins"):
        assert (text == "eins") == end
        return 1
    if "und" in text:
        ones, tens = text.split("und")
        return GERMAN_ONES[ones] + GERMAN_TENS[tens]
    return ({"null": 0} | GERMAN_ONES | GERMAN_TEENS | GERMAN_TENS)[text]


def read_english_year(text: str) -> int:
    if "thousand" in text:
        return read_english(text)
    century, rest = text.split(" ", 1)
    if rest == "hundred":
        return 100 * ENGLISH[century]
    years = read_english(rest.removeprefix("oh "))
    assert rest.startswith("oh ") == (years < 10)
    return 100 * ENGLISH[century] + years


def read_english_day(text: str) -> int:
    tens, hyphen, ones = text.partition("-")
    return ENGLISH[tens] + ENGLISH_DAYS[ones] if hyphen else ENGLISH_DAYS[text]


def read_german_day(text: str) -> int:
    if text in GERMAN_DAYS:
        return GERMAN_DAYS[text]
    if text.endswith("zehnte"):
        return GERMAN_TEENS[text.removesuffix("te")]
    return read_german(re.fullmatch("(.+ig)ste", text)[1])


def read_english_date(text: str) -> Date:
    if match := re.fullmatch(r"(\w+) ([1-9]\d?), (\d{4})", text):
        month, day, year = match.groups()
        return int(day), MONTHS[month], int(year)
    day, month, year = re.fullmatch(r"the (\S+) of (\w+)(?: (.+))?", text).groups()
    return read_english_day(day), MONTHS[month], read_english_year(year) if year else None


def read_german_date(text: str) -> Date:
    if match := re.fullmatch(r"([1-9]\d?)\. (\w+) (\d{4})", text):
        day, month, year = match.groups()
        return int(day), GERMAN_MONTHS[month], int(year)
    day, month, year = re.fullmatch(r"der (\w+) (\w+)(?: (\w+))?", text).groups()
    return read_german_day(day), GERMAN_MONTHS[month], read_german(year) if year else None


def read_english_time(text: str) -> int:
    """Minutes after twelve."""
    if text.endswith(" o'clock"):
        return ENGLISH[text.removesuffix(" o'clock")] % 12 * 60
    minutes, direction, hour = text.split(" ")
    count = {"quarter": 15, "half": 30}.get(minutes) or read_english(minutes)
    return (ENGLISH[hour] * 60 + {"past": count, "to": -count}[direction]) % 720


def read_german_time(text: str) -> int:
    """Minutes after twelve."""
    if match := re.fullmatch(r"(\w+) (vor|nach) (.+)", text):
        minutes, direction, base = match.groups()
        count = 15 if minutes == "Viertel" else read_german(minutes)
        return (read_german_time(base) + (count if direction == "nach" else -count)) % 720
    if text.startswith("halb "):
        return (read_german(text.removeprefix("halb ")) * 60 - 30) % 720
    if text.endswith(" Uhr"):
        return read_german(text.removesuffix(" Uhr"), end=False) % 12 * 60
    return read_german(text) % 12 * 60


def kind(english: str) -> str:
    if re.search(r"\d", english):
        return "dates in digits"
    if english.split(",")[0] in WEEKDAYS:
        return "weekday and date"
    if english.startswith("the "):
        return "dates in words"
    if re.search(r" (past|to|o'clock)\b", english):
        return "times"
    return "numbers"


def of_kind(*names: str) -> list[tuple[str, str]]:
    return [pair for pair in PAIRS if kind(pair[0]) in names]


def test_sizes():
    assert 19_000 <= len(TRAIN) <= 21_000
    assert len(HELD_OUT) == 1_000


def test_nothing_occurs_twice_in_either_language():
    for side in (0, 1):
        assert len({pair[side] for pair in PAIRS}) == len(PAIRS)


def test_every_call_makes_the_same():
    assert phrases() == (TRAIN, HELD_OUT)


def test_other_processes_make_the_same_and_their_global_generator_is_left_alone():
    # In another process because there no beartype draws from the generator, and the order of a set of strings differs.
    code = """import random, zlib
from jaxgpt.data.phrases import phrases
state = random.getstate()
made = phrases()
assert random.getstate() == state
print(zlib.crc32(repr(made).encode()))"""
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        ran = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, check=True)
        assert int(ran.stdout) == zlib.crc32(repr((TRAIN, HELD_OUT)).encode())


def test_shares_are_those_of_the_docstring():
    shares = {"numbers": 42, "dates in words": 25, "dates in digits": 14, "weekday and date": 12, "times": 7}
    for pairs, tolerance in ((TRAIN, 1), (HELD_OUT, 5)):
        counts = Counter(kind(english) for english, _ in pairs)
        assert {name: 100 * count / len(pairs) for name, count in counts.items()} == pytest.approx(
            shares, abs=tolerance
        )


def test_numbers_say_the_same_on_both_sides():
    pairs = of_kind("numbers")
    numbers = [read_english(english) for english, _ in pairs]
    assert numbers == [read_german(german) for _, german in pairs]
    assert all(("tausend" in german) == (read_german(german) >= 1_000) for _, german in pairs)
    assert set(range(1_000)) <= set(numbers) and 900_000 < max(numbers) < 1_000_000
    assert sum(number < 10_000 for number in numbers) == pytest.approx(2 / 3 * len(numbers), rel=0.01)


def test_small_numbers_are_trained_on():
    trained = {read_english(english) for english, _ in TRAIN if kind(english) == "numbers"}
    assert set(range(100)) <= trained


def test_dates_say_the_same_on_both_sides():
    pairs = of_kind("dates in words", "dates in digits")
    dates = [read_english_date(english) for english, _ in pairs]
    assert dates == [read_german_date(german) for _, german in pairs]
    for day, month, year in dates:
        assert 1 <= day <= LONGEST[month]
        assert year is None or 1700 <= year <= 2099
        leap = year is None or (year % 4 == 0 and year not in (1700, 1800, 1900))
        assert leap or (day, month) != (29, 2)
    assert {year for _, _, year in dates} == {None, *range(1700, 2100)}


def test_years_before_2000_are_read_in_hundreds():
    for _, german in of_kind("dates in words"):
        _, _, year = read_german_date(german)
        if year is not None:
            assert ("tausend" in german) == (year >= 2000)


def test_weekdays_and_dates_say_the_same_on_both_sides():
    pairs = of_kind("weekday and date")
    said = set()
    for english, german in pairs:
        weekday, date = english.split(", ")
        german_weekday, german_date = german.split(", ")
        assert WEEKDAYS[weekday] == GERMAN_WEEKDAYS[german_weekday]
        assert read_english_date(date) == read_german_date(german_date)
        said.add((weekday, read_english_date(date)))
    assert len(said) == len(pairs) == 7 * 366


def test_times_say_the_same_on_both_sides():
    said = set()
    for english, german in of_kind("times"):
        day, time = re.fullmatch(r"(?:(.*)\bat )?(.+)", english).groups()
        german_day, german_time = re.fullmatch(r"(?:(.*)\bum )?(.+)", german).groups()
        assert read_english_time(time) == read_german_time(german_time), (english, german)
        said.add((day, german_day, read_english_time(time)))
    days = {(f"on {day} ", f"am {german} ") for day, german in zip(WEEKDAYS, GERMAN_WEEKDAYS, strict=True)}
    days |= {(None, None), ("", ""), ("today ", "heute "), ("tomorrow ", "morgen ")}
    assert said == {(*day, minute) for day in days for minute in range(0, 720, 5)}


def test_every_word_of_what_is_held_out_is_often_trained_on():
    trained = Counter(word for english, _ in TRAIN for word in re.findall("[A-Za-z']+", english))
    held_out = {word for english, _ in HELD_OUT for word in re.findall("[A-Za-z']+", english)}
    assert min(trained[word] for word in held_out) >= 50


@pytest.mark.parametrize(
    ("english", "german"),
    [
        ("zero", "null"),
        ("one", "eins"),
        ("twenty-one", "einundzwanzig"),
        ("seventy-six", "sechsundsiebzig"),
        ("one hundred and one", "einhunderteins"),
        ("three hundred and forty-two", "dreihundertzweiundvierzig"),
        ("the first of January", "der erste Januar"),
        ("Monday, the third of March", "Montag, der dritte März"),
        ("Sunday, the thirty-first of May", "Sonntag, der einunddreißigste Mai"),
        ("one o'clock", "ein Uhr"),
        ("half past twelve", "halb eins"),
        ("half past three", "halb vier"),
        ("quarter to seven", "Viertel vor sieben"),
        ("twenty past six", "zwanzig nach sechs"),
        ("on Friday at twenty-five past eight", "am Freitag um fünf vor halb neun"),
    ],
)
def test_known_phrases(english, german):
    assert dict(PAIRS)[english] == german
