"""Reads scanned digits: two steps composed into one application.

    Digits ──┬── Straighten     light: on the event loop, many at a time
             └── Classify       heavy: in a thread, one at a time, on as many replicas as it takes

`make demo` puts it to work; `millstream run examples.digits.app:app` serves it.
"""

import numpy as np
from sklearn.ensemble import ExtraTreesClassifier

from examples.digits.images import Image, load_split, straighten
from millstream import DeploymentHandle, serve

# No replica while there is nothing to do. The default delay is five minutes; three seconds, so that a demo shows it.
FROM_ZERO = {"min_replicas": 0, "downscale_delay_s": 3}


@serve.deployment(autoscaling_config={**FROM_ZERO, "max_replicas": 1})
class Straighten:
    """Step 1: take out what the scanner put in. Numpy needs 0.1 ms for it, too little to leave the event loop for."""

    async def __call__(self, scan: Image) -> Image:
        return straighten(np.asarray(scan, dtype=float))  # lists of lists, where the caller speaks JSON


@serve.deployment(autoscaling_config={**FROM_ZERO, "max_replicas": 4})
class Classify:
    """Step 2: say which digit it is.

    The constructor trains the model, once per replica, in a third of a second. A forest asks every one of its trees:
    some 5 ms of honest work for each image, so a busy day takes several replicas.
    """

    def __init__(self, trees: int) -> None:
        images, digits = load_split("train")
        self._forest = ExtraTreesClassifier(trees, random_state=0)
        self._forest.fit([straighten(image).ravel() for image in images], digits)

    def __call__(self, image: Image) -> int:
        return int(self._forest.predict([image.ravel()])[0])


# It only waits for the others: it may hold many requests at once, and when it has to go, it has little to finish.
@serve.deployment(
    max_ongoing_requests=1000, graceful_shutdown_timeout_s=5, autoscaling_config={**FROM_ZERO, "max_replicas": 1}
)
class Digits:
    """What callers see: a scan in, a digit out."""

    def __init__(self, straighten: DeploymentHandle, classify: DeploymentHandle) -> None:
        self._straighten, self._classify = straighten, classify

    async def __call__(self, scan: Image) -> int:
        straight = self._straighten.remote(scan)  # not awaited: the image goes from replica to replica, not through us
        digit: int = await self._classify.call(straight)
        return digit


app = Digits.bind(Straighten.bind(), Classify.bind(trees=30))
