"""K answers of a model to each case."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mede2.trainer.data.images import Window
from mede2.trainer.data.records import Message
from mede2.trainer.files import hash_json
from mede2.trainer.preference.cases import FORMAT, Case, read_cases, with_system
from mede2.trainer.preference.journal import Journal
from mede2.trainer.preference.rows import Row, write_rows

LOCAL_OPTIONS = ("batch_size", "max_pixels")
SERVER_OPTIONS = ("api_key_variable", "served_as", "concurrency", "max_retries", "timeout_s", "allow_remote_images")
PATIENCE_MINUTES = 7 * 24 * 60  # that ranks wait for one whose answers are longer
SEEDS = 2**31  # servers take 32 bits, some of them signed
ANSWER = ("text", "finish", "num_tokens")  # what is journalled of an answer, beside its key


@dataclass(frozen=True)
class Job:
    """One answer to be had.

    Attributes:
        case: what is asked.
        sample: which of the case's answers, from 0.
        seed: of the answer's draws.
        prompt: the case's messages as they are asked.
    """

    case: Case
    sample: int
    seed: int
    prompt: tuple[Message, ...]

    def key(self, settings: Row) -> str:
        """sha256 of all that the answer depends on; `settings` say which model, too."""
        return hash_json([self.prompt, self.case.image_hashes, settings, self.seed])


def plan(cases: Sequence[Case], num: int, seed: int, system: str | None) -> list[Job]:
    """`num` answers to each case, in order.

    The seed of an answer follows from the run's seed, the case's id and the answer's number alone, so that more cases
    or more answers leave those before as they are.
    """

    def seed_of(case: Case, sample: int) -> int:
        digest = hashlib.sha256(f"{seed} {sample} {case.id}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % SEEDS

    return [
        Job(case, sample, seed_of(case, sample), case.prompt if system is None else with_system(case, system))
        for case in cases
        for sample in range(num)
    ]


def write_samples(
    output: Path, jobs: Sequence[Job], keys: Sequence[str], answers: Mapping[str, Row], model: str, settings: Row
) -> None:
    """Write samples.jsonl: every answer, in the order of the jobs."""
    write_rows(
        output,
        (
            {"case": job.case.id, "sample": job.sample, "seed": job.seed}
            | {name: answers[key][name] for name in ANSWER}
            | {"model": model, "settings": settings, "key": key}
            for job, key in zip(jobs, keys, strict=True)
        ),
    )


def _option(*names: str, help: str, **attributes: Any):
    """A click option that shows its default unless that is nothing."""
    return click.option(*names, help=help, show_default=attributes.get("default") is not None, **attributes)


HELP = """K answers of a model to each case.

Without --base-url the model runs here, in transformers; `torchrun --nproc_per_node 8 launch/pairs.py sample ...` shares
the answers out over ranks. With it an OpenAI-compatible server (vLLM, SGLang) is asked.

