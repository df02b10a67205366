from __future__ import annotations

import json

import grpc
import pytest
import typer

from mlmesh_cli.errors import CliError, ExitCode, leaves, not_running, usage_error
from mlmesh_cli.options import OutputFormat
from mlmesh_cli.terminal import Terminal, run
from mlmesh_runtime.config import ConfigError
from mlmesh_runtime.errors import Corrupt
from tests.unit.cli.conftest import FakeMesh, abort


def test_each_kind_of_problem_has_its_exit_code() -> None:
    assert usage_error("x").exit_code == ExitCode.USAGE
    assert not_running("y").exit_code == ExitCode.NOT_RUNNING
    assert CliError("z").exit_code == ExitCode.FAILED


def test_leaves_of_nested_groups() -> None:
    one, two = ValueError("1"), KeyError("2")
    assert list(leaves(ExceptionGroup("a", [one, ExceptionGroup("b", [two])]))) == [one, two]


def _run(error: BaseException, output: OutputFormat, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    async def main() -> None:
        raise error

    with pytest.raises(typer.Exit) as ended:
        run(Terminal(output), main)
    return ended.value.exit_code, capsys.readouterr().err


def test_a_problem_is_a_line_and_its_hint_another(capsys: pytest.CaptureFixture[str]) -> None:
    code, err = _run(CliError("it broke [really]", "mend it"), OutputFormat.TABLE, capsys)
    assert code == 1
    assert err.splitlines() == ["error: it broke [really]", "hint:  mend it"]


def test_a_problem_is_json_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    code, err = _run(not_running("here"), OutputFormat.JSON, capsys)
    assert code == 3
    error = json.loads(err)["error"]
    assert error["reason"] == "MESH_NOT_RUNNING"
    assert error["exit_code"] == 3
    assert "mlmesh up" in error["hint"]
    _, err = _run(CliError("a.yaml:1: one\n       a.yaml:2: two"), OutputFormat.JSON, capsys)
    assert json.loads(err)["error"]["problems"] == ["a.yaml:1: one", "a.yaml:2: two"]


def test_a_problem_inside_a_task_group_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    code, err = _run(ExceptionGroup("tasks", [CliError("inner")]), OutputFormat.TABLE, capsys)
    assert (code, err) == (1, "error: inner\n")


def test_ctrl_c_is_130_without_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(KeyboardInterrupt(), OutputFormat.TABLE, capsys) == (130, "")


def test_a_missing_file_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, err = _run(FileNotFoundError(2, "No such file or directory", "/x"), OutputFormat.TABLE, capsys)
    assert (code, err) == (1, "error: No such file or directory: /x\n")


def test_errors_of_the_runtime_are_told_in_the_same_way(capsys: pytest.CaptureFixture[str]) -> None:
    code, err = _run(Corrupt("the bytes differ", reason="DIGEST_MISMATCH"), OutputFormat.TABLE, capsys)
    assert (code, err) == (1, "error: the bytes differ\n")
    code, err = _run(ConfigError("channel target: no port"), OutputFormat.TABLE, capsys)
    assert code == 2
    assert "MLMESH_*_TARGET" in err
    code, err = _run(TimeoutError(), OutputFormat.TABLE, capsys)
    assert code == 1
    assert "took too long" in err


def test_a_defect_of_ours_is_not_hidden() -> None:
    async def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(Terminal(OutputFormat.TABLE), main)


def test_a_refused_call_tells_code_reason_and_what_to_do(mesh: FakeMesh) -> None:
    mesh.registry["GetModel"] = lambda _request, context: abort(
        context, grpc.StatusCode.NOT_FOUND, "no model 'x'", reason="MODEL_NOT_FOUND"
    )
    result = mesh.run("models", "show", "x")
    assert result.exit_code == 1
    assert "NOT_FOUND: no model 'x'" in result.stderr
    assert "mlmesh models list" in result.stderr


def test_fields_at_fault_are_named(mesh: FakeMesh) -> None:
    mesh.training["CreateJob"] = lambda _request, context: abort(
        context,
        grpc.StatusCode.INVALID_ARGUMENT,
        "the job is not valid",
        reason="INVALID_FIELD",
        violations=[("spec.hyperparameters['epochs']", "must be from 1 to 500, got 0")],
    )
    result = mesh.run("train", "--set", "epochs=0")
    assert result.exit_code == 1
    assert "spec.hyperparameters['epochs']: must be from 1 to 500, got 0" in result.stderr
