"""A Qwen2.5-VL of a million random weights that reads any text, to try commands on question files of one's own.

python benchmarks/real_files/tiny_model.py questions.jsonl --output runs/tiny
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import click

SMALLEST, LARGEST = 32 * 32, 128 * 128  # pixels of an image


@click.command(help=__doc__)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--output", required=True, metavar="FOLDER", help="Where the model goes.")
@click.option("--vocabulary", default=4096, show_default=True, type=click.IntRange(267), help="Tokens, learnt on FILE.")
@click.option("--seed", default=0, show_default=True, help="Of the weights.")
def main(files: Sequence[str], output: str, vocabulary: int, seed: int) -> None:
    from mede2.trainer.demo.model import build_base
    from mede2.trainer.questions.rows import read_rows

    texts = (text for file in files for _, row in read_rows(Path(file)) for text in strings(row))
    build_base(Path(output), seed, texts=texts, vocabulary=vocabulary, pixels=(SMALLEST, LARGEST), max_positions=8192)
    click.echo(f"{output}: an untrained model")


def strings(value: object) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


if __name__ == "__main__":
    main()
