"""Checks of what runs."""

from __future__ import annotations

from collections.abc import Iterator

from mlmesh_local.doctor.model import Context, Hit

LEAF_S = 3600.0
AUTHORITY_S = 30 * 86_400.0
FAILED_SHARE = 0.2
STREAMS_MIN = 20


def expiring_certificates(context: Context) -> Iterator[Hit]:
    """MLM022."""
    facts = context.facts
    for one in facts.certificates:
        left = one.expires_s - context.now_s
        # Certificates are renewed half way through their time: in its last quarter that has failed for long.
        if left < min(LEAF_S, (one.expires_s - one.begins_s) / 4):
            yield Hit(where=one.instance, detail=_left("its certificate", left))
    if facts.authority_expires_s and facts.authority_expires_s - context.now_s < AUTHORITY_S:
        yield Hit(where="certificate authority", detail=_left("its root", facts.authority_expires_s - context.now_s))


def _left(what: str, seconds: float) -> str:
    if seconds <= 0:
        return f"{what} has expired"
    return (
        f"{what} expires in {seconds / 86_400:.1f} days" if seconds > 86_400 else f"{what} expires in {seconds:.0f} s"
    )


def not_configured(context: Context) -> Iterator[Hit]:
    """MLM023."""
    for one in context.facts.configured:
        if one.rejection:
            yield Hit(where=one.instance, detail=f"Envoy refused: {one.rejection.splitlines()[0]}")
        elif not one.connected:
            yield Hit(where=one.instance, detail="its Envoy is not connected to the control plane")
        elif not one.acked:
            yield Hit(where=one.instance, detail="its Envoy has not taken all of what it was sent")


def _counted(context: Context, *endings: str) -> Iterator[Hit]:
    for instance, counters in sorted(context.facts.counters.items()):
        for name, value in sorted(counters.items()):
            ending = next((one for one in endings if name.endswith(one)), "")
            if ending:
                cluster = name.removesuffix(ending).strip(".").removeprefix("cluster.")
                yield Hit(where=f"{instance} {cluster}", detail=f"{value} times since its Envoy started ({name})")


def overflows(context: Context) -> Iterator[Hit]:
    """MLM024."""
    # Calls beyond http2MaxRequests are "active"; before Envoy 1.40 they were counted as pending.
    kinds = ("upstream_rq_active_overflow", "upstream_rq_pending_overflow", "upstream_cx_overflow")
    return _counted(context, *kinds, "upstream_rq_retry_overflow")


def abandoned_retries(context: Context) -> Iterator[Hit]:
    """MLM025."""
    return _counted(context, "retry_or_shadow_abandoned")


def refused_handshakes(context: Context) -> Iterator[Hit]:
    """MLM026."""
    return _counted(context, "ssl.fail_verify_san", "ssl.fail_verify_error", "ssl.fail_verify_no_cert")


def failing_streams(context: Context) -> Iterator[Hit]:
    """MLM027."""
    for one in context.facts.sockets:
        if one.streams_started >= STREAMS_MIN and one.streams_failed / one.streams_started > FAILED_SHARE:
            detail = f"{one.streams_failed} of {one.streams_started} streams from {one.remote} were cut"
            yield Hit(where=one.instance, detail=detail)
