"""What `istioctl validate` accepts of resources about hosts is accepted, and what it refuses is refused."""

from __future__ import annotations

import re
from pathlib import Path

from mlmesh_local.resources import InvalidResource
from tests.support import tools
from tests.support.mesh_world import load_alone, resource

PORT = "ports: [{number: 80, name: http, protocol: HTTP}]"
STATIC = f"resolution: STATIC, {PORT}"
TWO_ALGORITHMS = "{loadBalancer: {consistentHash: {useSourceIp: true, ringHash: {}, maglev: {tableSize: 3}}}}"
POLICIES = [
    "{}",
    "{loadBalancer: {}}",
    "{loadBalancer: {simple: FAST}}",
    "{loadBalancer: {simple: PASSTHROUGH, warmupDurationSecs: 5s}}",
    "{loadBalancer: {simple: RANDOM, consistentHash: {useSourceIp: true}}}",
    "{loadBalancer: {consistentHash: {}}}",
    "{loadBalancer: {consistentHash: {useSourceIp: false}}}",
    "{loadBalancer: {consistentHash: {httpHeaderName: a, useSourceIp: true}}}",
    "{loadBalancer: {consistentHash: {httpCookie: {path: /}}}}",
    "{loadBalancer: {consistentHash: {httpCookie: {name: a, attributes: [{name: b, value: c}, {name: d}]}}}}",
    "{loadBalancer: {consistentHash: {httpCookie: {name: a, attributes: [{name: b}, {name: b}]}}}}",
    "{loadBalancer: {consistentHash: {httpCookie: {name: a, attributes: [{value: b}]}}}}",
    "{loadBalancer: {consistentHash: {useSourceIp: true, maglev: {}}}}",
    "{loadBalancer: {consistentHash: {useSourceIp: true, maglev: {tableSize: 65537}}}}",
    "{loadBalancer: {consistentHash: {useSourceIp: true, maglev: {tableSize: 65536}}}}",
    "{loadBalancer: {consistentHash: {useSourceIp: true, maglev: {tableSize: 5000011}}}}",
    "{loadBalancer: {consistentHash: {useSourceIp: true, maglev: {tableSize: 1}}}}",
    "{loadBalancer: {consistentHash: {useSourceIp: true, ringHash: {}, minimumRingSize: 5}}}",
    TWO_ALGORITHMS,
    "{loadBalancer: {warmup: {}}}",
    "{loadBalancer: {warmup: {duration: 1s, aggression: 0}}}",
    "{loadBalancer: {warmup: {duration: 1s, aggression: 0.1, minimumPercent: 100}}}",
    "{loadBalancer: {warmup: {duration: 1s, minimumPercent: 101}}}",
    "{loadBalancer: {warmup: {duration: 0.5ms}}}",
    "{loadBalancer: {localityLbSetting: {enabled: false}}}",
    "{loadBalancer: {localityLbSetting: {}, zoneAwareLbSetting: {}}}",
    "{loadBalancer: {zoneAwareLbSetting: {minClusterSize: 3, failover: [{from: a, to: b}]}}}",
    "{loadBalancer: {zoneAwareLbSetting: {failoverPriority: [topology.kubernetes.io/zone]}}}",
    "{loadBalancer: {localityLbSetting: {failover: [{from: a, to: a}]}}}",
    "{loadBalancer: {localityLbSetting: {failover: [{from: a, to: b/c}]}}}",
    "{loadBalancer: {localityLbSetting: {failover: [{from: 'a*', to: b}]}}}",
    "{loadBalancer: {localityLbSetting: {failover: [{from: a, to: b}],"
    " failoverPriority: [topology.istio.io/subzone]}}}",
    "{loadBalancer: {localityLbSetting: {failover: [{from: a, to: b}], failoverPriority: [tier, a=b]}}}",
    *(
        f"{{loadBalancer: {{localityLbSetting: {{distribute: [{item}]}}}}}}"
        for item in (
            "{from: a, to: {b: 100}}",
            "{from: a, to: {b: 99}}",
            "{from: a, to: {b: 100, c: 0}}",
            "{from: a, to: {b: 101}}",
            "{from: a}",
            "{from: a, to: {a/b/c: 50, a/b/d: 50}}",
            "{from: a, to: {'*': 100}}",
            "{from: a, to: {'a*/b': 100}}",
            "{from: a, to: {'a//b': 100}}",
            "{from: a, to: {b: 100}}, {from: a, to: {c: 100}}",
            "{from: a, to: {b: 100}}, {from: a/b, to: {c: 100}}",
            "{from: a/b, to: {b: 100}}, {from: a, to: {c: 100}}",
            "{from: a/b, to: {b: 100}}, {from: a/*, to: {c: 100}}",
            "{from: '*', to: {b: 100}}, {from: a, to: {c: 100}}",
            "{from: a, to: {b: 100}}, {from: '*', to: {c: 100}}",
        )
    ),
    "{loadBalancer: {localityLbSetting: {distribute: [{from: a, to: {b: 100}}], failover: [{from: a, to: b}]}}}",
    "{connectionPool: {}}",
    "{connectionPool: {tcp: {}}}",
    "{connectionPool: {tcp: {maxConnections: -1}}}",
    "{connectionPool: {tcp: {maxConnections: 2147483648}}}",
    "{connectionPool: {tcp: {connectTimeout: 0s}}}",
    "{connectionPool: {tcp: {connectTimeout: 1500us}}}",
    "{connectionPool: {tcp: {connectTimeout: 1h1m1s1ms}}}",
    "{connectionPool: {tcp: {idleTimeout: 0s, maxConnectionDuration: 1ms}}}",
    "{connectionPool: {tcp: {tcpKeepalive: {time: 0s}}}}",
    "{connectionPool: {tcp: {tcpKeepalive: {probes: 4294967295, interval: 1ms}}}}",
    "{connectionPool: {http: {idleTimeout: 0s}}}",
    "{connectionPool: {http: {maxRetries: 0, http1MaxPendingRequests: 1, maxRequestsPerConnection: 2147483647}}}",
    "{connectionPool: {http: {h2UpgradePolicy: UPGRADE, useClientProtocol: true}}}",
    "{connectionPool: {http: {h2UpgradePolicy: DO_NOT_UPGRADE, useClientProtocol: true}}}",
    "{connectionPool: {http: {maxConcurrentStreams: -1}}}",
    "{connectionPool: {http: {http2KeepAlive: {interval: 1s}}}}",
    "{connectionPool: {http: {http2KeepAlive: {interval: 1s, timeout: 1s}}}}",
    "{outlierDetection: {}}",
    "{outlierDetection: {consecutiveErrors: 3, consecutive5xxErrors: 0, outlierDetectionHttpErrorCodes: [404]}}",
    "{outlierDetection: {consecutiveLocalOriginFailures: 1}}",
    "{outlierDetection: {consecutiveLocalOriginFailures: 1, splitExternalLocalOriginErrors: true}}",
    "{outlierDetection: {maxEjectionPercent: 101}}",
    "{outlierDetection: {minHealthPercent: -1}}",
    "{outlierDetection: {interval: 0s}}",
    "{tls: {}}",
    "{tls: {mode: MUTUAL}}",
    "{tls: {mode: MUTUAL, clientCertificate: /a, privateKey: /b}}",
    "{tls: {mode: MUTUAL, credentialName: a}}",
    "{tls: {mode: MUTUAL, credentialName: a, privateKey: /b}}",
    "{tls: {mode: SIMPLE, credentialName: a, caCrl: /b}}",
    "{tls: {mode: SIMPLE, insecureSkipVerify: true}}",
    "{tls: {mode: SIMPLE, insecureSkipVerify: true, caCertificates: /a}}",
    "{tls: {mode: SIMPLE, insecureSkipVerify: true, credentialName: a}}",
    "{tls: {mode: MUTUAL, insecureSkipVerify: true, credentialName: a}}",
    "{tls: {mode: MUTUAL, insecureSkipVerify: true, credentialName: a, subjectAltNames: [b]}}",
    "{tls: {mode: ISTIO_MUTUAL, caCertificates: /a, insecureSkipVerify: true}}",
    "{tls: {mode: DISABLE, sni: a.example.com}}",
    "{portLevelSettings: [{port: {number: 80}}]}",
    "{portLevelSettings: [{tls: {mode: DISABLE}}]}",
    "{portLevelSettings: [{port: {number: 80}, tls: {mode: DISABLE}}]}",
    "{portLevelSettings: [{port: {number: 80}, tunnel: {}}]}",
    "{tunnel: {targetHost: a.example.com, targetPort: 80}}",
    "{tunnel: {targetHost: 10.0.0.1, targetPort: 80, protocol: POST}}",
    "{tunnel: {targetHost: a.example.com, targetPort: 80, protocol: GET}}",
    "{tunnel: {targetHost: '*.example.com', targetPort: 80}}",
    "{tunnel: {targetHost: a.example.com}}",
    "{tunnel: {targetHost: a.example.com, targetPort: 80}, proxyProtocol: {}}",
    "{proxyProtocol: {version: V3}}",
    "{proxyProtocol: {version: V2}}",
    "{retryBudget: {percent: 50, minRetryConcurrency: 1, budgetInterval: 1s}}",
]
RULES = [
    "{}",
    "{host: ''}",
    *(
        f"{{host: '{host}'}}"
        for host in (
            "a",
            "*",
            "*.b.c",
            "*b.c",
            "b*.c",
            "a..b",
            "a.b.",
            "a_b.c",
            "A.b",
            "-a.b",
            "a.1",
            "1.a",
            "*-a.b",
            "a b",
        )
    ),
    *(
        f"{{host: a, exportTo: {to}}}"
        for to in ("['*', '.']", "['.', mlmesh]", "['~']", "[a, b]", "['a_b']", "[a, a]", "[]")
    ),
    "{host: a, workloadSelector: {}}",
    "{host: a, workloadSelector: {matchLabels: {a: '*'}}}",
    "{host: a, workloadSelector: {matchLabels: {a: b}}, exportTo: ['.']}",
    "{host: a, workloadSelector: {matchLabels: {a: b}}, exportTo: ['*']}",
    "{host: a, workloadSelector: {matchLabels: {a: b}}, exportTo: [c]}",
    *(
        f"{{host: a, subsets: [{subset}]}}"
        for subset in (
            "{name: a}",
            "{labels: {a: b}}",
            "{name: a_b}",
            "{name: A-b}",
            "{name: a}, {name: a}",
            "{name: a, labels: {'a b': c}}",
            "{name: a, labels: {a: 'b c'}}",
            "{name: a, labels: {a.b/c: ''}}",
            "{name: a, trafficPolicy: {}}",
        )
    ),
    *(f"{{host: a, trafficPolicy: {policy}}}" for policy in POLICIES),
]
ENTRIES = [
    "{}",
    f"{{hosts: [], {PORT}}}",
    "{hosts: [a.b]}",
    *(f"{{hosts: ['{host}'], {STATIC}}}" for host in ("*", "*.a.b", "*a.b", "a", "a..b", "A.b", "a_b.c")),
    f"{{hosts: ['*.a.b'], resolution: DNS, {PORT}}}",
    f"{{hosts: ['*.a.b'], resolution: DNS, endpoints: [{{address: c.d}}], {PORT}}}",
    f"{{hosts: ['*.a.b'], resolution: DYNAMIC_DNS, {PORT}}}",
    f"{{hosts: [a.b], resolution: DYNAMIC_DNS, {PORT}}}",
    f"{{hosts: ['*.a.b'], resolution: DYNAMIC_DNS, addresses: [10.0.0.1], {PORT}}}",
    f"{{hosts: ['*.a.b'], resolution: DYNAMIC_DNS, endpoints: [{{address: c.d}}], {PORT}}}",
    "{hosts: ['*.a.b'], resolution: DYNAMIC_DNS, ports: [{number: 80, name: a, protocol: TCP}]}",
    "{hosts: ['*.a.b'], resolution: DYNAMIC_DNS, ports: [{number: 80, name: a, protocol: TLS}]}",
    f"{{hosts: ['*.a.b'], location: MESH_INTERNAL, resolution: DYNAMIC_DNS, {PORT}}}",
    f"{{hosts: [a.b], resolution: MAGIC, {PORT}}}",
    f"{{hosts: [a.b], location: INSIDE, {PORT}}}",
    f"{{hosts: [a.b], endpoints: [{{address: 10.0.0.1}}], {PORT}}}",
    f"{{hosts: [a.b], resolution: NONE, workloadSelector: {{labels: {{a: b}}}}, {PORT}}}",
    f"{{hosts: [a.b], workloadSelector: {{labels: {{a: b}}}}, endpoints: [{{address: 10.0.0.1}}], {STATIC}}}",
    f"{{hosts: [a.b], workloadSelector: {{labels: {{a: '*'}}}}, {STATIC}}}",
    f"{{hosts: [a.b], workloadSelector: {{}}, {STATIC}}}",
    *(
        f"{{hosts: [a.b], addresses: ['{address}'], {STATIC}}}"
        for address in ("10.0.0.1", "10.0.0.0/8", "10.0.0.1/99", "a.b", "::1")
    ),
    f"{{hosts: [a.b], addresses: [10.0.0.0/8], resolution: DNS, {PORT}}}",
    f"{{hosts: [a.b], addresses: [10.0.0.0/8], {PORT}}}",
    *(
        f"{{hosts: [a.b], ports: [{port}]}}"
        for port in (
            "{number: 80}",
            "{name: a}",
            "{number: 0, name: a}",
            "{number: 65536, name: a}",
            "{number: 80, name: a_b}",
            "{number: 80, name: A}",
            "{number: 80, name: a, protocol: htTP}",
            "{number: 80, name: a, protocol: gRPC-web}",
            "{number: 80, name: a, protocol: HTTP3}",
            "{number: 80, name: a, protocol: HTTP_PROXY}",
            "{number: 80, name: a, protocol: UDP}",
            "{number: 80, name: a, protocol: ''}",
            "{number: 80, name: a, targetPort: 70000}",
            "{number: 80, name: a, targetPort: 81}",
            "{number: 80, name: a}, {number: 80, name: b}",
            "{number: 80, name: a}, {number: 81, name: a}",
        )
    ),
    *(
        f"{{hosts: [a.b], endpoints: [{endpoint}], {STATIC}}}"
        for endpoint in (
            "{}",
            "{address: 10.0.0.1}",
            "{address: a.b}",
            "{address: 'unix:///a/b'}",
            "{address: 'unix://@a'}",
            "{address: 'unix://a'}",
            "{address: 'unix:///a/'}",
            "{address: 'unix:///a', ports: {http: 80}}",
            "{network: a}",
            "{address: 10.0.0.1, ports: {http: 81}}",
            "{address: 10.0.0.1, ports: {more: 81}}",
            "{address: 10.0.0.1, ports: {http: 0}}",
            "{address: 10.0.0.1, labels: {a: 'b c'}}",
            "{address: 10.0.0.1, weight: 5, locality: a/b/c, serviceAccount: d, network: e}",
        )
    ),
    "{hosts: [a.b], resolution: STATIC, endpoints: [{address: 'unix:///a'}],"
    " ports: [{number: 80, name: a}, {number: 81, name: b}]}",
    *(
        f"{{hosts: [a.b], endpoints: [{endpoint}], resolution: DNS, {PORT}}}"
        for endpoint in (
            "{address: c.d}",
            "{address: 10.0.0.1}",
            "{address: 'c..d'}",
            "{address: 'unix:///a'}",
            "{network: a}",
        )
    ),
    f"{{hosts: [a.b], endpoints: [{{address: c.d}}, {{address: e.f}}], resolution: DNS_ROUND_ROBIN, {PORT}}}",
    "{hosts: [a.b, c.d], resolution: DNS, ports: [{number: 80, name: a, protocol: TCP}]}",
    "{hosts: [a.b, c.d], resolution: DNS, ports: [{number: 80, name: a, protocol: TLS}]}",
    "{hosts: [a.b, c.d], ports: [{number: 80, name: a, protocol: TCP}]}",
    *(f"{{hosts: [a.b], exportTo: {to}, {STATIC}}}" for to in ("['~']", "['~', a]", "['*', a]")),
]
WORKLOADS = [
    "{}",
    "{address: 10.0.0.1}",
    "{address: a.b}",
    "{address: 'a..b'}",
    "{address: 'unix:///a'}",
    "{address: 'unix:///a', ports: {a: 1}}",
    "{network: a}",
    "{address: 10.0.0.1, ports: {a_b: 1}}",
    "{address: 10.0.0.1, ports: {a: 70000}}",
    "{address: 10.0.0.1, labels: {'a b': c}}",
]
SIDECARS = [
    "{}",
    "{workloadSelector: {labels: {a: b}}}",
    "{workloadSelector: {labels: {}}, egress: [{hosts: ['*/*']}]}",
    "{workloadSelector: {labels: {a: '*'}}, egress: [{hosts: ['*/*']}]}",
    *(
        f"{{egress: [{{hosts: ['{host}']}}]}}"
        for host in (
            "*/*",
            "./*",
            "~/*",
            "a/*",
            "*/a.b",
            "*/*.b",
            "*/*b.c",
            "*/a",
            "a.b",
            "/a.b",
            "a/",
            "A/b.c",
            "a_b/c.d",
            "~a/b.c",
            "~./*",
            "~*/a.b",
        )
    ),
    "{egress: [{hosts: []}]}",
    "{egress: [{}]}",
    "{egress: [{hosts: ['*/*']}, {hosts: ['*/*']}]}",
    "{egress: [{hosts: ['*/*']}, {port: {number: 80, protocol: HTTP}, hosts: ['*/*']}]}",
    *(
        f"{{egress: [{{{port}, hosts: ['*/*']}}]}}"
        for port in (
            "port: {number: 80}",
            "port: {number: 80, protocol: HTTP, name: a_b}",
            "port: {number: 80, protocol: HTTPX}",
            "port: {number: 80, protocol: HTTP_PROXY}",
            "port: {number: 70000, protocol: HTTP}",
            "port: {number: 80, protocol: HTTP, targetPort: 81}",
            "port: {protocol: HTTP}",
            "port: {number: 0, protocol: HTTP}, bind: 'unix:///a'",
            "port: {number: 0, protocol: HTTP}, bind: 'unix:///a', captureMode: IPTABLES",
            "port: {number: 0, protocol: HTTP}, bind: 'unix://a'",
            "port: {number: 80, protocol: HTTP}, bind: 127.0.0.1, captureMode: NONE",
            "port: {number: 80, protocol: HTTP}, bind: a.b",
            "captureMode: SOME",
        )
    ),
    "{egress: [{port: {number: 80, protocol: HTTP}, hosts: ['a/*']},"
    " {port: {number: 80, protocol: HTTP}, hosts: ['b/*']}]}",
    *(
        f"{{ingress: [{listener}]}}"
        for listener in (
            "{}",
            "{port: {number: 80, protocol: HTTP}}",
            "{port: {protocol: HTTP}}",
            "{port: {number: 80, protocol: HTTP}, bind: a}",
            "{port: {number: 80, protocol: HTTP}, defaultEndpoint: '127.0.0.1:81'}",
            "{port: {number: 80, protocol: HTTP}, defaultEndpoint: '0.0.0.0:81'}",
            "{port: {number: 80, protocol: HTTP}, defaultEndpoint: ':81'}",
            "{port: {number: 80, protocol: HTTP}, defaultEndpoint: '[::1]:81'}",
            "{port: {number: 80, protocol: HTTP}, defaultEndpoint: '10.0.0.1:81'}",
            "{port: {number: 80, protocol: HTTP}, defaultEndpoint: '127.0.0.1'}",
            "{port: {number: 80, protocol: HTTP}, defaultEndpoint: '127.0.0.1:0'}",
            "{port: {number: 80, protocol: HTTP}, defaultEndpoint: '127.0.0.1:x'}",
            "{port: {number: 80, protocol: HTTP}, defaultEndpoint: 'unix:///a'}",
            "{port: {number: 80, protocol: HTTP}, defaultEndpoint: 'unix://a'}",
            "{port: {number: 80, protocol: HTTP}, connectionPool: {}}",
            "{port: {number: 80, protocol: TCP}, connectionPool: {http: {maxRetries: 1}}}",
            "{port: {number: 80, protocol: HTTP}}, {port: {number: 80, protocol: GRPC}}",
        )
    ),
    "{inboundConnectionPool: {tcp: {maxConnections: 1}}}",
    "{inboundConnectionPool: {}}",
    "{outboundTrafficPolicy: {}}",
    "{outboundTrafficPolicy: {mode: ALLOW_ANY}}",
    "{outboundTrafficPolicy: {mode: ALL}}",
    "{outboundTrafficPolicy: {mode: ALLOW_ANY, egressProxy: {host: a.b, port: {number: 80}}}}",
    "{outboundTrafficPolicy: {mode: ALLOW_ANY, egressProxy: {host: a.b}}}",
    "{outboundTrafficPolicy: {egressProxy: {host: a.b, port: {number: 80}}}}",
]
PROXIES = [
    "{}",
    "{concurrency: 0}",
    "{concurrency: -1}",
    "{selector: {matchLabels: {a: '*'}}}",
    "{image: {imageType: a}}",
]

