"""What a generation answers: the strict format first, then a ladder of looser forms, down to nothing.

The first rung whose form is there decides. If it means one option, that is the answer; if it means several (hedged,
contradictory) or something that is not offered, there is no answer, and no lower rung is asked. Of several final
answers the last counts, unless they stand side by side, where no word revises the first.

| rung | form | example |
| --- | --- | --- |
| format | exactly the two tags, an answer that names one option | `<think>...</think> <answer>C</answer>` |
| answer tag | the last <answer> tag, closed or cut off, read by the rungs below | `<answer>It is C.</answer>` |
| boxed | LaTeX or GLM's box | `\\boxed{\\text{C}}` |
| stated | words that announce an answer, or call an option the right one | `The answer is (C).`, `C is correct` |
| bold | one option alone is set in bold | `it has to be **C**` |
| letter | the first or last line begins with a letter | `C`, `(C) lung abscess` |
| option text | a sentence that is an option's text, or the last sentence names one | `This suggests lung abscess.` |
| short text | open questions only: one line of at most 20 words | `right lower lobe` |

Open questions go by format, answer tag, boxed, stated and short text. What stands before `</think>` (or another
model's mark for the end of its reasoning) is not an answer; nor is anything of a generation cut off within.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mede2.trainer.answering.answers import match_option, parse_answer, plain
from mede2.trainer.answering.mentions import (
    ANSWER_WORDS,
    BARE,
    BEHIND_LETTER,
    DENIED_BEHIND,
    FILLER,
    LETTER,
    MARK,
    MAX_CHARACTERS,
    OTHER,
    TEXT,
    clean,
    mark,
    mark_head,
    meant,
    named,
    sentences,
    unformatted,
)

MAX_WORDS = 20  # of a short text
SPECIAL = re.compile(r"<\|(?:im_end|im_start|eot_id|endoftext|end|return|eom_id)\|>|</?s>|<end_of_turn>|<eos>")
THOUGHT = re.compile(
    r"</(?:think|thinking|thought|reasoning)>|<unused95>|◁/think▷|<\|end_of_thought\|>|<\|channel\|>final<\|message\|>",
    re.IGNORECASE,
)
THINKING = re.compile(
    r"<(?:think|thinking|thought|reasoning)>|<unused94>|◁think▷|<\|begin_of_thought\|>|<\|channel\|>analysis",
    re.IGNORECASE,
)
ANSWER_TAG = re.compile(r"<answer>(?P<content>.*?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)
BOX = re.compile(
    r"\\f?boxed\s*\{(?P<content>(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)|<\|begin_of_box\|>(?P<glm>.*?)(?:<\||\Z)"
)
BOLD = re.compile(r"\*\*(.+?)\*\*|__(.+?)__|<(?:b|strong)>(.+?)</(?:b|strong)>", re.IGNORECASE)
IS = r"(?:\b(?:is|would be|should be|must be|could be|might be|may be|will be|has to be)\b|[:=→]|[-=]>|\s[-\u2013—]\s)"
WITHIN = rf"(?:(?!{MARK})[^\n.!?:])"
ANNOUNCED = (
    rf"(?:\b|_)(?:answer|ans|guess|diagnosis|conclusion|solution|(?:correct|final|best)\s+(?:option|choice|one))\b{WITHIN}{{0,40}}?{IS}"
    r"|^[ \t]*(?:the\s+)?(?:final\s+|correct\s+)?answer[ \t]*$"
    r"|(?:答案|答え|정답|\b(?:antwort|réponse|respuesta|resposta|risposta|ответ)\b)\s*(?:是|为|は|est|es|è|é|ist)?\s*[:=]?"
)
CHOSEN = (
    rf"|\b(?:option|choice)\s*(?:\bis\b|[:=])|\banswer\s+(?={LETTER}|[A-Z](?!\w){BEHIND_LETTER})"
    rf"|\b(?:most\s+(?:likely|appropriate|probable|suitable|consistent)|best|correct)\b{WITHIN}{{0,30}}?{IS}"
    rf"|\b(?:I|we)\b{WITHIN}{{0,20}}?\b(?:choose|pick|select|go with|opt for|say|answer|settle on)\b"
    r"|\b(?:so|therefore|thus|hence|it is|it's|it must be|it has to be)\b[,:]?\s+"
    rf"(?=(?:{LETTER}|[A-Z])\s*(?:$|[.\n]|it is\b))"
)
CUE = re.compile(ANNOUNCED + CHOSEN, re.IGNORECASE | re.MULTILINE)
OPEN_CUE = re.compile(ANNOUNCED, re.IGNORECASE | re.MULTILINE)
JSON_ANSWER = re.compile(r"[\"'](?:final_)?answer[\"']\s*:\s*\"(?P<content>[^\"\n]*)\"", re.IGNORECASE)
SINGLE = r"(?<![\w'-])[A-Z](?![\w'-])"
NAME = rf"(?:(?:{LETTER}|{SINGLE})[\s.:)]*{TEXT}|{MARK}|{SINGLE})"
CALLED_RIGHT = re.compile(
    rf"(?P<subject>{NAME}(?:\s*(?:,|/|&|and|or)\s*{NAME}){{0,9}})[\s)]*"
    r"(?:(?:is|are|would be|must be|seems|appears|looks)\s+(?:to be\s+)?(?:\w+ly\s+|therefore\s+|thus\s+)?"
    r"(?:the|my|our|an?)?\s*(?:single\s+)?(?:correct|right|best|answer|final|most\s+(?:likely|appropriate|probable|consistent|suitable))\b"
    r"|fits best|best\s+(?:fits|explains|describes|matches))"
)
DOUBTED = re.compile(
    r"(?:\b(?:not|doubt)|n't)\s+(?:think|believe|say|sure|know|agree|certain|the case)\b[^.,;\n]*$"
    r"|\b(?:doubt|wrong|incorrect|neither|nor|not|if|whether|unless)\s+(?:that\s+|the\s+)*$",
    re.IGNORECASE,
)
WORD = re.compile(rf"(?=(?:{'|'.join(sorted(ANSWER_WORDS))})\b)", re.IGNORECASE)  # "No effusion is seen"
WORD_FIRST = re.compile(
    rf"(?:{WORD.pattern}|[^,]{{1,40}},\s+{WORD.pattern})(?=\w+\s*(?:$|[,;:\u2013—-]))", re.IGNORECASE
)
SIDE_BY_SIDE = re.compile(r"(?:\W|\b(?:\w|the|my|and|or|also|correct|final|answer|is)\b)*", re.IGNORECASE)
REFUSAL = re.compile(r"\b(?:cannot|can't|unable|sorry|not able|don't know|do not know)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Extracted:
    """What a generation answers.

    Attributes:
        answer: the option's text, or the words of an answer to an open question; None where there is no answer.
        option: its index; None for open questions and where there is no answer.
        rung: of RUNGS, by which it was found; None where there is no answer.
    """

    answer: str | None = None
    option: int | None = None
    rung: str | None = None


def extract(text: str, options: Sequence[str] = ()) -> Extracted:
    """Read the answer of a generation.

    Args:
        text: the generation; special tokens may still be there.
        options: the texts of the options in the order in which they were offered; empty for an open question.
    """
    strict = parse_answer(text, options)
    if strict.option is not None:
        return Extracted(options[strict.option], strict.option, "format")
    if strict.answer and not options:
        return Extracted(strict.answer, None, "format")
    said = without_reasoning(SPECIAL.sub("", clean(text)))
    if said is None:
        return Extracted()
    for name, rung in OPTION_RUNGS if options else OPEN_RUNGS:
        found = rung(said, options) if options else rung(said)
        if found:
            (one, *more) = found
            if more or one == OTHER:
                return Extracted()
            return Extracted(options[one], one, name) if options else Extracted(one, None, name)
    return Extracted()


def without_reasoning(text: str) -> str | None:
    """What stands behind the reasoning, or from the <answer> tag on; None if the reasoning does not end."""
    *_, end = [0, *(match.end() for match in THOUGHT.finditer(text))]
    said = text[end:]
    opened = THINKING.search(said)
    if opened is None:
        return said
    tag = ANSWER_TAG.search(said, opened.end())
    return said[tag.start() :] if tag else None


def answer_tag(said: str, options: Sequence[str]) -> frozenset:
    """The last <answer> tag's content, by any form that an answer may have."""
    return last_of(said, [(m.start(), m.end(), content(m["content"], options)) for m in ANSWER_TAG.finditer(said)])


