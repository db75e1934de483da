"""Which options a piece of text means: by letter or by text, without those that it denies or only compares with.

Each mention is first replaced by one private-use character, the texts of options longest first, so that "pneumonia"
inside "viral pneumonia" and the B of "hepatitis B" are never mentions of their own and what remains is short grammar.
A capital letter on its own is a mention only where an answer begins, or joined to another mention: elsewhere it is the
article A, the pronoun I, or part of a name. Numbers (1., Option 2) name no option: they are texts of options too often.
"""

import re
import unicodedata
from collections.abc import Sequence

from mede2.trainer.answering.answers import plain

OTHER = -1  # something is meant that is not among the options
FIRST_TEXT, FIRST_LETTER = 0xE000, 0xF000  # private-use characters that stand for option 0's text and for letter A
TEXT, LETTER, MARK = "[\ue000-\uefff]", "[\uf000-\uf8ff]", "[\ue000-\uf8ff]"
MAX_CHARACTERS = 400  # of one answer's words, so that a model that repeats itself for ever is read in no time
ANSWER_WORDS = frozenset({"yes", "no", "maybe", "true", "false", "none", "both"})  # mentions only where answers begin

LATEX = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}|\\[()\[\]]")
FORMATTING = re.compile(
    r"[*`$]|__|</?(?:b|strong|i|em)>|(?m:^[ \t]*#+[ \t]*|^[ \t]*[-•][ \t]+)|(?<!\w)'|'(?!\w)|[\"“”«»「」]",
    re.IGNORECASE,
)
BRACKETED = re.compile(r"[(\[【]\s*([A-Za-z])\s*[)\]】]")
CALLED = re.compile(
    r"\b(?i:option|choice|letter|alternative)\s+(?:([A-Z])(?![\w'-])|([a-z])(?=\s*(?:$|[.,:;)\n]|is\b)))", re.MULTILINE
)
# What may follow a capital that is a letter; behind an article stands a noun, behind the pronoun I a verb.
BEHIND_LETTER = (
    rf"(?=\s*(?:$|[.!,;:()\]}}/&+\n\u2013—。]|-\s|{MARK})|\s+[B-HJ-Z](?![\w'-])|\s+(?:because|since|as|is|are|was|or|and|but|"
    r"given|due|based|would|not|rather|instead|which|here|for|over|if|it|fits|best)\b)"
)
BARE = re.compile(rf"([A-Z])(?![\w'-]\w){BEHIND_LETTER}|([a-z])(?=\s*(?:$|[.)\]}}:\n]))")
COMPARED = re.compile(
    rf"(\b(?i:not|than|nor|neither|unlike|instead of)\s+)([A-Z])(?![\w'-]\w){BEHIND_LETTER}",
)
JOINT = r"\s*(?:,\s*(?:and|or)\b|and/or\b|and\b|or\b|but\b|as well as\b|[,/&+])?\s*"
NEXT = rf"[.:)]?{JOINT}[A-Z](?![\w'-]\w){BEHIND_LETTER}"
JOINED = re.compile(rf"(?<={MARK})(?:{NEXT})+")
FILLER = re.compile(
    r"(?:[\s:=,>\u2013—-]|(?:\w+ly|therefore|thus|indeed|still|just|hence|then|most|either|both|the|that|it is|to be|"
    r"option|choice|letter)\b(?!$))*"
)
GROUP = rf"{MARK}(?:\s*(?:,|/|\bor\b|\bnor\b|\band\b|\(|\)|[.:])?\s*(?:the\s+|an?\s+)?{MARK}){{0,12}}"
ONE = rf"(?:{LETTER}[\s.:)\u2013—-]{{0,3}}{TEXT}|{MARK}(?:\s?\(?{LETTER})?)"
DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|no|nor|neither|never|without|unlike|cannot|exclud\w+|rul\w+ out|rather than|instead of|than|over|"
    rf"against|absence of|history of|risk of)|n't)\s+(?:\w+\s+){{0,3}}?{GROUP}",
    re.IGNORECASE,
)
DENIED_BEHIND = (
    r"[\s)\]:.,\u2013—-]{0,4}?(?:which\s+)?(?:(?:is|are|was|were|seems?|can be|has been|would be)"
    r"(?:n't\b|\s+(?:\w+ly\s+)?not\b)|"
    r"(?:(?:is|are|was|were|seems?|can be|has been|would be)\s+)?(?:\w+ly\s+|also\s+)?(?:incorrect|inconsistent|wrong|"
    r"false|ruled out|excluded|unlikely|less likely|impossible|cannot|doesn't|does not|do not|has no|lacks|"
    r"would(?!\s+(?:be\s+(?:the|correct|best|most)|fit|explain|also)\b))\b)"
)
DENIED = re.compile(
    rf"{GROUP}(?![\s)\]]*\b(?:is|was|seems)\b){DENIED_BEHIND}|{ONE}{DENIED_BEHIND}", re.IGNORECASE
)  # "A and B are wrong", but in "C, A is wrong" only A is
REASON = re.compile(
    r"\b(?:because|since|as(?! well)|given|due to|based on|which|whereas|while|although|though|however|but|with|"
    r"if|for)\b"
    r"|;(?!\s*(?:otherwise|alternatively)\b)|\n",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"[.!?](?=\s|$)|。|\n")


def clean(text: str) -> str:
    """One form of full-width letters and the like (NFKC) and of apostrophes; no characters that stand for mentions."""
    text = unicodedata.normalize("NFKC", text).replace("\u2018", "'").replace("\u2019", "'")
    return re.sub("[\ue000-\uf8ff\u200b-\u200d\ufeff]", "", text)


