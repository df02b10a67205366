"""Trust domain aliases in policies: identities that mean the same workload (pilot/pkg/security/trustdomain)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_PARTS = 5
_LOCAL = "cluster.local"


def with_aliases(principals: Iterable[str], domains: Sequence[str]) -> tuple[str, ...]:
    """Principals of the mesh's trust domain ("cluster.local" stands for it) under each of its names.

    ``domains`` are the trust domain and its aliases. Principals of other domains, and those that do not have the form
    "DOMAIN/ns/NAMESPACE/sa/ACCOUNT", stay as they are.
    """
    found: list[str] = []
    for principal in principals:
        parts = principal.split("/")
        domain = parts[0]
        own = domain == _LOCAL or any(_overlaps(domain, known) for known in domains)
        if len(parts) != _PARTS or domain == "*" or not own:
            found.append(principal)
            continue
        names: list[str] = []
        for known in domains:
            # "*-td" already means every domain that ends so.
            name = principal if _ends(known, domain) else "/".join([known, *parts[1:]])
            if name not in names:
                names.append(name)
        found += names
    return tuple(found)


def expanded(values: Iterable[str], domains: Sequence[str]) -> tuple[str, ...]:
    """Trust domains, the mesh's own under each of its names."""
    found = [name for value in values for name in (domains if value in domains else (value,))]
    return tuple(dict.fromkeys(found))


def _overlaps(domain: str, known: str) -> bool:
    return (
        known in (domain, "*")
        or _begins(domain, known)
        or _begins(known, domain)
        or _ends(domain, known)
        or _ends(known, domain)
    )


def _begins(text: str, pattern: str) -> bool:
    return pattern.endswith("*") and text.startswith(pattern[:-1])


def _ends(text: str, pattern: str) -> bool:
    return pattern.startswith("*") and text.endswith(pattern[1:])
