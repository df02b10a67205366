"""Why a call goes where it goes: Envoy's decisions, evaluated on the configuration that Envoy is given."""

from mlmesh_local.explain.evaluate import Call, explain
from mlmesh_local.explain.expect import FACTS, unmet
from mlmesh_local.explain.scene import Scene
from mlmesh_local.explain.values import SCHEMA, Explanation, document

__all__ = ["FACTS", "SCHEMA", "Call", "Explanation", "Scene", "document", "explain", "unmet"]
