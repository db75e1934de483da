"""All figures of a report, worked out once: what the page, the JSON file and the terminal show comes from here."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean

from mede2.trainer.answering.answers import plain
from mede2.trainer.answering.extraction import RUNGS
from mede2.trainer.evaluation.answered import AS_IT_IS, GROUPS, PROBES, Answered, Evaluation
from mede2.trainer.evaluation.scaling import scaling
from mede2.trainer.evaluation.statistics import Estimate, flips, holm, mcnemar, mean, paired_difference
from mede2.trainer.preference.rubric import SCORES
from mede2.trainer.questions.cases import Case
from mede2.trainer.questions.rows import Row

NOT_STATED = "not stated"
BETTER, WORSE, NO_DIFFERENCE = "better", "worse", "no difference shown"
LEVEL = 0.05  # of the adjusted p-values
LEAK_KINDS = ("text", "image")
Cases = Mapping[str, Case]
Answers = Mapping[str, Answered]  # by id of the question


def summarize(evaluation: Evaluation, leaks: Sequence[Row] | None = None, seed: int = 0) -> Row:
    """Everything that a report says in figures, as JSON holds it; an estimate is {"value", "low", "high", "num"}.

    Args:
        evaluation: every model has one greedy answer to every question as it is. Probes and drawn answers may be
            missing, or be there for some questions only; their figures say for how many.
        leaks: rows {"benchmark", "case", "training_file", "line", "kind": "text" or "image", "detail"}, one for each
            place in the training files that a question shares something with; None: nobody looked.
        seed: of the resampling.

    Returns:
        {"models", "settings", "seed", "benchmarks": {name: what the questions are, and what the same answer to all of
        them and chance would score}, "scores", "comparisons", "scaling", "grounding", "groups", "leakage"}, from
        "scores" on lists of rows that name their benchmark and model.

    Raises:
        ValueError: an answer that is missing, there twice, or to no question; a leak of no question.
    """
    book = _Book(evaluation, seed)
    return {
        "models": list(evaluation.models),
        "settings": dict(evaluation.settings),
        "seed": seed,
        "benchmarks": {name: _describe(cases, book.clusters[name]) for name, cases in book.benchmarks.items()},
        "scores": [_score(book, benchmark, model) for benchmark, model in book.each()],
        "comparisons": _compare(book),
        "scaling": [row for benchmark, model in book.each() for row in _scale(book, benchmark, model)],
        "grounding": [row for benchmark, model in book.each() for row in _ground(book, benchmark, model)],
        "groups": list(_break_down(book)),
        "leakage": None if leaks is None else _account(book, leaks),
    }


class _Book:
    """The answers by benchmark, model and probe, checked; estimates that know which questions share an image."""

    def __init__(self, evaluation: Evaluation, seed: int):
        self.models, self.benchmarks, self.seed = evaluation.models, evaluation.benchmarks, seed
        if not self.models or len(set(self.models)) < len(self.models):
            raise ValueError(f"models: {', '.join(self.models) or 'none'}; give one or more, each by a name of its own")
        if not self.benchmarks or not all(self.benchmarks.values()):
            raise ValueError("benchmarks: one or more, each with a question or more")
        self.greedy: dict[tuple[str, str, str], dict[str, Answered]] = {}
        self.drawn: dict[tuple[str, str], list[Answered]] = {}
        seen = set()
        for answer in evaluation.answers:
            self._check(answer)
            place = (answer.benchmark, answer.case, answer.model, answer.probe, answer.sample)
            if place in seen:
                raise ValueError(f"answers: {', '.join(map(str, place))} is there twice; give each answer once")
            seen.add(place)
            if answer.sample is None:
                probe = (answer.benchmark, answer.model, answer.probe)
                self.greedy.setdefault(probe, {})[answer.case] = answer
            else:
                self.drawn.setdefault((answer.benchmark, answer.model), []).append(answer)
        for benchmark, model in self.each():
            questions = self.benchmarks[benchmark].keys()
            missing = questions - self.greedy.get((benchmark, model, AS_IT_IS), {}).keys()
            if missing:
                raise ValueError(
                    f"answers: {model} has no greedy answer to {len(missing)} of {len(questions)} questions of "
                    f"{benchmark}, such as {min(missing)}; answer them first"
                )
        self.clusters = {name: share_images(cases) for name, cases in self.benchmarks.items()}

    def _check(self, answer: Answered) -> None:
        if answer.model not in self.models:
            raise ValueError(f"answers: model {answer.model!r} is none of {', '.join(self.models)}")
        if answer.case not in self.benchmarks.get(answer.benchmark, {}):
            raise ValueError(f"answers: there is no question {answer.case!r} in benchmark {answer.benchmark!r}")
        if answer.probe not in (AS_IT_IS, *PROBES):
            raise ValueError(f"answers: probe {answer.probe!r} is none of {', '.join((AS_IT_IS, *PROBES))}")
        if answer.sample is not None and answer.probe != AS_IT_IS:
            raise ValueError(f"answers: sample {answer.sample} under probe {answer.probe!r}; draw as they are only")

    def each(self) -> Iterator[tuple[str, str]]:
        """Benchmarks and their models, in the order of the report."""
        return ((benchmark, model) for benchmark in self.benchmarks for model in self.models)

    def as_is(self, benchmark: str, model: str) -> dict[str, Answered]:
        """The greedy answers in the order of the questions."""
        answers = self.greedy[benchmark, model, AS_IT_IS]
        return {case: answers[case] for case in self.benchmarks[benchmark]}

    def mean(
        self, benchmark: str, answers: Answers, figure: Callable[[Answered], float | None], bounds=(0.0, 1.0)
    ) -> Row | None:
        """Of the answers that have the figure; None where none has."""
        values = {case: figure(answer) for case, answer in answers.items()}
        values = {case: value for case, value in values.items() if value is not None}
        if not values:
            return None
        clusters = [self.clusters[benchmark][case] for case in values]
        return asdict(mean(list(values.values()), clusters, self.seed, bounds))

    def accuracy(self, benchmark: str, answers: Answers) -> Row | None:
        return self.mean(benchmark, answers, lambda answer: answer.right)

    def difference(self, benchmark: str, first: Answers, second: Answers) -> Estimate:
        """Accuracy of the second answers minus that of the first, to the same questions in the same order."""
        clusters = [self.clusters[benchmark][case] for case in first]
        return paired_difference(_verdicts(first), _verdicts(second), clusters, self.seed)


def share_images(cases: Cases) -> dict[str, int]:
    """A number for each question by its id, the same for those that share an image, also by way of other questions."""
    root: dict[object, object] = {}

    def find(node: object) -> object:
        while root.setdefault(node, node) != node:
            node = root[node]
        return node

    for name, case in cases.items():
        for digest in case.image_hashes:
            root[find(("question", name))] = find(("image", digest))
    numbers: dict[object, int] = {}
    return {name: numbers.setdefault(find(("question", name)), len(numbers)) for name in cases}


def group_of(case: Case, group: str) -> str:
    """What a case's `meta` says of one of GROUPS, as text."""
    value = case.meta.get(group)
    if value is None or value in ("", []):
        return NOT_STATED
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def groups_of(cases: Cases) -> dict[str, dict[str, list[str]]]:
    """Ids of the questions by group and value, values with most questions first; groups that a question states."""
    found: dict[str, dict[str, list[str]]] = {}
    for group in GROUPS:
        values: dict[str, list[str]] = {}
        for name, case in cases.items():
            values.setdefault(group_of(case, group), []).append(name)
        if values.keys() != {NOT_STATED}:
            found[group] = dict(sorted(values.items(), key=lambda item: (-len(item[1]), item[0])))
    return found


