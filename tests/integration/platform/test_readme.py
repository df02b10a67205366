"""The README's commands are run, in its order, as a reader would type them."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

from tests.support.live_platform import HOST, ROOT, Platform
from tests.support.tools import require

README = (ROOT / "README.md").read_text()
SECTION = "## Operate with grpcurl"


def blocks(section: str) -> list[str]:
    """Shell blocks of a section."""
    text = README.split(section, 1)[1].split("\n## ", 1)[0]
    return re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)


def test_every_grpcurl_command_works(platform: Platform) -> None:
    require("grpcurl")
    found = blocks(SECTION)
    assert len(found) >= 6
    script = "set -euo pipefail\n" + "\n".join(found).replace("127.0.0.1:8443", platform.gateway)
    # A reader need not wait out a stream that follows; the deadline that ends it is the same.
    script = script.replace("-max-time 10 -cacert", "-max-time ${MAX_TIME:-10} -cacert")
    script = re.sub(r"^(call .*Watch(?:Models|ServedVersions))", r"MAX_TIME=3 \1", script, flags=re.MULTILINE)
    script = re.sub(r"^(call .*WatchJob)", r"MAX_TIME=60 \1", script, flags=re.MULTILINE)
    script = re.sub(r"^(call .*WatchStudy)", r"MAX_TIME=60 \1", script, flags=re.MULTILINE)
    path = Path(platform.folder) / "readme.sh"
    path.write_text(script)
    done = subprocess.run(
        ["bash", "-x", str(path)],
        cwd=platform.folder,
        env=platform.environment(),
        check=False,
        capture_output=True,
        text=True,
        timeout=150,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert '"status": "SERVING"' in done.stdout
    # Streams that follow end with the deadline, which is no success: that they followed is seen in what they printed.
    assert '"bookmark"' in done.stdout
    assert "JOB_STATE_SUCCEEDED" in done.stdout
    assert "mlmesh.inference.v1.InferenceControlService" in done.stdout


def test_the_client_in_the_readme_works(platform: Platform) -> None:
    """As printed, but for the address: nothing captures calls on a laptop."""
    example = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[0]
    direct = 'grpc.insecure_channel("inference.mlmesh.svc.cluster.local:9000")'
    assert direct in example
    through = f'grpc.insecure_channel("{platform.outbound()}", [("grpc.default_authority", "{HOST}:9000")])'
    done = subprocess.run(
        [sys.executable, "-c", example.replace(direct, through)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"1 [0-9]\n", done.stdout)


def test_every_control_rpc_is_shown() -> None:
    from mlmesh.inference.v1 import control_pb2
    from mlmesh.local.v1 import local_pb2
    from mlmesh.registry.v1 import registry_pb2
    from mlmesh.training.v1 import training_pb2

    shown = "\n".join(blocks(SECTION))
    # Bytes are not typed by hand, a status that repeats is shown by its single form, and Shutdown ends the mesh.
    elsewhere = {
        "StartUpload", "UploadChunks", "GetUpload", "FinishUpload", "CancelUpload", "DownloadBlob", "WatchStatus",
        "Shutdown", "GetTrace", "AddModelVersionSignature",
    }  # fmt: skip
    for file in (control_pb2, registry_pb2, training_pb2, local_pb2):
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                assert method.name in elsewhere or method.name in shown, f"the README does not show {method.full_name}"


def test_every_variable_is_documented() -> None:
    known = runpy.run_path(str(ROOT / "tools" / "configuration.py"))
    assert known["PAGE"].read_text() == known["page"](), "run `python tools/configuration.py`"
    assert "docs/configuration.md" in README
    declared = {
        path.relative_to(root).with_suffix("").as_posix().replace("/", ".")
        for root in (ROOT / "services", ROOT / "mesh")
        for path in root.rglob("config.py")
        if "\nVARIABLES: tuple" in path.read_text()
    }
    assert declared == set(known["MODULES"])
