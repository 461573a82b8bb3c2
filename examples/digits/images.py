"""The images: scikit-learn's handwritten digits, what a careless scanner does to them, and how to undo that."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

Image = NDArray[np.float64]  # 8 x 8 pixels, from 0 (paper) to 16 (ink)

SIZE, INK, MIDDLE = 8, 16.0, 3.5
NOISE = 1.5
MOST_SLANT = 0.35  # pixels per row


def load_split(which: str) -> tuple[list[Image], list[int]]:
    """Half of the 1797 digits each: "train" for the model, "test" for those who ask it."""
    data = load_digits()
    train, test, train_digits, test_digits = train_test_split(
        data.images, data.target, test_size=0.5, random_state=0, stratify=data.target
    )
    images, digits = (train, train_digits) if which == "train" else (test, test_digits)
    return list(images), [int(digit) for digit in digits]


def scan_all(count: int, seed: int = 0) -> Iterator[tuple[Image, int]]:
    """`count` scans of the test digits, each with slant and noise of its own, and what they show."""
    random = np.random.default_rng(seed)
    images, digits = load_split("test")
    for i in random.integers(len(images), size=count):
        yield scan(images[i], random), digits[i]


def scan(image: Image, random: np.random.Generator) -> Image:
    """The image as it comes out of a careless scanner: slanted, and noisy."""
    slanted = shear(image, random.uniform(-MOST_SLANT, MOST_SLANT), MIDDLE, MIDDLE)
    return np.clip(slanted + random.normal(0, NOISE, image.shape), 0, INK)


def straighten(image: Image) -> Image:
    """Drop the noise, then set the digit upright and in the middle. ValueError if it is no scan."""
    if image.shape != (SIZE, SIZE):
        raise ValueError(f"a scan has {SIZE} x {SIZE} pixels, this has {' x '.join(map(str, image.shape))}")
    ink = np.where(image < 2 * NOISE, 0.0, image)
    if not ink.any():
        return ink
    y, x = np.mgrid[:SIZE, :SIZE]
    row, column = np.average(y, weights=ink), np.average(x, weights=ink)
    height = np.sum(ink * (y - row) ** 2) or 1.0  # none, and no slant either, where all ink is in one row
    slant = np.sum(ink * (y - row) * (x - column)) / height
    return shear(ink, slant, row, column)


def shear(image: Image, slant: float, row: float, column: float) -> Image:
    """Shift each line sideways: by `slant` for each line below `row`, and all so that `column` comes to the middle."""
    x = np.arange(SIZE)
    shifts = slant * (x - row) + column - MIDDLE
    return np.array([np.interp(x + shift, x, line, left=0, right=0) for line, shift in zip(image, shifts, strict=True)])
