"""The English stemmer that the published ROUGE figures were made with: Porter's, with NLTK's additions.

Knows one word at a time, lower case. Knows nothing of tokens or scores (`rouge.py`).
Source: M. F. Porter, "An algorithm for suffix stripping", Program 14(3), 1980. NLTK's default mode departs from the
paper where "NLTK" is written below, and every ROUGE that says `use_stemmer=True` inherits that, so equal figures need
equal departures. Rejected: depending on nltk, a toolkit with downloads of its own, for 150 lines.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

_VOWELS = frozenset("aeiou")

# NLTK: words that the rules would conflate or maim, with the stem they get instead.
_IRREGULAR = {
    "skies": "sky", "sky": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news",
    "innings": "inning", "inning": "inning", "outings": "outing", "outing": "outing",
    "cannings": "canning", "canning": "canning", "howe": "howe",
    "proceed": "proceed", "exceed": "exceed", "succeed": "succeed",
}  # fmt: skip

_STEP_1A = (("sses", "ss"), ("ies", "i"), ("ss", "ss"), ("s", ""))
_STEP_2 = (
    ("ational", "ate"), ("tional", "tion"), ("enci", "ence"), ("anci", "ance"), ("izer", "ize"),
    ("bli", "ble"),  # NLTK, after Porter's own later revision: the paper has abli -> able
    ("alli", "al"), ("entli", "ent"), ("eli", "e"), ("ousli", "ous"), ("ization", "ize"), ("ation", "ate"),
    ("ator", "ate"), ("alism", "al"), ("iveness", "ive"), ("fulness", "ful"), ("ousness", "ous"), ("aliti", "al"),
    ("iviti", "ive"), ("biliti", "ble"),
    ("fulli", "ful"),  # NLTK
)  # fmt: skip
_STEP_3 = (("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""), ("ness", ""))
_STEP_4 = (
    "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou", "ism", "ate", "iti",
    "ous", "ive", "ize",
)  # fmt: skip


@lru_cache(maxsize=1 << 16)
def stem(word: str) -> str:
    """Stem one lower-case English word.

    Porter 1980 with the additions of nltk.stem.PorterStemmer's default mode (NLTK_EXTENSIONS).
    Exact   equal to nltk's on every lower-case word tried (test_stemmer.py: every word of the real data).
    """
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) <= 2:
        return word
    for step in (_step_1a, _step_1b, _step_1c, _step_2, _step_3, _step_4, _step_5a, _step_5b):
        word = step(word)
    return word


def _consonants(word: str) -> list[bool]:
    """Whether each letter is a consonant: not a vowel, and y only after a vowel or in front."""
    flags: list[bool] = []
    for letter in word:
        if letter in _VOWELS:
            flags.append(False)
        elif letter == "y":
            flags.append(not flags or not flags[-1])
        else:
            flags.append(True)
    return flags


def _measure(word: str) -> int:
    """The paper's m: how often a vowel run is followed by a consonant run."""
    flags = _consonants(word)
    return sum(not before and after for before, after in pairwise(flags))


def _has_vowel(word: str) -> bool:
    return not all(_consonants(word))


def _ends_in_double_consonant(word: str) -> bool:
    return len(word) >= 2 and word[-1] == word[-2] and _consonants(word)[-1]


def _ends_in_cvc(word: str) -> bool:
    """The paper's *o: consonant, vowel, consonant that is not w, x, y. NLTK: also vowel, consonant as a whole word."""
    flags = _consonants(word)
    if len(word) == 2:
        return flags == [False, True]
    return flags[-3:] == [True, False, True] and word[-1] not in "wxy"


def _replace(word: str, rules: tuple[tuple[str, str], ...], holds: Callable[[str], bool]) -> str:
    """Apply the first rule whose suffix fits, if its stem passes; a fitting suffix that fails ends the search."""
    for suffix, replacement in rules:
        if word.endswith(suffix):
            rest = word.removesuffix(suffix)
            return rest + replacement if holds(rest) else word
    return word


def _step_1a(word: str) -> str:
    if word.endswith("ies") and len(word) == 4:  # NLTK: dies -> die, where the paper's rule gives di
        return word[:-1]
    return _replace(word, _STEP_1A, lambda rest: True)


def _step_1b(word: str) -> str:
    if word.endswith("ied"):  # NLTK: died -> die, tried -> tri
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    for suffix in ("ed", "ing"):
        rest = word.removesuffix(suffix)
        if rest != word and _has_vowel(rest):
            return _mended(rest)
    return word


def _mended(rest: str) -> str:
    """Give a stem that lost its -ed or -ing the ending it would be written with."""
    if rest.endswith(("at", "bl", "iz")):
        return rest + "e"
    if _ends_in_double_consonant(rest):
        return rest if rest[-1] in "lsz" else rest[:-1]
    return rest + "e" if _measure(rest) == 1 and _ends_in_cvc(rest) else rest


def _step_1c(word: str) -> str:
    # NLTK: only after a consonant that is not the first letter (the paper asks for a vowel): enjoy stays enjoy
    if word.endswith("y") and len(word) > 2 and _consonants(word)[-2]:
        return word[:-1] + "i"
    return word


def _step_2(word: str) -> str:
    if word.endswith("alli") and _measure(word[:-4]) > 0:  # NLTK: the shortened word goes through the step again
        return _step_2(word[:-2])
    if word.endswith("logi"):  # NLTK: measured with the l: geology and theology lose their ending, logi alone does not
        return word[:-1] if _measure(word[:-3]) > 0 else word
    return _replace(word, _STEP_2, lambda rest: _measure(rest) > 0)


def _step_3(word: str) -> str:
    return _replace(word, _STEP_3, lambda rest: _measure(rest) > 0)


def _step_4(word: str) -> str:
    for suffix in _STEP_4:
        if word.endswith(suffix):
            rest = word.removesuffix(suffix)
            allowed = _measure(rest) > 1 and (suffix != "ion" or rest[-1] in "st")
            return rest if allowed else word
    return word


def _step_5a(word: str) -> str:
    rest = word.removesuffix("e")
    if rest == word:
        return word
    measure = _measure(rest)
    return rest if measure > 1 or (measure == 1 and not _ends_in_cvc(rest)) else word


def _step_5b(word: str) -> str:
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word