def _describe(cases: Cases, clusters: Mapping[str, int]) -> Row:
    """What the questions are, and what answering without reading them would score."""
    with_options = [case for case in cases.values() if case.options]
    return {
        "questions": len(cases),
        "with_images": sum(bool(case.images) for case in cases.values()),
        "with_options": len(with_options),
        "images": len({digest for case in cases.values() for digest in case.image_hashes}),
        "share_images": len(set(clusters.values())) < len(cases),
        "majority": _majority(cases.values()),
        "chance": fmean(1 / len(case.options) for case in with_options) if with_options else None,
    }


def _majority(cases: Iterable[Case]) -> Row:
    """Always the same answer: the letter or the text that is most often the key of the questions with options, and the
    text that is most often the key of the open ones."""
    letters, texts, open_texts = Counter(), Counter(), Counter()
    for case in cases:
        if case.options:
            letters[chr(ord("A") + case.options.index(case.answer))] += 1
            texts[plain(case.answer)] += 1
        else:
            open_texts[plain(case.answer)] += 1
    best = [
        max((answer for counts in kind for answer in counts.most_common(1)), key=lambda answer: answer[1])
        for kind in ((texts, letters), (open_texts,)) if kind[0]
    ]  # fmt: skip
    num = texts.total() + open_texts.total()
    return {"answers": [text for text, _ in best], "accuracy": sum(hits for _, hits in best) / num}


def _score(book: _Book, benchmark: str, model: str) -> Row:
    answers = book.as_is(benchmark, model)
    bounds = (float(SCORES[0]), float(SCORES[-1]))
    rungs = Counter(answer.rung for answer in answers.values() if answer.rung is not None)
    return {
        "benchmark": benchmark,
        "model": model,
        "accuracy": book.accuracy(benchmark, answers),
        "format": book.mean(benchmark, answers, lambda answer: answer.rung == RUNGS[0]),
        "unparsed": book.mean(benchmark, answers, lambda answer: answer.answer is None),
        "cut_off": book.mean(benchmark, answers, lambda answer: answer.finish == "length"),
        "tokens": fmean(answer.num_tokens for answer in answers.values()),
        "recall": book.mean(benchmark, answers, lambda answer: answer.recall),
        "mmrp": book.mean(benchmark, answers, lambda answer: answer.mmrp, bounds),
        "rungs": dict(rungs.most_common()),
    }


