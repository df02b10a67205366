"""The weights of a fitted model beside its ONNX file: what fine-tuning starts from. safetensors, which runs no code."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import nn

from mlmesh_training.trainer.reporter import PermanentError

WEIGHTS_FILE = "weights.safetensors"
MEDIA_TYPE = "application/vnd.safetensors"


def packed(model: nn.Module) -> bytes:
    """Parameters and buffers by name; tensors that share memory are written each for itself."""
    data: bytes = safetensors.torch.save({name: value.detach().clone() for name, value in model.state_dict().items()})
    return data


def load_into(model: nn.Module, path: Path) -> None:
    """Take over stored weights. Errors: PermanentError when they are missing, damaged or another network's."""
    try:
        found = safetensors.torch.load(path.read_bytes())
    except FileNotFoundError:
        raise PermanentError(f"the source has no {path.name}; only versions that were trained here have it") from None
    except SafetensorError as error:
        raise PermanentError(f"the source's {path.name} cannot be read: {error}") from error
    try:
        model.load_state_dict(found)
    except RuntimeError as error:
        raise PermanentError(f"the source's {path.name} is of another network: {error}") from error
