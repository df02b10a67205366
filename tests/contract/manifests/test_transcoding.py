"""The JSON overlay is what the tool makes of the rules and the protos, and the rules name what is there."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
import yaml

from tests.support import tools


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("transcoding", tools.ROOT / "tools" / "transcoding.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_file_is_fresh(tool: ModuleType) -> None:
    path = tool.OVERLAY / "transcoder.yaml"
    assert path.read_text() == tool.text(), "run: python tools/transcoding.py"


def test_every_rule_binds_what_its_path_names(tool: ModuleType) -> None:
    file = next(file for file in tool.descriptors().file if file.package == "inference" and file.service)
    messages = {f".inference.{message.name}": {field.name for field in message.field} for message in file.message_type}
    methods = {method.name: messages[method.input_type] for method in file.service[0].method}
    rules = yaml.safe_load((tool.OVERLAY / "http.yaml").read_text())
    assert len(rules) == 8
    for rule in rules:
        for binding in (rule, *rule.get("additional_bindings", [])):
            path = binding.get("get") or binding.get("post")
            named = {part[1:-1] for part in path.split("/") if part.startswith("{")}
            assert named <= methods[rule["selector"].rpartition(".")[2]], path
