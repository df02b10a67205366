"""Parts that several kinds of the Gateway API share, read by the rules of its schemas."""

from __future__ import annotations

import re

from mlmesh_local.resources.fields import Fields
from mlmesh_local.resources.gateway_api.model import GROUP, LabelRequirement, ObjectRef, ParentRef
from mlmesh_local.resources.problems import At

_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_SUBDOMAIN = rf"{_LABEL}(\.{_LABEL})*"
GROUP_NAME = re.compile(rf"^\Z|^{_SUBDOMAIN}\Z")
KIND_NAME = re.compile(r"^[a-zA-Z]([-a-zA-Z0-9]*[a-zA-Z0-9])?\Z")
NAMESPACE_NAME = re.compile(rf"^{_LABEL}\Z")
SECTION_NAME = re.compile(rf"^{_SUBDOMAIN}\Z")
HOSTNAME = re.compile(rf"^(\*\.)?{_SUBDOMAIN}\Z")
PRECISE_HOSTNAME = re.compile(rf"^{_SUBDOMAIN}\Z")
HEADER_NAME = re.compile(r"^[A-Za-z0-9!#$%&'*+\-.^_`|~]+\Z")
DURATION = re.compile(r"^([0-9]{1,5}(h|m|s|ms)){1,4}\Z")
_LABEL_KEY = re.compile(rf"^({_SUBDOMAIN}/)?([A-Za-z0-9][-A-Za-z0-9_.]{{0,61}})?[A-Za-z0-9]\Z")
_LABEL_VALUE = re.compile(r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?\Z")

PARENTS_MAX = 32
HOSTNAMES_MAX = 16


def text(
    fields: Fields,
    name: str,
    pattern: re.Pattern[str] | None,
    what: str,
    *,
    default: str = "",
    required: bool = False,
    longest: int = 253,
    shortest: int = 1,
) -> str:
    """A string of a pattern and a length; the default when absent."""
    value = fields.text(name, default, required=required and shortest > 0)
    if required and shortest == 0:
        fields.required(name)
    if not fields.has(name):
        return value
    if len(value) > longest:
        fields.refuse(name, f"must have at most {longest} characters, not {len(value)}")
    elif len(value) < shortest:
        fields.refuse(name, "must not be empty")
    elif pattern is not None and not pattern.match(value):
        fields.refuse(name, f'"{value}" is not {what}')
    return value


def group(fields: Fields, default: str, *, required: bool = False) -> str:
    """An API group; empty is the core group."""
    return text(fields, "group", GROUP_NAME, "an API group", default=default, required=required, shortest=0)


def kind(fields: Fields, default: str = "", *, required: bool = False) -> str:
    """A kind."""
    return text(fields, "kind", KIND_NAME, "a kind", default=default, required=required, longest=63)


def namespace(fields: Fields, *, required: bool = False) -> str:
    """A namespace; empty when absent."""
    return text(fields, "namespace", NAMESPACE_NAME, "a namespace", required=required, longest=63)


def object_ref(fields: Fields, *, group_default: str | None = None, kind_default: str | None = None) -> ObjectRef:
    """A reference to a resource; group and kind are required where they have no default."""
    return ObjectRef(
        group=group(fields, group_default or "", required=group_default is None),
        kind=kind(fields, kind_default or "", required=kind_default is None),
        namespace=namespace(fields),
        name=text(fields, "name", None, "a name", required=True),
    )


def at_most(fields: Fields, name: str, count: int, limit: int) -> None:
    """Note a problem when a list is longer than the API allows."""
    if count > limit:
        fields.refuse(name, f"has {count} items; the Gateway API allows at most {limit}")


def hostnames(fields: Fields, *, limit: int = HOSTNAMES_MAX) -> tuple[str, ...]:
    """Host names that a route serves, possibly with a leading wildcard label."""
    found = fields.texts(
        "hostnames", lambda value: len(value) <= 253 and HOSTNAME.match(value) is not None, "a host name in lower case"
    )
    at_most(fields, "hostnames", len(found), limit)
    return found


def parent_refs(fields: Fields) -> tuple[ParentRef, ...]:
    """What a route attaches to. Several references to one parent differ by sectionName or port, and alike."""
    found = tuple(_parent_ref(item) for item in fields.messages("parentRefs"))
    at_most(fields, "parentRefs", len(found), PARENTS_MAX)
    parents: dict[tuple[str, str, str, str], list[ParentRef]] = {}
    for ref in found:
        seen = parents.setdefault((ref.group, ref.kind, ref.namespace, ref.name), [])
        if any(
            (bool(other.section), bool(other.port)) != (bool(ref.section), bool(ref.port))
            or (other.section, other.port) == (ref.section, ref.port)
            for other in seen
        ):
            fields.problems.add(
                ref.at, f'needs a "sectionName" or "port" of its own: {ref.kind} "{ref.name}" is named more than once'
            )
        seen.append(ref)
    return found


def _parent_ref(fields: Fields) -> ParentRef:
    with fields:
        return ParentRef(
            group=group(fields, GROUP),
            kind=kind(fields, "Gateway"),
            namespace=namespace(fields),
            name=text(fields, "name", None, "a name", required=True),
            section=text(fields, "sectionName", SECTION_NAME, "the name of a section"),
            port=fields.port("port"),
            at=fields.at,
        )


def selector(fields: Fields) -> tuple[LabelRequirement, ...]:
    """A Kubernetes label selector, https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/."""
    with fields:
        found = [
            LabelRequirement(key=key, operator="In", values=(value,))
            for key, value in fields.text_map("matchLabels").items()
        ]
        for item in fields.messages("matchExpressions"):
            with item:
                operator = item.text("operator", required=True)
                values = item.texts("values")
                found.append(LabelRequirement(key=item.text("key", required=True), operator=operator, values=values))
        return tuple(found)


def metadata_map(fields: Fields, name: str, *, limit: int, labels: bool) -> dict[str, str] | None:
    """Labels or annotations for what is made; None when absent."""
    if not fields.has(name):
        fields.ignored(name)
        return None
    found = dict(fields.text_map(name))
    at_most(fields, name, len(found), limit)
    for key, value in found.items():
        if not _LABEL_KEY.match(key) or len(key.split("/")[0]) >= 253:
            fields.refuse(name, f'"{key}" is not a key')
        if labels and (len(value) > 63 or not _LABEL_VALUE.match(value)):
            fields.refuse(name, f'"{value}" of "{key}" is not the value of a label')
        elif len(value) > 4096:
            fields.refuse(name, f'the value of "{key}" is longer than 4096 characters')
    return found


def place(at: At) -> str:
    """ "file:line" of a place."""
    return f"{at.source}:{at.line}"
