"""`@serve.deployment`, `.bind()` and the graph they make: values, checked when they are made."""

import collections
import dataclasses
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest

from millstream import serve
from millstream.broker.definitions import has_async_methods
from millstream.config import AutoscalingConfig, DeploymentConfig
from millstream.deployment import Application, Deployment, Node, compile_graph
from millstream.errors import ConfigError
from millstream.handles.handle import DeploymentHandle


class LeafClass:
    """Serves nobody in particular."""

    def __init__(self, size: int = 1, *, name: str = "") -> None:
        self.size, self.name = size, name

    def __call__(self) -> int:
        return self.size


class OuterClass:
    def __init__(self, *inner: Any, **named: Any) -> None:
        pass

    async def __call__(self) -> None:
        pass


@serve.deployment
def function(x: int) -> int:
    return x


# Not as decorators: some tests are about the classes themselves.
Leaf = serve.deployment(name="Leaf")(LeafClass)
Outer = serve.deployment(name="Outer")(OuterClass)


@dataclass(frozen=True)
class Settings:
    model: Any
    size: int = 1
    derived: Any = field(init=False, default=None)


class Pair(NamedTuple):
    left: Any
    right: Any


def names(application: Application) -> list[str]:
    return [node.name for node in compile_graph(application, "app")]


def handle(name: str) -> DeploymentHandle:
    return DeploymentHandle(name, "app")


# the decorator


def test_decorator_is_bare_or_takes_options() -> None:
    class Model:
        pass

    bare, with_options = serve.deployment(Model), serve.deployment(name="other", num_replicas=2)(Model)

    assert (bare.name, bare.config, bare.func_or_class) == ("Model", DeploymentConfig(), Model)
    assert (with_options.name, with_options.config.num_replicas) == ("other", 2)


def test_deployment_keeps_docstring_and_module() -> None:
    assert Leaf.__doc__ == "Serves nobody in particular."
    assert Leaf.__module__ == __name__
    assert repr(Leaf) == "Deployment(name='Leaf')"


@pytest.mark.parametrize(
    ("target", "complaint"),
    [(3, "takes a class or a function, not int"), (Leaf, "is a deployment already"), ("Model", "not str")],
)
def test_what_cannot_be_served_is_refused(target: Any, complaint: str) -> None:
    with pytest.raises(TypeError, match=complaint):
        serve.deployment()(target)


@pytest.mark.parametrize("name", ["a b", "a.b", "a:b", "", "{x}", "é", 3])
def test_name_that_cannot_be_part_of_a_key_is_refused(name: Any) -> None:
    if name == "":
        assert Leaf.options(name=name).name == "Leaf"
        return
    with pytest.raises(ConfigError, match="must consist of letters, digits"):
        serve.deployment(name=name)(function.func_or_class)
    with pytest.raises(ConfigError, match="must consist of letters, digits"):
        Leaf.options(name=name)


