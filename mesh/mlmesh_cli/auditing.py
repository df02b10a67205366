"""The audit log checked on the reader's side: digests recomputed, the chain followed, nothing taken on trust."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.text import Text

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_cli.errors import CliError, usage_error
from mlmesh_cli.terminal import Terminal
from mlmesh_registry.audit import AuditEntry, broken_at
from mlmesh_registry.events import from_micros

if TYPE_CHECKING:
    from mlmesh.registry.v1.registry_pb2_grpc import ModelRegistryServiceAsyncStub

_PAGE = 1000
_NOTED = re.compile(r"([1-9]\d{0,17}):([0-9a-f]{64})", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted:
    """An entry that somebody wrote down."""

    sequence: int
    digest: str

    @classmethod
    def parse(cls, text: str) -> Noted:
        """Reads NUMBER:DIGEST. Raises CliError (exit code 2)."""
        found = _NOTED.fullmatch(text)
        if found is None:
            raise usage_error(f"--remembered wants NUMBER:DIGEST, not {text!r}", "as `mlmesh audit verify` prints it")
        return cls(sequence=int(found[1]), digest=found[2])


def entry_of(message: pb.AuditEntry) -> AuditEntry:
    """An entry as a value."""
    return AuditEntry(
        sequence=message.sequence,
        time=from_micros(message.time.ToMicroseconds()),
        actor=message.actor,
        method=message.method,
        resource=message.resource,
        detail=message.detail,
        previous_digest=message.previous_digest,
        digest=message.digest,
    )


async def verified_log(stub: ModelRegistryServiceAsyncStub, terminal: Terminal, noted: Noted | None) -> None:
    """Reads the whole log, checks it and prints its last entry.

    Raises:
        CliError: an entry was changed, removed or put in, or the noted one is not there as it was.
    """
    token, last = "", None
    seen = noted is None
    while True:
        page = await stub.ListAuditEntries(pb.ListAuditEntriesRequest(page_size=_PAGE, page_token=token))
        entries = [entry_of(message) for message in page.entries]
        if (broken := broken_at(entries, after=last)) is not None:
            raise CliError(
                f"the audit log is broken at entry {broken}: it, or the one before, is not what was written",
                "restore the database from a backup, and compare from there on",
                reason="AUDIT_LOG_BROKEN",
            )
        seen = seen or any((entry.sequence, entry.digest) == (noted.sequence, noted.digest) for entry in entries)  # type: ignore[union-attr]  # it is noted while it was not seen
        last = entries[-1] if entries else last
        token = page.next_page_token
        if not token:
            break
    if not seen:
        assert noted is not None  # noqa: S101
        raise CliError(
            f"entry {noted.sequence} is not there as it was noted: the log was cut off or written anew",
            "restore the database from a backup, and compare from there on",
            reason="AUDIT_LOG_BROKEN",
        )
    count, digest = (last.sequence, last.digest) if last else (0, "")
    line = Text(f"{count} entries, every one as it was written", style="green")
    if last:
        line.append(f"\nnote the last one: {count}:{digest}", style="default")
    terminal.show(line, {"entries": count, "last": f"{count}:{digest}" if last else "", "intact": True})
