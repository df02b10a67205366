"""Names as Istio takes them: host names with and without wildcards, labels, namespaces.

The rules are those of pkg/config/validation/agent and pkg/config/labels in Istio's source.
"""

from __future__ import annotations

import ipaddress
import re

_LABEL = re.compile(r"^[a-zA-Z0-9](?:[-a-zA-Z0-9]*[a-zA-Z0-9])?\Z")
_WILD_LABEL = re.compile(r"^(\*|(\*|\*-)?[a-zA-Z0-9](?:[-a-zA-Z0-9]*[a-zA-Z0-9])?)\Z")
_QUALIFIED = r"(?:[A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]"
_DNS_PREFIX = r"[a-zA-Z0-9](?:[-a-zA-Z0-9]*[a-zA-Z0-9])?(?:\.[a-zA-Z0-9](?:[-a-zA-Z0-9]*[a-zA-Z0-9])?)*/"
_LABEL_KEY = re.compile(rf"^({_DNS_PREFIX})?({_QUALIFIED})\Z")
_LABEL_VALUE = re.compile(rf"^({_QUALIFIED})?\Z")
LABEL_MAX = 63
DOMAIN_MAX = 255
_PREFIX_MAX = 253
_CLAIMS = "@request.auth.claims"


def is_label(text: str) -> bool:
    """Whether it is a DNS label, such as a namespace."""
    return len(text) <= LABEL_MAX and _LABEL.match(text) is not None


def domain_problem(text: str, *, wildcard: bool) -> str:
    """What is wrong with a host name, or empty. A wildcard may only begin the first label: "*", "*.b.c", "*-a.b"."""
    if not text:
        return "must not be empty"
    if len(text) > DOMAIN_MAX:
        return f'"{text}" is longer than {DOMAIN_MAX} characters'
    first, dot, rest = text.partition(".")
    if not wildcard:
        return _labels_problem(text, text)
    if len(first) > LABEL_MAX or not _WILD_LABEL.match(first):
        return f'"{text}" is not a host name: "{first}" is not a DNS label'
    return _labels_problem(text, rest) if dot else ""


def _labels_problem(text: str, labels: str) -> str:
    parts = labels.split(".")
    if re.fullmatch(r"[+-]?\d+", parts[-1]):
        return f'"{text}" is not a host name: it ends in a number'
    for place, label in enumerate(parts):
        # The last may be empty: "istio.io." is unambiguous.
        if not (is_label(label) or (not label and place == len(parts) - 1)):
            return f'"{text}" is not a host name: "{label}" is not a DNS label'
    return ""


def sni_problem(text: str) -> str:
    """What is wrong with a server name at a gateway, which may also be the one that sidecars send, or empty."""
    if text.startswith("outbound_"):
        parts = text.split("_")
        fine = len(parts) >= 4 and re.search(r"[0-9]", parts[1]) and re.search(r"[a-zA-Z]", parts[3])
        return "" if fine else f'"{text}" is not of the form outbound_.PORT_.SUBSET_.HOST'
    return domain_problem(text, wildcard=True)


def is_ip(text: str) -> bool:
    """Whether it is an IP address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def subnet_problem(text: str) -> str:
    """What is wrong with an IP address or block of addresses, or empty."""
    try:
        ipaddress.ip_interface(text) if text.count("/") == 1 else ipaddress.ip_address(text)
    except ValueError:
        return f'"{text}" is not an IP address or a block such as 10.0.0.0/8'
    return ""


def labels_problem(key: str, value: str) -> str:
    """What is wrong with a label, or empty."""
    match = _LABEL_KEY.match(key)
    if match is None or len(match[1] or "") - 1 > _PREFIX_MAX or len(match[2]) > LABEL_MAX:
        return f'"{key}" is not the key of a label'
    return "" if _LABEL_VALUE.match(value) else f'"{value}" is not the value of a label'


def gateway_name_problem(name: str) -> str:
    """What is wrong with the name of a gateway in a VirtualService, or empty. "mesh" stands for all sidecars."""
    namespace, slash, gateway = name.partition("/")
    if not slash:
        return domain_problem(name, wildcard=False)
    if is_label(namespace) and is_label(gateway):
        return ""
    return f'"{name}" is not of the form namespace/name'


def host_covers(pattern: str, host: str) -> bool:
    """Whether every host that the second names (it may be a wildcard) is one of the first."""
    if host.startswith("*"):
        return pattern.startswith("*") and len(host) >= len(pattern) and host.endswith(pattern[1:])
    return host.endswith(pattern[1:]) if pattern.startswith("*") else pattern == host


def hosts_overlap(one: str, other: str) -> bool:
    """Whether two hosts, of which each may be a wildcard, have a host in common in Istio's sense."""
    return host_covers(one, other) or host_covers(other, one)


def claim_path(header: str) -> tuple[str, ...]:
    """Claims that a header of a match means: "@request.auth.claims.a.b" or "@request.auth.claims[a][b]"; else ()."""
    if not header.lower().startswith(_CLAIMS):
        return ()
    rest = header[len(_CLAIMS) :]
    if rest.startswith(".") and len(rest) > 1:
        return tuple(rest[1:].split("."))
    if rest.startswith("[") and rest.endswith("]") and len(rest) > 2:
        return tuple(rest[1:-1].split("]["))
    return ()
