"""Arguments of Ray's that make a difference with real processes."""

# mypy: disable-error-code="attr-defined"

import pytest

from millstream import serve
from millstream.errors import DeployFailedError
from tests.scenarios.apps import Adder, Broken
from tests.scenarios.processes import wait_for

pytestmark = pytest.mark.processes


def test_run_that_does_not_block_returns_before_the_application_serves() -> None:
    handle = serve.run(Adder.bind(1), _blocking=False)

    assert handle.call(1) == 2  # the request waits for a replica


def test_failure_of_what_run_did_not_wait_for_is_told_by_status_and_to_callers() -> None:
    handle = serve.run(Broken.bind("no"), _blocking=False)

    wait_for(lambda: serve.status().applications["default"].status == "DEPLOY_FAILED")
    with pytest.raises(DeployFailedError):
        handle.call()
