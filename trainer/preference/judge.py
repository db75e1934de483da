"""Scores for each answer on the rubric's criteria, with evidence from its text."""

import asyncio
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from mede2.trainer.answering.journal import Journal
from mede2.trainer.answering.progress import Progress
from mede2.trainer.data.images import parse_window
from mede2.trainer.preference import rules
from mede2.trainer.preference.combine import COMBINATIONS, combine
from mede2.trainer.preference.judgements import Answer, Judgement
from mede2.trainer.preference.rubric import CRITERIA, DEFAULT, Rubric, read_rubric
from mede2.trainer.preference.scored import read_samples
from mede2.trainer.questions.cases import read_cases
from mede2.trainer.questions.rows import write_rows
from mede2.trainer.stopping import EXIT_CODES, watcher

SERVED = re.compile(r"(?P<model>.+)@(?P<url>https?://.+)")
HELP = """Scores for each answer on the rubric's criteria, 1 to 5, with evidence from its text.

--judge rules needs no model. --judge MODEL@URL asks an OpenAI-compatible server, all answers of a case at once in a
shuffled order. Give --judge several times, and --combine, for several judges together.

Verdicts of servers lie in .OUTPUT.journal/ beside the output, under the hash of all that they depend on: the same
command again continues where it was stopped, and one with a judge more asks that judge alone. The rules are quicker
run again than read back."""


@click.command("judge", help=HELP, short_help=__doc__, epilog=EXIT_CODES)
@click.option("--cases", "cases_file", required=True, metavar="FILE", help="cases.jsonl")
@click.option("--samples", required=True, metavar="FILE", help="samples.jsonl")
@click.option("--output", required=True, metavar="FILE", help="judgements.jsonl")
@click.option("--judge", "judges", multiple=True, default=["rules"], show_default=True, metavar="rules|MODEL@URL")
@click.option(
    "--weight", "weights", multiple=True, type=click.FloatRange(0), help="One for each --judge, in their order. [1]"
)
@click.option("--combine", "how", type=click.Choice(COMBINATIONS), help="Adds what all judges together say.")
@click.option("--rubric", "rubric_file", default=str(DEFAULT), metavar="FILE", help="[the rubric that ships here]")
@click.option(
    "--twice", default=0.1, show_default=True, type=click.FloatRange(0, 1),
    help="Share of the cases that a model judges a second time, with the answers in the opposite order.",
)  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Of the orders and of the share.")
@click.option(
    "--attempts", default=3, show_default=True, type=click.IntRange(1),
    help="How often a model is asked before an answer is left unjudged.",
)  # fmt: skip
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0), help="Of the models.")
@click.option("--max-tokens", default=8192, show_default=True, type=click.IntRange(1), help="Of one reply.")
@click.option("--images/--no-images", default=True, show_default=True, help="Whether models are shown the images.")
@click.option("--grey-window", metavar="LOW,HIGH", help="Black and white in images of over 8 bits.")
@click.option("--allow-remote-images", is_flag=True, help="Images may go to a server that is not on this machine.")
@click.option("--api-key-variable", default="OPENAI_API_KEY", show_default=True, metavar="NAME")
@click.option("--concurrency", default=8, show_default=True, type=click.IntRange(1), help="Questions at a time.")
@click.option("--max-retries", default=12, show_default=True, type=click.IntRange(0), help="Of one request.")
@click.option("--timeout-s", default=600.0, show_default=True, type=click.FloatRange(0, min_open=True))
def command(
    cases_file: str, samples: str, output: str, judges: Sequence[str], weights: Sequence[float], how: str | None,
    rubric_file: str, **options,
) -> None:  # fmt: skip
    judges = list(judges)
    if len(set(judges)) < len(judges):
        raise ValueError(f"--judge {', '.join(judges)}: each once")
    if wrong := [judge for judge in judges if judge != rules.JUDGE and not SERVED.fullmatch(judge)]:
        raise ValueError(f"--judge {wrong[0]}: rules, or MODEL@URL such as my-model@http://127.0.0.1:8000/v1")
    if weights and (len(weights) != len(judges) or not any(weights) or how is None):
        raise ValueError(
            f"--weight: one for each of {len(judges)} judges, not all 0, and --combine, not {list(weights)}"
        )
    watcher.install()
    rubric = read_rubric(rubric_file)
    cases = {case.id: case for case in read_cases(Path(cases_file))}
    answers = [Answer(cases[one.case], one.sample, one.text, one.key) for one in read_samples(Path(samples), cases)]
    said: list[Judgement] = []
    with Journal(Path(output)) as journal:
        for judge in judges:
            if judge == rules.JUDGE:
                said += judge_by_rules(answers, rubric)
            else:
                said += asyncio.run(ask_judge(judge, answers, rubric, journal, options))
    if how:
        said += together(how, said, dict(zip(judges, weights or [1.0] * len(judges), strict=True)))
    write_rows(Path(output), (judgement.row() for judgement in said))
    click.echo("\n".join([*summary(said), f"{len(said)} judgements of {len(answers)} answers in {output}"]))


