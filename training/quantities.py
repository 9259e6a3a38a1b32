"""Numbers with units, as answers write them: "-3", "1,000", "1e-7", "3/4", "1 1/2", "50 %", "$5", "5 km", "60 km/h", "8 apples".

Values are exact fractions. Units of one dimension are converted into each other ("5 km" is 5000 m); an unknown unit is a
word, equal to itself and to its plural.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

_LONGEST = 100  # characters
_INTEGER = r"(?:\d{1,3}(?:[, ]\d{3})+(?!\d)|\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?P<whole>\d+)\s+(?P<upper>\d+)\s*/\s*(?P<lower>\d+)"
    rf"|(?P<value>{_INTEGER}(?:\.\d*)?|\.\d+)"
    r"(?:[eE](?P<exponent>[+-]?\d{1,3})|\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*\{?(?P<power>[+-]?\d{1,3})\}?"
    rf"|\s*/\s*(?P<over>{_INTEGER}))?)"
)
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{\s*([+-]?\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)\s*(\d))")
_CURRENCY = re.compile(r"(US\$|[$€£¥])")
_UNIT_WORD = r"(?:[^\W\d_]+\.?|%|°[^\W\d_]*)(?:\^?\{?[23]\}?)?"
_UNIT = re.compile(rf"{_UNIT_WORD}(?:[ /·]+{_UNIT_WORD})*")
_PER = re.compile(r"\s*/\s*|\s+per\s+")
_POWER = re.compile(r"(?:square|sq) |cubic |\^?\{?([23])\}?$")
_NO_UNITS = {"or", "and", "not", "to", "if", "is", "oder", "und", "nicht", "bis"}
_MULTIPLIERS = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_ALIASES = {
    **{"kph": "km/h", "kmh": "km/h", "mph": "mi/h"},
    **{f"{word}celsius": "°c" for word in ("degree ", "degrees ", "° ", "")},
    **{f"{word}fahrenheit": "°f" for word in ("degree ", "degrees ", "° ", "")},
}
_WORDS = 3  # "5 red apples": longer texts behind a number are no unit

# Dimension -> its units, each with its size in the first one.
_TABLE: dict[str, dict[str, str]] = {
    "length": {
        "m metre meter": "1",
        "km kilometre kilometer": "1000",
        "dm decimetre decimeter": "1/10",
        "cm centimetre centimeter": "1/100",
        "mm millimetre millimeter": "1/1000",
        "in inch inches": "0.0254",
        "ft foot feet": "0.3048",
        "yd yard": "0.9144",
        "mi mile": "1609.344",
    },
    "mass": {
        "g gram gramme": "1",
        "kg kilogram kilogramme kilo": "1000",
        "mg milligram": "1/1000",
        "t ton tonne": "1000000",
        "lb lbs pound": "453.59237",
        "oz ounce": "28.349523125",
    },
    "time": {
        "s sec second": "1",
        "ms millisecond": "1/1000",
        "min mins minute": "60",
        "h hr hrs hour": "3600",
        "d day": "86400",
        "week": "604800",
    },
    "months": {"month": "1", "y yr yrs year": "12"},
    "volume": {
        "l litre liter": "1",
        "ml millilitre milliliter": "1/1000",
        "cl centilitre centiliter": "1/100",
    },
    "dollars": {"$ us$ dollar usd": "1", "cent ¢": "1/100"},
    "euros": {"€ euro eur": "1"},
    "pounds sterling": {"£ gbp": "1"},
    "yen": {"¥ yen jpy": "1"},
    "percent": {"% percent": "1"},
    "angle": {"° degree deg": "1"},
}
_SIZES = {
    name: (dimension, Fraction(size))
    for dimension, units in _TABLE.items()
    for names, size in units.items()
    for name in names.split()
}
PERCENT = (("percent", 1),)


@dataclass(frozen=True)
class Quantity:
    """A number and its unit: dimensions with their powers, empty where there is none, and its size in their first units."""

    value: Fraction
    dimensions: tuple[tuple[str, int], ...] = ()
    size: Fraction = Fraction(1)


def quantity(text: str) -> Quantity | None:
    """What a text says as a number with or without a unit; None for anything else. text: see `notation.undecorated`."""
    if len(text) > _LONGEST:
        return None
    text = _FRACTION.sub(lambda match: f" {match[1] or match[3]}/{match[2] or match[4]} ", text).strip()
    if text.startswith("(") and text.endswith(")"):
        text = text[1:-1].strip()
    currency = _CURRENCY.search(text)
    if currency:  # before or behind the number
        text = (text[: currency.start()] + text[currency.end() :]).strip()
    match = _NUMBER.match(text)
    if match is None:
        return None
    value, rest = _value(match), text[match.end() :].strip()
    first, _, behind = rest.partition(" ")
    if value is not None and first in _MULTIPLIERS:
        value, rest = value * _MULTIPLIERS[first], behind.strip()
    unit = currency[1] if currency and not rest else rest
    if value is None or (currency and rest):
        return None
    if not unit:
        return Quantity(value)
    measured = _unit(unit)
    return None if measured is None else Quantity(value, *measured)


def same(reference: Quantity, answer: Quantity) -> bool:
    """Whether two quantities are equal. Units are compared where both have one.

    A percentage is equal to a bare number that is its hundredth, or the same where that is at least 1 ("50 %", 0.5 and 50).
    """
    if reference.dimensions and answer.dimensions:
        return (
            reference.dimensions == answer.dimensions
            and reference.value * reference.size == answer.value * answer.size
        )
    if PERCENT in (reference.dimensions, answer.dimensions):
        share, bare = (reference, answer) if reference.dimensions else (answer, reference)
        return bare.value == share.value / 100 or (bare.value == share.value and abs(bare.value) >= 1)
    return reference.value == answer.value


def _value(match: re.Match[str]) -> Fraction | None:
    sign = -1 if match["sign"] == "-" else 1
    if match["whole"]:
        lower = int(match["lower"])
        return sign * (int(match["whole"]) + Fraction(int(match["upper"]), lower)) if lower else None
    value = Fraction(match["value"].replace(",", "").replace(" ", "").rstrip("."))
    if match["over"]:
        over = int(match["over"].replace(",", "").replace(" ", ""))
        return sign * value / over if over else None
    return sign * value * Fraction(10) ** int(match["exponent"] or match["power"] or 0)


def _unit(text: str) -> tuple[tuple[tuple[str, int], ...], Fraction] | None:
    """Dimensions and size of a unit; None where the text cannot be one."""
    text = _ALIASES.get(text.casefold(), text)
    if text.casefold() in _SIZES:
        dimension, size = _SIZES[text.casefold()]
        return ((dimension, 1),), size
    if not _UNIT.fullmatch(text) or set(text.casefold().split()) & _NO_UNITS:
        return None
    powers: dict[str, int] = {}
    size = Fraction(1)
    for place, part in enumerate(_PER.split(text.casefold())):
        if len(part.split()) > _WORDS:
            return None
        power = 1
        found = _POWER.search(part)
        if found:
            power = int(found[1] or (3 if found[0] == "cubic " else 2))
            part = _POWER.sub("", part)
        dimension, own = _known(part.strip())
        power = -power if place else power
        powers[dimension] = powers.get(dimension, 0) + power
        size *= own**power
    return tuple(sorted((name, power) for name, power in powers.items() if power)), size


def _known(name: str) -> tuple[str, Fraction]:
    """The dimension and size of one unit without a power; an unknown one is a dimension of its own, in the singular."""
    name = name.rstrip(".")
    words = [name, name.removesuffix("s"), name.split(" ")[0], name.split(" ")[0].removesuffix("s")]
    for word in words:
        if word in _SIZES:
            return _SIZES[word]
    return " ".join(word.removesuffix("s") or word for word in name.split()), Fraction(1)