def test_lambda_needs_a_name() -> None:
    with pytest.raises(ConfigError, match="'<lambda>' must consist of"):
        serve.deployment(lambda x: x)
    assert serve.deployment(name="double")(lambda x: 2 * x).name == "double"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_replicas": -1}, "num_replicas=-1 must be at least 0"),
        ({"max_ongoing": 3}, "unknown option 'max_ongoing'; known are num_replicas"),
        ({"max_ongoing_requests": 0}, "max_ongoing_requests=0 must be at least 1"),
        ({"autoscaling_config": {"min_replicas": 3, "max_replicas": 2}}, "max_replicas=2 is below min_replicas=3"),
        ({"num_replicas": 2, "autoscaling_config": {}}, "num_replicas=2 and autoscaling_config exclude each other"),
        ({"start_method": "thread"}, "start_method='thread' is unknown"),
    ],
)
@pytest.mark.parametrize("make", [lambda **o: serve.deployment(**o)(LeafClass), Leaf.options])
def test_option_that_makes_no_sense_is_refused_by_name_and_value(
    make: Callable[..., Any], options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make(**options)


def test_options_make_a_copy_with_what_they_name() -> None:
    changed = Leaf.options(num_replicas=3).options(name="Big", max_concurrent_queries=7)

    assert (changed.name, changed.config.num_replicas, changed.config.max_ongoing_requests) == ("Big", 3, 7)
    assert changed.func_or_class is Leaf.func_or_class is LeafClass
    assert (Leaf.name, Leaf.config) == ("Leaf", DeploymentConfig())


def test_auto_is_autoscaling() -> None:
    assert Leaf.options(num_replicas="auto").config.autoscaling == AutoscalingConfig(min_replicas=1, max_replicas=100)


def test_calling_a_deployment_says_what_to_do_instead() -> None:
    with pytest.raises(RuntimeError, match=r"deploy it with serve\.run\(Leaf\.bind\(\.\.\.\)\)"):
        Leaf(3)  # type: ignore[operator]


# bind


def test_bind_has_no_side_effects_and_makes_a_new_node_each_time() -> None:
    first, second = Leaf.bind(), Leaf.bind()

    assert first != second and len({first, second, first}) == 2
    assert repr(first) == "Application('Leaf')"


@pytest.mark.parametrize(
    ("args", "kwargs", "complaint"),
    [
        ((1, 2), {}, r"Leaf\.bind\(\): too many positional arguments"),
        ((), {"colour": "red"}, r"Leaf\.bind\(\): got an unexpected keyword argument 'colour'"),
    ],
)
def test_arguments_that_do_not_fit_the_constructor_are_refused_at_bind(args: Any, kwargs: Any, complaint: str) -> None:
    with pytest.raises(TypeError, match=complaint):
        Leaf.bind(*args, **kwargs)


def test_function_is_bound_without_arguments() -> None:
    assert names(function.bind()) == ["function"]
    with pytest.raises(TypeError, match="is a function: bind\\(\\) takes no arguments"):
        function.bind(3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("target", "hint"), [(Leaf, "not Deployment; write .bind\\(\\) after it"), (3, "not int"), (None, "not NoneType")]
)
def test_what_is_not_bound_cannot_be_run(target: Any, hint: str) -> None:
    with pytest.raises(TypeError, match=hint):
        compile_graph(target, "app")
    with pytest.raises(TypeError, match=hint):
        serve.run(target)


# graphs


def test_ingress_comes_first_and_callers_before_what_they_call() -> None:
    leaf = Leaf.bind()

    assert names(Outer.bind(Outer.options(name="Middle").bind(leaf), function.bind())) == [
        "Outer", "Middle", "function", "Leaf",
    ]  # fmt: skip


def test_same_class_bound_twice_is_two_deployments() -> None:
    outer, first, second, third = compile_graph(Outer.bind(Leaf.bind(1), Leaf.bind(2), Leaf.bind(3)), "app")

    assert [node.name for node in (outer, first, second, third)] == ["Outer", "Leaf", "Leaf_1", "Leaf_2"]
    assert outer.args == (handle("Leaf"), handle("Leaf_1"), handle("Leaf_2"))
    assert [node.args for node in (first, second, third)] == [(1,), (2,), (3,)]


def test_same_node_bound_twice_is_one_deployment() -> None:
    leaf = Leaf.bind()

    outer, _ = compile_graph(Outer.bind(leaf, again=leaf), "app")

    assert (outer.args, outer.kwargs) == ((handle("Leaf"),), {"again": handle("Leaf")})


def test_diamond_shares_its_bottom() -> None:
    bottom = Leaf.bind()
    top = Outer.bind(Outer.options(name="Left").bind(bottom), Outer.options(name="Right").bind(bottom))

    nodes = {node.name: node for node in compile_graph(top, "app")}

    assert set(nodes) == {"Outer", "Left", "Right", "Leaf"}
    assert nodes["Left"].args == nodes["Right"].args == (handle("Leaf"),)


def test_automatic_name_does_not_take_one_that_was_given() -> None:
    application = Outer.bind(Leaf.options(name="Leaf_1").bind(), Leaf.bind(), Leaf.bind())

    assert names(application) == ["Outer", "Leaf_1", "Leaf", "Leaf_2"]


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda x: [x], lambda v: v[0]),
        (lambda x: (x, 1), lambda v: v[0]),
        (lambda x: {"a": {"b": [x]}}, lambda v: v["a"]["b"][0]),
        (lambda x: {x}, lambda v: next(iter(v))),
        (lambda x: frozenset([x]), lambda v: next(iter(v))),
        (lambda x: Pair(1, x), lambda v: v.right),
        (lambda x: Settings([x]), lambda v: v.model[0]),
        (lambda x: collections.OrderedDict(a=x), lambda v: v["a"]),
        (lambda x: collections.defaultdict(list, a=[x]), lambda v: v["a"][0]),
    ],
)
def test_node_is_found_in_containers_and_dataclasses_at_any_depth(
    wrap: Callable[[Any], Any], unwrap: Callable[[Any], Any]
) -> None:
    bound = wrap(Leaf.bind())

    outer, leaf = compile_graph(Outer.bind(bound), "app")

    assert leaf.name == "Leaf"
    assert type(outer.args[0]) is type(bound)
    assert unwrap(outer.args[0]) == handle("Leaf")


