"""Worlds for the analysis, changed by chance: Istio's analyzers and ours find the same in them.

    python -m tests.differential.analysed --count 100 --seed 1

The worlds are those of analysis/ and those of `fuzz`. A few documents are left out, doubled under another name or in
another namespace, or changed as `mutants` does; what is not valid any more stays as it was.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mlmesh_local.resources import Document, InvalidResource, load_resources
from mlmesh_local.resources.analysis import analyze
from tests.differential import fuzz
from tests.differential.mutants import Mutator, schemas
from tests.support.tools import run

HERE = Path(__file__).parent
# What looks at Secrets, webhooks and images of running proxies: the laptop mesh issues certificates itself and has
# neither of the others.
ELSEWHERE = frozenset(
    {"gateway.SecretAnalyzer", "injection.ImageAnalyzer", "injection.ImageAutoAnalyzer", "webhook.Analyzer"}
)
OURS_ALONE = "MLM0001"
Doc = dict[str, Any]
Finding = tuple[str, str, str]


def pods(documents: Sequence[Doc]) -> list[Doc]:
    """The pods that a cluster would make of Deployments."""
    return [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": f"{document['metadata']['name']}-0",
                "namespace": document["metadata"]["namespace"],
                "labels": document["spec"]["template"]["metadata"]["labels"],
            },
            "spec": {"containers": [{"name": "istio-proxy", "image": "proxy"}]},
        }
        for document in documents
        if document["kind"] == "Deployment"
    ]


def theirs(documents: Sequence[Doc]) -> set[Finding]:
    """What all analyzers of Istio find, but for those of what a laptop does not have."""
    with tempfile.TemporaryDirectory() as folder:
        cluster, answer = Path(folder, "cluster.yaml"), Path(folder, "found.json")
        cluster.write_text("\n---\n".join(json.dumps(document) for document in [*documents, *pods(documents)]))
        result = run("istiod-memory", "-analyze", "-o", answer, cluster)
        if result.returncode:
            raise RuntimeError(result.stderr)
        found = json.loads(answer.read_text())["messages"]
    return {(one["code"], one["level"], one["origin"]) for one in found if one["analyzer"] not in ELSEWHERE}


def ours(documents: Sequence[Doc]) -> set[Finding]:
    """What our analysis finds. Raises InvalidResource for what is not valid."""
    texts = [Document(source="cluster.yaml", text="\n---\n".join(json.dumps(document) for document in documents))]
    return {(one.code, one.level, one.origin) for one in analyze(load_resources(texts)) if one.code != OURS_ALONE}


def valid(documents: Sequence[Doc]) -> bool:
    """Whether the laptop mesh takes the documents at all."""
    try:
        ours(documents)
    except InvalidResource:
        return False
    return True


def world(seed: int) -> list[Doc]:
    """The changed world of a seed."""
    chance = random.Random(seed)  # noqa: S311  (no secret)
    files = sorted((HERE / "analysis").glob("*.yaml"))
    if chance.random() < 0.7:
        found = [one for one in yaml.safe_load_all(chance.choice(files).read_text()) if one]
    else:
        found = fuzz.documents(seed)
    _as_stored(found)
    if not valid(found):
        return []
    known = schemas()
    mutator = Mutator(chance, known, [one for one in found if "spec" in one])
    for _ in range(chance.randint(1, 6)):
        changed = _changed(chance, mutator, known, copy.deepcopy(found))
        found = changed if valid(changed) else found
    return found


def _as_stored(documents: list[Doc]) -> None:
    """What a cluster adds: namespaces, which have sidecars here, and the default protocol of Services' ports."""
    for one in documents:
        if one["kind"] not in ("Namespace", "GatewayClass"):
            one["metadata"].setdefault("namespace", "shop")
        for port in one["spec"].get("ports") or () if one["kind"] == "Service" else ():
            port.setdefault("protocol", "TCP")
    known = {one["metadata"]["name"] for one in documents if one["kind"] == "Namespace"}
    used = {one["metadata"].get("namespace") for one in documents} - known - {None}
    for name in sorted(used):
        metadata = {"name": name, "labels": {"istio-injection": "enabled"}}
        documents.append({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})


def _changed(chance: random.Random, mutator: Mutator, known: Any, found: list[Doc]) -> list[Doc]:
    place = chance.randrange(len(found))
    one = found[place]
    group, _, version = one["apiVersion"].rpartition("/")
    way = chance.choice(("drop", "twin", "move", "mutate", "mutate", "mutate"))
    if way == "drop" and len(found) > 2:
        del found[place]
    elif way == "twin" and one["kind"] != "Namespace":
        twin = copy.deepcopy(one)
        twin["metadata"]["name"] = f"twin-{chance.randrange(1000)}"
        found.append(twin)
    elif way == "move" and one["kind"] != "Namespace":
        one["metadata"]["namespace"] = chance.choice(found)["metadata"].get("namespace", "shop")
    elif (group, one["kind"], version) in known and isinstance(one.get("spec"), dict):
        found[place], _ = mutator.mutant(one)
    return found


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.differential.analysed", description=__doc__)
    parser.add_argument("--count", type=int, default=20, help="worlds; 20 when not said")
    parser.add_argument("--seed", type=int, default=1, help="of the first world; 1 when not said")
    parser.add_argument("--show", action="store_true", help="print the worlds that differ")
    options = parser.parse_args()
    wrong = findings = 0
    for seed in range(options.seed, options.seed + options.count):
        documents = world(seed)
        mine, other = ours(documents), theirs(documents)
        findings += len(other)
        if mine == other:
            continue
        wrong += 1
        sys.stdout.write(f"seed {seed}: only ours {sorted(mine - other)}, only Istio's {sorted(other - mine)}\n")
        if options.show:
            sys.stdout.write(yaml.safe_dump_all(documents, default_flow_style=None, sort_keys=False, width=200))
    sys.stdout.write(f"{options.count} worlds with {findings} findings, {wrong} differ\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
