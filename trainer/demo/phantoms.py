"""Findings and the chest phantom that shows them: grey pictures drawn from numbers, the same for the same seed."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 64, 96  # pixels; with patches of 8 px merged 2 x 2 a zone is exactly 2 x 2 visual tokens
KINDS = ("nodule", "mass", "cavity")
SIDES = ("right", "left")
LEVELS = ("upper", "middle", "lower")
ZONES = tuple((side, level) for side in SIDES for level in LEVELS)
NOISE = 0.08  # standard deviation of the grain; the whole grey scale is 1


@dataclass(frozen=True, order=True)
class Finding:
    """One lesion: its kind and the zone it lies in."""

    kind: str
    side: str
    level: str

    def __str__(self) -> str:
        return f"{self.kind} {self.side} {self.level}"


def zone_order(finding: Finding) -> int:
    """Reading order of a chest film: the patient's right side from the top down, then the left."""
    return ZONES.index((finding.side, finding.level))


def draw(findings: tuple[Finding, ...], seed: int, noise: float = NOISE) -> Image.Image:
    """Draw a frontal chest phantom, `WIDTH` x `HEIGHT` px, mode L.

    Laterality is radiological: the viewer faces the patient, so the patient's right lung is on the left of the picture
    (and the heart's bulge on the right of it).
    """
    rng = np.random.default_rng([seed, 1])  # its own stream: what a case says never depends on how it is drawn
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH] + 0.5
    grey = np.full((HEIGHT, WIDTH), rng.uniform(0.50, 0.60))
    for centre in (0.27, 0.73):
        grey -= 0.35 * _disc(x, y, centre * WIDTH, 0.5 * HEIGHT, 0.20 * WIDTH, 0.46 * HEIGHT, edge=0.08)
    grey += 0.12 * _disc(x, y, 0.56 * WIDTH, 0.64 * HEIGHT, 0.14 * WIDTH, 0.16 * HEIGHT, edge=0.2)
    grey += 0.03 * np.cos(2 * np.pi * (y - 0.25 * np.abs(x - WIDTH / 2) + rng.uniform(0, 12)) / 12)  # ribs
    for finding in findings:
        row, column = LEVELS.index(finding.level), SIDES.index(finding.side)
        centre_x = (0.27 + 0.46 * column) * WIDTH + rng.uniform(-4, 4)
        centre_y = (row + 0.5) * HEIGHT / 3 + rng.uniform(-8, 8)
        grey += rng.uniform(0.8, 1.2) * _lesion(finding.kind, x, y, centre_x, centre_y, rng.uniform(-1, 1))
    grey += noise * rng.standard_normal(grey.shape)
    return Image.fromarray((grey.clip(0, 1) * 255).astype(np.uint8), mode="L")


def _lesion(kind: str, x: np.ndarray, y: np.ndarray, centre_x: float, centre_y: float, size: float) -> np.ndarray:
    """Added brightness of one lesion, (HEIGHT, WIDTH); `size` in -1..1 spans the radii of its kind."""
    if kind == "nodule":
        radius = 3.0 + 0.5 * size
        return 0.40 * _disc(x, y, centre_x, centre_y, radius, radius, edge=0.3)
    radius = 6.5 + size
    solid = 0.35 * _disc(x, y, centre_x, centre_y, radius, radius, edge=0.2)
    if kind == "mass":
        return solid
    return solid - 0.35 * _disc(x, y, centre_x, centre_y, 0.6 * radius, 0.6 * radius, edge=0.2)


def _disc(
    x: np.ndarray, y: np.ndarray, centre_x: float, centre_y: float, radius_x: float, radius_y: float, edge: float
) -> np.ndarray:
    """A filled ellipse: 1 inside, 0 outside, with a soft rim of relative width `edge`."""
    distance = np.hypot((x - centre_x) / radius_x, (y - centre_y) / radius_y)
    return ((1 - distance) / edge + 0.5).clip(0, 1)
