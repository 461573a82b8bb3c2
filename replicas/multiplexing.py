"""`serve.multiplexed`: several models share one replica; each is loaded when it is asked for, and the oldest ones go."""

from millstream.handles.context import current


def get_multiplexed_model_id() -> str:
    """The model that the running request asks for, as its caller's `options(multiplexed_model_id=)` named it.

    "" if it named none, and outside of a request.
    """
    request = current.get()
    return "" if request is None else request.model_id
