"""How pytest-xdist spreads the suite over its workers."""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling

TOGETHER = ("tests/integration/local/", "tests/integration/platform/")
"""Folders whose tests share what is started once a session."""


class ByFile(LoadScopeScheduling):
    """A file is what one worker runs, in its order; so are the folders of `TOGETHER`."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return next((folder for folder in TOGETHER if file.startswith(folder)), file)
