"""The arithmetic of the demo."""

import numpy as np

from examples.digits.day import arrivals_s
from examples.digits.images import load_split, scan_all, straighten


def test_arrivals_fill_the_day_and_peak_at_noon() -> None:
    arrivals = arrivals_s(1000, 24.0)

    assert len(arrivals) == 1000
    assert (np.diff(arrivals) > 0).all()
    assert arrivals[0] > 0 and arrivals[-1] < 24
    morning, noon, evening = np.histogram(arrivals, bins=3, range=(0, 24))[0]
    assert noon > 2 * morning and abs(morning - evening) <= 2


def test_a_straightened_scan_is_closer_to_the_straightened_original() -> None:
    originals = {digit: image for image, digit in zip(*load_split("test"), strict=True)}
    scans = list(scan_all(50))

    def distance(image: np.ndarray, other: np.ndarray) -> float:
        return float(np.linalg.norm(image - other))

    closer = [distance(straighten(scan), straighten(originals[digit])) for scan, digit in scans]
    further = [distance(scan, originals[digit]) for scan, digit in scans]
    assert np.mean(closer) < np.mean(further)
