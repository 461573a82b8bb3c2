"""CHANGELOG.md speaks of this version, in the order that we keep."""

import re

import millstream
from tests.docs import pages

CHANGELOG = pages.ROOT / "CHANGELOG.md"
ORDER = ["Breaking", "Added", "Changed", "Fixed"]


def test_newest_version_is_this_one() -> None:
    newest = re.search(r"^## (\S+)", CHANGELOG.read_text(), re.MULTILINE)

    assert newest is not None and newest[1] == millstream.__version__


def test_sections_stand_in_order() -> None:
    for version in CHANGELOG.read_text().split("\n## ")[1:]:
        sections = re.findall(r"^### (.*)$", version, re.MULTILINE)

        assert sections == [name for name in ORDER if name in sections], version.partition("\n")[0]
