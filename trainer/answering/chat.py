"""Questions to an OpenAI-compatible server (vLLM, SGLang, a provider), many at once. Imports openai.

Images are those of patients, perhaps: they go to this machine's own addresses, and elsewhere only when that is allowed.
"""

import asyncio
import base64
import functools
import io
import ipaddress
import json
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai

from mede2.trainer.answering.journal import Journal
from mede2.trainer.answering.progress import Progress
from mede2.trainer.data.images import Window, load_image
from mede2.trainer.data.records import Message
from mede2.trainer.questions.rows import Row, tell
from mede2.trainer.redaction import has_credentials, without_secrets
from mede2.trainer.stopping import watcher

BAD_QUESTION = (400, 413, 422)  # the server understood and will not answer this one; others it may
MOST_REFUSED = 20  # as many refusals mean that the settings are wrong, not the questions
NO_KEY = "none"  # what servers without keys are sent

Job = TypeVar("Job")


class Refused(ValueError):
    """The server will not answer this question, however often it is asked."""


@dataclass(frozen=True)
class Reply:
    """What the server said.

    Attributes:
        text: the answer.
        reasoning: what the server cut out of the answer and told apart, if it runs a reasoning parser.
        finish: "stop", "length" or another reason, as the server names it.
        num_tokens: tokens of the answer, by the server's count.
        num_prompt_tokens: tokens of the question, by the server's count.
    """

    text: str
    reasoning: str | None
    finish: str
    num_tokens: int
    num_prompt_tokens: int


