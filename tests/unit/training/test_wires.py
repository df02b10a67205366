"""What workers report and print comes out at the agent, whole and in order, over real sockets and pipes."""

from __future__ import annotations

import io
import os

from mlmesh_training.backends.base import Died, Report
from mlmesh_training.jobs import JobPhase, LogLine
from mlmesh_training.trainer.fitting.wires import Exchange, Silent, _Whole
from mlmesh_training.trainer.reporter import Reporter


class Listener(Reporter):
    """Keeps reports."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())
        self.reports: list[Report | Died] = []

    def send(self, report: Report | Died) -> None:
        self.reports.append(report)


def test_reports_of_all_workers_come_whole_and_why_one_died_stays_with_the_agent() -> None:
    listener = Listener()
    with Exchange(2, listener) as exchange:
        worker = Reporter(_Whole(exchange.wires.reports))  # type: ignore[arg-type]
        sent = [LogLine(severity="info", message="x" * size) for size in (1, 16_000, 3)]
        for line in sent:
            worker.send(line)
        Silent().send(JobPhase.TRAINING)
        exchange.wires.reports.send(b"no report")
        worker.send(Died(reason="for good", permanent=True))
        worker.send(Died(reason="the other lost it"))
        exchange.flush()
        assert exchange.died == Died(reason="for good", permanent=True)
        assert listener.reports[:3] == sent
        (noted,) = listener.reports[3:]
        assert isinstance(noted, LogLine)
        assert "unreadable report of a worker" in noted.message


def test_prints_are_lines_with_their_rank_to_the_last_one_without_an_end() -> None:
    lines: list[bytes] = []
    with Exchange(2, Listener(), write=lines.append) as exchange:
        first, second = (pipe.fileno() for pipe in exchange.wires.prints)
        for end, data in ((first, b"a\nb"), (second, b"x\n"), (first, b"c\nlast words"), (second, b"\xff\r\n")):
            os.write(end, data)
    assert [line for line in lines if line.startswith(b"[rank 0]")] == [
        b"[rank 0] a\n",
        b"[rank 0] bc\n",
        b"[rank 0] last words\n",
    ]
    assert [line for line in lines if line.startswith(b"[rank 1]")] == [b"[rank 1] x\n", b"[rank 1] \xff\n"]


def test_a_flood_of_prints_holds_up_who_prints_and_loses_nothing() -> None:
    lines: list[bytes] = []
    with Exchange(1, Listener(), write=lines.append) as exchange:
        (pipe,) = exchange.wires.prints
        for number in range(5_000):
            os.write(pipe.fileno(), b"%d\n" % number)
    assert lines == [b"[rank 0] %d\n" % number for number in range(5_000)]
