"""The exporter on small real modules: several inputs, dynamic axes, names that clash, and models that may not pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from mlmesh_training import export  # noqa: E402
from mlmesh_training.trainer.definition import Axis, InUnits, WithProbabilities  # noqa: E402

STEPS = Axis(name="steps", low=2, high=64)


class Weighted(nn.Module):
    """Two inputs with a dynamic second dimension: values, and which of them count."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.head = nn.Linear(4, 3)

    def forward(self, values: Tensor, counted: Tensor) -> Tensor:
        weights = counted.to(values.dtype)[:, :, None]
        answers: Tensor = self.head((values * weights).sum(1) / weights.sum(1).clamp(min=1.0))
        return answers


def loaded(path: Path) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_several_inputs_with_further_dynamic_axes(tmp_path: Path) -> None:
    model = WithProbabilities(Weighted()).eval()
    names, axes = ("values", "counted"), {"values": {1: STEPS}, "counted": {1: STEPS}}
    inputs = [torch.rand(10, 9, 4), torch.ones(10, 9, dtype=torch.int64)]
    cases = export.cases(model, inputs, input_names=names, axes=axes)
    assert [tuple(each.shape[:2] for each in case.inputs) for case in cases] == [
        *(((size, 9),) * 2 for size in (1, 3, 64)),
        *(((3, steps),) * 2 for steps in (2, 5)),
        ((10, 9),) * 2,
    ]
    made = export.export(
        model, cases, tmp_path / "m.onnx", input_names=names, output_names=("logits", "probabilities"), axes=axes
    )
    assert [(each.name, each.datatype, each.shape) for each in made.inputs] == [
        ("values", "FP32", (-1, -1, 4)),
        ("counted", "INT64", (-1, -1)),
    ]
    assert [(each.name, each.shape) for each in made.outputs] == [("logits", (-1, 3)), ("probabilities", (-1, 3))]
    given = {"values": np.random.default_rng(1).random((5, 33, 4), np.float32), "counted": np.ones((5, 33), np.int64)}
    with torch.no_grad():
        expected = model(*map(torch.from_numpy, given.values()))[0].numpy()
    np.testing.assert_allclose(loaded(tmp_path / "m.onnx").run(["logits"], given)[0], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "relu", "add", "head.weight"])
def test_an_output_may_be_called_as_a_value_inside_of_the_model(tmp_path: Path, name: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            answers: Tensor = torch.relu(self.head(x)) + self.head(x)
            return answers

    model = Named().eval()
    cases = export.cases(model, [torch.rand(8, 3)], input_names=("x",))
    made = export.export(model, cases, tmp_path / "m.onnx", input_names=("x",), output_names=(name,))
    assert [each.name for each in made.outputs] == [name]
    graph = onnx.load(tmp_path / "m.onnx").graph
    written = [value for node in graph.node for value in node.output]
    assert len(set(written)) == len(written)


def test_an_output_called_as_an_input_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(3, 3).eval()
    cases = export.cases(model, [torch.rand(8, 3)], input_names=("x",))
    with pytest.raises(export.ExportError, match="both called x"):
        export.export(model, cases, tmp_path / "m.onnx", input_names=("x",), output_names=("x",))
    assert list(tmp_path.iterdir()) == []


def test_a_regressor_answers_in_the_unit_of_its_target_within_its_own_tolerance(tmp_path: Path) -> None:
    class Line(nn.Module):
        target_mean: Tensor
        target_std: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(2, 1)
            self.register_buffer("target_mean", torch.tensor(5e4))
            self.register_buffer("target_std", torch.tensor(1e4))

        def forward(self, row: Tensor) -> Tensor:
            values: Tensor = self.line(row).squeeze(1)
            return values

    inner = Line().eval()
    model = InUnits(inner).eval()
    rows = torch.rand(30, 2)
    cases = export.cases(model, [rows], input_names=("row",))
    made = export.export(
        model, cases, tmp_path / "m.onnx", input_names=("row",), output_names=("value",), difference_max=10.0
    )
    assert [(each.name, each.shape) for each in made.outputs] == [("value", (-1,))]
    value = loaded(tmp_path / "m.onnx").run(None, {"row": rows.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(value, inner(rows).numpy() * 1e4 + 5e4, rtol=1e-6)
    data = (tmp_path / "m.onnx").read_bytes()
    off = [
        export.Case(inputs=each.inputs, outputs=tuple(output + np.float32(11) for output in each.outputs))
        for each in cases
    ]
    with pytest.raises(export.ExportError, match="allowed are 10"):
        export.parity(data, off, difference_max=10.0)


def test_answers_that_are_not_finite_or_of_another_shape_do_not_pass(tmp_path: Path) -> None:
    model = nn.Linear(2, 2).eval()
    with torch.no_grad():
        model.weight.fill_(float("nan"))
    names: dict[str, Any] = {"input_names": ("x",), "output_names": ("y",)}
    cases = export.cases(model, [torch.rand(4, 2)], input_names=("x",))
    with pytest.raises(export.ExportError, match="not finite"):
        export.export(model, cases, tmp_path / "m.onnx", **names)
    with torch.no_grad():
        model.weight.fill_(1.0)
    good = export.cases(model, [torch.rand(4, 2)], input_names=("x",))
    wrong = [export.Case(inputs=each.inputs, outputs=(each.outputs[0][:, :1],)) for each in good]
    with pytest.raises(export.ExportError, match="shape"):
        export.export(model, wrong, tmp_path / "m.onnx", **names)


def test_what_the_exporter_cannot_express_is_said_in_a_line(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if float(x.sum()) > 1 else x

    model = Branching().eval()
    cases = export.cases(model, [torch.rand(4, 2)], input_names=("x",))
    with pytest.raises(export.ExportError, match="cannot express") as raised:
        export.export(model, cases, tmp_path / "m.onnx", input_names=("x",), output_names=("y",))
    assert "\n" not in str(raised.value)