def check_address(base_url: str) -> None:
    """Raise ValueError unless this can be the address of a server, with nothing secret in it."""
    if has_credentials(base_url) or "?" in base_url:
        raise ValueError(
            f"--base-url {without_secrets(base_url).partition('?')[0]!r}: an address without user, password or query, "
            "for it is told and written; a key is read from the environment variable that --api-key-variable names"
        )
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise ValueError(f"--base-url {base_url!r}: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"--base-url {base_url!r}: an address such as http://127.0.0.1:8000/v1")


def is_loopback(base_url: str) -> bool:
    """Whether a server's address is this machine itself. A name other than localhost could be anywhere."""
    host = httpx.URL(base_url).host
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def check_images_may_leave(base_url: str, images: Sequence[Path], allowed: bool) -> None:
    """Raise ValueError when there are images and the server is not on this machine, unless that is allowed."""
    check_address(base_url)
    if images and not allowed and not is_loopback(base_url):
        raise ValueError(
            f"--base-url {base_url}: {len(images)} images (the first is {images[0]}) would leave this machine for that "
            f"server; they may be of patients. If they may go there, say --allow-remote-images"
        )


class ChatClient:
    """One model on one server. To be used within one event loop: `async with ChatClient(...) as client`.

    What may be tried again is tried again by the official client: cut connections, timeouts, 408, 409, 429 and 5xx,
    after what `Retry-After` says (up to two minutes) or after 0.5 to 8 s, doubling.

    Args:
        base_url: such as http://127.0.0.1:8000/v1.
        model: the name under which the server knows it.
        allow_remote_images: whether images may go to a server that is not on this machine.
        key_variable: environment variable that holds the API key; unset means that the server wants none.
        max_retries: how often a question is asked again.
        timeout_s: seconds that one answer may take.
        grey_window: see `images.load_image`.

    Raises:
        ValueError: a base URL that is none.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        allow_remote_images: bool = False,
        key_variable: str = "OPENAI_API_KEY",
        max_retries: int = 12,
        timeout_s: float = 600.0,
        grey_window: Window = None,
    ):
        check_address(base_url)
        self.base_url, self.model, self.grey_window = base_url, model, grey_window
        self.allow_remote_images, self.key_variable = allow_remote_images, key_variable
        # What is meant for this machine goes past any proxy, and nothing follows a redirection to elsewhere.
        http = httpx.AsyncClient(
            follow_redirects=False, trust_env=not is_loopback(base_url), timeout=httpx.Timeout(timeout_s, connect=10.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )  # fmt: skip
        self._client = openai.AsyncOpenAI(
            base_url=base_url, api_key=os.environ.get(key_variable) or NO_KEY, max_retries=max_retries, http_client=http
        )

    async def __aenter__(self) -> "ChatClient":
        return self

    async def __aexit__(self, *_) -> None:
        await self._client.close()

    async def ask(
        self,
        messages: Sequence[Message],
        images: Sequence[Path],
        settings: Mapping[str, Any],
        schema: Mapping[str, Any] | None = None,
    ) -> Reply:
        """Ask one question.

        Args:
            messages: with list contents and {"type": "image"} where an image stands.
            images: files, in the order of their placeholders. They are sent as PNG made from their pixels, upright and
                without whatever else the file holds (dates, names, places).
            settings: of the request as the API names them: temperature, top_p, seed, max_completion_tokens, ...
            schema: JSON schema that the text must follow (strict structured output).

        Raises:
            Refused: the server refuses this question.
            ValueError: the server refuses every question, or did not answer within the retries, or answers something
                else than a chat completion; an image that may not leave, or does not decode.
        """
        check_images_may_leave(self.base_url, images, self.allow_remote_images)
        urls = [await asyncio.to_thread(_data_url, image, self.grey_window) for image in images]
        request: dict[str, Any] = {"model": self.model, "messages": _with_urls(messages, urls), **settings}
        if schema is not None:
            request["response_format"] = {
                "type": "json_schema", "json_schema": {"name": "reply", "strict": True, "schema": schema}
            }  # fmt: skip
        where = f"{self.base_url} ({self.model})"
        try:
            completion = await self._client.chat.completions.create(**request)
        except openai.APIStatusError as error:
            said = f"{where} answers {error.status_code}: {_brief(error.response.text)}"
            if error.status_code in BAD_QUESTION:
                raise Refused(said) from error
            if error.status_code in (401, 403):
                raise ValueError(f"{said}. The API key is read from the variable {self.key_variable}") from error
            raise ValueError(said) from error
        except openai.APITimeoutError as error:
            raise ValueError(f"{where} did not answer within --timeout-s") from error
        except openai.APIConnectionError as error:
            raise ValueError(f"{where} cannot be reached: {error.__cause__ or error}") from error
        except (openai.OpenAIError, json.JSONDecodeError) as error:
            raise ValueError(f"{where} answers something that is no chat completion: {error}") from error
        return _reply(completion, where)


async def ask_all(
    jobs: Mapping[str, Job],
    ask: Callable[[Job], Awaitable[Row]],
    journal: Journal,
    *,
    concurrency: int,
    title: str,
) -> None:
    """Do every job whose key is not in the journal, `concurrency` of them at a time, and journal each as it ends.

    When something fails that would fail again, or this process is asked to stop, no further job is begun, those under
    way end and are journalled, and then it is raised: nothing that was paid for is thrown away.

    Args:
        jobs: by key, the hash of all that the result depends on.
        ask: does one job; returns its row, to which the key is added.
        journal: of the step.
        concurrency: jobs under way at a time.
        title: for the progress line.

    Raises:
        ValueError: as `ask` raised it; or the list of jobs that were refused, when all else is done.
        StopRequested: the journal holds what was done.
    """
    waiting = iter([key for key in jobs if key not in journal])
    refused: list[Refused] = []
    failed: list[ValueError] = []

    async def work(progress: Progress) -> None:
        for key in waiting:
            if failed or watcher.asked or len(refused) >= MOST_REFUSED:
                return
            try:
                row = await ask(jobs[key])
            except Refused as error:
                refused.append(error)
            except ValueError as error:
                failed.append(error)
            else:
                journal.append(row | {"key": key})
                progress.advance()

    with Progress(title, len(jobs), found=sum(key in journal for key in jobs)) as progress:
        await asyncio.gather(*(work(progress) for _ in range(concurrency)))
    if failed:
        raise failed[0]
    watcher.stop_alone(f"after {sum(key in journal for key in jobs)} of {len(jobs)} {title}")
    if refused:
        raise tell(f"{title}: {len(refused)} were refused; what was answered is kept:", refused)


def _with_urls(messages: Sequence[Message], urls: Sequence[str]) -> list[Message]:
    """Messages in the API's form: plain text where there is nothing else, data URLs in place of placeholders."""
    remaining = iter(urls)
    return [
        {"role": message["role"], "content": _content(message["content"], remaining)} for message in messages
    ]  # fmt: skip


def _content(parts: list[dict], urls) -> str | list[dict]:
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return [
        part if part["type"] == "text" else {"type": "image_url", "image_url": {"url": next(urls)}} for part in parts
    ]


@functools.lru_cache(maxsize=64)  # the answers to a case, and judgements of them, come one after another
def _data_url(path: Path, grey_window: Window) -> str:
    buffer = io.BytesIO()
    load_image(path, grey_window).save(buffer, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _reply(completion: Any, where: str) -> Reply:
    """Check what came: servers differ, and a proxy's page is no answer either."""
    choices = getattr(completion, "choices", None)
    if not choices or choices[0].message is None:
        raise ValueError(f"{where} answers something that is no chat completion: {_brief(str(completion))}")
    message, finish, usage = choices[0].message, choices[0].finish_reason, completion.usage
    if finish == "content_filter" or message.refusal:
        raise Refused(f"{where} withholds its answer ({message.refusal or finish})")
    if usage is None:
        raise ValueError(f"{where} does not say how many tokens an answer has (`usage`)")
    text = message.content or ""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise Refused(f"{where} answers text that is not valid Unicode (half of a surrogate pair)")
    reasoning = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    return Reply(text, reasoning, finish, usage.completion_tokens, usage.prompt_tokens)


def _brief(text: str) -> str:
    return " ".join(without_secrets(text).split())[:200]
