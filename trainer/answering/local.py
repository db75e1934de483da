"""A model that answers in this process and its ranks, each rank its share of the batches."""

from collections.abc import Sequence

import torch

from mede2.trainer.answering.generation import Generator
from mede2.trainer.answering.jobs import Job
from mede2.trainer.answering.journal import Journal
from mede2.trainer.answering.progress import Progress
from mede2.trainer.data.images import load_image
from mede2.trainer.data.processing import describe_processor, load_processor, locate_model
from mede2.trainer.data.records import Message
from mede2.trainer.files import hash_file, hash_json, hash_weights
from mede2.trainer.policy import quiet_transformers
from mede2.trainer.questions.rows import Row
from mede2.trainer.stopping import watcher
from mede2.trainer.world import World

PATIENCE_MINUTES = 7 * 24 * 60  # that ranks wait for one whose answers are longer


class LocalModel:
    """A model folder, loaded when the first answer is missing.

    Args:
        model: folder or hub name.
        batch_size: answers at a time on each rank.
        max_pixels: see `processing.load_processor`.
        world: the ranks.

    Attributes:
        identity: what answers depend on beside question and settings: dtype, weights, end tokens, processor.
    """

    def __init__(self, model: str, *, batch_size: int, max_pixels: int | None, world: World):
        quiet_transformers()
        self.batch_size, self.max_pixels, self.world = batch_size, max_pixels, world
        self.folder = world.on_main(lambda: locate_model(model))
        self.identity = {
            "dtype": "bfloat16" if world.device.type == "cuda" else "float32",
            "weights": hash_weights(self.folder, world),
            "generation": hash_file(ends) if (ends := self.folder / "generation_config.json").exists() else None,
            "processor": hash_json(describe_processor(load_processor(self.folder, max_pixels))),
        }
        self._generator: Generator | None = None

    def answer(self, jobs: Sequence[Job], settings: Row, journal: Journal) -> list[Row]:
        """Answer every job, on all ranks together.

        Batches are those of all jobs, whatever is done already and however many ranks there are, and a batch is
        journalled as one: so neither ranks nor a stop change even the rounding of an answer.

        Args:
            jobs: the answers to be had, the same on every rank.
            settings: temperature, top_p, max_tokens, system and grey_window.
            journal: of this rank; all ranks have opened theirs.

        Returns:
            On every rank, in the order of the jobs: text, finish, num_tokens, key.

        Raises:
            ValueError: anything that a user can mend: an image, memory that is too small.
            StopRequested: on every rank; the journals hold what was done.
        """
        keys = [job.key(settings | self.identity) for job in jobs]
        self.world.barrier()  # every rank has read what there is before any adds to it
        share = _batches(jobs, self.batch_size)[self.world.rank :: self.world.size]
        missing = [[index for index in batch if keys[index] not in journal] for batch in share]
        total, num_missing = sum(map(len, share)), sum(map(len, missing))
        title = f"answers of rank 0 of {self.world.size}" if self.world.size > 1 else "answers"
        with Progress(title, total, total - num_missing, shown=self.world.is_main) as progress:
            for batch in filter(None, missing):
                if watcher.asked:
                    break
                rows = self._answer([jobs[index] for index in batch], settings)
                journal.append(*(row | {"key": keys[index]} for row, index in zip(rows, batch, strict=True)))
                progress.advance(len(batch))
        self.world.stop_if_asked("between two batches of answers")
        of_share = {keys[index]: journal[keys[index]] for batch in share for index in batch}
        answers = {key: row for part in self.world.gather(of_share) for key, row in part.items()}
        return [answers[key] for key in keys]

    def _answer(self, batch: list[Job], settings: Row) -> list[Row]:
        """One batch of answers."""
        if self._generator is None:
            dtype = getattr(torch, self.identity["dtype"])
            self._generator = Generator(
                self.folder, dtype=dtype, device=self.world.device, max_pixels=self.max_pixels
            )  # fmt: skip
        files = {image for job in batch for image in job.case.images}
        pictures = {image: load_image(image, settings["grey_window"]) for image in files}
        try:
            generations = self._generator(
                [with_pictures(job.prompt, [pictures[image] for image in job.case.images]) for job in batch],
                seeds=[job.seed for job in batch],
                **{name: settings[name] for name in ("temperature", "top_p", "max_tokens")},
            )
        except torch.OutOfMemoryError as error:
            told = f"--batch-size: {len(batch)} answers at a time do not fit into memory; lower it"
            raise ValueError(told) from error
        return [
            {"case": job.case.id, "sample": job.sample}
            | {"text": answer.text, "finish": answer.finish, "num_tokens": answer.num_tokens}
            for job, answer in zip(batch, generations, strict=True)
        ]


def _batches(jobs: Sequence[Job], batch_size: int) -> list[list[int]]:
    """Indices of the jobs in batches of like length, the longest first: what does not fit is seen at once."""

    def length(index: int) -> tuple[int, int]:
        parts = [part for message in jobs[index].prompt for part in message["content"]]
        return len(jobs[index].case.images), sum(len(part.get("text", "")) for part in parts)

    order = sorted(range(len(jobs)), key=length, reverse=True)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def with_pictures(prompt: Sequence[Message], pictures: list) -> list[Message]:
    """The messages with each picture in its placeholder."""
    remaining = iter(pictures)
    return [
        message
        | {
            "content": [
                part | {"image": next(remaining)} if part["type"] == "image" else part for part in message["content"]
            ]
        }
        for message in prompt
    ]
