"""AuthorizationPolicy: https://istio.io/latest/docs/reference/config/security/authorization-policy/."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

from mlmesh_local.resources.fields import Fields
from mlmesh_local.resources.model import AuthorizationPolicy, Meta, PolicyAction, PolicyRule, Values
from mlmesh_local.resources.security.attributes import (
    ANY,
    NOT_WITH_CUSTOM,
    OPERATION,
    SERVICE_ACCOUNTS_MAX,
    SOURCE,
    Check,
    condition_check,
)
from mlmesh_local.resources.security.scope import selector, targets

DRY_RUN = "istio.io/dry-run"
"""Annotation of a policy that is only tried."""

RULES_MAX = 512
SOURCES_MAX = 512
# Go's strconv.ParseBool.
_TRUE = frozenset({"1", "t", "T", "TRUE", "true", "True"})
_FALSE = frozenset({"0", "f", "F", "FALSE", "false", "False"})


def parse_authorization_policy(meta: Meta, spec: Fields) -> AuthorizationPolicy:
    """Read an AuthorizationPolicy's spec."""
    action = cast("PolicyAction", spec.choice("action", ("ALLOW", "DENY", "AUDIT", "CUSTOM"), "ALLOW"))
    gateways = targets(spec)
    selected = selector(spec)
    rules = tuple(_rule(item, action) for item in _items(spec, "rules", RULES_MAX))
    if action in ("DENY", "CUSTOM") and not rules:
        does = {"DENY": "denies", "CUSTOM": "asks about"}[action]
        message = f'action {action} without "rules" {does} nothing; write "rules: [{{}}]" to mean everything'
        spec.problems.add(spec.at, message)
    return AuthorizationPolicy(
        meta=meta,
        selector=selected,
        gateways=gateways,
        action=action,
        rules=rules,
        provider=_provider(spec, action),
        dry_run=_dry_run(meta, spec, action),
    )


def _provider(spec: Fields, action: PolicyAction) -> str:
    present = spec.has("provider")
    with spec.message("provider") as inner:
        name = inner.text("name")
    if action == "CUSTOM" and not name:
        spec.refuse("provider", '"provider.name" is required: action CUSTOM asks an extension provider of MeshConfig')
    elif action != "CUSTOM" and present:
        spec.refuse("provider", f"goes with action CUSTOM only, not with {action}")
    return name


def _dry_run(meta: Meta, spec: Fields, action: PolicyAction) -> bool:
    text = meta.annotations.get(DRY_RUN)
    if text is None:
        return False
    if action not in ("ALLOW", "DENY"):
        spec.problems.add(spec.at, f"the annotation {DRY_RUN} goes with action ALLOW or DENY only, not with {action}")
    elif text not in _TRUE | _FALSE:
        spec.problems.add(spec.at, f'the annotation {DRY_RUN} must be "true" or "false", not "{text}"')
    return text in _TRUE


def _items(fields: Fields, name: str, most: int = 0) -> Iterator[Fields]:
    """Items of a list that must not be empty ones; a list that is there must have some, unless it is of rules."""
    items = fields.items(name)
    if fields.has(name) and name != "rules" and not _some(fields, name):
        fields.refuse(name, "must not be empty; leave it out to match everything")
    if most and len(items) > most:
        fields.refuse(name, f"has more than {most} items")
    for node, at in items:
        if node.value is None:
            fields.problems.add(at, "must not be null")
        else:
            yield Fields(node, at, fields.problems)


def _rule(fields: Fields, action: PolicyAction) -> PolicyRule:
    with fields:
        sources = [_side(item, "source", SOURCE, action) for item in _items(fields, "from", SOURCES_MAX)]
        operations = [_side(item, "operation", OPERATION, action) for item in _items(fields, "to")]
        conditions = [
            found for item in fields.messages("when") if (found := _condition(item, custom=action == "CUSTOM"))
        ]
        return PolicyRule(sources=tuple(sources), operations=tuple(operations), conditions=tuple(conditions))


def _side(
    fields: Fields, name: str, known: Mapping[str, tuple[str, Check]], action: PolicyAction
) -> tuple[Values, ...]:
    result: list[Values] = []
    with fields:
        if not fields.required(name):
            return ()
        with fields.message(name) as inner:
            for field, (key, check) in known.items():
                values, not_values = _values(inner, field, check), _values(inner, _not(field), check)
                if values or not_values:
                    result.append(Values(key=key, values=values, not_values=not_values))
                    if action == "CUSTOM":
                        _refuse_with_custom(inner, field, key)
            if not result and not any(_some(inner, field) for field in _both(known)):
                inner.problems.add(inner.at, "must not be empty")
            _refuse_accounts_with_others(inner)
    return tuple(result)


def _values(fields: Fields, field: str, check: Check) -> tuple[str, ...]:
    values = fields.texts(field, *check)
    if field.lower().endswith("serviceaccounts") and len(values) > SERVICE_ACCOUNTS_MAX:
        fields.refuse(field, f"has more than {SERVICE_ACCOUNTS_MAX} items")
    return values


def _some(fields: Fields, name: str) -> bool:
    node = fields.raw(name)
    return node is not None and node.value != []


def _not(field: str) -> str:
    return f"not{field[0].upper()}{field[1:]}"


def _both(known: Mapping[str, object]) -> Iterator[str]:
    for field in known:
        yield field
        yield _not(field)


def _refuse_accounts_with_others(source: Fields) -> None:
    accounts = next((f for f in ("serviceAccounts", "notServiceAccounts") if source.has(f)), "")
    others = [f for f in ("principals", "notPrincipals", "namespaces", "notNamespaces") if source.has(f)]
    if accounts and others:
        source.refuse(accounts, f"cannot be set together with principals or namespaces ({', '.join(others)})")


def _refuse_with_custom(fields: Fields, field: str, key: str) -> None:
    if key in NOT_WITH_CUSTOM or key.startswith("request.auth."):
        name = field if fields.has(field) or not fields.has(_not(field)) else _not(field)
        fields.refuse(name, f"cannot be used with action CUSTOM: {key} is not known when the authorizer is asked")


def _condition(fields: Fields, *, custom: bool) -> Values | None:
    with fields:
        key = fields.text("key", required=True)
        check, problem = condition_check(key) if key else (None, "")
        if problem:
            fields.refuse("key", problem)
        if custom and check:
            _refuse_with_custom(fields, "key", key)
        values, not_values = (fields.texts(name, *(check or ANY)) for name in ("values", "notValues"))
        for name, found in (("values", values), ("notValues", not_values)):
            if key == "source.serviceAccount" and len(found) > SERVICE_ACCOUNTS_MAX:
                fields.refuse(name, f"has more than {SERVICE_ACCOUNTS_MAX} items")
        if key and not _some(fields, "values") and not _some(fields, "notValues"):
            fields.problems.add(fields.at, 'one of "values", "notValues" is required')
        return Values(key=key, values=values, not_values=not_values) if check else None