def _compare(book: _Book) -> list[Row]:
    """Each model with the first and with the one before it, p-values adjusted over all of them."""
    rows = []
    for benchmark in book.benchmarks:
        for i, model in enumerate(book.models[1:], start=1):
            for against in dict.fromkeys((book.models[0], book.models[i - 1])):
                first, second = book.as_is(benchmark, against), book.as_is(benchmark, model)
                flipped = flips(list(first.values()), list(second.values()))
                rows.append(
                    {
                        "benchmark": benchmark,
                        "model": model,
                        "against": against,
                        "difference": asdict(book.difference(benchmark, first, second)),
                        "gained": flipped.to_right,
                        "lost": flipped.to_wrong,
                        "p": mcnemar(_verdicts(first), _verdicts(second)),
                    }
                )
    for row, adjusted in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_adjusted"] = adjusted
        row["verdict"] = verdict(row["difference"], adjusted)
    return rows


def verdict(difference: Row, p_adjusted: float) -> str:
    """The word for a difference: BETTER or WORSE where the adjusted p-value is below 0.05 and the interval, which knows
    of questions that share an image, leaves out 0; NO_DIFFERENCE otherwise."""
    if p_adjusted < LEVEL and difference["low"] > 0:
        return BETTER
    if p_adjusted < LEVEL and difference["high"] < 0:
        return WORSE
    return NO_DIFFERENCE


def _scale(book: _Book, benchmark: str, model: str) -> Iterator[Row]:
    answers = book.drawn.get((benchmark, model))
    if answers:
        for point in scaling(answers, book.seed, book.clusters[benchmark]):
            yield {"benchmark": benchmark, "model": model} | asdict(point)


def _ground(book: _Book, benchmark: str, model: str) -> Iterator[Row]:
    """What the answers lose without the right image: over all questions with images, then by group."""
    with_images = {name: case for name, case in book.benchmarks[benchmark].items() if case.images}
    parts = [(None, None, list(with_images))] + [
        (group, value, names) for group, values in groups_of(with_images).items() for value, names in values.items()
    ]
    as_is = book.as_is(benchmark, model)
    for probe in PROBES:
        probed = book.greedy.get((benchmark, model, probe), {})
        for group, value, in_group in parts:
            if names := [name for name in in_group if name in probed]:
                right, other = ({name: answers[name] for name in names} for answers in (as_is, probed))
                flipped = flips(list(right.values()), list(other.values()))
                yield {
                    "benchmark": benchmark,
                    "model": model,
                    "probe": probe,
                    "group": group,
                    "value": value,
                    "right_image": book.accuracy(benchmark, right),
                    "probed": book.accuracy(benchmark, other),
                    "drop": asdict(book.difference(benchmark, other, right)),
                    "to_wrong": flipped.to_wrong,
                    "to_right": flipped.to_right,
                    "changed": flipped.changed,
                }


def _break_down(book: _Book) -> Iterator[Row]:
    for benchmark, cases in book.benchmarks.items():
        for group, values in groups_of(cases).items():
            for value, names in values.items():
                for model in book.models:
                    answers = book.as_is(benchmark, model)
                    accuracy = book.accuracy(benchmark, {name: answers[name] for name in names})
                    yield {
                        "benchmark": benchmark, "group": group, "value": value, "model": model, "accuracy": accuracy
                    }  # fmt: skip


def _account(book: _Book, leaks: Sequence[Row]) -> Row:
    """How many questions stand in the training files, and the accuracy on the others."""
    leaked: dict[str, dict[str, set[str]]] = {
        benchmark: {kind: set() for kind in LEAK_KINDS} for benchmark in book.benchmarks
    }
    for leak in leaks:
        if leak["case"] not in book.benchmarks.get(leak["benchmark"], {}) or leak["kind"] not in LEAK_KINDS:
            raise ValueError(
                f"leaks: {leak['kind']!r} of question {leak['case']!r} of {leak['benchmark']!r}; give text or image, "
                "and a question of the evaluation"
            )
        leaked[leak["benchmark"]][leak["kind"]].add(leak["case"])
    scores = []
    for benchmark, model in book.each():
        answers = book.as_is(benchmark, model)
        kept = answers.keys() - set.union(*leaked[benchmark].values())
        without = book.accuracy(benchmark, {case: answer for case, answer in answers.items() if case in kept})
        scores.append(
            {"benchmark": benchmark, "model": model, "all": book.accuracy(benchmark, answers), "without": without}
        )
    return {
        "found": [dict(leak) for leak in leaks],
        "questions": {
            benchmark: {kind: len(cases) for kind, cases in kinds.items()} | {"any": len(set.union(*kinds.values()))}
            for benchmark, kinds in leaked.items()
        },
        "scores": scores,
    }


def _verdicts(answers: Answers) -> list[bool]:
    return [answer.right for answer in answers.values()]
