"""How much of a reply is in the wanted language, or in the wanted script.

Where a script belongs to one language (Hangul, Thai, Greek; kana or their absence tell Japanese from Chinese) counting
letters is enough. Languages that share theirs (Latin, Cyrillic, Arabic, Devanagari) are identified by py3langid, extra
``language``, a few sentences at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import regex  # type: ignore[import-untyped]  # comes with transformers

from posttrain.rl.errors import ConfigError
from posttrain.rl.rewards.decorator import explains, factory, reward

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier  # type: ignore[import-untyped]

CHUNK_LETTERS = 60
"""Sentences are put together up to this many letters before their language is identified: fewer say too little."""

OWN_SCRIPT = {
    "bo": "Tibetan", "el": "Greek", "gu": "Gujarati", "he": "Hebrew", "hy": "Armenian", "ja": "Han Hiragana Katakana",
    "ka": "Georgian", "km": "Khmer", "kn": "Kannada", "ko": "Hangul", "lo": "Lao", "ml": "Malayalam", "my": "Myanmar",
    "or": "Oriya", "pa": "Gurmukhi", "si": "Sinhala", "ta": "Tamil", "te": "Telugu", "th": "Thai", "zh": "Han",
}  # fmt: skip
"""Language → the scripts that give it away."""

SHARED_SCRIPT = {
    **dict.fromkeys(("ba", "be", "bg", "kk", "ky", "mk", "mn", "ru", "tg", "tt", "uk"), "Cyrillic"),
    **dict.fromkeys(("ar", "ary", "arz", "fa", "ps", "sdh", "ug", "ur"), "Arabic"),
    **dict.fromkeys(("gom", "hi", "mr", "ne", "sa"), "Devanagari"),
    **dict.fromkeys(("as", "bn"), "Bengali"),
    **dict.fromkeys(("sr", "uz"), "Cyrillic Latin"),
    "am": "Ethiopic", "dz": "Tibetan", "grc": "Greek", "hbo": "Hebrew", "ku": "Arabic Latin",
    "wuu": "Han", "yue": "Han",
}  # fmt: skip
"""Language → the scripts it is written in, where that is not Latin alone."""

_ANY_LETTER = regex.compile(r"(?V1)[\p{L}--[\p{Common}\p{Inherited}]]")
_KANA = regex.compile(r"[\p{Hiragana}\p{Katakana}]")
_SENTENCE = regex.compile(r"[^.!?。！？\n]+[.!?。！？\n]*")
_NO_PROSE = regex.compile(
    r"""```.*?```|`[^`\n]+`                                    # code
    |\$\$.*?\$\$|\$[^$\n]*\$                                   # formulas
    |\\\((?:(?!\\\().)*?\\\)|\\\[(?:(?!\\\[).)*?\\\]|\\\p{L}+
    |</?\p{L}[\w:.-]*(?:\s[^<>\n]*)?>|https?://\S+             # tags, addresses""",
    regex.DOTALL | regex.VERBOSE,
)
"""Each alternative is linear: it ends before what could begin it once more, or is closed by it."""


@factory
def language(wanted: str, *, among: Sequence[str] = (), name: str = "language") -> Callable[[str], float | None]:
    """Share of a reply's letters that are in the ``wanted`` language or script.

    ``wanted``: an ISO 639 code (``de``, ``zh``) or a Unicode script (``Cyrillic``). Code, formulas, tags and addresses
    are left out, and a reply without letters has no score. ``among``: the languages a reply can be in, where that is
    known; short replies are told apart better then. Raises ``ConfigError`` for an unknown language or script, and where
    one has to be identified and py3langid is not installed.
    """
    languages = frozenset(among)
    if languages and wanted not in languages:
        raise ConfigError(f"among = {sorted(languages)} is without the wanted {wanted}")
    letter, foreign = _letters_of(wanted)
    identified = not wanted[:1].isupper() and wanted not in OWN_SCRIPT
    if identified and wanted not in _identifier(languages).labels:
        raise _unknown(wanted, _identifier(languages))

    def is_wanted(chunk: str) -> bool:
        if identified:  # by its own letters: a foreign word in between counts for itself
            return bool(_identifier(languages).classify(foreign.sub(" ", chunk))[0] == wanted)
        return wanted not in ("ja", "zh") or bool(_KANA.search(chunk)) == (wanted == "ja")

    def counts(completion: str) -> tuple[int, int]:
        """Letters of the wanted language, and all letters."""
        right = total = 0
        for chunk, letters in _chunks(prose(completion)):
            total += letters
            if is_wanted(chunk):
                right += len(letter.findall(chunk))
        return right, total

    @reward(name=name)
    def share(completion: str) -> float | None:
        right, total = counts(completion)
        return right / total if total else None

    @explains(share)
    def explain(completion: str) -> str:
        right, total = counts(completion)
        return f"{right} of {total} letters are {wanted}"

    return share


def prose(text: str) -> str:
    """The text without code, formulas, tags and addresses."""
    return str(_NO_PROSE.sub(" ", text))


def _chunks(text: str) -> Iterator[tuple[str, int]]:
    """Runs of sentences with enough letters to be identified, and how many they have; what is left at the end belongs
    to the last."""
    chunk, letters, waiting = "", 0, None
    for sentence in _SENTENCE.findall(text):
        chunk, letters = chunk + sentence, letters + len(_ANY_LETTER.findall(sentence))
        if letters >= CHUNK_LETTERS:
            if waiting is not None:
                yield waiting
            waiting, chunk, letters = (chunk, letters), "", 0
    if waiting is not None:
        yield waiting[0] + chunk, waiting[1] + letters
    elif letters:
        yield chunk, letters


def _letters_of(wanted: str) -> tuple[regex.Pattern[str], regex.Pattern[str]]:
    """Letters of the language's scripts, or of the script that ``wanted`` names; and all others."""
    scripts = wanted if wanted[:1].isupper() else OWN_SCRIPT.get(wanted) or SHARED_SCRIPT.get(wanted, "Latin")
    either = "".join(rf"\p{{Script={script}}}" for script in scripts.split())
    unknown = ConfigError(f"wanted = {wanted!r}: no Unicode script has this name (a language is written de)")
    if not scripts.replace(" ", "").replace("_", "").isalpha():
        raise unknown
    try:
        return regex.compile(rf"(?V1)[\p{{L}}&&[{either}]]"), regex.compile(rf"(?V1)[\p{{L}}--[{either}]]")
    except regex.error:
        raise unknown from None


@functools.cache
def _identifier(languages: frozenset[str]) -> LanguageIdentifier:
    """Chooses among ``languages``, or all it knows."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise ConfigError(
            'telling languages of one script apart needs py3langid: pip install "posttrain[language]"'
        ) from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    if unknown := sorted(languages - set(identifier.labels)):
        raise _unknown(unknown[0], identifier)
    if languages:
        identifier.set_languages(sorted(languages))
    return identifier


def _unknown(language: str, identifier: LanguageIdentifier) -> ConfigError:
    known = " ".join(sorted({*identifier.labels, *OWN_SCRIPT}))
    return ConfigError(
        f"{language!r} is no language that can be told: {known}; or name a Unicode script, such as Latin"
    )
