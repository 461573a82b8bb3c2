"""Where Ray Serve keeps its handles: `from ray.serve.handle import DeploymentHandle` ports by its first word.

Names that have no class of their own here stand for what they correspond to. There are two handles, one for code that
blocks and one for code on an event loop; what Ray calls a response is the ref itself.
"""

from millstream.handles.handle import DeploymentHandle, SyncHandle
from millstream.handles.ref import ObjectRef
from millstream.handles.streaming import AsyncStream

RayServeHandle = DeploymentHandle
RayServeDeploymentHandle = DeploymentHandle  # what a deployment gets for a node in its arguments
RayServeSyncHandle = SyncHandle  # what serve.run returns
DeploymentResponse = ObjectRef  # awaited, asked for its result(timeout_s=), cancelled, passed on
DeploymentResponseGenerator = AsyncStream  # for a SyncHandle it is `Stream`, with the same meaning for `for`

__all__ = [
    "DeploymentHandle",
    "DeploymentResponse",
    "DeploymentResponseGenerator",
    "RayServeDeploymentHandle",
    "RayServeHandle",
    "RayServeSyncHandle",
    "SyncHandle",
]
