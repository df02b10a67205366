"""The story, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mlmesh.local.v1 import local_pb2
from mlmesh_cli.apply import apply_documents, streams_follow
from mlmesh_cli.connection import Connection
from mlmesh_cli.demo.checks import Checks
from mlmesh_cli.inferring import Query
from mlmesh_cli.render import text as t
from mlmesh_cli.render.streams import moved_line
from mlmesh_cli.terminal import Terminal

_YAML = Path(__file__).parent
_PANEL_COLUMNS = 110


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large the story is told.

    Attributes:
        dataset: "mnist" or "digits".
        first, second: hyperparameters of the two trainings, the weaker first.
        before, during, after: requests sent at 100/0, at 90/10 and at 0/100.
        concurrency: requests in flight.
        share_tolerance: how far the observed share may be from the configured one.
    """

    dataset: str
    first: dict[str, float]
    second: dict[str, float]
    before: int
    during: int
    after: int
    concurrency: int
    share_tolerance: float

    @property
    def requests(self) -> int:
        """Requests of the whole shift, at least."""
        return self.before + self.during + self.after


FULL = Scale(
    dataset="mnist",
    first={"width": 2, "epochs": 1},
    second={"width": 12, "epochs": 4},
    before=1200,
    during=3200,
    after=1200,
    concurrency=12,
    share_tolerance=0.02,
)
# With a tenth of the requests chance alone moves the share by more than two points.
FAST = Scale(
    dataset="digits",
    first={"width": 2, "epochs": 4},
    second={"width": 8, "epochs": 8},
    before=150,
    during=500,
    after=150,
    concurrency=8,
    share_tolerance=0.06,
)


class Story:
    """What the steps share: where they print, the mesh, what they learned and claimed."""

    def __init__(self, *, terminal: Terminal, connection: Connection, scale: Scale) -> None:
        self.terminal = terminal
        self.connection = connection
        self.scale = scale
        self.checks = Checks()
        self.queries: Sequence[Query] = ()
        # Numbers of the two versions, the weaker first.
        self.versions: tuple[str, str] = ("1", "2")

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.scale.dataset

    def step(self, number: int, title: str, explanation: str) -> None:
        """Announces a step."""
        width = min(self.terminal.out.width, _PANEL_COLUMNS)
        heading = f"[bold]{number}. {title}[/bold]"
        panel = Panel(Text(explanation), title=heading, title_align="left", border_style="cyan", width=width)
        self.terminal.say(Group(Text(), panel))

    def tell(self, text: str) -> None:
        """A sentence between tables."""
        self.terminal.say(Text(f"» {text}", style="cyan"))

    def show(self, *renderables: RenderableType) -> None:
        """Tables and the like."""
        self.terminal.say(Group(*renderables))

    def check(self, claim: str, held: bool, detail: str = "") -> bool:
        """Notes a claim and prints it."""
        mark = Text("  ✓", style="bold green") if held else Text("  ✗", style="bold red")
        # Two columns, so that a long line goes on below its claim and not below the mark.
        line = Table.grid(padding=(0, 1, 0, 0))
        line.add_row(mark, Text.assemble(claim, (f"  ({detail})" if detail else "", "dim")))
        self.terminal.say(line)
        return self.checks.add(claim, held, detail)

    async def apply(self, name: str) -> local_pb2.ApplyResponse:
        """Applies one of the story's YAML files, as `mlmesh apply` does."""
        path = _YAML / name
        response = await apply_documents(await self.connection.control(), [(path, path.read_text())])
        acked = f"{response.acked_sidecars} of {response.connected_sidecars} sidecars"
        took = t.duration(t.seconds(response.ack_latency))
        self.tell(f"mlmesh apply -f {name}: acknowledged by {acked} in {took}")
        moved = await streams_follow(self.connection, response)
        if moved is not None and moved.streams:
            self.tell(f"streams follow the weights: {moved_line(moved)}")
        return response
