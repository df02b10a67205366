"""How the processes share a model: not at all, DDP, or FSDP2. The rest of the fitting sees no difference.

Batch normalisation normalises each process's part of a batch by itself, on CPU and GPU alike: SyncBatchNorm exists for
GPUs alone, and would make the same job learn differently on each. The running statistics are averaged over the
processes after each step, so that every process validates with, and every checkpoint keeps, the same ones. With such
layers the gradients of n processes and a batch of b are those of one process that accumulates n batches of b / n;
without them, those of one process and a batch of b.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from mlmesh_training.options import Strategy
from mlmesh_training.trainer.fitting.ranks import Ranks

State = dict[str, Any]

# torch 2.15 has a new name for it, and warns of the old one.
_NAMES = inspect.signature(DistributedDataParallel.__init__).parameters
_BUFFERS: Mapping[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers": False
}


class Shared(Protocol):
    """A model as one process holds it.

    Attributes:
        model: what is called to train.
        plain: what is called to evaluate.
    """

    model: nn.Module
    plain: nn.Module

    def accumulating(self, more: bool) -> contextlib.AbstractContextManager[None]:
        """Within it, gradients only add up here when more batches of the step follow."""
        ...

    def weights(self) -> State:
        """All weights and buffers, whole, on the CPU, as copies; at rank 0 (elsewhere maybe nothing). All call it."""
        ...

    def restore_weights(self, state: Mapping[str, Any]) -> None:
        """Take whole weights. Errors: RuntimeError for another model's."""
        ...

    def optimizer(self, optimizer: Optimizer) -> State:
        """The optimizer's whole state, at rank 0. All call it."""
        ...

    def restore_optimizer(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Take an optimizer's whole state."""
        ...


def share(model: nn.Module, strategy: Strategy, ranks: Ranks) -> Shared:
    """Spread a model that each process built alike."""
    model.to(ranks.device)
    if ranks.alone:
        return Whole(model, model)
    if strategy is Strategy.FSDP2:
        return Sharded(model, ranks)
    return Copied(model, ranks)


class Whole:
    """Every process holds all of the model: one process alone."""

    def __init__(self, model: nn.Module, plain: nn.Module) -> None:
        self.model = model
        self.plain = plain

    @contextlib.contextmanager
    def accumulating(self, more: bool) -> Iterator[None]:  # noqa: ARG002 - see `Shared`
        """Nothing to do."""
        yield

    def weights(self) -> State:
        """See `Shared`."""
        return {name: value.detach().to("cpu", copy=True) for name, value in self.plain.state_dict().items()}

    def restore_weights(self, state: Mapping[str, Any]) -> None:
        """See `Shared`."""
        self.plain.load_state_dict(state)

    def optimizer(self, optimizer: Optimizer) -> State:
        """See `Shared`."""
        return optimizer.state_dict()

    def restore_optimizer(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """See `Shared`."""
        optimizer.load_state_dict(dict(state))


class Copied(Whole):
    """DDP: every process holds all of the model, and gradients are averaged."""

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self._copied = DistributedDataParallel(
            model,
            device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None,
            # The running statistics are averaged instead, which uses what all processes saw.
            **_BUFFERS,
            gradient_as_bucket_view=True,
        )
        super().__init__(self._copied, model)

    @contextlib.contextmanager
    def accumulating(self, more: bool) -> Iterator[None]:
        """See `Shared`."""
        with self._copied.no_sync() if more else contextlib.nullcontext():
            yield


class Sharded:
    """FSDP2: each process holds a shard of every parameter, its gradient and its optimizer state.

    Each element of a module list (a transformer's layers) is gathered by itself while it computes, the rest at once.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415 - takes long, and only this needs it
        from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

        mesh = init_device_mesh(ranks.device.type, (ranks.world,))
        for module in list(model.modules()):
            if isinstance(module, nn.ModuleList):
                for each in module:
                    if any(True for _ in each.parameters()):
                        fully_shard(each, mesh=mesh)
        self.model: Any = fully_shard(model, mesh=mesh)
        self.plain: nn.Module = model

    @contextlib.contextmanager
    def accumulating(self, more: bool) -> Iterator[None]:
        """See `Shared`."""
        self.model.set_requires_gradient_sync(not more)
        yield

    def weights(self) -> State:
        """See `Shared`."""
        from torch.distributed.checkpoint.state_dict import (  # noqa: PLC0415
            StateDictOptions,
            get_model_state_dict,
        )

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        found = get_model_state_dict(self.model, options=options)
        return {name: cast("Tensor", value).detach().clone() for name, value in found.items()}

    def restore_weights(self, state: Mapping[str, Any]) -> None:
        """See `Shared`."""
        from torch.distributed.checkpoint.state_dict import (  # noqa: PLC0415
            StateDictOptions,
            set_model_state_dict,
        )

        set_model_state_dict(self.model, dict(state), options=StateDictOptions(full_state_dict=True))

    def optimizer(self, optimizer: Optimizer) -> State:
        """See `Shared`."""
        from torch.distributed.checkpoint.state_dict import (  # noqa: PLC0415
            StateDictOptions,
            get_optimizer_state_dict,
        )

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return dict(get_optimizer_state_dict(self.model, optimizer, options=options))

    def restore_optimizer(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """See `Shared`."""
        from torch.distributed.checkpoint.state_dict import (  # noqa: PLC0415
            StateDictOptions,
            set_optimizer_state_dict,
        )

        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(self.model, optimizer, dict(state), options=options)


def statistics(model: nn.Module) -> list[Tensor]:
    """The running statistics of a model's batch normalisations, the buffers themselves."""
    found: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, _NormBase) and module.track_running_stats:
            found += [each for each in (module.running_mean, module.running_var) if each is not None]
    return found


@torch.no_grad()
def averaging(totals: Tensor, buffers: list[Tensor], ranks: Ranks) -> Callable[[], None]:
    """Begin to sum `totals`, FP64 [n], over the processes and to average the buffers, in one message.

    Nobody may change either before the function that is returned has been called: it waits and takes the result over.
    """
    if ranks.alone:
        return lambda: None
    message = torch.cat([totals, *(each.flatten().double() for each in buffers)])
    wait = ranks.adding(message)

    @torch.no_grad()
    def finish() -> None:
        wait()
        first, *rest = torch.split(message, [len(totals), *(each.numel() for each in buffers)])
        totals.copy_(first)
        for buffer, total in zip(buffers, rest, strict=True):
            buffer.copy_((total / ranks.world).reshape(buffer.shape))

    return finish
