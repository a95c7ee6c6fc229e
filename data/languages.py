"""What letters and words alone say about a text: its words, script, language, whether it asks.

Small rules on purpose, for filters over many pairs; evals/bm25.py has the analyser of searches.
Invisible characters never part two texts: the zero-width non-joiner of Persian is neither a letter
nor a space here, so that a word counts as one with it and without.
"""

import difflib
import functools
import re
import sys
import unicodedata
from collections.abc import Iterator

# zero-width non-joiner, joiner and space, soft hyphen, marks of direction, byte order mark, tatweel
INVISIBLE = re.compile("[\u200b-\u200f\u00ad\u202a-\u202e\u2060\u2066-\u2069\ufeff\u0640]")
# written without spaces: each character counts as a word
UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e4e]")
_ASKS = "?\u061f\uff1f\u037e"  # question marks: Latin, Arabic, full-width, Greek

# forms of one letter: alef with madda, hamza and wasla; yeh; kaf; teh marbuta and heh; waw hamza
_ONE_FORM = str.maketrans(
    {
        **dict.fromkeys("\u0622\u0623\u0625\u0671", "\u0627"),
        **dict.fromkeys("\u0649\u064a\u06d2\u0626", "\u06cc"),
        **dict.fromkeys("\u0629\u06c0\u06c1\u06be\u06d5", "\u0647"),
        "\u0643": "\u06a9",
        "\u0624": "\u0648",
        "\u0131": "i",  # dotless i: capitals of Turkish lose the difference
    }
)
_PERSIAN_TYPING = str.maketrans("\u0643\u064a\u0649", "\u06a9\u06cc\u06cc")  # Arabic keyboards

_ARABIC_LETTERS = frozenset(
    "\u0621\u0622\u0623\u0624\u0625\u0626\u0627\u0628\u0629\u062a\u062b\u062c\u062d\u062e\u062f"
    "\u0630\u0631\u0632\u0633\u0634\u0635\u0636\u0637\u0638\u0639\u063a\u0641\u0642\u0643\u0644"
    "\u0645\u0646\u0647\u0648\u0649\u064a\u0671"
)
ALPHABETS = {
    "en": frozenset("abcdefghijklmnopqrstuvwxyz"),
    "tr": frozenset(
        "abcdefghijklmnoprstuvyz\u00e7\u011f\u0131\u00f6\u015f\u00fc\u00e2\u00ee\u00fb"
    ),
    "ar": _ARABIC_LETTERS,
    # without teh marbuta and alef with hamza below; with peh, tcheh, zheh, gaf, kaf and yeh
    "fa": (_ARABIC_LETTERS - set("\u0629\u0625\u0643\u0649\u064a"))
    | set("\u067e\u0686\u0698\u06af\u06a9\u06cc\u06c0"),
}
LANGUAGES = tuple(ALPHABETS)

# frequent words that only the one language has, written as ALPHABETS writes it
_FUNCTION_WORDS = {
    "en": "the of and is was are to for with that which by from this it be have has not".split(),
    "tr": "ve bir bu i\u00e7in ile olarak olan \u00e7ok daha gibi kadar".split(),
    "ar": (
        "\u0641\u064a \u0625\u0644\u0649 \u0627\u0644\u062a\u064a \u0627\u0644\u0630\u064a \u0647"
        "\u0630\u0627 \u0647\u0630\u0647 \u0630\u0644\u0643 \u0643\u0627\u0646\u062a \u0648\u0642"
        "\u062f \u0648\u0647\u0648 \u0648\u0647\u064a \u0639\u0646"
    ).split(),
    "fa": (
        "\u0627\u0632 \u0631\u0627 \u0628\u0647 \u062f\u0631 \u0628\u0627 \u0627\u0633\u062a \u0634"
        "\u062f \u0634\u062f\u0647 \u0628\u0648\u062f \u0628\u0631 \u0622\u0646 \u0647\u0627"
    ).split(),
}

_HAS_ARTICLE = re.compile("\u0648?\u0627\u0644\\w{3}").match  # Arabic (wa-)al-; rare in Persian

# words that ask at the start of a question; those of Persian and Turkish also stand inside it
_ASKING_FIRST = frozenset(
    "who whom whose what when where which why how is are was were do does did can could should"
    " would will has have \u0645\u0627 \u0645\u0627\u0630\u0627 \u0645\u0646 \u0645\u062a\u0649"
    " \u0623\u064a\u0646 \u0643\u064a\u0641 \u0644\u0645\u0627\u0630\u0627 \u0643\u0645"
    " \u0647\u0644 \u0623\u064a".split()
)
_ASKING = frozenset(
    "nas\u0131l neden ni\u00e7in niye kim kimdir kimin hangi hangisi ka\u00e7 nerede nereye nereden"
    " nedir mi m\u0131 mu m\u00fc midir m\u0131d\u0131r mudur \u0686\u0647 \u0686\u06cc\u0633\u062a"
    " \u06a9\u062f\u0627\u0645 \u0686\u0631\u0627 \u0686\u06af\u0648\u0646\u0647 \u06a9\u062c\u0627"
    " \u06a9\u062c\u0627\u0633\u062a \u0686\u0646\u062f \u0686\u0637\u0648\u0631 \u0686\u0642\u062f"
    "\u0631 \u06a9\u06cc\u0633\u062a \u0622\u06cc\u0627".split()
)


