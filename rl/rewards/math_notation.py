r"""How people write mathematics: the final answer of a text, numbers in their many dresses, and lists of answers."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)"
_SIGN = r"(?:(?<![\w)])-\s?(?:\\?\$)?)?"
_NUMBER = re.compile(
    rf"(?<![\w.,)])(?:-\s?)?\.\d+|{_SIGN}(?:(?<![\d.,/])\d{{1,3}} (?=\d{{1,2}}/\d))?"
    rf"{_DIGITS}(?:\.\d+)?(?:/{_DIGITS})?(?:\s?\\?%)?",
    re.ASCII,
)
"""Thousands commas, a decimal part, a fraction, a mixed number, a percent sign; a minus behind a digit or bracket is a
difference."""
_CUE = re.compile(
    r"(?:answer|solution|result|option|choice)s?\b[*_\s]*+(?:(?:is|are|equals)\b|[:=])[*_:\s]*+([^\n]*)", re.IGNORECASE
)
_TAG = re.compile(r"<answer>((?:(?!<answer>).)*)</answer>", re.DOTALL)
_MATH = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$(?=\S)([^$\n]+?)(?<![\\\s])\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_BRACES = re.compile(r"\\f?boxed\s*\{|\\[\\{}]|[{}]")
"""A box's beginning, what is escaped, a brace."""
_TAIL = 2000
"""Characters at the end of a text in which a formula is looked for, and of a sentence that states an answer."""
_SENTENCE_END = re.compile(
    r"[.!?;](?:\*{1,2})?(?=\s|$)|,?\s+(?:because|since|as\s+(?:the|it|we)|so\s+that|which)\b", re.IGNORECASE
)

_SYMBOLS = str.maketrans(
    {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "°": r"^\circ ", "π": r"\pi ", "∞": r"\infty "}
    | {"∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "≤": r"\le ", "≥": r"\ge ", "±": r"\pm ", "≈": r"\approx "}
    | {"√": r"\sqrt ", "²": "^2", "³": "^3", "⁄": "/", "\u00a0": " ", "\u202f": " ", "£": "$", "€": "$", "¥": "$"}
    | {"½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4", "⅕": " 1/5", "⅛": " 1/8"}
)
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right|displaystyle|limits|[bB]igg?[lr]?)(?![a-zA-Z])", ""),
        (r"\\[dt]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
        (r"\{,\}|\\,(?=\d{3}(?!\d))|(?<=\d)[ ](?=\d{3}(?:[ ]\d{3})*(?![\d/]))", ","),
        (r"(?<!\\)\\[,!;:> ]|\\q?quad(?![a-zA-Z])|~", " "),
        (r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname|rm|bf)\s*\{([^{}]*)\}", r" \1 "),
        (r"\^\s*\{?\s*\\circ\s*\}?|\bdegrees?\b", " "),
        (r"\\(?:leq|leqslant)(?![a-zA-Z])", r"\\le"),
        (r"\\(?:geq|geqslant)(?![a-zA-Z])", r"\\ge"),
        (r"\\%", "%"),
        (r"\\?\$|\b(?:USD|EUR|GBP)\b", " "),
        (r"\*\*|__", ""),
    )
)
_UNITS = {
    alias: names.split()[0]
    for names in (
        "mm millimeter millimeters millimetre millimetres",
        "cm centimeter centimeters centimetre centimetres",
        "m meter meters metre metres",
        "km kilometer kilometers kilometre kilometres",
        "in inch inches",
        "ft foot feet",
        "yd yard yards",
        "mi mile miles",
        "g gram grams",
        "kg kilogram kilograms",
        "mg milligram milligrams",
        "lb lbs pound pounds",
        "oz ounce ounces",
        "s sec secs second seconds",
        "min mins minute minutes",
        "h hr hrs hour hours",
        "day days",
        "week weeks",
        "month months",
        "year years yr yrs",
        "L l liter liters litre litres",
        "mL ml milliliter milliliters",
        "cent cents",
        "mph",
        "N newton newtons",
        "J joule joules",
        "W watt watts",
    )
    for alias in names.split()
}
_RELATIONS = {r"\le": "<=", r"\ge": ">=", r"\lt": "<", r"\gt": ">"}
_TURNED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
_MAGNITUDES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_MAGNITUDE = re.compile(rf"\s*\b({'|'.join(_MAGNITUDES)})$")
_DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_RATIONAL = re.compile(
    rf"(?P<sign>[+-]?)(?:(?P<whole>\d+)(?:\s+|\s*(?=\\frac)))?"
    rf"(?:\\frac\{{\s*(?P<top>-?{_DECIMAL})\s*\}}\{{\s*(?P<bottom>-?{_DECIMAL})\s*\}}"
    rf"|(?P<up>{_DECIMAL})\s*/\s*(?P<down>{_DECIMAL}))",
    re.ASCII,
)
_PLAIN = re.compile(
    rf"(?P<mantissa>[+-]?{_DECIMAL})(?:[eE](?P<e>[+-]?\d{{1,3}})"
    r"|\s*(?:\\times|\\cdot|\*|x)\s*10\s*(?:\^|\*\*)\s*\{?\s*(?P<power>[+-]?\d{1,3})\s*\}?)?",
    re.ASCII,
)
MAX_DIGITS = 120
"""Of what is compared as a number here."""


