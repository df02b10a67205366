"""A whole OpenStack Swift with its S3 API in one process: `python serve.py FOLDER` with Swift's own environment.

Account, container, object and proxy server listen on loopback ports of the system's choice; the rings have one device
with one replica. Prints the address of the S3 API, then serves until stdin closes. Nothing is written outside FOLDER,
whose file system must have user extended attributes. Started again in the same folder it has the same addresses.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import textwrap
from pathlib import Path

import eventlet

eventlet.patcher.monkey_patch(all=False, socket=True, select=True, time=True, thread=True)

from eventlet import wsgi  # noqa: E402
from swift.common import constraints, storage_policy, utils  # noqa: E402
from swift.common.ring import RingBuilder  # noqa: E402
from swift.common.wsgi import loadapp  # noqa: E402

BACKENDS = ("account", "container", "object")
BACKEND = """
    [DEFAULT]
    swift_dir = {folder}
    devices = {folder}/devices
    mount_check = false
    log_level = ERROR
    [pipeline:main]
    pipeline = {name}-server
    [app:{name}-server]
    use = egg:swift#{name}
    fallocate_reserve = 0
"""
PROXY = """
    [DEFAULT]
    swift_dir = {folder}
    log_level = ERROR
    [pipeline:main]
    pipeline = catch_errors cache s3api tempauth copy slo dlo proxy-server
    [app:proxy-server]
    use = egg:swift#proxy
    account_autocreate = true
    [filter:catch_errors]
    use = egg:swift#catch_errors
    [filter:cache]
    use = egg:swift#memcache
    memcache_servers = 127.0.0.1:{nobody}
    [filter:s3api]
    use = egg:swift#s3api
    s3_acl = false
    min_segment_size = 1
    [filter:tempauth]
    use = egg:swift#tempauth
    user_test_tester = testing .admin
    [filter:copy]
    use = egg:swift#copy
    [filter:slo]
    use = egg:swift#slo
    [filter:dlo]
    use = egg:swift#dlo
"""


def main(folder: Path) -> None:
    """Make rings and configurations, then serve."""
    (folder / "devices" / "one").mkdir(parents=True, exist_ok=True)
    (folder / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = tests\n")
    utils.set_swift_dir(str(folder))
    utils.validate_configuration()
    storage_policy.reload_storage_policies()
    constraints.reload_constraints()
    logging.getLogger().addHandler(logging.StreamHandler())
    ports_file = folder / "ports.json"
    ports = json.loads(ports_file.read_text()) if ports_file.exists() else {}
    sockets = {name: eventlet.listen(("127.0.0.1", ports.get(name, 0))) for name in (*BACKENDS, "proxy")}
    ports_file.write_text(json.dumps({name: socket.getsockname()[1] for name, socket in sockets.items()}))
    for name in BACKENDS:
        ring = RingBuilder(part_power=2, replicas=1, min_part_hours=0)
        port = sockets[name].getsockname()[1]
        where = {"ip": "127.0.0.1", "port": port, "replication_ip": "127.0.0.1", "replication_port": port}
        ring.add_dev({"id": 0, "region": 1, "zone": 1, "weight": 1.0, "device": "one", "meta": "", **where})
        ring.rebalance()
        ring.get_ring().save(str(folder / f"{name}.ring.gz"))
    for name, socket in sockets.items():
        text = PROXY if name == "proxy" else BACKEND
        path = folder / f"{name}-server.conf"
        path.write_text(textwrap.dedent(text.format(folder=folder, name=name, nobody=1)))
        app = loadapp(str(path), global_conf={"log_name": name})
        eventlet.spawn(wsgi.server, socket, app, log=open(os.devnull, "w"), log_output=False, max_size=64)  # noqa: SIM115
    sys.stdout.write(f"127.0.0.1:{sockets['proxy'].getsockname()[1]}\n")
    sys.stdout.flush()
    eventlet.tpool.execute(sys.stdin.read)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