def judge_by_rules(answers: Sequence[Answer], rubric: Rubric) -> list[Judgement]:
    judgements = []
    with Progress("judged by rules", len(answers)) as progress:
        for answer in answers:
            watcher.stop_alone(f"after {len(judgements)} of {len(answers)} answers were judged by rules")
            judgements.append(rules.judge(answer, rubric))
            progress.advance()
    return judgements


async def ask_judge(
    name: str, answers: Sequence[Answer], rubric: Rubric, journal: Journal, options: Mapping
) -> list[Judgement]:
    """A model's judgements, in the order of the answers and then in the opposite order of its reading."""
    from mede2.trainer.answering.chat import ChatClient, Refused, ask_all, check_images_may_leave
    from mede2.trainer.preference.judge_by_chat import ChatJudge, Question, plan

    served = SERVED.fullmatch(name)
    questions = plan(answers, options["seed"], options["twice"], options["images"])
    images = list(dict.fromkeys(image for question in questions if question.images for image in question.case.images))
    check_images_may_leave(served["url"], images, options["allow_remote_images"])
    settings = {"temperature": options["temperature"], "max_completion_tokens": options["max_tokens"]}
    window = parse_window(options["grey_window"])
    judge = ChatJudge(name, rubric, settings, options["attempts"], window)
    todo = {judge.key(question): question for question in questions}
    refused: dict[str, str] = {}

    async with ChatClient(
        served["url"], served["model"], allow_remote_images=options["allow_remote_images"],
        key_variable=options["api_key_variable"], max_retries=options["max_retries"], timeout_s=options["timeout_s"],
        grey_window=window,
    ) as client:  # fmt: skip

        async def ask(question: Question) -> dict:
            try:
                return await judge.ask(client, question)
            except Refused as error:
                refused[judge.key(question)] = str(error)
                raise

        try:
            await ask_all(todo, ask, journal, concurrency=options["concurrency"], title=f"judged by {name}")
        except ValueError:
            if not all(key in journal or key in refused for key in todo):
                raise
    if refused:
        click.echo(f"{name}: {len(refused)} questions refused, such as: {next(iter(refused.values()))}", err=True)
    asked = {(question.case.id, question.order): (key, question) for key, question in todo.items()}
    judgements = []
    for order in (0, 1):
        for answer in answers:
            if (answer.case.id, order) in asked:
                key, question = asked[answer.case.id, order]
                verdict = journal[key] if key in journal else judge.nothing(question, refused[key])
                judgements.append(judge.judgement(answer, question, verdict | {"key": key}))
    return judgements


def together(how: str, said: Sequence[Judgement], weights: Mapping[str, float]) -> list[Judgement]:
    """The judges combined, for each answer in order."""
    of_answer: dict[tuple[str, int], list[Judgement]] = {}
    for judgement in said:
        of_answer.setdefault((judgement.case, judgement.sample), []).append(judgement)
    return [combine(how, judgements, weights) for judgements in of_answer.values()]


def summary(said: Sequence[Judgement]) -> list[str]:
    """A line for each judge: how much it judged, and its mean scores."""
    lines = []
    for judge in dict.fromkeys(judgement.judge for judgement in said):
        own = [judgement for judgement in said if judgement.judge == judge]
        unjudged = sum(judgement.scores is None for judgement in own)
        means = []
        for criterion in CRITERIA:
            scores = [one.scores[criterion].score for one in own if one.scores and one.scores[criterion].score]
            means.append(f"{criterion} {sum(scores) / len(scores):.2f} ({len(scores)})" if scores else f"{criterion} -")
        lines.append(f"{judge}: {len(own)} judgements, {unjudged} unjudged; mean (number): {', '.join(means)}")
    return lines