Finished answers lie in .OUTPUT.journal/ beside the output, under the hash of all that they depend on, so the same
command again continues where it was stopped, and costs nothing when all are there. Only an answer whose reply was still
on its way from the server when the command was killed, or the connection cut, is asked for again. OUTPUT is written
whole at the end, in the order of the cases."""


@click.command("sample", help=HELP, short_help=__doc__)
@_option("--cases", "cases_file", required=True, metavar="FILE", help="cases.jsonl")
@_option("--output", required=True, metavar="FILE", help="samples.jsonl")
@_option("--model", required=True, metavar="NAME", help="Model folder or hub name, or the server's name for its model.")
@_option("--num", default=4, type=click.IntRange(1), help="Answers to each case.")
@_option("--temperature", default=1.0, type=click.FloatRange(0), help="0 takes the likeliest token each time.")
@_option("--top-p", default=1.0, type=click.FloatRange(0, 1, min_open=True), help="Mass of the tokens drawn from.")
@_option("--max-tokens", default=1024, type=click.IntRange(1), help="Of one answer.")
@_option("--seed", default=0, type=click.IntRange(0), help="Another seed, other answers.")
@_option("--system", metavar="format|FILE", help="System message for all cases: `format` asks for <think>...</think> "
         "<answer>...</answer>, a FILE holds another text. [none: the cases' prompts as they are, for models that have "
         "learnt the format in Stage I]")  # fmt: skip
@_option("--grey-window", metavar="LOW,HIGH", help="Intensities that become black and white in images of over 8 bits.")
@_option("--batch-size", default=32, type=click.IntRange(1), help="Answers at a time on each rank.")
@_option("--max-pixels", type=click.IntRange(1), help="Larger images are scaled down. [the model's own limit]")
@_option("--base-url", metavar="URL", help="A server, such as http://127.0.0.1:8000/v1")
@_option("--api-key-variable", default="OPENAI_API_KEY", metavar="NAME", help="Environment variable with its API key.")
@_option("--served-as", metavar="NAME", help="Stands for the URL in the keys, for a server that moves. [the URL]")
@_option("--concurrency", default=16, type=click.IntRange(1), help="Questions to the server at a time.")
@_option("--max-retries", default=12, type=click.IntRange(0), help="Of one question.")
@_option("--timeout-s", default=600.0, type=click.FloatRange(0, min_open=True), help="Seconds that an answer may take.")
@_option("--allow-remote-images", is_flag=True, help="Images may go to a server that is not on this machine.")
@click.pass_context
def command(
    context: click.Context, cases_file: str, output: str, model: str, num: int, seed: int, base_url: str | None,
    system: str | None, grey_window: str | None, temperature: float, top_p: float, max_tokens: int, **options: Any,
) -> None:  # fmt: skip
    for name in LOCAL_OPTIONS if base_url else SERVER_OPTIONS:
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise ValueError(f"--{name.replace('_', '-')}: only {'without' if base_url else 'with'} --base-url")
    if temperature == 0 and num > 1:
        raise ValueError(f"--num {num}: at temperature 0 all answers to a case are the same; say --num 1")
    text = _system_text(system)
    jobs = plan(read_cases(Path(cases_file)), num, seed, text)
    settings = {
        "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "system": text,
        "grey_window": parse_window(grey_window),
    }  # fmt: skip
    if base_url:
        _ask_server(jobs, Path(output), model, base_url, settings, **options)
    else:
        from mede2.trainer.preference.sample_here import sample_here
        from mede2.trainer.world import join_world

        world = join_world(PATIENCE_MINUTES)
        limits = {name: options[name] for name in LOCAL_OPTIONS}
        sample_here(jobs, Path(output), model, settings, **limits, world=world)
        world.leave()
    if os.environ.get("RANK", "0") == "0":
        click.echo(f"{len(jobs)} answers to {len(jobs) // num} cases in {output}")


def _ask_server(jobs: list[Job], output: Path, model: str, base_url: str, settings: Row, **options: Any) -> None:
    """Every answer from a server."""
    import asyncio

    from mede2.trainer.preference.chat import ChatClient, ask_all, check_images_may_leave

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--base-url: one process asks the server, --concurrency questions at a time; start no ranks")
    images = list(dict.fromkeys(image for job in jobs for image in job.case.images))
    check_images_may_leave(base_url, images, options["allow_remote_images"])
    settings = settings | {"server": options["served_as"] or base_url}
    keys = [job.key(settings | {"model": model}) for job in jobs]

    async def run(journal: Journal) -> None:
        async with ChatClient(
            base_url, model, allow_remote_images=options["allow_remote_images"],
            key_variable=options["api_key_variable"], max_retries=options["max_retries"],
            timeout_s=options["timeout_s"], grey_window=settings["grey_window"],
        ) as client:  # fmt: skip

            async def ask(job: Job) -> Row:
                return await _ask(client, job, settings)

            todo = dict(zip(keys, jobs, strict=True))
            await ask_all(todo, ask, journal, concurrency=options["concurrency"], title="answers")

    with Journal(output) as journal:
        asyncio.run(run(journal))
        write_samples(output, jobs, keys, journal, model, settings)


async def _ask(client, job: Job, settings: Row) -> Row:
    """One answer from the server."""
    request = {
        "temperature": settings["temperature"], "top_p": settings["top_p"], "seed": job.seed,
        "max_completion_tokens": settings["max_tokens"],
    }  # fmt: skip
    reply = await client.ask(job.prompt, job.case.images, request)
    if reply.reasoning:
        raise ValueError(
            f"{client.base_url} ({client.model}) tells the reasoning apart from the answer; start it without a "
            f"reasoning parser, for an answer is judged and learnt as the model wrote it"
        )
    if reply.finish not in ("stop", "length"):
        raise ValueError(f"{client.base_url} ({client.model}) ended an answer by {reply.finish!r}, not stop or length")
    answer = {"text": reply.text, "finish": reply.finish, "num_tokens": reply.num_tokens}
    return {"case": job.case.id, "sample": job.sample} | answer


def _system_text(system: str | None) -> str | None:
    if system is None or system == "format":
        return system and FORMAT
    try:
        text = Path(system).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--system {system}: `format` or a text file ({error})") from error
    if not text:
        raise ValueError(f"--system {system}: an empty file")
    return text


def parse_window(text: str | None) -> Window:
    if text is None:
        return None
    try:
        low, high = map(float, text.split(","))
    except ValueError as error:
        raise ValueError(f"--grey-window {text}: two numbers, such as 0,4095") from error
    if not low < high:
        raise ValueError(f"--grey-window {text}: the first is to be the lower one")
    return low, high
