"""English and German number and date phrases, made by rule: parallel text for a first translator, nothing downloaded.

Of about 21,500 pairs:

    42 %  cardinal numbers    three hundred and forty-two                dreihundertzweiundvierzig
    25 %  dates in words      the third of March nineteen eighty-seven   der dritte März neunzehnhundertsiebenundachtzig
    14 %  dates in digits     March 3, 1987                              3. März 1987
    12 %  weekday and date    Monday, the third of March                 Montag, der dritte März
     7 %  times of the clock  on Friday at half past three               am Freitag um halb vier

Two thirds of the numbers are below 10,000 and none has more than six digits; years are 1700 to 2099; a few dates in
words have no year, and four in eleven times no weekday. There is one way to say each: "and" before the last two digits
of every group of three, "einhundert" and "eintausend" rather than "hundert" and "tausend".
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import date

Pair = tuple[str, str]  # (English, German)

SEED = 1987
HELD_OUT = 1_000
BASIC = 100  # numbers below are never held out: every other phrase is built of them
SMALL, MEDIUM, LARGE = 1_000, 10_000, 1_000_000  # every number below the first, a sample up to the second and the third
MEDIUM_NUMBERS, LARGE_NUMBERS = 5_000, 3_000
WORD_DATES, DIGIT_DATES = 5_100, 2_900  # with a year
FIRST_DAY, LAST_DAY = date(1700, 1, 1), date(2099, 12, 31)


def _table(english: str, german: str) -> tuple[Pair, ...]:
    return tuple(zip(english.split(), german.split(), strict=True))


NUMBERS = _table(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen",
    "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn "
    "achtzehn neunzehn",
)
TENS = _table(
    "twenty thirty forty fifty sixty seventy eighty ninety",
    "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig",
)
# Every other ordinal is the number and an ending.
ENGLISH_ORDINALS = {1: "first", 2: "second", 3: "third", 5: "fifth", 8: "eighth", 9: "ninth", 12: "twelfth"}
GERMAN_ORDINALS = {1: "erste", 3: "dritte", 7: "siebte", 8: "achte"}

MONTHS = _table(
    "January February March April May June July August September October November December",
    "Januar Februar März April Mai Juni Juli August September Oktober November Dezember",
)
WEEKDAYS = _table(
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag",
)
# What stands before the hour, and whether German names the next hour; English does so after "to" only.
PAST = (
    ("five past", "fünf nach", False),
    ("ten past", "zehn nach", False),
    ("quarter past", "Viertel nach", False),
    ("twenty past", "zwanzig nach", False),
    ("twenty-five past", "fünf vor halb", True),
    ("half past", "halb", True),
)
TO = (
    ("twenty-five to", "fünf nach halb"),
    ("twenty to", "zwanzig vor"),
    ("quarter to", "Viertel vor"),
    ("ten to", "zehn vor"),
    ("five to", "fünf vor"),
)
BEFORE_TIMES = (("at", "um"), ("today at", "heute um"), ("tomorrow at", "morgen um"))


def phrases() -> tuple[list[Pair], list[Pair]]:
    """Make all pairs, the same at every call.

    Returns:
        The pairs to train on and the pairs held out, each in a mixed order. No phrase of either language occurs twice.
    """
    generator = random.Random(SEED)
    always = [_cardinal(number) for number in range(BASIC)]
    others = [*_cardinals(generator), *_dates(generator), *_weekday_dates(), *_times()]
    generator.shuffle(others)
    train = always + others[HELD_OUT:]
    generator.shuffle(train)
    return train, others[:HELD_OUT]


def _cardinals(generator: random.Random) -> Iterator[Pair]:
    numbers = [
        *range(BASIC, SMALL),
        *generator.sample(range(SMALL, MEDIUM), MEDIUM_NUMBERS),
        *generator.sample(range(MEDIUM, LARGE), LARGE_NUMBERS),
    ]
    return map(_cardinal, numbers)


def _cardinal(number: int) -> Pair:
    return _english(number), _german(number)


def _dates(generator: random.Random) -> Iterator[Pair]:
    """Yield every day without a year, then a sample of days with one, in words and in digits."""
    for day in _days_of_a_year():
        yield _day_in_words(day)
    span = range(FIRST_DAY.toordinal(), LAST_DAY.toordinal() + 1)
    for day in map(date.fromordinal, generator.sample(span, WORD_DATES)):
        english, german = _day_in_words(day)
        yield f"{english} {_english_year(day.year)}", f"{german} {_german_year(day.year)}"
    for day in map(date.fromordinal, generator.sample(span, DIGIT_DATES)):
        english, german = MONTHS[day.month - 1]
        yield f"{english} {day.day}, {day.year}", f"{day.day}. {german} {day.year}"


def _weekday_dates() -> Iterator[Pair]:
    for day in _days_of_a_year():
        english, german = _day_in_words(day)
        for english_weekday, german_weekday in WEEKDAYS:
            yield f"{english_weekday}, {english}", f"{german_weekday}, {german}"


def _days_of_a_year() -> Iterator[date]:
    """Yield the 366 days of a leap year."""
    return map(date.fromordinal, range(date(2000, 1, 1).toordinal(), date(2001, 1, 1).toordinal()))


def _day_in_words(day: date) -> Pair:
    english, german = MONTHS[day.month - 1]
    return f"the {_english_ordinal(day.day)} of {english}", f"der {_german_ordinal(day.day)} {german}"


def _times() -> Iterator[Pair]:
    for hour in range(1, 13):
        for english, german in _times_from(hour):
            yield english, german
            for english_before, german_before in BEFORE_TIMES:
                yield f"{english_before} {english}", f"{german_before} {german}"
            for english_weekday, german_weekday in WEEKDAYS:
                yield f"on {english_weekday} at {english}", f"am {german_weekday} um {german}"


def _times_from(hour: int) -> Iterator[Pair]:
    """Yield the hour and each five minutes until the next."""
    following = hour % 12 + 1
    yield f"{_english(hour)} o'clock", f"{_german(hour, before_noun=True)} Uhr"
    for english, german, german_names_next in PAST:
        yield f"{english} {_english(hour)}", f"{german} {_german(following if german_names_next else hour)}"
    for english, german in TO:
        yield f"{english} {_english(following)}", f"{german} {_german(following)}"


def _english(number: int) -> str:
    """A number from 0 to 999,999 in words."""
    if number < 20:
        return NUMBERS[number][0]
    if number < 100:
        tens, ones = divmod(number, 10)
        return TENS[tens - 2][0] + (f"-{NUMBERS[ones][0]}" if ones else "")
    unit, name = (1_000, "thousand") if number >= 1_000 else (100, "hundred")
    count, rest = divmod(number, unit)
    link = " and " if rest < 100 else " "
    return f"{_english(count)} {name}" + (link + _english(rest) if rest else "")


def _german(number: int, before_noun: bool = False) -> str:
    """A number from 0 to 999,999 as one word; a final "eins" is "ein" where a word follows, as in "ein Uhr"."""
    if number == 1 and before_noun:
        return "ein"
    if number < 20:
        return NUMBERS[number][1]
    if number < 100:
        tens, ones = divmod(number, 10)
        return (f"{_german(ones, before_noun=True)}und" if ones else "") + TENS[tens - 2][1]
    unit, name = (1_000, "tausend") if number >= 1_000 else (100, "hundert")
    count, rest = divmod(number, unit)
    return _german(count, before_noun=True) + name + (_german(rest, before_noun) if rest else "")


def _english_ordinal(number: int) -> str:
    """The ordinal of a number from 1 to 99."""
    tens, ones = divmod(number, 10)
    if tens >= 2 and ones:
        return f"{TENS[tens - 2][0]}-{_english_ordinal(ones)}"
    if tens >= 2:
        return TENS[tens - 2][0].removesuffix("y") + "ieth"
    return ENGLISH_ORDINALS.get(number) or NUMBERS[number][0] + "th"


def _german_ordinal(number: int) -> str:
    """The ordinal of a number from 1 to 99, as it stands after "der"."""
    return GERMAN_ORDINALS.get(number) or _german(number) + ("te" if number < 20 else "ste")


def _english_year(year: int) -> str:
    """A year as it is read out: "seventeen hundred", "nineteen oh five", "two thousand and five", "twenty ten"."""
    if 2000 <= year < 2010:
        return _english(year)
    century, rest = divmod(year, 100)
    if rest == 0:
        return f"{_english(century)} hundred"
    return f"{_english(century)} {'oh ' if rest < 10 else ''}{_english(rest)}"


def _german_year(year: int) -> str:
    """A year as it is read out: in hundreds before 2000, as a number from then on."""
    if year >= 2000:
        return _german(year)
    century, rest = divmod(year, 100)
    return f"{_german(century)}hundert" + (_german(rest) if rest else "")