@dataclass
class Checked:
    """Looks at its fields when it is made."""

    model: Any

    def __post_init__(self) -> None:
        assert isinstance(self.model, Application | DeploymentHandle)


def test_dataclass_that_checks_its_fields_is_made_with_the_handle_only() -> None:
    outer, _ = compile_graph(Outer.bind(Checked(Leaf.bind())), "app")

    assert outer.args[0].model == handle("Leaf")


class OwnList(list[int]):
    def __init__(self, a: int, b: int) -> None:
        super().__init__([a, b])


class OwnDict(dict[str, int]):
    pass


@dataclass
class Plain:
    items: list[int]
    seed: dataclasses.InitVar[int] = 0

    def __post_init__(self, seed: int) -> None:
        self.rng = seed


@pytest.mark.parametrize(
    "value",
    [
        OwnList(1, 2), OwnDict(a=1), collections.defaultdict(list, a=[1]), collections.Counter("aab"),
        collections.OrderedDict(b=1, a=2), Pair(1, 2), Plain([1], seed=3), Settings(1), {1, 2}, Plain, [[1], {"a": (2,)}],
    ],
)  # fmt: skip
def test_argument_without_nodes_is_passed_on_as_it_is(value: Any) -> None:
    (node,) = compile_graph(Outer.bind(value, named=value), "app")

    assert node.args[0] is value and node.kwargs["named"] is value


def test_node_that_was_not_found_says_why_it_is_no_handle() -> None:
    class Holder:
        def __init__(self, node: Any) -> None:
            self.node = node

    (outer,) = compile_graph(Outer.bind(Holder(Leaf.bind())), "app")
    hidden = pickle.loads(pickle.dumps(outer.args[0].node))

    with pytest.raises(AttributeError, match=r"Application\('Leaf'\) is a node of a graph and no handle"):
        hidden.remote(1)
    with pytest.raises(AttributeError, match="no attribute 'size'"):
        _ = hidden.size


def test_handles_are_of_the_application() -> None:
    outer, _ = compile_graph(Outer.bind(Leaf.bind()), "other")

    assert outer.args[0].app_name == "other"


# how many at once


@pytest.mark.parametrize(
    ("deployment", "expected"),
    [
        (Outer, 100),
        (Leaf, 1),
        (Leaf.options(sync_threads=4), 4),
        (Leaf.options(sync_threads=4, max_ongoing_requests=9), 9),
        (function, 1),
        (serve.deployment(name="f")(has_async_methods), 1),
    ],
)
def test_number_of_ongoing_requests_is_settled_at_deployment(deployment: Deployment, expected: int) -> None:
    node = Node(deployment.name, deployment, (), {})

    assert node.config.max_ongoing_requests == expected


def test_class_is_async_if_one_public_method_is() -> None:
    class Private:
        async def _load(self) -> None: ...

    class Inherits(OuterClass):
        pass

    class Static:
        @staticmethod
        async def run() -> None: ...

    async def coroutine() -> None: ...

    assert [has_async_methods(t) for t in (Private, Inherits, Static, coroutine, len)] == [
        False, True, True, True, False,
    ]  # fmt: skip
