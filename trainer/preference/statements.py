"""What a reasoning says about the image: findings with kind and place, asserted, called possible or denied.

Read by words, clause by clause; the words come from the rubric file and from the case's own findings. What no rule
below recognises is not a statement: a judge built on this sees too little rather than too much.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mede2.trainer.preference.rubric import Words

ASSERTED, POSSIBLE, DENIED = "asserted", "possible", "denied"
ANYTHING = "anything"  # the kind of a statement about whatever might be there: "the left lung is clear" denies it
CUES = (
    "both_sides", "sites", "negations", "negations_after", "hedges", "hedges_after", "normal", "nothing", "looks",
    "except_",
)  # fmt: skip
SENTENCE = re.compile(r"[^\s.!?].*?(?:[.!?]+(?=\s|$)|(?=\n)|$)", re.MULTILINE)
CLAUSE = re.compile(r";|\b(?:but|however|whereas|while|although|though|except)\b")
SEGMENT = re.compile(r",|\band\b|\bor\b")
FRESH = re.compile(r"\s*(?:the|this|these|that|there|it|i|we)\b")  # begins a segment that no negation reaches into
NOT_A_SIDE = re.compile(
    r"\b(?:is|are|was|seems|all|that's|it's)\s+right\b|\bright\s+(?:answer|option|choice|diagnosis)\b"
)


@dataclass(frozen=True)
class Finding:
    """What a case's record says the image shows; `place` holds names such as left and upper."""

    kind: str
    place: frozenset[str]
    words: str

    def __str__(self) -> str:
        return self.words


@dataclass(frozen=True)
class Statement:
    """What a sentence says of the image."""

    kind: str
    place: frozenset[str]
    mode: str
    quote: str

    def __str__(self) -> str:
        return " ".join([self.kind, *sorted(self.place, reverse=True)])


def sentences(text: str) -> list[str]:
    """The sentences of a text, each a piece of it, in order."""
    return [match.group().strip() for match in SENTENCE.finditer(text)]


def phrase(words: Iterable[str]) -> re.Pattern:
    """A pattern for any of some words or phrases (the longest first), with a plural s, in lower-case text."""
    ordered = sorted(words, key=len, reverse=True)
    either = "|".join(re.escape(word).replace(r"\ ", r"\s+").replace("'", r"['\u2019]") for word in ordered)
    either = either or "(?!)"  # of no words none is found
    return re.compile(rf"(?<![\w-])(?:{either})s?(?!\w)")


