"""Answers of a model that runs in this process and its ranks, each rank its share of the batches."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mede2.trainer.data.images import load_image
from mede2.trainer.data.processing import describe_processor, load_processor, locate_model
from mede2.trainer.data.records import Message
from mede2.trainer.evaluation.generation import Generator
from mede2.trainer.files import hash_json, hash_weights
from mede2.trainer.policy import quiet_transformers
from mede2.trainer.preference.journal import Journal
from mede2.trainer.preference.progress import Progress
from mede2.trainer.preference.rows import Row
from mede2.trainer.preference.sample import Job, write_samples
from mede2.trainer.world import World


def sample_here(
    jobs: Sequence[Job],
    output: Path,
    model: str,
    settings: Row,
    *,
    batch_size: int,
    max_pixels: int | None,
    world: World,
) -> None:
    """Have every answer made and write samples.jsonl.

    Batches are those of all jobs, whatever is done already and however many ranks there are, and a batch is journalled
    as one: so neither ranks nor a stop change even the rounding of an answer.

    Args:
        jobs: the answers to be had.
        output: samples.jsonl.
        model: folder or hub name.
        settings: temperature, top_p, max_tokens, system and grey_window; what else the answers depend on is added.
        batch_size: answers at a time on each rank.
        max_pixels: see `processing.load_processor`.
        world: the ranks.

    Raises:
        ValueError: anything that a user can mend: the model, an image, memory that is too small.
    """
    quiet_transformers()
    folder = world.on_main(lambda: locate_model(model))
    settings = settings | {
        "dtype": "bfloat16" if world.device.type == "cuda" else "float32",
        "weights": hash_weights(folder, world),
        "processor": hash_json(describe_processor(load_processor(folder, max_pixels))),
    }
    keys = [job.key(settings) for job in jobs]
    with Journal(output, world.rank) as journal:
        world.barrier()  # every rank has read what there is before any adds to it
        share = _batches(jobs, batch_size)[world.rank :: world.size]
        _generate(jobs, keys, share, journal, folder, settings, max_pixels, world)
        of_share = {keys[index]: journal[keys[index]] for batch in share for index in batch}
        answers = {key: row for part in world.gather(of_share) for key, row in part.items()}
        world.on_main(lambda: write_samples(output, jobs, keys, answers, model, settings))


def _batches(jobs: Sequence[Job], batch_size: int) -> list[list[int]]:
    """Indices of the jobs in batches of like length, the longest first: what does not fit is seen at once."""

    def length(index: int) -> tuple[int, int]:
        parts = [part for message in jobs[index].prompt for part in message["content"]]
        return len(jobs[index].case.images), sum(len(part.get("text", "")) for part in parts)

    order = sorted(range(len(jobs)), key=length, reverse=True)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _generate(
    jobs: Sequence[Job], keys: Sequence[str], share: list[list[int]], journal: Journal, folder: Path, settings: Row,
    max_pixels: int | None, world: World,
) -> None:  # fmt: skip
    """Make the answers of a rank's batches that are not in its journal, and journal them."""
    missing = [[index for index in batch if keys[index] not in journal] for batch in share]
    total, num_missing = sum(map(len, share)), sum(map(len, missing))
    title = f"answers of rank 0 of {world.size}" if world.size > 1 else "answers"
    with Progress(title, total, total - num_missing, shown=world.is_main) as progress:
        if not num_missing:
            return
        generator = Generator(
            folder, dtype=getattr(torch, settings["dtype"]), device=world.device, max_pixels=max_pixels
        )
        for batch in filter(None, missing):
            rows = _answer(generator, [jobs[index] for index in batch], settings)
            journal.append(*(row | {"key": keys[index]} for row, index in zip(rows, batch, strict=True)))
            progress.advance(len(batch))


def _answer(generator: Generator, batch: list[Job], settings: Row) -> list[Row]:
    """One batch of answers."""
    files = {image for job in batch for image in job.case.images}
    pictures = {image: load_image(image, settings["grey_window"]) for image in files}
    try:
        generations = generator(
            [with_pictures(job.prompt, [pictures[image] for image in job.case.images]) for job in batch],
            seeds=[job.seed for job in batch],
            **{name: settings[name] for name in ("temperature", "top_p", "max_tokens")},
        )
    except torch.OutOfMemoryError as error:
        raise ValueError(f"--batch-size: {len(batch)} answers at a time do not fit into memory; lower it") from error
    return [
        {"case": job.case.id, "sample": job.sample}
        | {"text": answer.text, "finish": answer.finish, "num_tokens": answer.num_tokens}
        for job, answer in zip(batch, generations, strict=True)
    ]


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