def plain(text: str) -> str:
    """NFKC without invisible characters; whitespace and case as they are."""
    if text.isascii():
        return text
    return INVISIBLE.sub("", unicodedata.normalize("NFKC", text))


def words(text: str) -> list[str]:
    """What stands between spaces and has a letter or digit; each Chinese, Japanese or Thai
    character is a word."""
    text = UNSPACED.sub(r" \g<0> ", plain(text))
    return [word for word in text.split() if any(c.isalnum() for c in word)]


@functools.lru_cache(maxsize=1 << 14)
def comparable(text: str) -> str:
    """The letters and digits of a text alone, in one form: no case, marks, spaces or punctuation.

    Arabic letters that differ in hamza or dots, and dotless i, are one; digits are 0-9.
    """
    folded = unicodedata.normalize("NFKD", plain(text).casefold()).translate(_ONE_FORM)
    if folded.isascii():
        return "".join(c for c in folded if c.isalnum())
    return "".join(_digit(c) for c in folded if c.isalnum())


@functools.cache
def _digit(c: str) -> str:
    return str(unicodedata.digit(c)) if unicodedata.category(c) == "Nd" else c


@functools.cache
def script_of(letter: str) -> str:
    """Unicode's name of a letter's script, in capitals: LATIN, ARABIC, CYRILLIC, CJK ..."""
    return unicodedata.name(letter, "UNKNOWN").split()[0].split("-")[0]


@functools.cache
def scripts() -> frozenset[str]:
    """Every script that some letter has, as script_of names it."""
    letters = (c for c in map(chr, range(sys.maxunicode + 1)) if c.isalpha())
    return frozenset(map(script_of.__wrapped__, letters))


def check_script(script: str, setting: str) -> None:
    """Raise ValueError for a name that no letter's script has: all pairs would be dropped."""
    if script.upper() in scripts():
        return
    near = difflib.get_close_matches(script.upper(), scripts(), n=3)
    hint = f"did you mean {', '.join(s.title() for s in near)}?" if near else ""
    raise ValueError(
        f"{setting} ({script}) is no script that Unicode names, such as Latin, Arabic, Cyrillic,"
        f" Greek, Hebrew, Devanagari, Cjk, Hiragana, Hangul. {hint}".strip()
    )


def script_share(text: str, script: str) -> float:
    """Share of letters that are of a script; 1 for a text without letters."""
    letters = [c for c in plain(text) if c.isalpha()]
    if not letters:
        return 1.0
    return sum(script_of(c) == script.upper() for c in letters) / len(letters)


def language_share(text: str, language: str) -> float:
    """Share of words that could be of a language: all letters are in its alphabet, and it is no
    frequent word of another one; 1 for a text without letters.

    language  one of LANGUAGES. Names and terms of others lower it: text that is meant stays above
    .85, of a related alphabet (Arabic for Persian, English for Turkish) it is .5 to .7.
    """
    alphabet, total, num = ALPHABETS[language], 0, 0
    for word in _spelled(text, language):
        total += 1
        is_foreign = word in _foreign(language) or (language == "fa" and _HAS_ARTICLE(word))
        num += alphabet.issuperset(word) and not is_foreign
    return num / total if total else 1.0


def _spelled(text: str, language: str) -> Iterator[str]:
    """The letters of each word, in lower case as the language lowers it."""
    text = plain(text)
    if language == "tr":
        text = text.replace("I", "\u0131")
    text = text.replace("\u0130", "i").lower()
    if language == "fa":
        text = text.translate(_PERSIAN_TYPING)
    for word in words(text):
        letters = "".join(c for c in word if c.isalpha())
        if letters:
            yield letters


@functools.cache
def _foreign(language: str) -> frozenset[str]:
    own = set(_FUNCTION_WORDS[language])
    table = _PERSIAN_TYPING if language == "fa" else {}
    others = (w for name, some in _FUNCTION_WORDS.items() if name != language for w in some)
    return frozenset(w.translate(table) for w in others) - own


def is_question(text: str) -> bool:
    """Whether a text has a question mark or a question word of English, Arabic, Persian or Turkish
    where that language has it."""
    if any(mark in text for mark in _ASKS):
        return True
    found = [
        "".join(c for c in word if c.isalnum())
        for word in words(plain(text).replace("\u0130", "i").lower())
    ]
    return bool(found) and (found[0] in _ASKING_FIRST or not _ASKING.isdisjoint(found))
