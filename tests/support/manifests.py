"""The YAML of the platform as Python values, and as much of kustomize as its overlays use.

`render` is checked against the real kustomize where that exists (tests/contract/manifests/test_overlays.py); anything
that it does not know is an error.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any, cast

import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
BASE = ROOT / "manifests" / "base"
ISTIO = ROOT / "mesh" / "istio"
OVERLAYS = ROOT / "manifests" / "overlays"

Document = dict[str, Any]

_KNOWN = {"apiVersion", "kind", "resources", "namespace", "labels", "images", "patches"}


def load(path: Path) -> list[Document]:
    """The documents of a file, in order."""
    return [cast(Document, d) for d in yaml.safe_load_all(path.read_text()) if d is not None]


def documents(folder: Path) -> list[Document]:
    """The documents of a kustomize folder as they are written, without what the kustomization changes."""
    kustomization = load(folder / "kustomization.yaml")[0]
    return [d for name in kustomization["resources"] for d in load(folder / name)]


def of_kind(docs: list[Document], kind: str) -> dict[str, Document]:
    """Documents of one kind by name."""
    return {d["metadata"]["name"]: d for d in docs if d["kind"] == kind}


def containers(deployment: Document) -> list[Document]:
    """The containers of a Deployment's pods."""
    return cast(list[Document], deployment["spec"]["template"]["spec"]["containers"])


def render(folder: Path) -> list[Document]:
    """What `kubectl apply -k folder` would apply."""
    kustomization = load(folder / "kustomization.yaml")[0]
    unknown = set(kustomization) - _KNOWN
    if unknown:
        raise ValueError(f"{folder}: render does not know {sorted(unknown)}")
    docs: list[Document] = []
    for name in kustomization["resources"]:
        path = folder / name
        docs += render(path) if path.is_dir() else copy.deepcopy(load(path))
    for doc in docs:
        for label in kustomization.get("labels", []):
            doc["metadata"].setdefault("labels", {}).update(label["pairs"])
        for image in kustomization.get("images", []):
            _retag(doc, image)
        for patch in kustomization.get("patches", []):
            if _targets(patch["target"], doc):
                _patch(doc, patch, folder)
    return [doc for doc in docs if doc]


def _targets(target: Document, doc: Document) -> bool:
    return doc["kind"] == target["kind"] and re.fullmatch(target["name"], doc["metadata"]["name"]) is not None


def _retag(doc: Document, image: Document) -> None:
    if doc["kind"] == "Deployment":
        for container in containers(doc):
            if container["image"].rpartition(":")[0] == image["name"]:
                container["image"] = f"{image['name']}:{image['newTag']}"


def _patch(doc: Document, patch: Document, folder: Path) -> None:
    if "path" in patch:
        merge = load(folder / patch["path"])[0]
        merge.pop("metadata")
        _merge(doc, merge)
        return
    written = yaml.safe_load(patch["patch"])
    if isinstance(written, dict):
        if written.get("$patch") != "delete":
            raise ValueError("render does not know merge patches in place, but for $patch: delete")
        doc.clear()
        return
    for operation in written:
        # RFC 6901: "~1" is a slash inside of a key.
        *parents, last = (step.replace("~1", "/") for step in operation["path"].strip("/").split("/"))
        at: Any = doc
        for key in parents:
            at = at[int(key)] if isinstance(at, list) else at[key]
        if operation["op"] == "remove":
            del at[last]
        elif operation["op"] == "replace":
            if last not in at:
                raise ValueError(f"nothing to replace at {operation['path']}")
            at[last] = operation["value"]
        elif operation["op"] == "add" and isinstance(at, dict):
            at[last] = copy.deepcopy(operation["value"])
        else:
            raise ValueError(f"render does not know the operation {operation['op']}")


def _merge(into: Document, patch: Document) -> None:
    """Strategic merge, for mappings and for lists whose items have names."""
    for key, value in patch.items():
        old = into.get(key)
        if value is None:
            into.pop(key, None)
        elif isinstance(old, dict) and isinstance(value, dict):
            _merge(old, value)
        elif isinstance(old, list) and all(isinstance(item, dict) and "name" in item for item in [*old, *value]):
            by_name = {item["name"]: item for item in old}
            for item in value:
                if item["name"] in by_name:
                    _merge(by_name[item["name"]], item)
            # What is new comes first, in its order.
            old[:0] = [item for item in value if item["name"] not in by_name]
        else:
            into[key] = value
