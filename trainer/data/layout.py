"""How an example lies in the rows of a micro-batch: its prompt and images once, the answers behind them."""

from dataclasses import dataclass

import numpy as np

from mede2.trainer.data.encoding import Example, Sequence

CHOSEN, REJECTED, CORRUPTED = range(3)  # sides of a pair; a demonstration has the first only


@dataclass(frozen=True)
class Piece:
    """Sequences that share their first `prefix` tokens, laid out as prefix, rest of the first, rest of the second.

    Attributes:
        sequences: the conversations.
        prefix: tokens that all of them begin with, computed once; all images are in it. A piece of one sequence is all
            prefix.
        sides: what each sequence is to its example: CHOSEN, REJECTED, or CORRUPTED (the chosen answer under a corrupted
            image).
        images: paths, in the order of their placeholders.
    """

    sequences: tuple[Sequence, ...]
    prefix: int
    sides: tuple[int, ...]
    images: tuple[str, ...]

    def __len__(self) -> int:
        return self.prefix + sum(len(sequence) - self.prefix for sequence in self.sequences)

    def input_ids(self) -> np.ndarray:
        """(T,) int64."""
        first, *others = self.sequences
        return np.concatenate([first.input_ids, *(other.input_ids[self.prefix :] for other in others)])

    def branches(self) -> np.ndarray:
        """(T,) int64: 0 in the prefix, then the number of the sequence, from 1."""
        lengths = [self.prefix, *(len(sequence) - self.prefix for sequence in self.sequences)]
        return np.repeat(np.arange(len(lengths)), lengths)

    def answers(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each sequence the places in the piece that predict its answer tokens, and those tokens; (n,) int64. The
        prefix's last place predicts the first token of every answer."""
        found, start = [], self.prefix
        for sequence in self.sequences:
            answer = np.flatnonzero(sequence.answer_mask)
            before = answer - 1
            found.append(
                (np.where(before < self.prefix, before, before - self.prefix + start), sequence.input_ids[answer])
            )
            start += len(sequence) - self.prefix
        return found


@dataclass(frozen=True)
class Layout:
    """Which pieces examples are cut into.

    Attributes:
        shared_prefix: the answers of a pair lie behind one prompt.
        corrupted: pairs with images are followed by their chosen answer under a corrupted image.
    """

    shared_prefix: bool = True
    corrupted: bool = False

    def pieces(self, example: Example) -> list[Piece]:
        first, images = example.sequences[0], example.images
        if len(example.sequences) == 1:
            return [Piece((first,), len(first), (CHOSEN,), images)]
        if self.shared_prefix:
            pieces = [Piece(example.sequences, example.prefix, (CHOSEN, REJECTED), images)]
        else:
            pieces = [Piece((seq,), len(seq), (side,), images) for side, seq in enumerate(example.sequences)]
        if self.corrupted and images:
            pieces.append(Piece((first,), len(first), (CORRUPTED,), images))
        return pieces

    def lengths(self, example: Example) -> tuple[int, ...]:
        """Tokens of each of its pieces."""
        return tuple(map(len, self.pieces(example)))

    def num_sides(self, example: Example) -> int:
        return len(example.sequences) + (self.corrupted and len(example.sequences) > 1)
