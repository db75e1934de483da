"""Both stages on children's chest films of 28 x 28 pixels (PneumoniaMNIST), scored on held-out films.

python benchmarks/real_files/child_films.py --questions mm_pneumoniamnist.jsonl

The only truth about a film is its label, so what the base model learns to write about one, clear or hazy lungs, is the
label in other words: here the stages can teach the form of an answer, and what follows, but nothing to see.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import click
import numpy as np
from eyes import Batch, learn_to_see
from PIL import Image
from two_stages import Row, copied, report, score, train_models, turns, write_rows

from mede2.trainer.questions.rows import read_rows

TASK = "pneumonia"
QUESTION = "This is a frontal chest radiograph of a child. Is it normal or does it show pneumonia?"
OPTIONS = ("Normal", "Pneumonia")
LUNGS = {"Normal": "clear lungs", "Pneumonia": "hazy lungs"}
SIDE = 32  # pixels of a view
NUM_TOKENS = 4  # visual tokens of a view: 16 px each
SHIFT = 2  # pixels of 28 by which a view is moved
REQUEST = "Think, then answer."
LICENSE = "CC BY 4.0"  # MedMNIST v2


@click.command(help=__doc__)
@click.option("--questions", required=True, metavar="FILE", help="Questions on films.")
@click.option("--output", default="runs/child_films", show_default=True, help="Folder of records and runs.")
@click.option("--num-heldout", default=120, show_default=True, help="Films that nothing is trained on.")
@click.option("--eye-steps", default=300, show_default=True, help="Updates on what visual tokens show.")
@click.option("--num-views", default=1600, show_default=True, help="Views that the base model learns to transcribe.")
@click.option("--num-words", default=1600, show_default=True, help="Rows of words before that.")
@click.option("--num-demos", default=640, show_default=True, help="Demonstrations of Stage I.")
@click.option("--num-pairs", default=640, show_default=True, help="Pairs of Stage II.")
@click.option("--seed", default=0, show_default=True, help="Of the split, the weights, the records and their order.")
@click.option("--results", metavar="FILE.csv", help="Write the table there, too.")
def main(
    questions: str, output: str, num_heldout: int, eye_steps: int, num_views: int, num_words: int, num_demos: int,
    num_pairs: int, seed: int, results: str | None,
) -> None:  # fmt: skip
    from mede2.trainer.demo.model import build_base

    folder, path = Path(output), Path(questions)
    rows = [row for _, row in read_rows(path, ("id", "images", "answer_text"))]
    order = np.random.default_rng([seed, 0]).permutation(len(rows))
    scored, films = [rows[i] for i in sorted(order[:num_heldout])], [rows[i] for i in sorted(order[num_heldout:])]
    write_rows(folder / "cases.jsonl", cases(scored, path.parent, folder))
    write_rows(folder / "words.jsonl", words(num_words, seed))
    write_rows(folder / "views.jsonl", transcripts(films, num_views, folder, path.parent, seed))
    write_rows(folder / "demos.jsonl", demonstrations(num_demos, seed))
    write_rows(folder / "pairs.jsonl", pairs(films, num_pairs, folder, path.parent, seed))
    every = [*words(400, seed), *demonstrations(400, seed)]
    texts = [turn["content"].replace("<", " ").replace(">", " ") for row in every for turn in row["messages"]]
    build_base(folder / "random", seed, texts=texts, vocabulary=512, pixels=(SIDE**2, SIDE**2))
    rng = np.random.default_rng([seed, 5])
    see = partial(
        learn_to_see, draw_batch=partial(labelled, films, path.parent, rng), num_classes=len(OPTIONS),
        num_tokens=NUM_TOKENS, num_steps=eye_steps,
    )  # fmt: skip
    train_models(folder, seed, see)
    majority = Counter(row["answer_text"] for row in films).most_common(1)[0][0]
    report(score(folder, {TASK: majority}), results)


def chain(seen: str, answer: str, option: str | None = None) -> str:
    """The chain for what is seen, the answer that it arrives at, and the option given."""
    return f"<think>Look: {seen}. Check: {seen}, so {answer}.</think>\n<answer> {option or answer}</answer>"


def asked(request: str = REQUEST) -> str:
    """The question with its options."""
    return f"{QUESTION} Options: {', '.join(OPTIONS)}. {request}"


def told(seen: str, rng: np.random.Generator) -> str:
    """What is seen, in words."""
    return str(rng.choice([f"The report names {seen}.", f"The film shows {seen}.", f"There are {seen}."]))


def cases(films: Sequence[Row], source: Path, folder: Path) -> Iterator[Row]:
    """Each film with its question, the images copied from `source` to `folder`."""
    for index, film in enumerate(films):
        answer = film["answer_text"]
        yield {
            "id": film["id"],
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked()}]}],
            "images": [copied(source / film["images"][0], folder, index)],
            "answer": answer,
            "options": list(OPTIONS),
            "meta": {"task": TASK, "look": LUNGS[answer], "modality": "X-ray", "license": LICENSE},
        }


def words(num: int, seed: int) -> Iterator[Row]:
    """Lungs told in words to transcribe, and words to copy."""
    rng = np.random.default_rng([seed, 1])
    known = sorted(set(" ".join(chain(seen, answer) for answer, seen in LUNGS.items()).split()))
    for index in range(num):
        copied = f"Copy: {' '.join(rng.choice(known, size=rng.integers(3, 9)))}."
        seen = str(rng.choice(list(LUNGS.values())))
        told_row = turns(f"{told(seen, rng)} {asked('Write look.')}", f"Look: {seen}.")
        yield {"messages": turns(copied, copied) if index % 2 else told_row}


def transcripts(films: Sequence[Row], num: int, folder: Path, source: Path, seed: int) -> Iterator[Row]:
    """Views to transcribe, and one row in eight of words."""
    rng = np.random.default_rng([seed, 2])
    with_words = words(num // 7 + 1, seed + 1)
    for index in range(num):
        film = films[rng.integers(len(films))]
        content = [{"type": "image"}, {"type": "text", "text": asked("Write look.")}]
        written = f"Look: {LUNGS[film['answer_text']]}."
        image = save_view(source / film["images"][0], folder / "views" / f"{index:05d}.png", rng)
        yield {"messages": turns(content, written), "images": [image]}
        if index % 7 == 6:
            yield next(with_words)


def demonstrations(num: int, seed: int) -> Iterator[Row]:
    """Stage I: lungs told in words, the question, the chain."""
    rng = np.random.default_rng([seed, 3])
    for index in range(num):
        answer = OPTIONS[index % 2]
        yield {"messages": turns(f"{told(LUNGS[answer], rng)} {asked()}", chain(LUNGS[answer], answer))}


def pairs(films: Sequence[Row], num: int, folder: Path, source: Path, seed: int) -> Iterator[Row]:
    """Stage II: views; what is seen wrongly with its consequences, or an answer that contradicts the chain."""
    rng = np.random.default_rng([seed, 4])
    for index in range(num):
        film = films[rng.integers(len(films))]
        answer = film["answer_text"]
        other = OPTIONS[1 - OPTIONS.index(answer)]
        wrong = chain(LUNGS[other], other) if index % 2 else chain(LUNGS[answer], answer, other)
        yield {
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked()}]}],
            "chosen": [{"role": "assistant", "content": chain(LUNGS[answer], answer)}],
            "rejected": [{"role": "assistant", "content": wrong}],
            "images": [save_view(source / film["images"][0], folder / "pair_views" / f"{index:05d}.png", rng)],
            "meta": {"license": LICENSE},
        }


def labelled(films: Sequence[Row], source: Path, rng: np.random.Generator, num: int) -> Batch:
    """Views, and the film's label for each visual token."""
    drawn = [films[rng.integers(len(films))] for _ in range(num)]
    labels = [[OPTIONS.index(film["answer_text"])] * NUM_TOKENS for film in drawn]
    return [view(source / film["images"][0], rng) for film in drawn], labels


def save_view(image: Path, path: Path, rng: np.random.Generator) -> str:
    """Save a view beside the records; its path relative to them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    view(image, rng).save(path)
    return f"{path.parent.name}/{path.name}"


def view(image: Path, rng: np.random.Generator) -> Image.Image:
    """A film moved a little."""
    film = Image.open(image).convert("L")
    left, top = rng.integers(0, 2 * SHIFT + 1, size=2).tolist()
    padded = Image.fromarray(np.pad(np.asarray(film), SHIFT, mode="edge"))
    return padded.crop((left, top, left + film.width, top + film.height)).convert("RGB")


if __name__ == "__main__":
    main()
