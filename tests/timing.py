"""Upper limits on wall time, on machines that others use as well."""

import pytest

# One of several tries within the limit shows that the code can do it; a machine that stands still for a second shows
# nothing. What a limit guards against (a fallback that looks once a second, a growing delay) is late every time.
timed = pytest.mark.flaky(reruns=4)
