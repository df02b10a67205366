"""Built-in steps by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.pipelines.steps import audio, images, ocr, scores, texts
from mlmesh_inference.pipelines.steps.base import BuiltIn, Options

PREFIX: Final = "mlmesh."

STEPS: Final[Mapping[str, Callable[[Options], BuiltIn]]] = MappingProxyType(
    {
        "mlmesh.audio-frames": audio.FramesStep,
        "mlmesh.classes": scores.ClassesStep,
        "mlmesh.ctc": ocr.CtcStep,
        "mlmesh.decode": images.DecodeStep,
        "mlmesh.image": images.ImageStep,
        "mlmesh.mean-pool": texts.MeanPoolStep,
        "mlmesh.speech": audio.SpeechStep,
        "mlmesh.text-boxes": ocr.BoxesStep,
        "mlmesh.text-crops": ocr.CropsStep,
        "mlmesh.text-input": ocr.DetectInputStep,
        "mlmesh.tokenize": texts.TokenizeStep,
    }
)


def build_step(name: str, parameters: Mapping[str, str], folder: Path) -> BuiltIn:
    """A step for a version. Blocking: it may read the version's files.

    Args:
        name: "mlmesh.NAME", or "mlmesh.NAME:LABEL" where a graph has two of a kind with different options.
        parameters: of the configuration; those that begin with `name` and a dot are its options.

    Raises:
        EngineError: there is no such step, an option is wrong, a file or a library is missing.
    """
    kind = STEPS.get(name.partition(":")[0])
    if kind is None:
        raise EngineError(f"there is no built-in step '{name}'; there are {', '.join(STEPS)}")
    try:
        step = kind(Options.of(name, parameters, folder))
    except ImportError as error:
        raise EngineError(f"step '{name}' needs {error.name}, which is not installed: mlmesh[pipelines]") from error
    step.name = name
    return step
