"""What is done to a single text: clean it, fold it for comparison, count its words, cut it into chunks."""

import html
import math
import re
import unicodedata
from itertools import pairwise

# A word is a run of letters and digits, or one Chinese, Japanese or Korean character.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+(?:['’-][^\W{_CJK}]+)*")

# AG News lost the ampersand of many entities (" #39;" for "&#39;", " quot;" for "&quot;"). Of numbers only those of
# quotes, dollar, ampersand, brackets and typographic signs are taken: "came in #12; last year #7" stays as it is.
_LAME_ENTITY = re.compile(r" (#(?:0?3[4689]|6[02]|9[13]|1[3-9]\d|2\d\d|8\d{3})|quot|amp|lt|gt);")
_HTML_TAG = re.compile(r"</?(?:a|b|br|em|font|i|img|li|nobr|p|span|strong|u|ul)(?:\s[^<>]*)?/?>", re.IGNORECASE)
_INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f\u00ad\u200b\u2060\ufeff]")

# A sentence ends at . ! ? before a capital or a digit (not behind an initial or a title such as "Dr."), or at a
# full-width mark; closing quotes belong to it.
_SENTENCE_END = re.compile(
    r"""(?:(?<!\b[A-Z])(?<!\bMr)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bMrs)[.]|[!?…])["'”’)\]]*\s+(?=["'“‘(]?[A-Z0-9])"""
    r"""|[。！？；]+[”’」』）"]*"""
)


def clean_text(text: str) -> str:
    """Entities resolved, HTML tags and invisible characters gone, NFC, every run of white space one space."""
    text = html.unescape(_LAME_ENTITY.sub(r"&\1;", text))
    text = _HTML_TAG.sub(" ", text)
    return " ".join(_INVISIBLE.sub("", unicodedata.normalize("NFC", text)).split())


def clean_label(label: str) -> str:
    """NFC, no invisible characters, no white space around it; case is kept."""
    return " ".join(_INVISIBLE.sub("", unicodedata.normalize("NFC", label)).split())


def is_empty(text: str) -> bool:
    """Whether nothing of the text can be seen."""
    return not any(character.isprintable() and not character.isspace() for character in text)


def fold(text: str) -> str:
    """The text without case, spaces and punctuation: two texts with the same fold are the same text."""
    folded = "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())
    return folded or text


def words(text: str) -> list[str]:
    """The words of a text; a Chinese character counts as one."""
    return _WORD.findall(text)


def chunk_text(text: str, most_words: int) -> list[str]:
    """Cut a text at sentence ends into chunks of similar length; together they are the whole text.

    Args:
        most_words: most words (Chinese: characters) of a chunk. A single longer sentence is cut at a word.

    Raises:
        ValueError: `most_words` is below 1.
    """
    if most_words < 1:
        raise ValueError(f"a chunk needs at least one word, not {most_words}")
    left = len(words(text))  # words that stand in no chunk yet
    if left <= most_words:
        return [text]
    chunks, chunk, size = [], "", 0
    for sentence in _sentences(text, most_words):
        length = len(words(sentence))
        target = left / math.ceil(left / most_words)
        # Close the chunk where that is nearer to the target than going on, and always before it grows too long.
        if chunk and (size + length > most_words or size + length / 2 > target):
            chunks.append(chunk)
            left -= size
            chunk, size = "", 0
        chunk += sentence
        size += length
    return [piece.strip() for piece in [*chunks, chunk]]


def _sentences(text: str, most_words: int) -> list[str]:
    """Pieces of a text that end at sentence ends, none above `most_words` words; joined they are the text."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    pieces = []
    for start, end in zip([0, *ends], [*ends, len(text)], strict=True):
        sentence = text[start:end]
        starts = [match.start() for match in _WORD.finditer(sentence)]
        cuts = [0, *starts[most_words::most_words], len(sentence)]
        pieces += [sentence[a:b] for a, b in pairwise(cuts)]
    return [piece for piece in pieces if piece]
