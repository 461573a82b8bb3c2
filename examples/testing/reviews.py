"""Rates product reviews: the application that the tests beside it test."""

import asyncio
import json
from pathlib import Path

from millstream import DeploymentHandle, serve

WEIGHTS = Path("/models/reviews.json")  # not on the machine where the tests run


class Model:
    """Stands for what takes long to load, and time to compute."""

    def __init__(self, weights: dict[str, float]) -> None:
        self.weights = weights

    def predict(self, words: list[str]) -> float:
        return sum(self.weights.get(word, 0.0) for word in words) / len(words)


def load_model(path: Path) -> Model:
    return Model(json.loads(path.read_text()))


@serve.deployment
class Clean:
    """Turns a review into its words."""

    async def __call__(self, text: str) -> list[str]:
        return [word.strip(".,!") for word in text.lower().split()]


@serve.deployment(max_ongoing_requests=4)
class Rate:
    """Holds the model."""

    def __init__(self, path: Path) -> None:
        self.model = load_model(path)

    def __call__(self, words: list[str]) -> float:
        if not words:
            raise ValueError("a review without words")
        return self.model.predict(words)


@serve.deployment
class Reviews:
    """What clients call."""

    def __init__(self, clean: DeploymentHandle, rate: DeploymentHandle) -> None:
        self.clean, self.rate = clean, rate

    async def __call__(self, text: str) -> float:
        words = self.clean.remote(text)  # not awaited: `rate` waits for its value
        rating: float = await self.rate.call(words)
        return rating

    async def best(self, texts: list[str]) -> str:
        """The review with the highest rating; all of them are rated at the same time."""
        ratings = await asyncio.gather(*[self(text) for text in texts])
        return max(zip(ratings, texts, strict=True))[1]


app = Reviews.bind(Clean.bind(), Rate.bind(WEIGHTS))