def based(text: str) -> tuple[str, str | None]:
    """``101_2`` as digits and base, other texts with no base."""
    found = re.fullmatch(r"\(?([0-9A-F]+)\)?_\{?(\d+)\}?", text.replace(" ", ""))
    return (found[1], found[2]) if found else (text, None)


class Number(NamedTuple):
    """A rational number as written."""

    value: Fraction
    percent: bool
    unit: str | None


class Parts(NamedTuple):
    """A bracketed or bare list of answers."""

    brackets: str
    """Opening and closing bracket, or nothing."""
    items: list[str]


def final_answer(text: str) -> str | None:
    r"""What a text gives as its answer, or ``None`` where there is none.

    In this order: the last ``\boxed{…}``, the last ``<answer>…</answer>``, what follows the last ``####``, what follows
    the last "answer is" or "answer:" up to the end of the sentence, the last formula where no number follows it, the
    last number. What stands before ``</think>`` does not count.
    """
    text = text.rpartition("</think>")[2]
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    tagged = _TAG.findall(text[-_TAIL:])
    if tagged:
        return str(tagged[-1]).strip()
    _, mark, after = text.rpartition("####")
    if mark and after.strip():
        return after.strip().splitlines()[0].strip()
    cue = _last(_CUE, text)
    if cue is not None and (stated := _sentence(cue[1][:_TAIL])):
        return stated
    tail = text[-_TAIL:]
    formulas = list(_MATH.finditer(tail))
    if formulas and not re.search(r"\d", tail[formulas[-1].end() :]):
        formula = next(group for group in formulas[-1].groups() if group is not None)
        return formula.rpartition("=")[2].strip().rstrip(".") or None
    plain = _last(_NUMBER, text.translate(_SYMBOLS))
    return plain[0] if plain else None


def simplified(text: str) -> str:
    """One way of writing for many: no spacing commands, dollar signs, text boxes, degree signs or closing full stop."""
    text = text.strip().translate(_SYMBOLS)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = re.sub(r"^(?:\\approx|\\sim|=)\s*", "", text.strip())
    return re.sub(r"\s+", " ", text).strip().rstrip(".").strip()


def named(text: str) -> tuple[str | None, str]:
    """``x = 5`` as the name and what it is; the name is ``None`` where there is none."""
    found = re.fullmatch(r"\s*([A-Za-z](?:_\{?\w+\}?)?(?:\([a-z]\))?)\s*(?:=|\\in(?![a-z]))\s*([^=<>]+)", text)
    return (found[1], found[2].strip()) if found else (None, text)


def number(text: str) -> Number | None:
    """A simplified text as one rational number, with the unit where it has one that is known."""
    text = text.strip()
    percent = bool(re.search(r"%|\bpercent\b", text))
    text = re.sub(r"%|\bpercent\b", " ", text)
    unit, text = _unit(text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.strip()).strip()
    text = re.sub(r"^([+-])\s+", r"\1", text.rstrip("."))
    if len(text) > MAX_DIGITS:
        return None
    magnitude = _MAGNITUDE.search(text)
    value = _rational(text[: magnitude.start()] if magnitude else text)
    if value is None:
        return None
    return Number(value * _MAGNITUDES[magnitude[1]] if magnitude else value, percent, unit)


def stated_number(text: str) -> str:
    """The number of a sentence, behind its last equals sign: "that she has 18 dollars left" is ``18``."""
    text = text.rpartition("=")[2] or text
    if not re.search(r"[A-Za-z]{2}", re.sub(r"\\[A-Za-z]+", "", text)):
        return text
    found = _NUMBER.findall(text)
    return found[0] if len(set(found)) == 1 else text


def parts(text: str) -> Parts | None:
    r"""A tuple, set, interval or bare list of answers; ``None`` for a single one."""
    text = text.strip()
    text = re.sub(r"\\([{}])", r"\1", text)
    inner, brackets = text, ""
    if len(text) > 1 and text[0] in "([{" and text[-1] in ")]}" and _closes_at_end(text):
        inner, brackets = text[1:-1], text[0] + text[-1]
    items = _split(inner)
    if len(items) == 1 and brackets != "{}":
        return None
    return Parts(brackets, items)


