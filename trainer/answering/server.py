"""A model that answers on an OpenAI-compatible server (vLLM, SGLang, a provider)."""

import asyncio
import os
from collections.abc import Sequence
from typing import Any

from mede2.trainer.answering.chat import ChatClient, ask_all, check_images_may_leave
from mede2.trainer.answering.jobs import ANSWER, Job
from mede2.trainer.answering.journal import Journal
from mede2.trainer.questions.rows import Row


class ServerModel:
    """One model on one server.

    Args:
        model: the name under which the server knows it.
        base_url: such as http://127.0.0.1:8000/v1.
        served_as: stands for the URL in the keys, for a server that moves.
        concurrency: questions under way at a time.
        api_key_variable, max_retries, timeout_s, allow_remote_images: see `chat.ChatClient`.

    Attributes:
        identity: what answers depend on beside question and settings: the server and its name for the model.

    Raises:
        ValueError: more than one rank.
    """

    def __init__(
        self, model: str, base_url: str, *, served_as: str | None, concurrency: int, api_key_variable: str,
        max_retries: int, timeout_s: float, allow_remote_images: bool,
    ):  # fmt: skip
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"{base_url}: one process asks a server, --concurrency questions at a time; start no ranks"
            )
        self.model, self.base_url, self.concurrency = model, base_url, concurrency
        self.allow_remote_images = allow_remote_images
        self.client_settings: dict[str, Any] = {
            "allow_remote_images": allow_remote_images, "key_variable": api_key_variable, "max_retries": max_retries,
            "timeout_s": timeout_s,
        }  # fmt: skip
        self.identity = {"server": served_as or base_url, "model": model}

    def answer(self, jobs: Sequence[Job], settings: Row, journal: Journal) -> list[Row]:
        """Ask every question that is not in the journal.

        Args:
            jobs: the answers to be had.
            settings: temperature, top_p, max_tokens, system and grey_window.
            journal: what was answered before.

        Returns:
            In the order of the jobs: text, finish, num_tokens, key.

        Raises:
            ValueError: see `chat.ask_all`; a server that parses the reasoning out of an answer.
        """
        images = list(dict.fromkeys(image for job in jobs for image in job.case.images))
        check_images_may_leave(self.base_url, images, self.allow_remote_images)
        keys = [job.key(settings | self.identity) for job in jobs]
        asyncio.run(self._ask_all(dict(zip(keys, jobs, strict=True)), settings, journal))
        return [{name: journal[key][name] for name in (*ANSWER, "key")} for key in keys]

    async def _ask_all(self, jobs: dict[str, Job], settings: Row, journal: Journal) -> None:
        window = settings["grey_window"]
        async with ChatClient(self.base_url, self.model, grey_window=window, **self.client_settings) as client:

            async def ask(job: Job) -> Row:
                return await _ask(client, job, settings)

            await ask_all(jobs, ask, journal, concurrency=self.concurrency, title="answers")


async def _ask(client: ChatClient, job: Job, settings: Row) -> Row:
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
