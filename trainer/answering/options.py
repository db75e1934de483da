"""The command line's options by which a model is asked, the same for every command that asks one."""

from collections.abc import Callable
from typing import Any

import click

LOCAL_OPTIONS = ("batch_size", "max_pixels")  # of a model in this process
SERVER_OPTIONS = ("api_key_variable", "served_as", "concurrency", "max_retries", "timeout_s", "allow_remote_images")


def option(*names: str, help: str, **attributes: Any) -> Callable[[Callable], Callable]:
    """A click option that shows its default unless that is nothing."""
    return click.option(*names, help=help, show_default=attributes.get("default") is not None, **attributes)


ASKING = (
    option("--temperature", default=1.0, type=click.FloatRange(0), help="0 takes the likeliest token each time."),
    option("--top-p", default=1.0, type=click.FloatRange(0, 1, min_open=True), help="Mass of the tokens drawn from."),
    option("--max-tokens", default=1024, type=click.IntRange(1), help="Of one answer."),
    option("--seed", default=0, type=click.IntRange(0), help="Another seed, other answers."),
    option(
        "--system",
        metavar="format|FILE",
        help="System message for all cases: `format` asks for <think>...</think> "
        "<answer>...</answer>, a FILE holds another text. [none: the cases' prompts as they are, for models that have "
        "learnt the format in Stage I]",
    ),
    option(
        "--grey-window", metavar="LOW,HIGH", help="Intensities that become black and white in images of over 8 bits."
    ),
    option("--batch-size", default=32, type=click.IntRange(1), help="Answers at a time on each rank."),
    option("--max-pixels", type=click.IntRange(1), help="Larger images are scaled down. [the model's own limit]"),
    option(
        "--api-key-variable", default="OPENAI_API_KEY", metavar="NAME", help="Environment variable with its API key."
    ),
    option("--served-as", metavar="NAME", help="Stands for the URL in the keys, for a server that moves. [the URL]"),
    option("--concurrency", default=16, type=click.IntRange(1), help="Questions to the server at a time."),
    option("--max-retries", default=12, type=click.IntRange(0), help="Of one question."),
    option(
        "--timeout-s", default=600.0, type=click.FloatRange(0, min_open=True), help="Seconds that an answer may take."
    ),
    option("--allow-remote-images", is_flag=True, help="Images may go to a server that is not on this machine."),
)


def asking_options(command: Callable) -> Callable:
    """Give a command all of them, in this order."""
    for decorate in reversed(ASKING):
        command = decorate(command)
    return command
