"""Secrets with certificates or roots, as a DestinationRule's `credentialName` names them. Others are not kept.

Keys and their order are those of pilot/pkg/credentials/kube/secrets.go in Istio's source.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from mlmesh_local.resources.fields import Fields
from mlmesh_local.resources.meta import Meta
from mlmesh_local.resources.tree import Node

if TYPE_CHECKING:
    from mlmesh_local.resources.model_hosts import ClientTls, DestinationRule, TrafficPolicy

_PAIRS = (("cert", "key"), ("tls.crt", "tls.key"))
_ROOTS = ("cacert", "ca.crt")
_KEYS = (*_ROOTS, *(key for pair in _PAIRS for key in pair))
_ROOTS_SUFFIX = "-cacert"
_IN_NAMESPACE = "kubernetes://"


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """A Secret: a certificate chain with its key, and roots, PEM; empty is what it does not have."""

    meta: Meta
    certificate: str = ""
    key: str = field(default="", repr=False)
    roots: str = ""


def holds_credential(_meta: Meta, body: Fields) -> bool:
    """Whether a Secret has one of the keys that hold certificates."""
    return any(key in _values(body, name) for name in ("data", "stringData") for key in _KEYS)


def parse_credential(meta: Meta, body: Fields) -> Credential:
    """Read a Secret. What Envoy could not use counts as not there: it would refuse it, too."""
    body.ignored("data", "stringData", "type", "immutable")
    values = _decoded(body)
    certificate, key = next(
        ((values[one], values[two]) for one, two in _PAIRS if values.get(one) and values.get(two)), ("", "")
    )
    roots = next((values[name] for name in _ROOTS if values.get(name)), "")
    usable = _is_certificate(certificate) and _is_key(key)
    return Credential(
        meta=meta,
        certificate=certificate if usable else "",
        key=key if usable else "",
        roots=roots if _is_certificate(roots) else "",
    )


def client_rules(rule: DestinationRule) -> Iterator[ClientTls]:
    """Every place of a DestinationRule that says how TLS to its host is made."""
    for policy in (rule.policy, *(subset.policy for subset in rule.subsets)):
        yield from _of_policy(policy)


def secret_place(name: str, namespace: str) -> tuple[str, str] | None:
    """(namespace, name) of the Secret that a proxy of a namespace reads under a `credentialName`; None for none."""
    if "://" in name and not name.startswith(_IN_NAMESPACE):
        return None
    first, slash, second = name.removeprefix(_IN_NAMESPACE).partition("/")
    if slash and first != namespace:
        return None
    return namespace, second.partition("/")[0] if slash else first


def roots_for(place: tuple[str, str], known: Mapping[tuple[str, str], Credential]) -> str:
    """The roots of a `credentialName`: of the Secret of that name with "-cacert", else of the Secret itself."""
    namespace, name = place
    found = known.get((namespace, name + _ROOTS_SUFFIX)) or known.get(place)
    return found.roots if found else ""


def _of_policy(policy: TrafficPolicy | None) -> Iterator[ClientTls]:
    if policy is None:
        return
    if policy.tls is not None:
        yield policy.tls
    for _, own in policy.ports:
        yield from _of_policy(own)


def _decoded(body: Fields) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, text in _values(body, "data").items():
        try:
            found[key] = base64.b64decode("".join(text.split()), validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            body.refuse("data", f'"{key}" is not base64 of a text')
    return found | {key: text for key, text in _values(body, "stringData").items() if text}


def _values(body: Fields, name: str) -> dict[str, str]:
    found = body.raw(name)
    values = found.value if found is not None and isinstance(found.value, dict) else {}
    return {
        key: node.value
        for key, node in values.items()
        if key in _KEYS and isinstance(node, Node) and isinstance(node.value, str)
    }


def _is_certificate(text: str) -> bool:
    try:
        return bool(x509.load_pem_x509_certificates(text.encode()))
    except ValueError:
        return False


def _is_key(text: str) -> bool:
    try:
        load_pem_private_key(text.encode(), password=None)
    except (ValueError, TypeError):
        return False
    return True
