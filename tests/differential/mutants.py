"""Valid documents, changed by chance: what a cluster refuses of them we must refuse, and take what it takes.

    python -m tests.differential.mutants --count 20000 --seed 1              # what differs
    python -m tests.differential.mutants --kind Telemetry --count 5000

The documents are those of this suite and of the project. Each gets one or two faults: a field less, one more (of those
that its schema has, or of none), another type, a value from a list of likely mistakes, or one of another document. A
cluster's verdict is that of its schemas (with CEL and unknown fields) and of Istio's webhook (`istioctl validate`).
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from mlmesh_local.resources import Document, InvalidResource, load_resources
from mlmesh_local.resources.analysis import analyze
from tests.differential.fields import SCHEMAS, title
from tests.support.tools import ROOT, run

HERE = Path(__file__).parent
SOURCES = (HERE / "cases", HERE / "gateway_api", HERE / "analysis", HERE / "worlds", ROOT / "manifests", ROOT / "mesh")
MISTAKES = json.loads((HERE / "mistakes.json").read_text())
STRINGS: list[str] = MISTAKES["strings"]
NUMBERS: list[int | float | str] = MISTAKES["numbers"]
LONG = ("a" * 254, "a." * 127 + "b", "x" * 300, "a" * 1025)
OTHERS: tuple[Any, ...] = (None, True, False, 0, 1, 1.5, "", "x", [], {}, [None], [{}], [""], {"x": "y"}, [1], {"": {}})
_GENERIC = ("x", "name", "exact", "values", "labels", "value", "mode", "port", "host", "metadata", "spec", "status")
STRICTER = {
    "must not be empty; leave it out to match everything": "an empty `from` or `to` would let everybody in",
}
"""What only we refuse, by words of the message, and why."""
WARNINGS = ("IST0130", "IST0131", "IST0133")
"""Codes of the analysis that tell what Istio's validation warns of."""
ADDRESSES = "addresses are required for ports serving TCP"
"""A warning that an analyzer of Istio has too, for more documents (IST0134)."""
Document_ = dict[str, Any]
Path_ = tuple[str | int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a cluster says of one document: why it is refused (empty: it is not), and what it warns of."""

    refused: str = ""
    warning: str = ""
    crashed: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """A document of which both sides think differently."""

    what: str
    document: Document_
    changed: str
    ours: str
    theirs: str


def schemas() -> dict[tuple[str, str, str], Mapping[str, Any]]:
    """Schemas of the custom resources, by group, kind and version. Empty where they are not."""
    found: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    for file in (file for folder in SCHEMAS if folder.is_dir() for file in sorted(folder.glob("*.yaml"))):
        for definition in yaml.load_all(file.read_text(), yaml.CSafeLoader):
            if definition and definition.get("kind") == "CustomResourceDefinition":
                spec = definition["spec"]
                for version in spec["versions"]:
                    key = (spec["group"], spec["names"]["kind"], version["name"])
                    found[key] = version["schema"]["openAPIV3Schema"]
    return found


def corpus(known: Iterable[tuple[str, str, str]]) -> list[Document_]:
    """All documents of the kinds that have a schema, of this suite and of the project, each once."""
    kinds, found = set(known), {}
    for file in (file for folder in SOURCES for file in sorted(folder.rglob("*.yaml"))):
        for document in yaml.load_all(file.read_text(), yaml.CSafeLoader):
            if isinstance(document, dict) and _key(document) in kinds and isinstance(document.get("spec"), dict):
                plain = {name: document[name] for name in ("apiVersion", "kind", "spec")}
                found.setdefault(json.dumps(plain, sort_keys=True, default=str), plain)
    for file in sorted((HERE / "validation").glob("*.yaml")):
        versions = sorted(key for key in kinds if title(key[0], key[1]) == file.stem)
        group, kind, version = next((key for key in versions if key[2] == "v1"), versions[0])
        for spec in yaml.load(file.read_text(), yaml.CSafeLoader):
            if isinstance(spec, dict):
                plain = {"apiVersion": f"{group}/{version}", "kind": kind, "spec": spec}
                found.setdefault(json.dumps(plain, sort_keys=True, default=str), plain)
    return list(found.values())


def _key(document: Mapping[str, Any]) -> tuple[str, str, str]:
    group, _, version = str(document.get("apiVersion", "")).rpartition("/")
    return (group, str(document.get("kind", "")), version)


def named(document: Mapping[str, Any], number: int) -> Document_:
    """The document with a name of its own, by which verdicts are told apart."""
    metadata = {"name": f"m-{number:06d}"} | ({} if document["kind"] == "GatewayClass" else {"namespace": "shop"})
    return {
        "apiVersion": document["apiVersion"],
        "kind": document["kind"],
        "metadata": metadata,
        "spec": document["spec"],
    }


# The cluster's side.


def unknown_fields(value: Any, schema: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Fields that a schema does not have: what an API server refuses when fields are validated strictly."""
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    if isinstance(value, dict):
        properties, free = schema.get("properties", {}), schema.get("additionalProperties")
        for name, inner in value.items():
            if name in properties:
                yield from unknown_fields(inner, properties[name], f"{path}.{name}")
            elif isinstance(free, dict):
                yield from unknown_fields(inner, free, f"{path}.{name}")
            elif not free and schema.get("type") == "object":
                yield f"{path}.{name}"
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for inner in value:
            yield from unknown_fields(inner, schema["items"], f"{path}[]")


def without_nulls(value: Any, schema: Mapping[str, Any]) -> Any:
    """What an API server makes of null: fields that may not be null are left out, or get their default."""
    if isinstance(value, dict):
        free = schema.get("additionalProperties")
        below = {name: schema.get("properties", {}).get(name, free) for name in value}
        return {
            name: without_nulls(inner, below[name] if isinstance(below[name], dict) else {})
            for name, inner in value.items()
            if inner is not None or not isinstance(below[name], dict) or below[name].get("nullable")
        }
    if isinstance(value, list):
        return [without_nulls(inner, schema.get("items") or {}) for inner in value]
    return value


def verdicts(documents: Sequence[Document_], known: Mapping[tuple[str, str, str], Mapping[str, Any]]) -> list[Verdict]:
    """What a cluster says of documents with names of their own."""
    with TemporaryDirectory() as folder:
        file, answer = Path(folder, "all.yaml"), Path(folder, "refused.json")
        # As JSON, which has one meaning: of the words y and no, YAML has several.
        stored = [without_nulls(document, known[_key(document)]) for document in documents]
        file.write_text("\n---\n".join(json.dumps(document) for document in stored))
        checked = run(
            "istiod-memory", "-check", "-crds", ",".join(map(str, SCHEMAS)), "-o", answer, file, timeout_s=600
        )
        if checked.returncode:
            raise RuntimeError(checked.stderr)
        refused = {name.split("/")[-1]: why for name, why in json.loads(answer.read_text())["refused"].items()}
        said = run("istioctl", "validate", "-f", file, timeout_s=600)
    warnings: dict[str, str] = {}
    into = warnings
    for line in (said.stdout + said.stderr).splitlines():
        if line.startswith("Error:"):
            into = refused
        found = re.match(r"\s*\* \w+/(?:\w+/|/)?(m-\d{6}): (.*)", line)
        if found:
            into.setdefault(found.group(1), found.group(2))
    for document in stored:
        strange = next(unknown_fields(document["spec"], known[_key(document)]["properties"]["spec"], "spec"), "")
        if strange:
            refused.setdefault(document["metadata"]["name"], f"unknown field {strange}")
    return [
        Verdict(refused=refused.get(name, ""), warning=warnings.get(name, ""))
        for name in (document["metadata"]["name"] for document in documents)
    ]


# Our side.


def ours(document: Document_) -> Verdict:
    """What the laptop mesh says of a document."""
    try:
        resources = load_resources([Document(source="it.yaml", text=json.dumps(document))])
        warnings = [message.text for message in analyze(resources) if message.code in WARNINGS]
    except InvalidResource as error:
        return Verdict(refused=error.message)
    except Exception as error:
        traceback.print_exc()
        return Verdict(crashed=repr(error))
    return Verdict(warning="; ".join(warnings))


def accepted(message: str) -> bool:
    """Whether it is refused on purpose: what the laptop mesh does not have, and what is listed with its reason."""
    return "not supported" in message or "the laptop mesh" in message or any(text in message for text in STRICTER)


def mismatch(document: Document_, changed: str, theirs: Verdict) -> Mismatch | None:
    """What differs between both sides' verdicts, None when nothing does."""
    mine = ours(document)
    what = ""
    if mine.crashed:
        what = "only we crash"
    elif mine.refused and theirs.refused:
        return None
    elif theirs.refused and not mine.refused:
        what = "only a cluster refuses"
    elif mine.refused:
        what = "" if accepted(mine.refused) else "only we refuse"
    elif mine.warning and not theirs.warning:
        what = "only we warn"
    elif theirs.warning and not mine.warning and ADDRESSES not in theirs.warning:
        what = "only a cluster warns"
    if not what:
        return None
    told = [verdict.refused or verdict.warning or verdict.crashed for verdict in (mine, theirs)]
    return Mismatch(what=what, document=document, changed=changed, ours=told[0], theirs=told[1])


# Chance.


class Mutator:
    """Makes faults in documents, of what their schemas and the other documents have."""

    def __init__(
        self, chance: random.Random, known: Mapping[tuple[str, str, str], Mapping[str, Any]], found: Sequence[Document_]
    ) -> None:
        self._chance = chance
        self._known = known
        self._values: dict[str, list[Any]] = {}
        for document in found:
            for path, value in _walk(document["spec"]):
                self._values.setdefault(_plain(path), []).append(value)

    def mutant(self, document: Document_) -> tuple[Document_, str]:
        """A changed copy, and what was done."""
        result = copy.deepcopy(document)
        done: list[str] = []
        for _ in range(1 if self._chance.random() < 0.8 else 2):
            result["spec"] = self._change(result["spec"], self._known[_key(result)]["properties"]["spec"], done)
        return result, "; ".join(done)

    def _change(self, spec: Any, schema: Mapping[str, Any], done: list[str]) -> Any:
        places = [(path, value) for path, value in _walk(spec) if path]
        if not places:
            return spec
        path, value = self._chance.choice(places)
        holder = spec
        for step in path[:-1]:
            holder = holder[step]
        way = self._chance.choices(("value", "other", "drop", "add", "strange", "twice"), (10, 2, 3, 7, 1, 1))[0]
        here, last = ".".join(map(str, path)), path[-1]
        if way == "drop":
            del holder[last]
        elif way == "strange":
            name = self._chance.choice((*_GENERIC, f"{last}s", str(last).upper(), str(last)[:-1]))
            if isinstance(holder, dict):
                holder[name] = holder.pop(last)
        elif way == "twice" and isinstance(holder, list):
            holder.insert(int(last), copy.deepcopy(value))
        elif way == "add":
            here = self._add(spec, path, schema)
        elif way == "other":
            holder[last] = copy.deepcopy(self._chance.choice(OTHERS))
        else:
            holder[last] = self._value(value, _plain(path), _schema_at(schema, path))
        done.append(f"{way} {here}")
        return spec

    def _value(self, value: Any, path: str, schema: Mapping[str, Any]) -> Any:  # noqa: PLR0911  (one for each type)
        known = self._values.get(path)
        if known and self._chance.random() < 0.25:
            return copy.deepcopy(self._chance.choice(known))
        if schema.get("enum") and self._chance.random() < 0.5:
            return self._chance.choice(schema["enum"])
        if isinstance(value, bool):
            return self._chance.choice((not value, "true", 1, "yes"))
        if isinstance(value, str):
            # YAML has no keys of that length, so it is for values alone.
            return self._chance.choice(LONG if self._chance.random() < 0.03 else STRINGS)
        if isinstance(value, int | float):
            return self._chance.choice(NUMBERS)
        if isinstance(value, list):
            return self._chance.choice(([], [*value, *copy.deepcopy(value)], value[1:], value[0] if value else {}))
        if isinstance(value, dict) and value and not schema.get("properties"):
            first = next(iter(value))
            return {self._chance.choice(STRINGS): value[first]}
        return self._chance.choice(({}, [value]))

    def _add(self, spec: Any, path: Path_, schema: Mapping[str, Any]) -> str:
        """A field that a mapping on the way does not have yet."""
        way = [path[:length] for length in range(len(path))]
        at = self._chance.choice(way)
        holder = spec
        for step in at:
            holder = holder[step]
        below = _schema_at(schema, at)
        absent = [name for name in below.get("properties", {}) if isinstance(holder, dict) and name not in holder]
        if not absent:
            return "nothing"
        name = self._chance.choice(absent)
        holder[name] = self._made(below["properties"][name], ".".join((_plain(at), name)).strip("."))
        return ".".join(map(str, (*at, name)))

    def _made(self, schema: Mapping[str, Any], path: str, depth: int = 0) -> Any:  # noqa: PLR0911  (one for each type)
        known = self._values.get(path)
        if known and self._chance.random() < 0.5:
            return copy.deepcopy(self._chance.choice(known))
        kind = schema.get("type")
        if schema.get("enum"):
            return self._chance.choice(schema["enum"])
        if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
            inner = self._made(schema["additionalProperties"], f"{path}.*", depth + 1)
            return {self._chance.choice(STRINGS) if self._chance.random() < 0.3 else "x-key": inner}
        if kind == "object":
            properties = schema.get("properties", {})
            wanted = set(schema.get("required", ()))
            wanted |= {name for name in properties if self._chance.random() < (0.3 if depth < 3 else 0.05)}
            return {n: self._made(properties[n], f"{path}.{n}", depth + 1) for n in properties if n in wanted}
        if kind == "array":
            count = self._chance.choice((0, 1, 1, 1, 2))
            return [self._made(schema.get("items", {}), f"{path}.[]", depth + 1) for _ in range(count)]
        if kind in ("integer", "number") or schema.get("x-kubernetes-int-or-string"):
            return self._chance.choice(NUMBERS)
        return self._chance.random() < 0.5 if kind == "boolean" else self._chance.choice(STRINGS)


def _walk(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    yield path, value
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in steps:
        yield from _walk(inner, (*path, step))


def _plain(path: Path_) -> str:
    return ".".join("[]" if isinstance(step, int) else step for step in path)


def _schema_at(schema: Mapping[str, Any], path: Path_) -> Mapping[str, Any]:
    for step in path:
        free = schema.get("additionalProperties")
        if isinstance(step, int):
            schema = schema.get("items") or {}
        else:
            schema = schema.get("properties", {}).get(step) or (free if isinstance(free, dict) else {})
    return schema


def mutants(seed: int, count: int, *, kind: str = "") -> tuple[list[tuple[Document_, str]], dict[Any, Any]]:
    """Changed documents, of each what was done; and the schemas."""
    known = schemas()
    found = [one for one in corpus(known) if kind in ("", title(_key(one)[0], one["kind"]))]
    chance = random.Random(seed)  # noqa: S311  (no secret)
    mutator = Mutator(chance, known, found)
    by_kind: dict[str, list[Document_]] = {}
    for document in found:
        by_kind.setdefault(title(_key(document)[0], document["kind"]), []).append(document)
    made = []
    for number in range(count):
        # All kinds as often, however many documents there are of each.
        changed, how = mutator.mutant(chance.choice(by_kind[chance.choice(sorted(by_kind))]))
        made.append((named(changed, number), how))
    return made, known


def compare(seed: int, count: int, *, kind: str = "") -> list[Mismatch]:
    """What differs in mutants of a seed."""
    made, known = mutants(seed, count, kind=kind)
    told = verdicts([document for document, _ in made], known)
    found = [mismatch(document, how, theirs) for (document, how), theirs in zip(made, told, strict=True)]
    return [one for one in found if one is not None]


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.differential.mutants", description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="documents; 1000 when not said")
    parser.add_argument("--seed", type=int, default=1, help="1 when not said")
    parser.add_argument(
        "--kind", default="", help="only documents of this kind; the Gateway API's is KubernetesGateway"
    )
    options = parser.parse_args()
    found = compare(options.seed, options.count, kind=options.kind)
    for one in found:
        plain = {name: one.document[name] for name in ("kind", "spec")}
        sys.stdout.write(
            f"{one.what}: {one.changed}\n  {json.dumps(plain)}\n  us: {one.ours}\n  a cluster: {one.theirs}\n"
        )
    sys.stdout.write(f"{options.count} documents, {len(found)} differ\n")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