BY_SCHEMA = (
    "{host: a, trafficPolicy: {loadBalancer: {simple: RANDOM, consistentHash: {useSourceIp: true}}}}",
    "{host: a, trafficPolicy: {loadBalancer: {consistentHash: {httpHeaderName: a, useSourceIp: true}}}}",
    f"{{host: a, trafficPolicy: {TWO_ALGORITHMS}}}",
)
"""Refused by the schema of the kind (`oneOf`), which `istioctl validate` does not ask."""

NOT_HERE = (
    "{egress: [{port: {number: 0, protocol: HTTP}, bind: 'unix:///a', hosts: ['*/*']}]}",
    "{egress: [{port: {number: 80, protocol: HTTP_PROXY}, hosts: ['*/*']}]}",
)
"""Valid, and refused by name: see `sidecar-sockets` in differences.yaml."""

CORPUS = {
    f"{kind.lower()}-{number}": (kind, group, spec)
    for kind, group, specs in (
        ("DestinationRule", "networking.istio.io/v1", RULES),
        ("ServiceEntry", "networking.istio.io/v1", ENTRIES),
        ("WorkloadEntry", "networking.istio.io/v1", WORKLOADS),
        ("Sidecar", "networking.istio.io/v1", SIDECARS),
        ("ProxyConfig", "networking.istio.io/v1beta1", PROXIES),
    )
    for number, spec in enumerate(specs)
}


