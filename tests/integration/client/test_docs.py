"""Every example of docs/client.md, run as it stands against a real server."""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
from pathlib import Path

from tests.support import onnx_models
from tests.support.inference import inference_server, onnx_engine, ready_model
from tests.support.special_models import summing_model

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _run(text: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(text, "docs/client.md", "exec"), {"__name__": "__main__"})  # noqa: S102
    return said.getvalue()


async def test_every_example_of_the_docs_runs(repository: Path, tmp_path: Path) -> None:
    blocks = _BLOCK.findall(await asyncio.to_thread((repository / "docs" / "client.md").read_text))
    engine = onnx_engine(tmp_path / "model.onnx", onnx_models.classes(count=10, width=64))
    said = []
    async with inference_server(ready_model(engine, name="digits"), summing_model()) as server:
        for block in blocks:
            assert "localhost:9000" in block
            said.append(await asyncio.to_thread(_run, block.replace("localhost:9000", server.address)))
    assert said == [
        "(2, 10) by version 1\n",
        f"{['1'] * 8}\n",
        "inputs[x].shape input 'x' takes shape [-1,64], got [1,2]\n",
        "1000\n",
        "1 connections, 0 moves\n",
        "[[1.]]\n[[2.]]\n[[3.]]\n",
        "True\n",
    ]
