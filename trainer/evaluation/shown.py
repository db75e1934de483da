"""The questions that a page holds to be read: which ones, with what every model answered, each image once."""

import random
from collections.abc import Mapping
from itertools import chain, zip_longest

from mede2.trainer.answering.answers import parse_answer
from mede2.trainer.data.images import Window
from mede2.trainer.data.records import message_text
from mede2.trainer.data.thumbnails import thumbnail
from mede2.trainer.evaluation.answered import AS_IT_IS, GROUPS, PROBES, Answered, Evaluation
from mede2.trainer.evaluation.summary import group_of
from mede2.trainer.questions.cases import Case
from mede2.trainer.questions.rows import Row


def choose(evaluation: Evaluation, num: int, seed: int = 0) -> tuple[list[tuple[str, str]], dict[str, Row]]:
    """Draw questions to be shown: those that some model gets wrong before the others, benchmarks in turns.

    Returns:
        (benchmark, id) of at most `num` questions in the order of the benchmarks' files; and for each benchmark
        {"questions", "with_errors", "shown", "errors_shown"}.
    """
    errors = {(a.benchmark, a.case) for a in evaluation.answers if _is_main(a) and not a.right}
    rng, queues = random.Random(seed), []
    for benchmark, cases in evaluation.benchmarks.items():
        queue = [(benchmark, name) for name in cases]
        rng.shuffle(queue)
        queues.append(sorted(queue, key=lambda place: place not in errors))
    turns = (place for turn in zip_longest(*queues) for place in turn if place is not None)
    chosen = {place for place, _ in zip(turns, range(num), strict=False)}
    counts = {
        benchmark: {
            "questions": len(cases),
            "with_errors": sum((benchmark, name) in errors for name in cases),
            "shown": sum((benchmark, name) in chosen for name in cases),
            "errors_shown": sum((benchmark, name) in chosen & errors for name in cases),
        }
        for benchmark, cases in evaluation.benchmarks.items()
    }
    every = ((benchmark, name) for benchmark, cases in evaluation.benchmarks.items() for name in cases)
    return [place for place in every if place in chosen], counts


def collect(evaluation: Evaluation, num: int, seed: int = 0, window: Window = None) -> Row:
    """What the page's script reads, as JSON holds it. The answers are the greedy ones.

    Returns:
        {"models", "benchmarks", "probes": names; "images": thumbnails, each once; "counts": see `choose`;
        "questions": [{"benchmark", "id", "images": places in "images", "prompt", "options", "key", "groups",
        "answers": [{"model", "probe", "verdict", "rung", "finish", "tokens", "think", "text", "said", "recall",
        "mmrp"}]}]}; `think` and `text` are the parts of an answer in the format, or None and the whole text.
    """
    places, counts = choose(evaluation, num, seed)
    models, probes = list(evaluation.models), (AS_IT_IS, *PROBES)
    answers: dict[tuple[str, str], list[Answered]] = {place: [] for place in places}
    for answer in evaluation.answers:
        if answer.sample is None and (answer.benchmark, answer.case) in answers:
            answers[answer.benchmark, answer.case].append(answer)
    number: dict[str, int] = {}
    images, questions = [], []
    for benchmark, name in places:
        case = evaluation.benchmarks[benchmark][name]
        for digest, path in zip(case.image_hashes, case.images, strict=True):
            if digest not in number:
                number[digest] = len(images)
                images.append(thumbnail(path, window))
        given = sorted(answers[benchmark, name], key=lambda a: (probes.index(a.probe), models.index(a.model)))
        questions.append(
            {
                "benchmark": benchmark,
                "id": name,
                "images": [number[digest] for digest in case.image_hashes],
                "prompt": [{"role": message["role"], "text": message_text(message)} for message in case.prompt],
                "options": list(case.options),
                "key": case.answer if case.options else " / ".join(case.meta.get("accepted_answers") or [case.answer]),
                "groups": {group: group_of(case, group) for group in GROUPS if case.meta.get(group)},
                "answers": [_answer(answer, case) for answer in given],
            }
        )
    used = {answer.probe for answer in chain.from_iterable(answers.values())}
    return {
        "models": models,
        "benchmarks": list(evaluation.benchmarks),
        "probes": [probe for probe in probes if probe in used],
        "images": images,
        "counts": counts,
        "questions": questions,
    }


def _is_main(answer: Answered) -> bool:
    return answer.sample is None and answer.probe == AS_IT_IS


def _answer(answer: Answered, case: Case) -> Mapping[str, object]:
    parsed = parse_answer(answer.text, case.options)
    return {
        "model": answer.model,
        "probe": answer.probe,
        "verdict": "unparsed" if answer.answer is None else "right" if answer.right else "wrong",
        "rung": answer.rung,
        "finish": answer.finish,
        "tokens": answer.num_tokens,
        "think": parsed.think if parsed.well_formed else None,
        "text": parsed.answer if parsed.well_formed else answer.text,
        "said": answer.answer,
        "recall": answer.recall,
        "mmrp": answer.mmrp,
    }
