"""Writes docs/mesh/fields.md: every field of Istio's API and of the Gateway API, and what the laptop mesh makes of it.

    python tools/istio_fields.py [--check]

What fields there are is read from the schemas of Istio's API (`make tools` puts them into .tools/crds). Whether a
field is taken is asked of the reader itself, with a document that has it. That its effect is Istio's comes from the
differential suite (tests/differential), which leaves build/differential.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mlmesh_local.resources.mesh_config import OF_AN_INSTALL
from mlmesh_local.resources.parse import Document, load_resources
from mlmesh_local.resources.problems import InvalidResource, Problem
from mlmesh_local.resources.proxies import OF_THE_AGENT
from mlmesh_local.resources.workload_groups import WHY_UNUSED

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    # Run by its path only the folder of tools is there.
    sys.path.insert(0, str(ROOT))

from tools import mesh_config  # noqa: E402

SCHEMAS = (ROOT / ".tools" / "crds" / "istio", mesh_config.FOLDER, ROOT / ".tools" / "crds" / "gateway-api")
GATEWAY_API = "gateway.networking.k8s.io"
RESULTS = ROOT / "build" / "differential.json"
PAGE = ROOT / "docs" / "mesh" / "fields.md"

Schema = Mapping[str, Any]
_BOGUS = "aFieldThatNobodyKnows"
# What Istio's own validation refuses, too.
_ISTIO_TOO = ("means nothing", "does not go with", "must not be set")
_REFUSALS = ("unknown field", "not supported", *_ISTIO_TOO)
_UNREAD = "never read"
# Members of unions that are told by a word beside them.
_UNIONS = {
    "filters[]": {"urlRewrite": "URLRewrite", "cors": "CORS"},
    "path": {"replaceFullPath": "ReplaceFullPath", "replacePrefixMatch": "ReplacePrefixMatch"},
}
# What a field needs beside it, or it does not go with the default.
_BESIDE: Mapping[str, tuple[str, str]] = {"ServiceEntry.spec.endpoints": ("resolution", "STATIC")}
_VERDICTS = ("same", "differs", "accepted", "no effect", "refused")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind with the paths of its fields; "[]" is an item of a list, "*" a key that is free.

    ``unused`` are fields that are taken and mean nothing on a laptop, and why.
    """

    group: str
    kind: str
    version: str
    leaves: tuple[tuple[str, Schema], ...]
    unused: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The kind's name in paths: that of Istio and that of the Gateway API are both a Gateway."""
        return "KubernetesGateway" if (self.group, self.kind) == (GATEWAY_API, "Gateway") else self.kind

    @property
    def api_version(self) -> str:
        """Group and version, or where else it is."""
        return f"{self.group}/{self.version}" if self.group else "key `mesh` of ConfigMap istio-system/istio"

    def why_unused(self, path: str) -> str:
        """Why a field means nothing on a laptop; empty for others."""
        return next(
            (why for name, why in self.unused.items() if path == name or path.startswith((f"{name}.", f"{name}["))), ""
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What becomes of a field, one of `_VERDICTS`, and why."""

    field: str
    verdict: str
    why: str = ""


def kinds(folder: Path) -> list[Kind]:
    """Kinds of the schemas in a folder, by group and name."""
    documents = [each for file in sorted(folder.glob("*.yaml")) for each in yaml.safe_load_all(file.read_text())]
    found = [_kind(each["spec"]) for each in documents if each and each.get("kind") == "CustomResourceDefinition"]
    return sorted(found, key=lambda kind: (kind.group, kind.kind))


def _kind(spec: Mapping[str, Any]) -> Kind:
    served = [version for version in spec["versions"] if version["served"]]
    unused = {"spec": WHY_UNUSED} if spec["names"]["kind"] == "WorkloadGroup" else {}
    newest = next((version for version in served if version["name"] == "v1"), served[0])
    leaves = _leaves(newest["schema"]["openAPIV3Schema"]["properties"]["spec"], "spec")
    return Kind(
        group=spec["group"], kind=spec["names"]["kind"], version=newest["name"], leaves=tuple(leaves), unused=unused
    )


def _leaves(schema: Schema, path: str) -> Iterator[tuple[str, Schema]]:
    if schema.get("properties"):
        for name, inner in schema["properties"].items():
            yield from _leaves(inner, f"{path}.{name}")
    elif schema.get("type") == "array":
        yield from _leaves(schema["items"], f"{path}[]")
    elif isinstance(schema.get("additionalProperties"), dict):
        yield from _leaves(schema["additionalProperties"], f"{path}.*")
    else:
        yield path, schema


def probe(kind: Kind, path: str, schema: Schema) -> str:
    """Why the reader refuses a field, or empty where it takes it: other problems of the small document do not count."""
    problems = _problems(kind, path, _value(schema))
    for problem in problems:
        if problem.message.startswith(_REFUSALS) and _covers(problem.at.path, path):
            return problem.message.partition(" (did you mean")[0]
        if problem.at.path in {"kind", "apiVersion"} or _is_word_of(problem, path):
            return problem.message
    # A place that is never looked at refuses nothing; that it is looked at shows by a field that nobody knows.
    parent, dot, _ = path.rpartition(".")
    beside = _problems(kind, f"{parent}{dot}{_BOGUS}" if not parent.endswith("*") else path, "x")
    if parent.endswith("*") or any(_BOGUS in problem.at.path or _BOGUS in problem.message for problem in beside):
        return ""
    return "" if _free(kind, path) else _UNREAD


def _is_word_of(problem: Problem, path: str) -> bool:
    """Whether a problem is with the word that tells the member of a union which the field is in."""
    around, dot, word = problem.at.path.replace("[0]", "[]").rpartition(".")
    return word == "type" and bool(dot) and path.startswith(f"{around}.") and "support" in problem.message


def _free(kind: Kind, path: str) -> bool:
    """Whether a field is inside of a value whose keys are free."""
    return path.endswith(("*", "[]")) or kind.kind == "EnvoyFilter"


def _problems(kind: Kind, path: str, leaf: Any) -> tuple[Problem, ...]:
    document = {
        "apiVersion": kind.api_version,
        "kind": kind.kind,
        "metadata": {"name": "probe", "namespace": "mlmesh"},
        **_nested(path.split("."), leaf),
    }
    for start, (name, value) in _BESIDE.items():
        if f"{kind.title}.{path}".startswith(start):
            document["spec"][name] = value
    if not kind.group:
        settings = yaml.safe_dump(_nested(path.split("."), leaf))
        named = {"name": "istio", "namespace": "istio-system"}
        document = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": named, "data": {"mesh": settings}}
    try:
        load_resources([Document(source="probe.yaml", text=yaml.safe_dump(document))])
    except InvalidResource as error:
        return error.problems
    return ()


def _nested(steps: list[str], leaf: Any) -> dict[str, Any]:
    step, rest = steps[0], steps[1:]
    depth = step.count("[]")
    name = step.removesuffix("[]" * depth) if depth else step
    value: Any = _nested(rest, leaf) if rest else leaf
    union = _UNIONS.get(step)
    if union is not None and rest:
        member = rest[0].removesuffix("[]")
        value = {"type": union.get(member, member[:1].upper() + member[1:]), **value}
    for _ in range(depth):
        value = [value]
    return {"probe" if name == "*" else name: value}


def _value(schema: Schema) -> Any:
    if "enum" in schema:
        return next((value for value in schema["enum"] if "UNSPECIFIED" not in str(value)), schema["enum"][0])
    kind = schema.get("type")
    if kind == "boolean":
        return True
    if kind in {"integer", "number"}:
        return max(1, int(schema.get("minimum", 1)))
    if kind == "object":
        return {}
    return "1s" if schema.get("x-kubernetes-int-or-string") is None else 1


def _covers(place: str, path: str) -> bool:
    """Whether a problem's place is the field or something around it."""
    plain = place.replace('["probe"]', ".*").replace(".probe", ".*").replace("[0]", "[]").removeprefix(".")
    plain = plain.removeprefix("data.mesh.")
    return path == plain or path.startswith((f"{plain}.", f"{plain}["))


def verdicts(kind: Kind, results: Mapping[str, Any]) -> list[Verdict]:
    """What becomes of every field of a kind."""
    found = []
    for path, schema in kind.leaves:
        field = f"{kind.title}.{path}"
        refusal = probe(kind, path, schema)
        compared = results.get(field, {})
        if refusal == _UNREAD and not compared:
            found.append(Verdict(field=field, verdict="no effect", why=kind.why_unused(path)))
        elif refusal and refusal != _UNREAD:
            found.append(Verdict(field=field, verdict="refused", why=refusal.removeprefix("not supported: ")))
        elif compared.get("differs"):
            links = ", ".join(f"[{name}](differential.md#{name})" for name in sorted(compared["differs"]))
            found.append(Verdict(field=field, verdict="differs", why=links))
        elif compared.get("cases"):
            found.append(Verdict(field=field, verdict="same"))
        elif kind.why_unused(path):
            found.append(Verdict(field=field, verdict="no effect", why=kind.why_unused(path)))
        else:
            found.append(Verdict(field=field, verdict="accepted"))
    return found


def mesh_config_kind() -> Kind:
    """MeshConfig as a kind of its own."""
    unused = {**OF_AN_INSTALL, **{f"defaultConfig.{name}": why for name, why in OF_THE_AGENT.items()}}
    leaves = tuple((path.removeprefix("."), schema) for path, schema in _leaves(mesh_config.schema(), ""))
    return Kind(group="", kind="MeshConfig", version="v1alpha1", leaves=leaves, unused=unused)


def all_kinds() -> list[Kind]:
    """Kinds of Istio's API, MeshConfig, then those of the Gateway API that are no experiments under another group."""
    istio, _, gateway_api = (kinds(folder) for folder in SCHEMAS)
    return [*istio, mesh_config_kind(), *(kind for kind in gateway_api if not kind.group.endswith("x-k8s.io"))]


def page(listed: Iterable[Kind], results: Mapping[str, Any]) -> str:
    """The page."""
    lines = [
        "# Every field of Istio's API and of the Gateway API on the laptop mesh",
        "",
        "Made by `python tools/istio_fields.py` from the schemas of Istio's API, from what the reader takes, and from",
        "the comparison with Istio's own control plane; a test keeps it as it is.",
        "",
        "- **same**: taken; Istio's control plane and ours made the same of it in every case of the differential suite",
        "  that has it.",
        "- **differs**: taken; the effect differs, for the reason that is linked.",
        "- **accepted**: taken; the two were not compared on it: it leaves nothing in Envoy's configuration, or no",
        "  case has it.",
        "- **no effect**: taken, and means nothing here: what it sets exists in a cluster only, or Istio makes nothing",
        "  of it either.",
        "- **refused**: applying it is an error that names the field; it is never silently ignored.",
        "",
    ]
    tables: list[str] = []
    total: Counter[str] = Counter()
    summary = [f"| kind | {' | '.join(_VERDICTS)} |", "| --- |" + " ---: |" * len(_VERDICTS)]
    for kind in listed:
        rows = verdicts(kind, results)
        count = Counter(row.verdict for row in rows)
        total += count
        anchor = kind.title.lower()
        counts = " | ".join(str(count[name]) for name in _VERDICTS)
        summary.append(f"| [{kind.title}](#{anchor}) | {counts} |")
        tables += _table(kind, rows, count)
    counts = " | ".join(str(total[name]) for name in _VERDICTS)
    summary.append(f"| **{sum(total.values())} fields** | {counts} |")
    return "\n".join([*lines, *summary, "", *tables])


def _table(kind: Kind, rows: list[Verdict], count: Counter[str]) -> list[str]:
    head = [f"## {kind.title}", "", f"`{kind.api_version}`", ""]
    reasons = {row.why for row in rows}
    if count["refused"] == len(rows) and len(reasons) == 1:
        return [*head, f"The kind is refused: {reasons.pop()}.", ""]
    table = ["| field | | why |", "| --- | --- | --- |"]
    for row in rows:
        path = row.field.removeprefix(f"{kind.title}.").replace("|", "\\|")
        table.append(f"| `{path}` | {row.verdict} | {row.why.replace('|', chr(92) + '|')} |")
    return [*head, *table, ""]


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only tell whether the page is as it should be")
    check = parser.parse_args().check
    missing = [folder for folder in SCHEMAS if not folder.is_dir()]
    if missing:
        sys.exit(f"{missing[0].relative_to(ROOT)} is missing: `make tools` puts the schemas there")
    if not RESULTS.exists():
        sys.exit(
            f"{RESULTS.relative_to(ROOT)} is missing: the differential suite writes it (pytest tests/differential)"
        )
    text = page(all_kinds(), json.loads(RESULTS.read_text())["fields"])
    if not check:
        PAGE.write_text(text)
        return 0
    return 0 if PAGE.exists() and PAGE.read_text() == text else 1


if __name__ == "__main__":
    sys.exit(main())
