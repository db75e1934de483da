"""Leakage: questions and images of benchmarks that stand in the rows of training files.

Texts are compared as in GPT-3 (arXiv 2005.14165, appendix C): by 13 words in a row, without case and punctuation.
"""

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from mede2.trainer.data.images import Window, load_image
from mede2.trainer.data.records import BadRow, Message, Record, detect_stage, read_records
from mede2.trainer.files import hash_file
from mede2.trainer.preference.duplicates import perceptual_hash
from mede2.trainer.questions.cases import Case
from mede2.trainer.questions.rows import tell

Benchmarks = Mapping[str, Sequence[Case]]
Lines = tuple[tuple[str, ...], ...]  # of a question, each as its words

GRAM = 13  # words
SHORTEST = 4
"""Words of the shortest question that is looked for: fewer, such as "what is it", stand in texts by chance."""
COMMON = 10
"""Questions of a benchmark that words may stand in and still be one's own; in a small benchmark, half of them."""
LIKELY = 0.25
"""Share of a question's 13-grams from which it was copied rather than met by chance. Measured: MedQA (767 vignettes)
and Craft-MD (139), each halved, make 152,000 pairs of different vignettes; 202 share a 13-gram that is not common, such
as "the remainder of the examination shows no abnormalities which of the following is", none more than 0.16 of them."""
LEAK_BITS = 16
"""Bits of 256 in which perceptual hashes of one picture may differ. Measured: 200 phantoms, 80 blood smears and 76
chest films as JPEG of quality 60 and 85, halved and doubled, differ from themselves in up to 12, 6 and 4; the nearest
of 1,000 phantoms to 1,000 others in 32, of 292 smears and of 76 films among themselves in 24 and 54. Thumbnails of 28
pixels, halved, are not found: they differ in up to 56."""

IDEOGRAPH = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # kana and Chinese characters: no spaces between words
WORD = re.compile(rf"[{IDEOGRAPH}]|[^\W_{IDEOGRAPH}]+")
UNKNOWN = 0  # number of a word that no benchmark has, and of what lies between two messages


@dataclass(frozen=True)
class Leak:
    """A case of a benchmark in a row of a training file.

    Attributes:
        benchmark: its name.
        case: id of the case.
        file, line: of the row.
        kind: "text" or "image".
        detail: what was found.
        share: of the question's own 13-grams that stand in the row; 1 for a whole question and for an image.
    """

    benchmark: str
    case: str
    file: str
    line: int
    kind: str
    detail: str
    share: float = 1.0

    @property
    def severity(self) -> str:
        """ "error", or "warning" where different questions have as much in common by chance (see `LIKELY`)."""
        return "error" if self.share >= LIKELY else "warning"


def to_row(leak: Leak) -> dict[str, str | int]:
    """A leak as a report has it."""
    return {
        "benchmark": leak.benchmark, "case": leak.case, "training_file": leak.file, "line": leak.line,
        "kind": leak.kind, "detail": leak.detail,
    }  # fmt: skip


def find_leaks(
    records: Iterable[Record], benchmarks: Benchmarks, grey_window: Window = None, most_bits: int = LEAK_BITS
) -> list[Leak]:
    """Every case of the benchmarks that stands in a record, for each record; see `Index`.

    Args:
        records: of training files; they are read once, and none is kept.
        benchmarks: cases by the benchmark's name.
        grey_window: see `images.load_image`.
        most_bits: in which the perceptual hashes of images that look alike may differ, of 256.

    Raises:
        ValueError: an image of a benchmark that does not decode.
        BadRow: one of a record.
    """
    index = Index(benchmarks, grey_window, most_bits)
    return [leak for record in records for leak in index.leaks(record)]