def interval(text: str) -> str:
    r"""An inequality of one unknown as its interval: ``1 < x \le 2`` is ``(1,2]``. Anything else stays as it is."""
    ends = re.split(r"(<|>|\\le(?![a-z])|\\ge(?![a-z])|\\lt(?![a-z])|\\gt(?![a-z]))", text)
    terms, signs = [term.strip() for term in ends[::2]], [_RELATIONS.get(sign, sign) for sign in ends[1::2]]
    if len(terms) == 2 and re.fullmatch("[a-zA-Z]", terms[1]):
        terms, signs = terms[::-1], [_TURNED[signs[0]]]
    if len(terms) == 2 and re.fullmatch("[a-zA-Z]", terms[0]):
        bound, sign = terms[1], signs[0]
        below = f"(-\\infty,{bound}{']' if sign == '<=' else ')'}"
        above = f"{'[' if sign == '>=' else '('}{bound},\\infty)"
        return below if sign[0] == "<" else above
    if len(terms) != 3 or not re.fullmatch("[a-zA-Z]", terms[1]) or signs[0][0] != signs[1][0]:
        return text
    if signs[0][0] == ">":
        terms, signs = terms[::-1], [_TURNED[sign] for sign in signs[::-1]]
    return f"{'[' if signs[0] == '<=' else '('}{terms[0]},{terms[2]}{']' if signs[1] == '<=' else ')'}"


def _last_boxed(text: str) -> str | None:
    r"""Content of the last complete ``\boxed{…}``, braces matched."""
    open_braces: list[re.Match[str]] = []
    last: tuple[int, int] | None = None
    for found in _BRACES.finditer(text):
        if found[0] == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and start[0] != "{" and (last is None or start.end() > last[0]):
                last = start.end(), found.start()
        elif found[0].endswith("{") and found[0] != "\\{":
            open_braces.append(found)
    return text[slice(*last)].strip() if last else None


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """The last match, which is usually near the end: long texts are read whole only where it is not."""
    for begin in (max(0, len(text) - _TAIL), 0):
        found = None
        for found in pattern.finditer(text, begin):  # noqa: B007
            continue
        if found is not None and found.start() > begin:
            return found
    return found


def _sentence(text: str) -> str:
    """Up to the end of the first sentence; a formula's own dots and commas end nothing."""
    end = _SENTENCE_END.search(text)
    return (text[: end.start()] if end else text).strip().strip("*_").strip()


def _unit(text: str) -> tuple[str | None, str]:
    """The known unit behind a number and the rest; words that are no unit ("apples") are dropped."""
    found = re.fullmatch(r"(.*?[\d}])(\s*)([A-Za-z][A-Za-z\s./-]*)(?:\^\{?([23])\}?)?\s*", text.strip())
    if not found or "\\" in found[3]:
        return None, text
    words = found[3].split()
    if not found[2] and len(found[3]) == 1:  # 2m is a product, 2 m a length
        return None, text
    if len(words) == 1 and len(words[0]) == 1 and words[0] not in _UNITS:
        return None, text
    powers = {"square": "2", "sq": "2", "squared": "2", "cubic": "3", "cubed": "3"}
    power = next((powers[word] for word in words if word in powers), found[4] or "")
    large = next((word for word in words if word in _MAGNITUDES), "")
    known = [_UNITS[word] for word in words if word in _UNITS]
    return "/".join(known) + power if known else None, f"{found[1]} {large}".rstrip()


def _rational(text: str) -> Fraction | None:
    fraction = _RATIONAL.fullmatch(text)
    if fraction:
        top, bottom = fraction["top"] or fraction["up"], fraction["bottom"] or fraction["down"]
        if Fraction(bottom) == 0:
            return None
        value = Fraction(top) / Fraction(bottom) + int(fraction["whole"] or 0)
        return -value if fraction["sign"] == "-" else value
    repeating = re.fullmatch(r"(-?)(\d*)\.(\d*)\\overline\s*\{?(\d+)\}?", text, re.ASCII)
    if repeating:
        sign, whole, fixed, period = repeating.groups()
        tail = Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed))
        value = Fraction(f"{whole or 0}.{fixed or 0}") + tail
        return -value if sign else value
    plain = _PLAIN.fullmatch(text)
    if not plain:
        return None
    return Fraction(plain["mantissa"]) * Fraction(10) ** int(plain["e"] or plain["power"] or 0)


def _closes_at_end(text: str) -> bool:
    """Whether the first bracket is closed by the last character, whatever its kind: intervals mix them."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return position == len(text) - 1
    return False


def _split(text: str) -> list[str]:
    """At commas, semicolons, "and" and "or" outside brackets; not inside a number's thousands."""
    text = re.sub(r"\s*,?\s*(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])\s*", " ; ", text)
    text = re.sub(r"(?<![\d,])(\d{1,3}(?:,\d{3})+)(?![\d,])(?=\s|$|;)", lambda found: found[1].replace(",", ""), text)
    items, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character in ",;" and depth == 0:
            items.append(text[start:position])
            start = position + 1
    items.append(text[start:])
    return [item.strip() for item in items if item.strip()]