def boxed(said: str, options: Sequence[str]) -> frozenset:
    """The last box's content."""
    boxes = [(m.start(), m.end(), m["content"] or m["glm"] or "") for m in BOX.finditer(said)]
    return last_of(said, [(start, end, content(inner, options)) for start, end, inner in boxes])


def content(text: str, options: Sequence[str]) -> frozenset:
    """What a place made for the answer holds; OTHER if it holds something that is no option."""
    if not text.strip():
        return frozenset()
    whole = match_option(unformatted(text).strip(), options)
    if whole is not None:
        return frozenset({whole})
    for rung in (boxed, stated, lambda said, options: meant(mark(said, options), options), bold, letter, option_text):
        if found := rung(text, options):
            return found
    return frozenset({OTHER})


def stated(said: str, options: Sequence[str]) -> frozenset:
    """Words that announce an answer, or call an option the right one."""
    marked = mark(said, options)
    cues = [
        (cue.start(), cue.end(), meant(marked[cue.end() : cue.end() + 2 * MAX_CHARACTERS], options))
        for cue in CUE.finditer(marked)
    ]
    called = [(match.start(), match.end(), meant(match["subject"], options)) for match in CALLED_RIGHT.finditer(marked)]
    believed = [found for found in cues + called if not DOUBTED.search(marked[max(0, found[0] - 60) : found[0]])]
    return last_of(marked, sorted(believed, key=lambda found: found[0]))


