"""The request that code is running for: set by the replica, read by handles (and by `serve.get_multiplexed_model_id`)."""

from contextvars import ContextVar


class Request:
    """What the code of a request may know of it. One per attempt."""

    __slots__ = ("children", "model_id", "ref_id")

    def __init__(self, ref_id: str, model_id: str) -> None:
        self.ref_id = ref_id
        self.model_id = model_id  # of options(multiplexed_model_id=); "" without one
        self.children: list[str] = []  # ref ids of the requests that it has sent: cancelled with it


current: ContextVar[Request | None] = ContextVar("millstream_request", default=None)