def text_of(name: str) -> str:
    kind, group, spec = CORPUS[name]
    return resource(kind, spec, name=name, namespace="mlmesh", group=group)


def refused_here(name: str) -> bool:
    try:
        load_alone(text_of(name))
    except InvalidResource:
        return True
    return False


def test_what_istio_accepts_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "corpus.yaml").write_text("".join(text_of(name) for name in CORPUS))
    answer = tools.run("istioctl", "validate", "-f", tmp_path / "corpus.yaml")
    _, _, errors = answer.stderr.partition("Error:")  # before it there are warnings
    theirs = set(re.findall(r"\* \w+/mlmesh/([a-z]+-\d+):", errors)) | {
        name for name, (_, _, spec) in CORPUS.items() if spec in (*BY_SCHEMA, *NOT_HERE)
    }
    ours = {name for name in CORPUS if refused_here(name)}
    wrong = {name: CORPUS[name][2] for name in sorted(ours ^ theirs)}
    told = [f"{'refused' if name in ours else 'accepted'} here: {name} {spec}" for name, spec in wrong.items()]
    assert not told, "\n".join(told)


def test_the_corpus_has_both() -> None:
    refused = sum(refused_here(name) for name in CORPUS)
    assert 100 < refused < len(CORPUS) - 100, f"{refused} of {len(CORPUS)}"