def bold(said: str, options: Sequence[str]) -> frozenset:
    """The only option that is set in bold; nothing if several are."""
    found = set()
    for match in BOLD.finditer(said):
        inner = mark(next(filter(None, match.groups())), options)
        denied = re.match(DENIED_BEHIND, said[match.end() :], re.IGNORECASE)
        if not denied and (re.fullmatch(r"\W*(?:[A-Za-z]\b)?\W*", inner) or plain(inner) in ANSWER_WORDS):
            found |= meant(inner, options)
    return frozenset(found) if len(found) == 1 else frozenset()


def letter(said: str, options: Sequence[str]) -> frozenset:
    """The letter with which the first or the last line begins; several, if lines of one shape begin with several."""
    lines = [line for line in mark(said, options).splitlines() if line.strip()]
    heads = [(meant(line, options), shape(line)) for line in lines if begins_with_letter(line)]
    if not heads or not (begins_with_letter(lines[0]) or begins_with_letter(lines[-1])):
        return frozenset()
    found = frozenset().union(*(meaning for meaning, _ in heads))
    if len(found) > 1:
        shapes = [shape for _, shape in heads]
        ends = [heads[0]] * begins_with_letter(lines[0]) + [heads[-1]] * begins_with_letter(lines[-1])
        singled_out = [meaning for meaning, shape in ends if shape != "words" and shapes.count(shape) == 1]
        if singled_out:
            return frozenset().union(*singled_out)
    return found if begins_with_letter(lines[-1]) or len(found) == 1 else frozenset()


def shape(line: str) -> str:
    """What a marked line that begins with a letter holds beside it: nothing, an option's text, or words."""
    line = line[FILLER.match(line).end() :]
    if re.match(rf"(?:{LETTER}|[A-Z])[\s.:)\u2013—-]*{TEXT}", line):
        return "text"
    return "words" if re.search(r"\w", line[1:]) else "nothing"


