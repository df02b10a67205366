"""The bootstrap that a gRPC client reads from GRPC_XDS_BOOTSTRAP, as gRFC A27 and A29 describe it.

The certificates are files: gRPC looks at them again every `REFRESH_S` seconds, so new ones may be written over them.
"""

from __future__ import annotations

from typing import Any

from mlmesh_local.proxyless.clusters import PROVIDER
from mlmesh_local.proxyless.node import LABELS_FIELD, TOKEN_FIELD, TOLERATED_FIELD, ProxylessNode

BOOTSTRAP_FILE = "bootstrap.json"
CHAIN_FILE = "cert-chain.pem"
KEY_FILE = "key.pem"
ROOTS_FILE = "root-cert.pem"
REFRESH_S = 10


def bootstrap(node: ProxylessNode, *, ads: str, folder: str) -> dict[str, Any]:
    """The bootstrap of a client whose certificates lie in ``folder``; ``ads`` is "host:port" of the control plane."""
    return {
        "xds_servers": [
            {"server_uri": ads, "channel_creds": [{"type": "insecure"}], "server_features": ["xds_v3"]},
        ],
        "node": {
            "id": node.id,
            "metadata": {
                "GENERATOR": "grpc",
                "NAMESPACE": node.namespace,
                "SERVICE_ACCOUNT": node.service_account,
                LABELS_FIELD: dict(node.labels),
                TOLERATED_FIELD: sorted(node.tolerated),
                TOKEN_FIELD: node.token,
            },
        },
        "certificate_providers": {
            PROVIDER: {
                "plugin_name": "file_watcher",
                "config": {
                    "certificate_file": f"{folder}/{CHAIN_FILE}",
                    "private_key_file": f"{folder}/{KEY_FILE}",
                    "ca_certificate_file": f"{folder}/{ROOTS_FILE}",
                    "refresh_interval": f"{REFRESH_S}s",
                },
            }
        },
    }