class ImageReader:
    """Reads the findings of one case and statements about its image with one vocabulary.

    Args:
        words: the rubric's.
        findings: the case's structured findings, {place: finding or list of findings}; None if it has none. An empty
            one, and the findings "normal", "clear" and "none", say that nothing is there.
        options: what the case offers. A word that names an option is a diagnosis here, unless the case has it as a
            finding.
        rows: phrases, in lower case, that name a row of the case's own table of conclusions, and so not what is seen.

    Raises:
        ValueError: `findings` of another form.
    """

    def __init__(
        self,
        words: Words,
        findings: Mapping[str, Any] | None,
        options: Sequence[str] = (),
        rows: Iterable[str] = (),
    ):
        self.words = words
        self.axis = {name: axis for axis, named in words.places.items() for name in named}
        self._kinds = {name: phrase((name, *others)) for name, others in words.findings.items()}
        self._places = {name: phrase(others) for named in words.places.values() for name, others in named.items()}
        self.findings = None if findings is None else tuple(self._findings(findings))
        named = {finding.kind for finding in self.findings or ()}
        offered = " | ".join(options).lower()
        for kind in [kind for kind, words in self._kinds.items() if kind not in named and words.search(offered)]:
            del self._kinds[kind]
        self._said = {name: phrase(getattr(words, name)) for name in CUES}
        self._rows = phrase(rows)

    def _findings(self, findings: Mapping[str, Any]) -> Iterator[Finding]:
        if not isinstance(findings, Mapping):
            raise ValueError(f"meta.findings: {{place: finding}}, not {findings!r:.60}")
        for place, value in findings.items():
            values = value if isinstance(value, list) else [value]
            if not all(isinstance(item, str) and item.strip() for item in values):
                raise ValueError(f"meta.findings: {place!r}: a finding or a list of findings, not {value!r:.60}")
            where = self._place_of(str(place).lower())
            for text in values:
                lower = " ".join(text.lower().split())
                if lower in ("none", *self.words.normal, *self.words.nothing):
                    continue
                kinds = [kind for kind, pattern in self._kinds.items() if pattern.search(lower)]
                if not kinds:
                    kinds = [lower]
                    self._kinds[lower] = phrase([lower])
                for kind in kinds:
                    yield Finding(kind, where, f"{text} {place}")

    def _place_of(self, text: str) -> frozenset[str]:
        """The place that a record names; words that the vocabulary does not have become places of their own."""
        names = {name for name, pattern in self._places.items() if pattern.search(text)}
        for word in re.findall(r"\w+", text):
            known = any(pattern.fullmatch(word) for pattern in self._places.values())
            if not known and word not in self.words.filler and not phrase(self.words.sites).fullmatch(word):
                self._places[word] = phrase([word])
                names.add(word)
        return frozenset(names)

    def statements(self, text: str) -> list[Statement]:
        """Everything that a text says of the image, in order."""
        return [statement for sentence in sentences(text) for statement in self._sentence(sentence)]

    def conflict(self, one: frozenset[str], other: frozenset[str]) -> bool:
        """Whether two places exclude each other on some axis."""
        return any(
            self._on(axis, one).isdisjoint(self._on(axis, other)) for axis in self._axes(one) & self._axes(other)
        )

    def same_side(self, one: frozenset[str], other: frozenset[str]) -> bool:
        return not self._on("side", one).isdisjoint(self._on("side", other))

    def has_side(self, place: frozenset[str]) -> bool:
        return bool(self._on("side", place))

    def _on(self, axis: str, place: frozenset[str]) -> set[str]:
        return {name for name in place if self.axis.get(name) == axis}

    def _axes(self, place: frozenset[str]) -> set[str]:
        return {self.axis[name] for name in place if name in self.axis}

    def _sentence(self, sentence: str) -> Iterator[Statement]:
        lower = NOT_A_SIDE.sub(" ", self._rows.sub(" ", sentence.lower()))
        looks = bool(self._said["looks"].search(lower))
        for clause in CLAUSE.split(lower):
            yield from self._clause(clause, sentence, looks)

    def _clause(self, clause: str, quote: str, looks: bool) -> Iterator[Statement]:
        """A negation or a hedge holds to the end of its clause or to a segment that begins anew ("no mass, the ...").

        A segment without a place takes the one that stood alone before it or stands alone behind it; a place alone
        after a placed finding repeats that finding there.
        """
        negated = hedged = False
        waiting: frozenset[str] = frozenset()
        said: list[tuple[str, frozenset[str], str]] = []
        for segment in SEGMENT.split(clause):
            mentions = sorted(
                (match.start(), kind) for kind, pattern in self._kinds.items() for match in pattern.finditer(segment)
            )
            places = self._places_in(segment)
            fresh = bool(FRESH.match(segment))
            if fresh:
                negated = hedged = False
            negation, hedge = self._said["negations"].search(segment), self._said["hedges"].search(segment)
            if not mentions and self._normal(segment, looks, negated):
                yield from (Statement(ANYTHING, place, DENIED, quote) for place in places or [frozenset()])
                continue
            negation_after, hedge_after = (
                self._said["negations_after"].search(segment),
                self._said["hedges_after"].search(segment),
            )
            for start, kind in mentions:
                denied = negated or _is_before(negation, start) or _is_behind(negation_after, start)
                possible = hedged or _is_before(hedge, start) or _is_behind(hedge_after, start)
                if denied and self._said["except_"].search(segment):  # "no other nodule" denies no nodule
                    continue
                mode = DENIED if denied else POSSIBLE if possible else ASSERTED
                said += [(kind, place, mode) for place in places or [waiting]]
            if (
                places and not fresh
            ):  # "no nodule, mass or cavity in the left lung": the place holds for all that is denied
                said = [(k, p, m) for k, p0, m in said for p in (places if m == DENIED and not p0 else [p0])]
            if not mentions and places:
                if said and not said[-1][1]:
                    kind, _, mode = said.pop()
                    said += [(kind, place, mode) for place in places]
                elif said:
                    kind, _, mode = said[-1]
                    said += [(kind, place, mode) for place in places]
                else:
                    waiting = places[0] if len(places) == 1 else frozenset()
            negated, hedged = negated or bool(negation), hedged or bool(hedge)
        yield from (Statement(kind, place, mode, quote) for kind, place, mode in said)

    def _places_in(self, segment: str) -> list[frozenset[str]]:
        """The places that a segment names: one, or one for each side if it names both."""
        names = {name for name, pattern in self._places.items() if pattern.search(segment)}
        sides = self._on("side", frozenset(names))
        if self._said["both_sides"].search(segment):
            sides = set(self.words.places["side"])
        if len(sides) > 1:
            return [frozenset(names - sides | {side}) for side in sorted(sides)]
        return [frozenset(names)] if names else []

    def _normal(self, segment: str, looks: bool, negated: bool) -> bool:
        """Whether a segment says that nothing is there."""
        if self._said["except_"].search(segment):
            return False
        nothing = self._said["nothing"].search(segment)
        if nothing and (looks or " " in nothing.group()):
            return True
        normal = self._said["normal"].search(segment)
        about = self._said["sites"].search(segment) or self._places_in(segment)
        negation = self._said["negations"].search(segment)
        return bool(normal and about and not negated and not (negation and negation.start() < normal.start()))


def _is_before(cue: re.Match | None, start: int) -> bool:
    return cue is not None and cue.start() < start


def _is_behind(cue: re.Match | None, start: int) -> bool:
    return cue is not None and cue.start() > start