def leaks_of_files(
    files: Sequence[Path], benchmarks: Benchmarks, stage: int | None = None, on_bad_row: str = "stop",
    grey_window: Window = None, most_bits: int = LEAK_BITS,
) -> list[Leak]:  # fmt: skip
    """Every case of the benchmarks that stands in training files.

    Args:
        files: jsonl files of records.
        benchmarks, grey_window, most_bits: see `find_leaks`.
        stage: what the rows are; None: each file's own, by its rows' keys.
        on_bad_row: "stop" raises where rows cannot be used, "skip" leaves them out, as a run leaves them out.

    Raises:
        ValueError: rows that cannot be used, a file that cannot be read or whose rows are of neither stage, an image of
            a benchmark that does not decode.
    """
    index = Index(benchmarks, grey_window, most_bits)
    leaks: list[Leak] = []
    problems: list[BadRow] = []
    for file in map(str, files):
        for record in read_records((file,), stage or detect_stage(file)):
            try:
                if isinstance(record, BadRow):
                    raise record
                leaks += index.leaks(record)
            except BadRow as problem:
                problems.append(problem)
    if problems and on_bad_row == "stop":
        raise tell(f"{len(problems)} rows of {', '.join(map(str, files))} cannot be compared:", problems)
    return leaks


def words(text: str) -> list[str]:
    """The words that are compared: text in one form of its characters (NFKC), without upper case, cut into runs of
    letters and digits, a Chinese or Japanese character a word of its own. Punctuation and white space do not count."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return WORD.findall(unicodedata.normalize("NFKC", folded))  # again, for folding takes some Greek letters apart


def _text(messages: Iterable[Message]) -> str:
    """The text of messages, with a line break where there is an image and between messages."""
    return "\n".join("".join(part.get("text", "\n") for part in message["content"]) for message in messages)


def _offer(options: Sequence[str]) -> re.Pattern:
    """All options in their order, with nothing but a letter each and punctuation between."""
    letter = r"(?<![^\W_])(?:[A-Za-z](?![^\W_])[\W_]*)?"
    return re.compile(r"[\W_]*".join(letter + re.escape(option.strip()) for option in options))


def _pieces(case: Case) -> tuple[Lines, ...]:
    """What the user's messages ask: the lines before the options and those behind them, each as its words."""
    text = _text(message for message in case.prompt if message["role"] == "user")
    parts = _offer(case.options).split(text) if case.options else [text]
    lines = (tuple(tuple(words(line)) for line in part.splitlines()) for part in parts)
    return tuple(tuple(line for line in part if line) for part in lines)


@dataclass(frozen=True)
class Question:
    """What one or several cases ask alike.

    Attributes:
        benchmark: its name.
        cases: their ids.
        has_images: whether they show images.
        num_grams: different 13-grams of its own.
        short: (T,) its words where it has no 13-gram of its own, as numbers; empty where there are too few.
    """

    benchmark: str
    cases: tuple[str, ...]
    has_images: bool
    num_grams: int
    short: np.ndarray


@dataclass(frozen=True)
class Fingerprint:
    """An image file, told by its bytes (sha256), its pixels (sha256) and its looks ((4,) uint64)."""

    image: Path
    bytes: str
    pixels: str
    looks: np.ndarray


