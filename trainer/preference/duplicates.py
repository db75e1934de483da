"""What is nearly the same: images by perceptual hash, texts by the words in a row that they share."""

from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from PIL import Image

HASH_SIDE = 16  # of the grid of frequencies: 256 bits
ALIKE_BITS = 24
"""Bits that may differ between pictures that look alike. Measured: chest films scaled by half or two, made brighter or
JPEG of quality 60 differ from themselves in up to 8, phantoms in up to 12; the nearest two different ones of 76 films,
292 blood smears and 300 phantoms in 54, 24 and 46."""
ALIKE_TEXT = 0.9
BLOCK = 1024  # rows that are compared with all before them at a time


def perceptual_hash(image: Image.Image) -> np.ndarray:
    """(4,) uint64: the signs of a picture's low frequencies against their median (`imagehash.phash`)."""
    from imagehash import phash

    return np.packbits(phash(image, hash_size=HASH_SIDE).hash).view(np.uint64)


def alike_images(hashes: np.ndarray, most_bits: int = ALIKE_BITS) -> Iterator[tuple[int, int, int]]:
    """Yield (image, the earlier image most like it, bits that differ) for every image that has one so near.

    Args:
        hashes: (N, 4) uint64, of `perceptual_hash`.
        most_bits: that may differ.
    """
    for image in range(1, len(hashes)):
        bits = np.bitwise_count(hashes[:image] ^ hashes[image]).sum(axis=1)
        nearest = int(bits.argmin())
        if bits[nearest] <= most_bits:
            yield image, nearest, int(bits[nearest])


def alike_texts(
    texts: Sequence[str], groups: Sequence[Hashable], least: float = ALIKE_TEXT
) -> Iterator[tuple[int, int, float]]:
    """Yield (text, an earlier text of its group, their similarity) for every two that are so near, in order of texts.

    The similarity is the cosine of the counts of one, two and three words in a row, rare ones counting more (tf-idf):
    what all texts share by their template counts least. Every text is compared with all before it.

    Args:
        texts: N texts.
        groups: only texts of an equal one are compared.
        least: similarity, 1 for the same words in the same order.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not any(any(map(str.isalnum, text)) for text in texts):
        return
    weights = TfidfVectorizer(ngram_range=(1, 3), token_pattern=r"\w+", dtype=np.float32).fit_transform(texts)
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    group = np.array([numbers[name] for name in groups])
    for start in range(0, len(texts), BLOCK):
        found = (weights[start : start + BLOCK] @ weights[: start + BLOCK].T).tocoo()
        row, column = found.row + start, found.col
        near = (found.data >= least) & (column < row) & (group[row] == group[column])
        order = np.lexsort((column[near], row[near]))
        triples = (row[near][order], column[near][order], found.data[near][order])
        yield from zip(*(part.tolist() for part in triples), strict=True)
