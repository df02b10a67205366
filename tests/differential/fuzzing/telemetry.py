"""Random Telemetry of all three levels."""

from __future__ import annotations

from tests.differential.fuzzing.chance import NAMESPACES, ROOT, Chance, Doc

_METRICS = ("ALL_METRICS", "REQUEST_COUNT", "REQUEST_DURATION", "TCP_SENT_BYTES", "GRPC_REQUEST_MESSAGES")


def telemetry(chance: Chance) -> None:
    """Tracing, access logs and metrics; one of a namespace without a selector, as Istio has it."""
    namespace = chance.one([*NAMESPACES, ROOT])
    selector: Doc = {}
    if namespace != ROOT and chance.yes(0.5):
        selector = {"selector": {"matchLabels": chance.one([chance.label(), {"app": "client"}, {"istio": "gateway"}])}}
    for other in chance.documents:
        same = other["kind"] == "Telemetry" and other["metadata"]["namespace"] == namespace
        if same and (not selector or other["spec"].get("selector") == selector["selector"]):
            return
    known = any(document["kind"] == "ConfigMap" for document in chance.documents)
    spec: Doc = {
        **selector,
        **chance.maybe(0.6, tracing=[_tracing(chance, known=known) for _ in range(chance.number(1, 2))]),
        **chance.maybe(0.6, accessLogging=[_logging(chance, known=known) for _ in range(chance.number(1, 2))]),
        **chance.maybe(0.25, metrics=[_metrics(chance)]),
    }
    chance.add("telemetry.istio.io/v1", "Telemetry", spec, namespace=namespace)


def _mode(chance: Chance) -> Doc:
    return chance.maybe(0.3, match={"mode": chance.one(["CLIENT", "SERVER", "CLIENT_AND_SERVER"])})


def _tracing(chance: Chance, *, known: bool) -> Doc:
    tags: Doc = {
        "t": {"literal": {"value": "x"}},
        "h": {"header": {"name": "x-h", **chance.maybe(0.5, defaultValue="none")}},
        "e": {"environment": {"name": "E", "defaultValue": "d"}},
        "f": {"formatter": {"value": "%REQ(x-f)%"}},
    }
    names = chance.some(list(tags), 1, 3)
    return {
        **chance.maybe(0.6, randomSamplingPercentage=chance.one([0, 1, 33.3, 50, 100])),
        **chance.maybe(0.3, disableSpanReporting=chance.yes(0.5)),
        **chance.maybe(0.4, customTags={name: tags[name] for name in names}),
        **chance.maybe(0.2, enableIstioTags=chance.yes(0.5)),
        **chance.maybe(0.15, useRequestIdForTraceSampling=chance.yes(0.5)),
        **(chance.maybe(0.7, providers=[{"name": chance.one(["spans", "spans", "zip"])}]) if known else {}),
        **_mode(chance),
    }


def _logging(chance: Chance, *, known: bool) -> Doc:
    providers = ["lines", "lines", "json", "envoy", "als"] if known else ["envoy"]
    expressions = ["response.code >= 400", 'request.path.startsWith("/a")', "connection.mtls"]
    return {
        **(
            chance.maybe(0.75, providers=[{"name": n} for n in chance.some(providers, 1, 2)])
            if known
            else {"providers": [{"name": "envoy"}]}
        ),
        **chance.maybe(0.3, filter={"expression": chance.one(expressions)}),
        **chance.maybe(0.25, disabled=chance.yes(0.8)),
        **_mode(chance),
    }


def _metrics(chance: Chance) -> Doc:
    override: Doc = {
        "match": {"metric": chance.one(_METRICS), **chance.maybe(0.5, mode=chance.one(["CLIENT", "SERVER"]))},
        **chance.maybe(0.4, disabled=chance.yes(0.7)),
        **chance.maybe(
            0.5,
            tagOverrides={
                "request_method": {"operation": "UPSERT", "value": "request.method"},
                "source_app": {"operation": "REMOVE"},
            },
        ),
    }
    return {"providers": [{"name": "prometheus"}], **chance.maybe(0.7, overrides=[override])}
