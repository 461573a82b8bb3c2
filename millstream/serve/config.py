"""Where Ray Serve keeps its settings."""

from types import SimpleNamespace

from millstream.config import AutoscalingConfig, DeploymentConfig


class HTTPOptions(SimpleNamespace):
    """Taken by `serve.start(http_options=)`, and without effect: nothing here listens for HTTP."""


__all__ = ["AutoscalingConfig", "DeploymentConfig", "HTTPOptions"]
