"""Words of texts in any script: what metrics that count words count."""

import unicodedata
from collections.abc import Iterable

import regex

# Scripts that put no spaces between words: each letter with its marks counts as a word.
_UNSPACED = "".join(
    rf"\p{{scx={script}}}"
    for script in (
        *("Han", "Bopomofo", "Hiragana", "Katakana", "Yi"),
        *("Thai", "Lao", "Khmer", "Myanmar", "Tai_Le", "New_Tai_Lue", "Tai_Tham", "Tai_Viet"),
        *("Balinese", "Javanese"),
    )
)
# Some punctuation belongs to these scripts as well.
_LETTER = rf"[[{_UNSPACED}]&&[\p{{L}}\p{{N}}]]"
# The two joiners are used within words of Persian and of India's languages.
_WORDS = regex.compile(
    rf"{_LETTER}\p{{M}}*"
    rf"|[[\p{{L}}\p{{N}}]--[{_UNSPACED}]](?:[[\p{{L}}\p{{N}}\p{{M}}\u200c\u200d]--[{_UNSPACED}]])*",
    regex.V1,
)
_UNSPACED_LETTER = regex.compile(rf"({_LETTER}\p{{M}}*)", regex.V1)
_LETTERS = regex.compile(r"\p{L}")
_HAN = regex.compile(r"[[\p{Han}\p{Bopomofo}]&&\p{L}]", regex.V1)
_NOT_ASCII = regex.compile(r"[[\p{L}\p{N}]--[a-z0-9]]", regex.V1)
_NOT_LATIN = regex.compile(r"[\p{L}--\p{Latin}]", regex.V1)
_PUNCTUATION = regex.compile(r"\p{P}")


def words(text: str) -> list[str]:
    """Splits a text into its words, lower-cased and without punctuation and symbols.

    A word is a run of letters, digits and their marks; of scripts that are written without spaces
    (Chinese, Japanese, Thai, Lao, Khmer, Burmese, ...) it is each letter. Of ASCII texts they are
    the runs of a-z and 0-9.
    """
    # é may be written as one character or as two.
    return _WORDS.findall(unicodedata.normalize("NFC", text.lower()))


def is_ascii(text: str) -> bool:
    """Returns whether a text's letters and digits are all a-z, A-Z and 0-9."""
    return not _NOT_ASCII.search(text.lower())


def is_latin(text: str) -> bool:
    """Returns whether a text's letters are all Latin; True where it has none."""
    return not _NOT_LATIN.search(text)


def spaced(text: str) -> str:
    """Puts spaces around each letter of the scripts that are written without."""
    return _UNSPACED_LETTER.sub(r" \1 ", text)


def without_punctuation(text: str) -> str:
    """Takes out the punctuation of all scripts."""
    return _PUNCTUATION.sub("", text)


def bleu_tokenizer(texts: Iterable[str]) -> str:
    """Chooses sacrebleu's tokenizer by the script of most of the texts' letters.

    Returns:
        "zh" for Chinese, "char" for the other scripts without spaces, among them Japanese, else
        "intl", which splits at spaces and at Unicode's punctuation.
    """
    joined = "\n".join(texts)
    letters, unspaced, han = (
        len(pattern.findall(joined)) for pattern in (_LETTERS, _UNSPACED_LETTER, _HAN)
    )
    if 2 * unspaced <= letters:
        return "intl"
    # Of the letters of a Japanese text, about half are Han.
    return "zh" if 10 * han > 9 * unspaced else "char"