def begins_with_letter(line: str) -> bool:
    """Whether a marked line begins with a letter, perhaps behind a word such as `either`."""
    line = line[FILLER.match(line).end() :]
    return bool(re.match(LETTER, line) or BARE.match(line))


def option_text(said: str, options: Sequence[str]) -> frozenset:
    """A sentence that is nothing but an option's text, or yes or no where it begins; else what the last one names."""
    marked = mark(said, options)
    parts = sentences(marked)
    if not parts:
        return frozenset()
    exact = []
    for number, (start, sentence) in enumerate(parts):
        word = WORD_FIRST.match(sentence) or (not number and WORD.match(sentence))
        if word:
            exact.append((start, start + len(sentence), named(mark_head(sentence[word.end() :], options))))
        elif re.fullmatch(rf"\W*{TEXT}\W*", sentence) and len(re.findall(MARK, sentence)) == 1:
            exact.append((start, start + len(sentence), named(sentence)))
    found = last_of(marked, exact)
    start, final = parts[-1]
    if len(found) == 1 or (exact and exact[-1][0] == start):
        return found
    thought = re.search(r"\b(?:think|say|believe|is|so|therefore|thus)\b[,:]?\s+(?=[a-z]{2,}$)", final, re.IGNORECASE)
    return named(final) or (thought and named(mark_head(final[thought.end() :], options))) or found


def last_of(text: str, statements: Sequence[tuple[int, int, frozenset]]) -> frozenset:
    """What the last of some statements means (start, end, meaning), with those beside it that no word parts from it."""
    statements = [statement for statement in statements if statement[2]]
    if not statements:
        return frozenset()
    start, _, found = statements[-1]
    for earlier_start, earlier_end, earlier in reversed(statements[:-1]):
        if not SIDE_BY_SIDE.fullmatch(text, earlier_end, max(start, earlier_end)):
            break
        start, found = earlier_start, found | earlier
    return found


def open_tag(said: str) -> frozenset:
    """The last <answer> tag's content."""
    return last_of(said, [(m.start(), m.end(), worded(m["content"])) for m in ANSWER_TAG.finditer(said)])


def open_box(said: str) -> frozenset:
    """The last box's content."""
    return last_of(said, [(m.start(), m.end(), worded(m["content"] or m["glm"] or "")) for m in BOX.finditer(said)])


def open_stated(said: str) -> frozenset:
    """The rest of the sentence behind words that announce an answer."""
    if found := [worded(match["content"]) for match in JSON_ANSWER.finditer(said)]:
        return found[-1]
    said = unformatted(said)
    statements = []
    for cue in OPEN_CUE.finditer(said):
        rest = sentences(said[cue.end() :].lstrip())
        if rest:
            statements.append((cue.start(), cue.end() + len(rest[0][1]) + 1, worded(rest[0][1])))
    return last_of(said, statements)


def short_text(said: str) -> frozenset:
    """All of it, if it is one line of at most MAX_WORDS words and no refusal."""
    said = said.strip()
    short = len(said.splitlines()) == 1 and len(said.split()) <= MAX_WORDS
    return worded(said) if short and not REFUSAL.search(said) else frozenset()


def worded(text: str) -> frozenset:
    """The words of an open answer without type, brackets and final full stop."""
    words = " ".join(unformatted(text).split()).strip(" :{},").removesuffix(".").removesuffix("。")
    return frozenset({words} if words else ())


OPTION_RUNGS: tuple[tuple[str, Callable[[str, Sequence[str]], frozenset]], ...] = (
    ("answer tag", answer_tag),
    ("boxed", boxed),
    ("stated", stated),
    ("bold", bold),
    ("letter", letter),
    ("option text", option_text),
)
OPEN_RUNGS: tuple[tuple[str, Callable[[str], frozenset]], ...] = (
    ("answer tag", open_tag),
    ("boxed", open_box),
    ("stated", open_stated),
    ("short text", short_text),
)
RUNGS = ("format", *(name for name, _ in OPTION_RUNGS), "short text")
