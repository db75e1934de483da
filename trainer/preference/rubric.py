"""The rubric: a readable YAML file with four criteria and the rule-based judge's words, versioned by its hash."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from mede2.trainer.files import hash_file

CRITERIA = ("logical_consistency", "image_analysis", "no_hallucination", "reflection")
SCORES = (1, 2, 3, 4, 5)
DEFAULT = Path(__file__).with_name("rubric.yaml")


@dataclass(frozen=True)
class Example:
    """An answer, or a part of one, with the score that it deserves and why."""

    answer: str
    score: int
    because: str


@dataclass(frozen=True)
class Criterion:
    """What is scored, what each score from 1 to 5 means, and examples."""

    definition: str
    scores: Mapping[int, str]
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Words:
    """What the rule-based judge listens for. `findings` and an axis of `places` map a name to the words for it."""

    findings: Mapping[str, tuple[str, ...]]
    places: Mapping[str, Mapping[str, tuple[str, ...]]]
    both_sides: tuple[str, ...]
    sites: tuple[str, ...]
    negations: tuple[str, ...]
    negations_after: tuple[str, ...]
    hedges: tuple[str, ...]
    hedges_after: tuple[str, ...]
    normal: tuple[str, ...]
    nothing: tuple[str, ...]
    looks: tuple[str, ...]
    except_: tuple[str, ...]
    conclusions: tuple[str, ...]
    reflection: tuple[str, ...]
    changes: tuple[str, ...]
    filler: tuple[str, ...]


@dataclass(frozen=True)
class Rubric:
    """A rubric file, read; `hash` is the sha256 of its bytes."""

    criteria: Mapping[str, Criterion]
    words: Words
    hash: str

    def text(self, names: Sequence[str] = CRITERIA) -> str:
        """Criteria as a judge reads them."""
        parts = []
        for name in names:
            criterion = self.criteria[name]
            lines = [f"## {name}", criterion.definition]
            lines += [f"{score}: {criterion.scores[score]}" for score in reversed(SCORES)]
            lines += [f"Example, score {e.score}: {e.answer}\n({e.because})" for e in criterion.examples]
            parts.append("\n".join(lines))
        return "\n\n".join(parts)


def read_rubric(path: str | Path = DEFAULT) -> Rubric:
    """Read and check a rubric file.

    Raises:
        ValueError: names the file, the field and what it should hold.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"rubric: cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"rubric: {path} is not YAML: {error}") from error
    reader = _Reader(str(path))
    reader.keys("the file", content, ("criteria", "words"))
    reader.keys("criteria", content["criteria"], CRITERIA)
    criteria = {name: reader.criterion(f"criteria.{name}", content["criteria"][name]) for name in CRITERIA}
    return Rubric(criteria, reader.words(content["words"]), hash_file(Path(path)))


class _Reader:
    """Checks the parts of one file; every message names the file and the field."""

    def __init__(self, path: str):
        self.path = path

    def fail(self, where: str, problem: str) -> None:
        raise ValueError(f"rubric {self.path}: {where}: {problem}")

    def keys(self, where: str, value: Any, names: tuple) -> None:
        if not isinstance(value, dict) or set(value) != set(names):
            given = ", ".join(map(str, value)) if isinstance(value, dict) else f"{value!r:.60}"
            self.fail(where, f"must have exactly {', '.join(map(str, names))}; it has {given}")

    def text(self, where: str, value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            self.fail(where, f"a text, not {value!r:.60}")
        return value.strip()

    def texts(self, where: str, value: Any) -> tuple[str, ...]:
        if not isinstance(value, list) or not value:
            self.fail(where, f"a list of words, not {value!r:.60} (quote words such as no)")
        return tuple(self.text(f"{where}[{i}]", word).lower() for i, word in enumerate(value))

    def named(self, where: str, value: Any) -> dict[str, tuple[str, ...]]:
        if not isinstance(value, dict) or not value:
            self.fail(where, f"a mapping from names to lists of words, not {value!r:.60}")
        return {name: self.texts(f"{where}.{name}", words) for name, words in value.items()}

    def criterion(self, where: str, value: Any) -> Criterion:
        self.keys(where, value, ("definition", "scores", "examples"))
        self.keys(f"{where}.scores", value["scores"], SCORES)
        scores = {score: self.text(f"{where}.scores.{score}", value["scores"][score]) for score in SCORES}
        if not isinstance(value["examples"], list) or not value["examples"]:
            self.fail(f"{where}.examples", "at least one example")
        examples = []
        for i, example in enumerate(value["examples"]):
            place = f"{where}.examples[{i}]"
            self.keys(place, example, ("answer", "score", "because"))
            if example["score"] not in SCORES:
                self.fail(f"{place}.score", f"1 to 5, not {example['score']!r}")
            answer, because = (self.text(f"{place}.{name}", example[name]) for name in ("answer", "because"))
            examples.append(Example(answer, example["score"], because))
        return Criterion(self.text(f"{where}.definition", value["definition"]), scores, tuple(examples))

    def words(self, value: Any) -> Words:
        names = tuple(item.name.rstrip("_") for item in fields(Words))
        self.keys("words", value, names)
        if not isinstance(value["places"], dict) or "side" not in value["places"]:
            self.fail("words.places", "axes of places, `side` among them")
        lists = {
            item.name: self.texts(f"words.{name}", value[name])
            for item, name in zip(fields(Words), names, strict=True)
            if name not in ("findings", "places")
        }
        places = {axis: self.named(f"words.places.{axis}", named) for axis, named in value["places"].items()}
        return Words(findings=self.named("words.findings", value["findings"]), places=places, **lists)