class Index:
    """The benchmarks, laid out so that one record after the other can be looked up; its size is that of the benchmarks.

    A question's own words are those of the user's messages without the list of the options and without what is
    boilerplate: lines, and 13-grams, that stand in more than `COMMON` of the benchmark's different questions, or in
    more than half of them. Cases with the same words and the same images are one question. No 13-gram spans a cut.

    - A question leaks if one of its own 13-grams stands in one message of a record, be it a turn or an answer.
    - One that has none, but `SHORTEST` words or more in a row, leaks if these stand there whole; if it has images,
      only in a record that shows one of them, for "Is there a fracture?" is another question about another film.
    - An image leaks if a record shows it: the same bytes, the same pixels, or one that looks like it.

    Attributes:
        summary: of each benchmark: `cases`, `images` (different files), and `without_words`, the cases that have no
            words of their own to be looked for.
    """

    def __init__(self, benchmarks: Benchmarks, grey_window: Window = None, most_bits: int = LEAK_BITS):
        self.most_bits = most_bits
        self.vocabulary: dict[str, int] = {}
        self.questions: list[Question] = []
        self.summary: dict[str, dict[str, int]] = {}
        random = np.random.default_rng(0)
        self.factors = random.integers(2**63, size=GRAM, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        texts = {name: [_pieces(case) for case in cases] for name, cases in benchmarks.items()}
        for word in (
            word for all_of in texts.values() for text in all_of for part in text for line in part for word in line
        ):
            self.vocabulary.setdefault(word, len(self.vocabulary) + 1)
        self.codes = random.integers(2**64, size=len(self.vocabulary) + 1, dtype=np.uint64)
        grams: list[np.ndarray] = []
        for name, cases in benchmarks.items():
            grams += self._add(name, cases, texts[name])
        self.grams, self.owners = _sorted(grams)
        self.starts, self.start_owners = _sorted(
            [self._hashes(question.short[:SHORTEST], SHORTEST) for question in self.questions]
        )
        self.shown: dict[Path, list[tuple[str, str]]] = defaultdict(
            list
        )  # image -> (benchmark, case) of those it is in
        for name, cases in benchmarks.items():
            for case in cases:
                for number, image in enumerate(case.images, start=1):
                    self.shown[image].append((name, case.id, number))
        self._fingerprint = lru_cache(4096)(lambda image: fingerprint(image, grey_window))
        self.images: list[Fingerprint] = []
        for image, places in self.shown.items():
            try:
                self.images.append(fingerprint(image, grey_window))
            except ValueError as error:
                raise ValueError(f"{places[0][0]}: case {places[0][1]!r:.60}: {error}") from error
        self.looks = np.stack([image.looks for image in self.images]) if self.images else np.empty((0, 4), np.uint64)

    def _add(self, name: str, cases: Sequence[Case], texts: Sequence[tuple[Lines, ...]]) -> list[np.ndarray]:
        """Add a benchmark's questions; returns the hashes of each one's own 13-grams."""
        alike: dict[tuple, list[str]] = defaultdict(list)
        for case, text in zip(cases, texts, strict=True):
            alike[text, case.image_hashes].append(case.id)
        most = max(1, min(COMMON, len(alike) // 2))
        lines = Counter(line for text, _ in alike for line in {line for part in text for line in part})
        runs, hashes = [], []
        for text, _ in alike:
            runs.append([self._numbers(run) for part in text for run in _runs(part, lines, most)])
            hashes.append(np.unique(np.concatenate([np.empty(0, np.uint64), *map(self._hashes, runs[-1])])))
        all_hashes, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]), return_counts=True)
        common = all_hashes[counts > most]
        own = [found[~np.isin(found, common)] for found in hashes]
        without_words = 0
        for ((_, images), ids), its_runs, grams in zip(alike.items(), runs, own, strict=True):
            short = max(its_runs, key=len, default=np.empty(0, np.int64))
            if not SHORTEST <= len(short) < GRAM:
                short = short[:0]
            self.questions.append(Question(name, tuple(ids), bool(images), len(grams), short))
            without_words += 0 if len(grams) or len(short) else len(ids)
        images = {image for case in cases for image in case.images}
        self.summary[name] = {"cases": len(cases), "images": len(images), "without_words": without_words}
        return own

    def _numbers(self, found: Iterable[str]) -> np.ndarray:
        return np.fromiter((self.vocabulary.get(word, UNKNOWN) for word in found), np.int64)

    def _hashes(self, numbers: np.ndarray, length: int = GRAM) -> np.ndarray:
        """(T - length + 1,) uint64, one for so many words in a row: their random codes times random odd factors. Of ten
        million 13-grams against a million, one is taken for another with a probability of 1 in a million."""
        codes, num = self.codes[numbers], max(0, len(numbers) - length + 1)
        total = np.zeros(num, np.uint64)
        for place in range(length):
            total += codes[place : place + num] * self.factors[place]
        return total

    def leaks(self, record: Record) -> list[Leak]:
        """The cases that stand in a record, those whose words do first.

        Raises:
            BadRow: an image of the record does not decode.
        """
        images = dict(self._in_images(record))
        file, _, line = record.source.rpartition(":")
        texts = [
            Leak(question.benchmark, case, file, int(line), "text", detail, share)
            for question, detail, share in self._in_texts(record)
            for case in question.cases
            if question.num_grams or not question.has_images or (question.benchmark, case) in images
        ]
        return texts + [Leak(*place, file, int(line), "image", detail) for place, detail in images.items()]

    def _in_texts(self, record: Record) -> Iterator[tuple[Question, str, float]]:
        """Questions that stand in the record, with what was found of them and its share."""
        messages = [*record.conversations[0], *(talk[-1] for talk in record.conversations[1:])]
        found = [word for message in messages for word in (*words(_text([message])), "")]
        numbers = self._numbers(found)
        places: dict[int, dict[int, int]] = defaultdict(dict)  # question -> 13-gram -> where it first stands
        for place, gram in _lookup(self.grams, self._hashes(numbers)):
            places[int(self.owners[gram])].setdefault(gram, place)
        for place, start in _lookup(self.starts, self._hashes(numbers, SHORTEST)):
            number = int(self.start_owners[start])
            short = self.questions[number].short
            if np.array_equal(numbers[place : place + len(short)], short):
                places[number].setdefault(start, place)
        for number, grams in sorted(places.items()):
            question, first = self.questions[number], min(grams.values())
            said = " ".join(found[first : first + (GRAM if question.num_grams else len(question.short))])
            share = len(grams) / question.num_grams if question.num_grams else 1.0
            of = f"{len(grams)} of {question.num_grams} 13-grams of the question ({share:.0%}), first"
            yield question, f"{of if question.num_grams else 'the whole question,'} {said!r}", share

    def _in_images(self, record: Record) -> Iterator[tuple[tuple[str, str], str]]:
        """((benchmark, case), what was found) for cases whose images the record shows: the nearest image last."""
        found: list[tuple[int, tuple[str, str], str]] = []
        for path in record.images if self.images else ():
            try:
                image = self._fingerprint(path)
            except ValueError as error:
                raise BadRow(record.source, str(error), "image") from error
            bits = np.bitwise_count(self.looks ^ image.looks).sum(axis=1)
            for number in np.flatnonzero(bits <= self.most_bits):
                other = self.images[number]
                if image.bytes == other.bytes:
                    order, how = 0, "has the bytes of"
                elif image.pixels == other.pixels:
                    order, how = 1, "has the pixels of"
                else:
                    order, how = 2 + int(bits[number]), f"looks like ({bits[number]} bits of 256 differ)"
                for benchmark, case, which in self.shown[other.image]:
                    found.append((order, (benchmark, case), f"image {path} {how} image {which} of the case"))
        for _, place, detail in sorted(found, key=lambda one: one[0], reverse=True):
            yield place, detail


