"""Telemetry: providers, filters, tags, modes and overrides, with Istio's scopes, precedence and merging."""

from __future__ import annotations

from typing import Any

import pytest

from mlmesh_local.metrics.names import BY_SELECTOR
from mlmesh_local.model import ProxyNode
from mlmesh_local.resources import InvalidResource
from mlmesh_local.translate import View
from mlmesh_local.translate.metric_plans import plan_of
from tests.support.mesh_world import WORKLOADS, Told, load, resource, world

ROOT = "istio-system"
OUTBOUND, INBOUND = "OUTBOUND", "INBOUND"
MANAGER = "envoy.filters.network.http_connection_manager"
COLLECTOR = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: collector}
spec:
  hosts: [collector.example]
  ports: [{number: 4317, name: grpc, protocol: GRPC}, {number: 9411, name: http, protocol: HTTP}]
  resolution: STATIC
  endpoints: [{address: 127.0.0.9}]
---
"""


def telemetry(spec: str, *, name: str = "it", namespace: str = "") -> str:
    return resource("Telemetry", spec, name=name, group="telemetry.istio.io/v1", namespace=namespace)


def mesh_config(text: str) -> str:
    lines = "".join(f"    {line}\n" for line in text.strip().splitlines())
    return (
        f"apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: {ROOT}}}\ndata:\n  mesh: |\n{lines}---\n"
    )


def told(*texts: str, instance: str = "client", **fields: Any) -> Told:
    return Told(instance, *texts, **{"otlp_address": "127.0.0.1:4317", **fields})


def manager(found: Told, direction: str = OUTBOUND) -> dict[str, Any]:
    """The first connection manager of a direction on the port of the server."""
    listeners = [each for each in found.listeners.values() if each["traffic_direction"] == direction]
    filters = [each for listener in listeners for chain in listener["filter_chains"] for each in chain["filters"]]
    config: dict[str, Any] = next(each["typed_config"] for each in filters if each["name"] == MANAGER)
    return config


def loggers(found: Told, direction: str = OUTBOUND) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = manager(found, direction).get("access_log", [])
    return result


def traced(found: Told, routes: str = "9000") -> dict[str, Any]:
    result: dict[str, Any] = found.routes[routes]["virtual_hosts"][0]["routes"][0]["tracing"]
    return result


def percent(found: Told, routes: str = "9000") -> float:
    fraction = traced(found, routes)["random_sampling"]
    assert fraction["denominator"] == "TEN_THOUSAND"
    return float(fraction["numerator"]) / 100


def proxy_of(found: Any, name: str) -> ProxyNode:
    return next(proxy for proxy in found.proxies if proxy.id == name)


# Scope and merging


def test_without_a_word_one_percent_is_traced_and_nothing_is_logged() -> None:
    assert percent(told()) == 1.0
    assert loggers(told()) == []


def test_each_field_comes_from_the_nearest_scope_that_sets_it() -> None:
    texts = (
        telemetry(
            "{tracing: [{randomSamplingPercentage: 20, customTags: {a: {literal: {value: root}}}}]}", namespace=ROOT
        ),
        telemetry("{tracing: [{customTags: {b: {literal: {value: ns}}}}]}", name="namespace"),
        telemetry("{selector: {matchLabels: {team: red}}, tracing: [{enableIstioTags: false}]}", name="workload"),
    )
    found = traced(told(*texts))
    assert found["random_sampling"]["numerator"] == 2000
    # Tags are replaced as a whole.
    assert found["custom_tags"] == [{"tag": "b", "literal": {"value": "ns"}}]
    others = traced(told(*texts, instance="server-v1"))
    assert "istio.canonical_service" in {tag["tag"] for tag in others["custom_tags"]}


def test_of_one_scope_the_oldest_without_selector_counts_and_all_that_select() -> None:
    texts = (
        telemetry("{tracing: [{randomSamplingPercentage: 5}]}", name="first"),
        telemetry("{tracing: [{randomSamplingPercentage: 6}]}", name="second"),
    )
    assert percent(told(*texts)) == 5.0
    both = (
        telemetry("{selector: {matchLabels: {team: red}}, tracing: [{randomSamplingPercentage: 7}]}", name="third"),
        telemetry("{selector: {matchLabels: {app: client}}, tracing: [{disableSpanReporting: false}]}", name="fourth"),
    )
    assert percent(told(*texts, *both)) == 7.0


def test_modes_tell_calls_made_from_calls_taken() -> None:
    text = telemetry(
        "{tracing: [{match: {mode: SERVER}, randomSamplingPercentage: 30}, "
        "{match: {mode: CLIENT}, disableSpanReporting: true}]}"
    )
    server = told(text, instance="server-v1")
    assert percent(server, "inbound|8000||") == 30.0
    assert "tracing" not in manager(server)


def test_sampling_and_tags_change_no_listener() -> None:
    before = told().snapshot.resources
    changed = told(
        telemetry("{tracing: [{randomSamplingPercentage: 100, customTags: {a: {header: {name: x-a}}}}]}")
    ).snapshot.resources
    listener = "type.googleapis.com/envoy.config.listener.v3.Listener"
    assert {name: item.content for name, item in before[listener].items()} == {
        name: item.content for name, item in changed[listener].items()
    }


def test_tags_of_every_kind() -> None:
    found = traced(
        told(
            telemetry(
                "{tracing: [{enableIstioTags: false, customTags: {a: {literal: {value: x}}, "
                "b: {environment: {name: HOME, defaultValue: none}}, c: {header: {name: x-c}}, "
                "d: {formatter: {value: '%REQ(x-d)%'}}}}]}"
            )
        )
    )
    assert found["custom_tags"] == [
        {"tag": "a", "literal": {"value": "x"}},
        {"tag": "b", "environment": {"name": "HOME", "default_value": "none"}},
        {"tag": "c", "request_header": {"name": "x-c"}},
        {"tag": "d", "value": "%REQ(x-d)%"},
    ]


# Providers

PROVIDERS = {
    "opentelemetry": "{service: collector.example, port: 4317, grpc: {timeout: 2s}, maxTagLength: 99}",
    "opentelemetry-http": "{service: collector.example, port: 9411, http: {path: /v1/traces, timeout: 3s}}",
    "zipkin": "{service: collector.example, port: 9411}",
    "datadog": "{service: collector.example, port: 9411}",
    "skywalking": "{service: collector.example, port: 4317}",
}


@pytest.mark.parametrize("kind", PROVIDERS)
def test_a_provider_that_the_mesh_names_gets_the_spans(kind: str) -> None:
    config = mesh_config(f"extensionProviders: [{{name: mine, {kind.removesuffix('-http')}: {PROVIDERS[kind]}}}]")
    found = told(COLLECTOR, config, telemetry("{tracing: [{providers: [{name: mine}]}]}"))
    provider = manager(found)["tracing"]["provider"]
    assert provider["name"] == f"envoy.tracers.{kind.removesuffix('-http')}"
    assert "outbound|" in str(provider)
    assert "collector.example" in str(provider)
    assert "opentelemetry-collector" not in str(provider)


def test_a_provider_that_nobody_names_is_the_laptops_own() -> None:
    found = told(telemetry("{tracing: [{providers: [{name: of-production}]}]}"))
    assert "opentelemetry-collector" in str(manager(found)["tracing"]["provider"])


def test_a_provider_that_cannot_trace_gets_nothing() -> None:
    found = told(telemetry("{tracing: [{providers: [{name: envoy}]}]}"))
    assert "tracing" not in manager(found)


def test_the_meshs_own_settings_count_where_no_telemetry_is() -> None:
    config = mesh_config(
        "accessLogFile: /dev/stderr\naccessLogEncoding: JSON\n"
        "defaultConfig: {tracing: {sampling: 12, customTags: {a: {literal: {value: b}}}, enableIstioTags: false}}"
    )
    found = told(config)
    assert percent(found) == 12.0
    assert traced(found)["custom_tags"] == [{"tag": "a", "literal": {"value": "b"}}]
    (logger,) = loggers(found)
    assert logger["typed_config"]["path"] == "/dev/stderr"
    assert logger["typed_config"]["log_format"]["json_format"]["response_flags"] == "%RESPONSE_FLAGS%"
    off = told(mesh_config("enableTracing: false"))
    assert "tracing" not in manager(off)


# Access logs


def test_logs_have_filters_and_modes() -> None:
    text = telemetry(
        "{accessLogging: [{providers: [{name: envoy}], match: {mode: CLIENT}, "
        "filter: {expression: 'response.code >= 400'}}]}"
    )
    (logger,) = loggers(told(text))
    assert logger["filter"]["extension_filter"]["typed_config"]["expression"] == "response.code >= 400"
    assert loggers(told(text, instance="server-v1"), INBOUND) == []


def test_a_nearer_scope_turns_logs_off() -> None:
    root = telemetry("{accessLogging: [{providers: [{name: envoy}]}]}", namespace=ROOT)
    assert len(loggers(told(root))) == 1
    off = telemetry("{accessLogging: [{disabled: true}]}", name="quiet")
    assert loggers(told(root, off)) == []


@pytest.mark.parametrize(
    ("provider", "logger"),
    [
        ("envoyFileAccessLog: {path: /dev/null, logFormat: {labels: {code: '%RESPONSE_CODE%'}}}", "file"),
        (
            "envoyOtelAls: {service: collector.example, port: 4317, logFormat: {labels: {a: '%REQ(x)%'}}}",
            "open_telemetry",
        ),
        ("envoyHttpAls: {service: collector.example, port: 4317, additionalRequestHeadersToLog: [x]}", "http_grpc"),
        ("envoyTcpAls: {service: collector.example, port: 4317}", "tcp_grpc"),
    ],
)
def test_log_providers(provider: str, logger: str) -> None:
    config = mesh_config(
        f"extensionProviders: [{{name: mine, {provider}}}]\ndefaultProviders: {{accessLogging: [mine]}}"
    )
    (found,) = loggers(told(COLLECTOR, config))
    assert logger in found["name"]


def test_reports_go_on_beside_logs_and_logs_tell_only_what_ended() -> None:
    found = told(telemetry("{accessLogging: [{providers: [{name: envoy}]}]}"), als_address="127.0.0.1:15013")
    log, report = loggers(found)
    assert log["filter"] == {"log_type_filter": {"types": ["DownstreamPeriodic"], "exclude": True}}
    assert report["name"] == "envoy.access_loggers.http_grpc"
    assert manager(found)["access_log_options"] == {"access_log_flush_interval": "5s"}
    often = told(telemetry("{metrics: [{reportingInterval: 2s}]}"), als_address="127.0.0.1:15013")
    assert manager(often)["access_log_options"] == {"access_log_flush_interval": "2s"}


# Metrics


def test_metrics_are_there_unless_disabled_and_a_nearer_scope_may_enable_them_again() -> None:
    root = telemetry("{metrics: [{overrides: [{disabled: true}]}]}", namespace=ROOT)
    nearer = telemetry("{metrics: [{overrides: [{match: {metric: REQUEST_COUNT}, disabled: false}]}]}", name="nearer")
    for texts, disabled in (((), False), ((root,), True), ((root, nearer), False)):
        here = world(*texts)
        assert plan_of(View(here), proxy_of(here, "client"), "outbound").disabled is disabled
    server = Told("server-v1", root, als_address="127.0.0.1:15013")
    assert loggers(server, INBOUND) == []
    # What is sent is counted by its rule all the same.
    (report,) = loggers(server)
    assert {tag["tag"] for tag in report["typed_config"]["common_config"]["custom_tags"]} >= {"resource", "rule"}


def test_overrides_are_by_metric_and_mode() -> None:
    here = world(
        telemetry(
            "{metrics: [{providers: [{name: prometheus}], overrides: ["
            "{match: {metric: REQUEST_COUNT, mode: CLIENT}, "
            "tagOverrides: {model: {value: \"request.headers['x-model']\"}, "
            "source_app: {operation: REMOVE}}}, {match: {metric: REQUEST_SIZE}, disabled: true}]}]}"
        )
    )
    client = plan_of(View(here), proxy_of(here, "client"), "outbound")
    assert [expression.source for expression in client.expressions] == ["request.headers['x-model']"]
    assert dict(client.metrics)["REQUEST_COUNT"].tags == (("model", 0), ("source_app", None))
    assert dict(client.metrics)["REQUEST_SIZE"].disabled
    server = plan_of(View(here), proxy_of(here, "server-v1"), "inbound")
    assert [name for name, _ in server.metrics] == ["REQUEST_SIZE"]


def test_headers_that_labels_are_made_of_are_reported() -> None:
    text = telemetry("{metrics: [{overrides: [{tagOverrides: {model: {value: \"request.headers['X-Model']\"}}}]}]}")
    (report,) = loggers(told(text, als_address="127.0.0.1:15013"))
    assert report["typed_config"]["additional_request_headers_to_log"] == ["content-type", "x-model"]


def test_another_provider_than_prometheus_gets_no_metrics() -> None:
    here = world(mesh_config("defaultProviders: {metrics: []}"))
    assert plan_of(View(here), proxy_of(here, "client"), "outbound").disabled
    assert len(BY_SELECTOR) == 10


# Refusals

WRONG = {
    "randomSamplingPercentage: must be 0 to 100, not 101": "{tracing: [{randomSamplingPercentage: 101}]}",
    'did you mean "randomSamplingPercentage"': "{tracing: [{randomSampling: 1}]}",
    'spec.tracing[0].providers[0]: "name" is required': "{tracing: [{providers: [{}]}]}",
    "spec.tracing[0].customTags.a.literal": "{tracing: [{customTags: {a: {literal: {value: ''}}}}]}",
    "spec.tracing[0].customTags.a.header": "{tracing: [{customTags: {a: {header: {}}}}]}",
    "spec.tracing[0].customTags.a.environment": "{tracing: [{customTags: {a: {environment: {name: ''}}}}]}",
    "cannot be set together": "{tracing: [{customTags: {a: {literal: {value: a}, header: {name: b}}}}]}",
    "spec.tracing[0].match.mode": "{tracing: [{match: {mode: BOTH}}]}",
    "spec.accessLogging[0].match.mode": "{accessLogging: [{match: {mode: server}}]}",
    "spec.accessLogging[0].filter.expression: is not a valid CEL expression": (
        "{accessLogging: [{filter: {expression: 'response.code >='}}]}"
    ),
    "is not closed": '{accessLogging: [{filter: {expression: "request.path == \'/a"}}]}',
    "spec.metrics[0].overrides[0].match.metric": "{metrics: [{overrides: [{match: {metric: REQUESTS}}]}]}",
    '"value" is required when the operation is UPSERT': "{metrics: [{overrides: [{tagOverrides: {a: {}}}]}]}",
    "must not be set when the operation is REMOVE": (
        "{metrics: [{overrides: [{tagOverrides: {a: {operation: REMOVE, value: b}}}]}]}"
    ),
    "spec.metrics[0].reportingInterval": "{metrics: [{reportingInterval: 5}]}",
    'cannot be set together with "selector"': (
        "{selector: {matchLabels: {a: b}}, targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: a}]}"
    ),
    "wildcards are not supported": "{selector: {matchLabels: {app: 'a*'}}}",
}
OURS = {
    "is not an expression that the laptop mesh understands": (
        "{metrics: [{overrides: [{tagOverrides: {a: {value: 'filter_state.x'}}}]}]}"
    ),
    "not supported: the laptop mesh has Istio's standard metrics only": (
        "{metrics: [{overrides: [{match: {customMetric: mine}}]}]}"
    ),
    "spec.tracing[0].disableContextPropagation: not supported": "{tracing: [{disableContextPropagation: true}]}",
}
ACCEPTED = {
    "nothing": "{}",
    "several": "{tracing: [{randomSamplingPercentage: 0.5, providers: [{name: a}, {name: b}]}, {}]}",
    "a tag without a kind": "{tracing: [{customTags: {a: {}}}]}",
    "a filter": "{accessLogging: [{filter: {expression: 'response.code >= 400 || has(request.headers.x)'}}]}",
    "overrides": (
        "{metrics: [{reportingInterval: 10s, overrides: [{match: {metric: ALL_METRICS, mode: SERVER}, disabled: false, "
        "tagOverrides: {a: {operation: REMOVE}, b: {value: \"'x' + request.host\"}}}]}]}"
    ),
    "a gateway": "{targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: a}], tracing: [{}]}",
}


@pytest.mark.parametrize("part", [*WRONG, *OURS])
def test_refused_in_words(part: str) -> None:
    with pytest.raises(InvalidResource) as caught:
        load(telemetry((WRONG | OURS)[part]))
    assert part in str(caught.value)
    assert "0.yaml:" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (
            "extensionProviders: [{name: a, lightstep: {service: x, port: 1}}]",
            "lightstep: not supported: Istio has given it up",
        ),
        ("extensionProviders: [{name: a, opentelemetry: {port: 4317}}]", '"service" is required'),
        ("extensionProviders: [{name: a, opentelemetry: {service: 'a b', port: 4317}}]", "is not [NAMESPACE/]HOST"),
        ("extensionProviders: [{name: a, zipkin: {service: a.example}}]", '"port" is required'),
        ("extensionProviders: [{name: a}]", "is required"),
        ("defaultProviders: {traces: [a]}", "unknown field"),
    ],
)
def test_settings_are_refused_in_words(text: str, part: str) -> None:
    with pytest.raises(InvalidResource) as caught:
        load(mesh_config(text))
    assert part in str(caught.value)


def test_tracing_in_the_annotation_of_a_pod_is_refused() -> None:
    annotation = "annotations: {proxy.istio.io/config: 'tracing: {sampling: 5}'}"
    text = WORKLOADS.replace(
        "metadata: {labels: {app: client, team: red}}", f"metadata: {{labels: {{app: client}}, {annotation}}}"
    )
    with pytest.raises(InvalidResource, match="say it in a Telemetry that selects the workload"):
        load(text)