def unformatted(text: str) -> str:
    """Without Markdown's and LaTeX' marks for type, and without quotation marks."""
    for _ in range(3):  # \textbf{\text{C}}
        text = LATEX.sub(lambda match: match[1] or "", text)
    return FORMATTING.sub("", text)


def mark(text: str, options: Sequence[str]) -> str:
    """The unformatted text, each option's text and each letter that is marked as one replaced by its character."""
    text = unformatted(text)
    indices: dict[str, int] = {}
    for index, option in enumerate(options):
        known = plain(unformatted(clean(option)))
        indices[known] = OTHER if known in indices else index
    names = sorted((name for name in indices if len(name) > 1 or not name.isalpha()), key=len, reverse=True)
    names = [name for name in names if name and name not in ANSWER_WORDS]
    if names:
        pattern = "|".join(r"\s+".join(map(re.escape, name.split())) for name in names)
        text = re.sub(
            rf"(?<!\w)(?<!\w-)(?<!\d\.)(?:{pattern})(?!\w|-\w|\.\d)",
            lambda match: _character(FIRST_TEXT, indices.get(plain(match[0]), OTHER)),
            text,
            flags=re.IGNORECASE,
        )
    for pattern in (CALLED, BRACKETED):
        text = pattern.sub(lambda match: letter_mark(next(filter(None, match.groups())), options), text)
    return COMPARED.sub(lambda match: match[1] + letter_mark(match[2], options), text)


def letter_mark(letter: str, options: Sequence[str]) -> str:
    """The character that stands for a letter."""
    index = ord(letter.upper()) - ord("A")
    return _character(FIRST_LETTER, index if index < len(options) else OTHER)


def mark_head(marked: str, options: Sequence[str]) -> str:
    """The letter, or the yes or no, with which an answer begins is a mention, and so are letters joined to one."""
    marked = marked[FILLER.match(marked).end() :]
    texts = [plain(option) for option in options]
    word = re.match(r"[a-z]+\b", marked, re.IGNORECASE)
    bare = BARE.match(marked)
    behind = re.match(rf"({LETTER}\W*|[A-Za-z][.:)]\s*)([a-z]+)\s*(?:$|[.,;\n])", marked, re.IGNORECASE)
    if behind and behind[2].lower() in ANSWER_WORDS.intersection(texts):  # (A) yes
        spelled = _character(FIRST_TEXT, texts.index(behind[2].lower()))
        marked = behind[1] + spelled + marked[behind.end(2) :]
        bare = BARE.match(marked)
    if word and word[0].lower() in ANSWER_WORDS.intersection(texts):
        others = re.match(r"\s*(?:,|/|\bor\b|\band\b)\s*([a-z]+)\s*(?:$|[.!?])", marked[word.end() :], re.IGNORECASE)
        found = [word[0]] + ([others[1]] if others else [])
        marks = [_character(FIRST_TEXT, texts.index(name.lower())) for name in found if name.lower() in texts]
        return "".join(marks) + marked[word.end() :]
    if bare:
        letter, rest = bare[0], marked[bare.end() :]
        if letter.lower() in texts:  # blood group A, whatever its place
            marked = _character(FIRST_TEXT, texts.index(letter.lower())) + rest
        elif letter in "Aa" and re.match(rf"\s+{TEXT}", rest) and named(rest[: rest.index(rest.strip()[0]) + 1]) != {0}:
            marked = rest  # "A lung abscess": an article
        else:
            marked = letter_mark(letter, options) + rest
    return JOINED.sub(lambda chain: re.sub(r"[A-Z]", lambda match: letter_mark(match[0], options), chain[0]), marked)


def meant(marked: str, options: Sequence[str]) -> frozenset[int]:
    """The options that the answer at the beginning of a marked text means; empty if it means none.

    An answer ends with its sentence, and after MAX_CHARACTERS. A text behind a letter belongs to it: `(B) text of A`
    means both.
    """
    marked = mark_head(re.match(rf"\s*((?s:.{{0,{MAX_CHARACTERS}}}))", marked)[1].rstrip(), options)
    label = re.match(
        rf"{LETTER}(?:\s*[):\u2013—-]?\s*{TEXT}|\s*[.]\s*{TEXT}(?=\s*(?:$|[.,;:(\n\]}}]|{MARK}))|[.:)]?\s*{LETTER})",
        marked,
    )
    start = label.end() if label else 0
    end = SENTENCE_END.search(marked, start)
    return named(marked[: end.start()] if end else marked)


def named(marked: str) -> frozenset[int]:
    """The options that a marked sentence names, without those that it denies, up to where it begins to give reasons."""
    marked = DENIED.sub("", DENIED_BEFORE.sub("", marked))
    first = re.search(MARK, marked)
    if first is None:
        return frozenset()
    reason = REASON.search(marked, first.end())
    marks = re.findall(MARK, marked[: reason.start()] if reason else marked)
    return frozenset(map(_index, marks))


def sentences(marked: str) -> list[tuple[int, str]]:
    """Start and text of each sentence or line that is not blank."""
    starts = [0, *(match.end() for match in SENTENCE_END.finditer(marked))]
    ends = [*starts[1:], len(marked)]
    parts = [(start, marked[start:end].strip(" \t\r\n.!?。")) for start, end in zip(starts, ends, strict=True)]
    return [(start, part) for start, part in parts if part]


def _character(first: int, index: int) -> str:
    return chr(first + (0xFF if index == OTHER else index))


def _index(character: str) -> int:
    index = (ord(character) - FIRST_TEXT) % (FIRST_LETTER - FIRST_TEXT)
    return OTHER if index == 0xFF else index