def fingerprint(image: Path, grey_window: Window = None) -> Fingerprint:
    """What an image file is compared by, or the ValueError that it does not decode."""
    picture = load_image(image, grey_window)
    pixels = hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()
    return Fingerprint(image, hash_file(image), pixels, perceptual_hash(picture))


def _runs(lines: Lines, counts: Mapping[tuple[str, ...], int], most: int) -> Iterator[list[str]]:
    """The words of lines that follow each other, cut where a line stands in more than `most` questions."""
    run: list[str] = []
    for line in lines:
        if counts[line] > most:
            yield run
            run = []
        else:
            run = [*run, *line]
    yield run


def _sorted(hashes: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All hashes in order, and the number of the array that each is from."""
    together = np.concatenate([np.empty(0, np.uint64), *hashes])
    owners = np.repeat(np.arange(len(hashes)), [len(part) for part in hashes])
    order = np.argsort(together, kind="stable")
    return together[order], owners[order]


def _lookup(table: np.ndarray, hashes: np.ndarray) -> Iterator[tuple[int, int]]:
    """(place among the hashes, place in the sorted table) of all that are equal."""
    first, last = np.searchsorted(table, hashes, "left"), np.searchsorted(table, hashes, "right")
    for place in np.flatnonzero(last > first).tolist():
        for found in range(first[place], last[place]):
            yield place, found
