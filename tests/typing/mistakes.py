"""What mypy with our plugin reports. After `# E:` stands a part of the message; test_checkers.py compares."""

from collections.abc import AsyncIterator

from millstream import DeploymentHandle, SyncHandle, serve
from tests.typing import methods


@serve.deployment
class Model:
    async def __call__(self, x: int, *, scale: float = 1.0) -> float:
        return x * scale

    async def words(self, text: str) -> AsyncIterator[str]:
        yield text

    @serve.batch
    async def lengths(self, texts: list[str]) -> list[int]:
        return [len(text) for text in texts]


class Silent:
    """Has no `__call__`."""


@serve.deployment(num_replicas=2)
class Front:
    def __init__(self, model: DeploymentHandle[Model], limits: list[int], more: list[DeploymentHandle]) -> None: ...

    async def __call__(self) -> str:
        return ""


@serve.deployment
def double(x: int) -> int:
    return 2 * x


async def of_requests(model: DeploymentHandle[Model], front: DeploymentHandle[Front]) -> None:
    model.call("3")  # E: Argument 1 to "call" of "DeploymentHandle" has incompatible type "str"; expected "int | Obj
    model.remote(3, scale="2")  # E: Argument "scale" to "remote" of "DeploymentHandle" has incompatible type "str"
    model.remote()  # E: Missing positional argument "x" in call to "remote" of "DeploymentHandle"
    model.remote(3, 2.0)  # E: Too many positional arguments for "remote" of "DeploymentHandle"
    model.call(3, size=2)  # E: Unexpected keyword argument "size" for "call" of "DeploymentHandle"
    model.call(front.remote())  # E: type "RefTask[str]"; expected "int | ObjectRef[int] | RefTask[int]"
    model.call(model.call(3))  # E: type "Future[float]"; expected "int | ObjectRef[int] | RefTask[int]"
    model.map(["3"])  # E: List item 0 has incompatible type "str"
    await model.call(3) + "x"  # E: Unsupported operand types for + ("float" and "str")


async def of_methods(model: DeploymentHandle[Model], blocking: SyncHandle[Model]) -> None:
    model.word.stream("a")  # E: "Model" has no attribute "word"; maybe "words"?
    model.words.stream(3)  # E: Argument 1 to "stream" of "DeploymentHandle" has incompatible type "int"
    model.stream(3)  # E: Invalid self argument "DeploymentHandle[Model]" to attribute function "stream"
    model.lengths.call(["a"])  # E: type "list[str]"; expected "str | ObjectRef[str] | RefTask[str]"
    model.words("a")  # E: not callable
    blocking.words.stream(3)  # E: Argument 1 to "stream" of "SyncHandle" has incompatible type "int"
    blocking.wrods.call("a")  # E: "Model" has no attribute "wrods"


async def of_kinds(silent: DeploymentHandle[Silent]) -> None:
    silent.call()  # E: Invalid self argument "DeploymentHandle[Silent]"  # E: "Silent" not callable
    serve.run(Model)  # E: Argument 1 to "run" has incompatible type "type[Model]"
    double(3)  # E: not callable
    Model.unbind()  # E: "type[Model]" has no attribute "unbind"


def of_nodes() -> None:
    Front.bind(Model.bind(), [1], [Model.bind(), double.bind()])
    Front.bind(serve.get_deployment_handle("Model"), [], more=[])
    Front.bind(double.bind(), [1], [])  # E: expected "DeploymentHandle[Model] | Application[Model]"
    Front.options(num_replicas=2).bind(Model.bind(), ["1"], [])  # E: List item 0 has incompatible type "str"
    Front.bind(Model.bind())  # E: Missing positional arguments "limits", "more" in call to "bind" of "Deployment"
    Model.bind(3)  # E: Too many arguments for "bind" of "Deployment"
    double.bind(3)  # E: Too many arguments for "bind" of "Deployment"


def of_classes_elsewhere(model: SyncHandle[methods.Model]) -> None:
    """Mypy may know them from its cache only."""
    methods.Front.bind(methods.Derived.bind())  # E: expected "DeploymentHandle[Model] | Application[Model]"
    model.predict.call(3)  # E: expected "str | ObjectRef[str] | RefTask[str]"
    model.lengths.call("abc", "1")  # E: Argument 2 to "call" of "SyncHandle" has incompatible type "str"
