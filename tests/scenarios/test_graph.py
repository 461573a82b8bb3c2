"""Composed applications on real processes: what is bound where, and who calls whom."""

# mypy: disable-error-code="attr-defined"
# (mypy does not apply what a class decorator returns: https://github.com/python/mypy/issues/3135)

from typing import Any

import pytest

from millstream import serve
from millstream.errors import DeploymentNotFoundError
from tests.scenarios.graphs import Chain, Dispatcher, Ping, Stages, Suffix, Visitor, exclaim, upper

pytestmark = pytest.mark.processes


def deployments(app: str = "default") -> set[str]:
    return set(serve.status().applications[app].deployments)


@pytest.mark.parametrize(
    "bind",
    [
        lambda a, b: Chain.bind(a, b),
        lambda a, b: Chain.bind(first=a, second=b),
        lambda a, b: Chain.bind([a, (b,)]),
        lambda a, b: Chain.bind({"deep": [{"er": (a, [b])}]}),
        lambda a, b: Chain.bind(Stages(a, (b,))),
        lambda a, b: Chain.bind([Stages({"x": a}, ([Stages(b)],))]),
    ],
    ids=["positional", "named", "lists", "dicts", "dataclass", "all at once"],
)
def test_nodes_are_found_wherever_they_are_bound(bind: Any) -> None:
    handle = serve.run(bind(Suffix.bind("a"), Suffix.bind("b")))

    assert handle.call("x") == "xab"
    assert handle.names.call() == ["Suffix", "Suffix_1"]
    assert deployments() == {"Chain", "Suffix", "Suffix_1"}


def test_graph_within_a_graph() -> None:
    inner = Chain.options(name="Inner").bind(Suffix.bind("a"), [Chain.options(name="Innermost").bind(Suffix.bind("b"))])

    assert serve.run(Chain.bind(inner, inner)).call("x") == "xabab"
    assert deployments() == {"Chain", "Inner", "Innermost", "Suffix", "Suffix_1"}


def test_node_shared_by_two_parents_is_one_deployment() -> None:
    shared = Suffix.bind("s")
    left, right = Chain.options(name="Left").bind(shared), Chain.options(name="Right").bind([shared])

    handle = serve.run(Chain.bind(left, {"right": right}, shared))

    assert handle.call("x") == "xsss"
    assert deployments() == {"Chain", "Left", "Right", "Suffix"}
    assert serve.get_deployment_handle("Suffix", sync=True).calls.call() == 3


def test_functions_sync_and_async_take_part() -> None:
    assert serve.run(Chain.bind(upper.bind(), exclaim.bind())).call("hey") == "HEY!"
    assert deployments() == {"Chain", "upper", "exclaim"}


def test_deployment_chooses_among_its_handles_for_each_request() -> None:
    handle = serve.run(Dispatcher.bind({"en": Suffix.bind(" please"), "de": Suffix.bind(" bitte"), "up": upper.bind()}))

    assert [handle.call(language, "tea") for language in ("en", "de", "up", "en")] == [
        "tea please", "tea bitte", "TEA", "tea please",
    ]  # fmt: skip
    assert handle.by_ref.call("de", "Tee") == "Tee bitte"


def test_options_after_the_decorator_count() -> None:
    renamed = Suffix.options(name="Ending", num_replicas=2, max_ongoing_requests=3, max_attempts=1)

    handle = serve.run(Chain.options(name="Front").bind(renamed.bind("a"), renamed.bind("b"), Suffix.bind("c")))

    assert handle.call("x") == "xabc"
    assert deployments() == {"Front", "Ending", "Ending_1", "Suffix"}
    targets = {n: d.target_replicas for n, d in serve.status().applications["default"].deployments.items()}
    assert targets == {"Front": 1, "Ending": 2, "Ending_1": 2, "Suffix": 1}


@pytest.mark.parametrize("method", ["by_app", "by_name", "in_a_thread"])
def test_deployment_calls_another_application_by_its_name(method: str) -> None:
    serve.run(Suffix.bind("!"), name="other")
    handle = serve.run(Visitor.bind("other", "Suffix"))

    assert handle.options(method_name=method).call("x") == "x!"


def test_lookup_inside_a_deployment_is_fast() -> None:
    handle = serve.run(Visitor.bind("default", "Visitor"))

    assert min(handle.how_long_a_lookup_takes.call() for _ in range(5)) < 0.05


def test_applications_call_each_other_back_and_forth() -> None:
    one = serve.run(Ping.bind("two"), name="one")
    serve.run(Ping.bind("one"), name="two")

    assert one.call(6) == ["two", "one"] * 3
    assert [one.call(n) for n in range(4)] == [[], ["two"], ["two", "one"], ["two", "one", "two"]]


def test_deleting_one_application_leaves_the_other() -> None:
    other = serve.run(Suffix.bind("!"), name="other")
    visitor = serve.run(Visitor.bind("other", "Suffix"))
    assert visitor.by_app.call("x") == "x!"

    serve.delete("default")
    assert other.call("x") == "x!"
    serve.run(Visitor.bind("other", "Suffix"))
    serve.delete("other")

    for method in ("by_app", "by_name", "in_a_thread"):
        with pytest.raises(DeploymentNotFoundError, match="other"):
            visitor.options(method_name=method).call("x")
    assert set(serve.status().applications) == {"default"}
