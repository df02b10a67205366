"""Where the machines of one fitting meet: nowhere when there is one, at the first of them when there are several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch._C._distributed_c10d import HashStore, PrefixStore
from torch.distributed.elastic.rendezvous.api import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from mlmesh_training.trainer.reporter import PermanentError

MEETING_S_MAX = 600
"""How long a machine waits for the others to come up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """The machines of a fitting, this one's number, and where the first of them listens."""

    count: int = 1
    rank: int = 0
    address: str = ""
    port: int = 0

    @classmethod
    def of(cls, count: int, environ: Mapping[str, str]) -> Machines:
        """As Kubeflow Trainer tells a pod in torchrun's variables. Errors: PermanentError when it does not."""
        if count == 1:
            return cls()
        try:
            return cls(
                count=count,
                rank=int(environ["PET_NODE_RANK"]),
                address=environ["PET_MASTER_ADDR"],
                port=int(environ["PET_MASTER_PORT"]),
            )
        except (KeyError, ValueError) as error:
            wanted = "PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT"
            raise PermanentError(f"{count} machines need {wanted} in the environment: {error!r}") from None

    def meet(self, run_id: str) -> RendezvousHandler:
        """The rendezvous of their agents."""
        if self.count == 1:
            return OneMachine(run_id)
        return StaticTCPRendezvous(self.address, self.port, self.rank, self.count, run_id, MEETING_S_MAX)


class OneMachine(RendezvousHandler):
    """The rendezvous of an agent that is alone: complete when asked for, without a socket that anybody could reach."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._store = HashStore()
        self._round = 0

    def get_backend(self) -> str:
        """Its name."""
        return "one-machine"

    def next_rendezvous(self) -> RendezvousInfo:
        """A new round with a store of its own for the agent."""
        self._round += 1
        # Workers meet through a file instead: this address is never used.
        return RendezvousInfo(PrefixStore(str(self._round), self._store), 0, 1, RendezvousStoreInfo("127.0.0.1", 0))

    def is_closed(self) -> bool:
        """Never."""
        return False

    def set_closed(self) -> None:
        """Nothing to close."""

    def num_nodes_waiting(self) -> int:
        """Nobody comes later."""
        return 0

    def get_run_id(self) -> str:
        """The job."""
        return self._run_id

    def shutdown(self) -> bool:
        """Nothing to end."""
        return True
