"""docs/protocol.md says what is so: the tests it names exist, and its lists are the code's."""

from __future__ import annotations

import re
from collections import defaultdict

from mlmesh_inference.oip.config_fields import CARRIED_OUT
from mlmesh_inference.oip.describe import EXTENSIONS
from mlmesh_inference.oip.servicer import METHODS
from open_inference import model_config_pb2
from tests.support.contract import ROOT

PAGE = (ROOT / "docs" / "protocol.md").read_text()


def _section(title: str) -> str:
    return PAGE.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_every_test_that_is_named_exists() -> None:
    named = set(re.findall(r"`(test_\w+)::(test_\w+)`", PAGE))
    assert len(named) > 40
    texts: dict[str, str] = defaultdict(str)
    for path in (ROOT / "tests").rglob("test_*.py"):
        texts[path.stem] += path.read_text()
    missing = [f"{file}::{name}" for file, name in sorted(named) if f"def {name}(" not in texts[file]]
    assert missing == []


def test_every_rpc_is_in_the_table() -> None:
    listed = {
        name for row in re.findall(r"^\| ([A-Z]\w+(?:, \w+)*) \|", _section("RPCs"), re.M) for name in row.split(", ")
    }
    assert listed - {"RPC"} == METHODS


def test_the_extensions_are_those_that_the_server_tells() -> None:
    text = " ".join(_section("RPCs").split("lists ", 1)[1].split(" where it", 1)[0].split())
    told = {name.strip(" ,") for name in re.split(r",| and ", text)}
    assert {name for name in told if name} == {*EXTENSIONS, "system_shared_memory"}


def test_every_field_of_a_configuration_is_in_the_table() -> None:
    section = _section("config.pbtxt")
    fields = {field.name for field in model_config_pb2.ModelConfig.DESCRIPTOR.fields}
    assert {name for name in fields if f"`{name}`" not in section} == set()
    refused = set(re.findall(r"`(\w+)`", section.split("| all others |", 1)[1]))
    assert refused == fields - CARRIED_OUT["ModelConfig"] | {"response_cache"}
