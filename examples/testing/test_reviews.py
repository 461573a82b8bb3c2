"""How an application is tested: the fixture `serve_local` comes with millstream, and serves in this process."""

import asyncio
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from examples.testing import reviews
from examples.testing.reviews import Clean, Model, Rate, Reviews
from millstream import TaskError, serve
from millstream.errors import DeployFailedError
from millstream.pytest_plugin import ServeLocal

TEXTS = ["A GREAT talk, good food!", "Bad.", "so so"]


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test loads the real one. The replica looks `load_model` up in this process: patching it is enough."""
    model = Model({"great": 1.0, "good": 1.0, "bad": -1.0})
    monkeypatch.setattr(reviews, "load_model", lambda path: model)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# the whole application


def test_review_is_rated(serve_local: ServeLocal) -> None:
    handle = serve_local(reviews.app)

    assert handle.call("A GREAT talk, good food!") == pytest.approx(0.4)
    assert list(handle.map(["good", "bad"])) == [1.0, -1.0]


@pytest.mark.anyio
async def test_best_review_is_found(serve_local: ServeLocal) -> None:
    handle = await serve_local.run_async(reviews.app)

    assert await handle.best.call(TEXTS) == TEXTS[0]


# errors


def test_error_of_the_second_deployment_reaches_the_caller_of_the_first(serve_local: ServeLocal) -> None:
    handle = serve_local(reviews.app)

    with pytest.raises(ValueError, match="without words") as caught:
        handle.call("")

    assert isinstance(caught.value, TaskError)  # both: what was raised, and that it was raised elsewhere


def test_model_that_is_not_there_is_told_when_it_is_deployed(
    serve_local: ServeLocal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reviews, "load_model", mock.Mock(side_effect=FileNotFoundError("no weights")))

    with pytest.raises(DeployFailedError, match="FileNotFoundError: no weights"):
        serve_local(reviews.app)


# one deployment, the others replaced


def test_model_gets_the_words(serve_local: ServeLocal) -> None:
    predict = mock.Mock(return_value=0.5)
    handle = serve_local(Rate.bind(Path("anywhere")))

    with mock.patch.object(Model, "predict", predict):
        assert handle.call(["a", "talk"]) == 0.5

    predict.assert_called_once_with(["a", "talk"])


def test_ingress_without_its_model(serve_local: ServeLocal) -> None:
    rate = mock.AsyncMock(return_value=0.9)
    fake: serve.Deployment[Any] = serve.deployment(name="Rate")(rate)

    assert serve_local(Reviews.bind(Clean.bind(), fake.bind())).call("Nice.") == 0.9

    rate.assert_awaited_once_with(["nice"])


# concurrency, without a clock


def test_all_reviews_are_rated_at_the_same_time(serve_local: ServeLocal) -> None:
    all_here = asyncio.Barrier(len(TEXTS))

    @serve.deployment(name="Rate")
    async def rate(words: list[str]) -> int:
        await all_here.wait()  # one after the other, the first would wait for ever
        return len(words)

    handle = serve_local(Reviews.bind(Clean.bind(), rate.bind()))

    assert handle.best.options(timeout_s=30).call(TEXTS) == TEXTS[0]
