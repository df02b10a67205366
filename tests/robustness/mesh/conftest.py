"""The mesh that most tests here run in."""

from __future__ import annotations

from tests.support.mesh_fixtures import mesh, running

__all__ = ["mesh", "running"]
