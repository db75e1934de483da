"""Four rates of a model on unseen cases: answers right, well-formed, grounded, sound."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mede2.trainer.answering.answers import parse_answer
from mede2.trainer.answering.generation import Generator
from mede2.trainer.demo.cases import Case, read_chain, render
from mede2.trainer.demo.records import image_question
from mede2.trainer.evaluation.statistics import Rate

MAX_NEW_TOKENS = 80  # the longest chain has about 60


@dataclass(frozen=True)
class Scores:
    """A model's rates on the same cases.

    - accuracy: the answer is the right option;
    - format: the generation is `<think>...</think> <answer>...</answer>` and nothing else;
    - grounding: the findings that the chain names are exactly those in the picture;
    - soundness: the answer follows by the table from what the chain states, be that true or not.
    """

    accuracy: Rate
    format: Rate
    grounding: Rate
    soundness: Rate


@dataclass(frozen=True)
class Verdict:
    """One generation, judged on the four counts of `Scores`."""

    text: str
    accuracy: bool = False
    format: bool = False
    grounding: bool = False
    soundness: bool = False


def score(folder: Path, cases: Sequence[Case], batch_size: int = 100) -> Scores:
    """Generate an answer to every case with the model in `folder`, greedily, and judge it."""
    return summarize(judge(case, text) for case, text in zip(cases, generate(folder, cases, batch_size), strict=True))


def judge(case: Case, text: str) -> Verdict:
    """Compare one generation with its case."""
    parsed = parse_answer(text, case.options)
    if not parsed.well_formed:
        return Verdict(text)
    chosen = None if parsed.option is None else case.options[parsed.option]
    stated = read_chain(parsed.think)
    return Verdict(
        text,
        accuracy=chosen == case.answer,
        format=True,
        grounding=stated is not None and stated.findings == case.findings,
        soundness=stated is not None and stated.supports(parsed.answer),
    )


def summarize(verdicts: Iterator[Verdict]) -> Scores:
    """Count the verdicts."""
    every = list(verdicts)
    names = ("accuracy", "format", "grounding", "soundness")
    return Scores(**{name: Rate(sum(getattr(verdict, name) for verdict in every), len(every)) for name in names})


def generate(folder: Path, cases: Sequence[Case], batch_size: int = 100) -> list[str]:
    """Greedy generations, special tokens removed, in the order of `cases`."""
    generator = Generator(folder, dtype=torch.float32, device="cpu")
    batches = (cases[start : start + batch_size] for start in range(0, len(cases), batch_size))
    return [
        generation.text
        for batch in batches
        for generation in generator([_conversation(case) for case in batch], max_tokens=MAX_NEW_TOKENS)
    ]


def print_scores(scores: Mapping[str, Scores], console: Console | None = None) -> None:
    """Print one row for each model: rates in per cent with their 95 % Wilson intervals."""
    num = next(iter(scores.values())).accuracy.num
    table = Table(title=f"{num} unseen cases, % [95 % interval]")
    for heading in ("model", "accuracy", "format", "grounding", "soundness"):
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    for name, row in scores.items():
        table.add_row(name, *map(str, (row.accuracy, row.format, row.grounding, row.soundness)))
    (console or Console(width=120)).print(table)


def _conversation(case: Case) -> list[dict]:
    """The case as one user turn, its picture in place."""
    picture, text = image_question(case)
    return [{"role": "user", "content": [picture | {"image": render(case)}, text]}]
