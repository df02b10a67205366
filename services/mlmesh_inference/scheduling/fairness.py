"""Who is next within one priority level: tenants by start-time fair queueing, each tenant's requests by deadline.

Start-time fair queueing (P. Goyal, H. M. Vin, H. Cheng, SIGCOMM 1996), in rows instead of bytes: every tenant has a
start tag; the tenant with the least one is next, and its tag grows by the rows it got. A tenant that had nothing
waiting begins at the level's virtual time (the least tag of those that wait), so nobody saves up service. While two
tenants both wait, what they got differs by no more than the largest request of the one plus that of the other,
whatever either offers.

When there is no room, the tenant that holds most gives way (longest queue drop: B. Suter, T. V. Lakshman,
D. Stiliadis, A. K. Choudhury, INFOCOM 1998), so one that floods the queue cannot keep the others out.

A request costs a few binary searches and heap steps. Inserting into a sorted list also shifts 8 bytes for each request
behind it, which at a thousand of them is a tenth of a microsecond.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Final

from mlmesh_inference.running import Sink, Work

_IDLE_TENANTS_MAX: Final = 1024
"""Tenants remembered although nothing of theirs waits."""


@dataclass(slots=True, eq=False)
class Pending:
    """A request that waits. Times are nanoseconds of the batcher's clock.

    Attributes:
        shape_key: requests of one batch agree in it.
        rows: of the work. level: its priority level.
        arrived_ns: when it came. latest_ns: a run that begins later is in vain; 0: never in vain.
        order_ns: of two requests of one tenant the one with the smaller value goes first.
        serial: number of the request in this queue; the queue sets it.
        expected_ns: when it was foreseen to be answered; 0 when nobody looked.
    """

    work: Work
    sink: Sink
    shape_key: Hashable
    arrived_ns: int
    rows: int = 1
    level: int = 1
    latest_ns: int = 0
    order_ns: int = 0
    serial: int = 0
    expected_ns: float = 0.0


_Entry = tuple[int, int, Pending]
"""(-order, -serial, request): sorted lists of these end with the request that goes first."""


class _Tenant:
    """Requests of one tenant, and what it got."""

    __slots__ = ("items", "lanes", "listed", "name", "rows", "serial", "start")

    def __init__(self, name: str, serial: int) -> None:
        self.name = name
        self.serial = serial
        self.start = 0
        self.rows = 0
        self.items: list[_Entry] = []
        self.lanes: dict[Hashable, list[_Entry]] = {}
        self.listed = False


_Heap = list[tuple[int, int, _Tenant]]
"""(start tag, serial, tenant). A tag may have grown since; it never shrinks while the tenant is in a heap."""


class _Group:
    """Tenants that have requests of one shape key."""

    __slots__ = ("heap", "members", "waiting")

    def __init__(self) -> None:
        self.heap: _Heap = []
        self.members: set[int] = set()
        self.waiting = 0


class FairLevel:
    """The requests of one priority level."""

    def __init__(self) -> None:
        self.rows = 0
        self.count = 0
        self._virtual = 0
        self._serial = 0
        self._tenants: dict[str, _Tenant] = {}
        self._active = 0
        self._everyone: _Heap = []
        self._groups: dict[Hashable, _Group] = {}
        self._by_size: dict[int, dict[int, _Tenant]] = {}
        self._most = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Pending]:
        for tenant in self._tenants.values():
            for entry in reversed(tenant.items):
                yield entry[2]

    @property
    def tenants(self) -> int:
        """Tenants with something waiting."""
        return self._active

    def add(self, item: Pending) -> None:
        """Queue a request."""
        tenant = self._tenants.get(item.work.tenant)
        if tenant is None:
            tenant = self._new_tenant(item.work.tenant)
        entry = (-item.order_ns, -item.serial, item)
        if not tenant.items:
            self._active += 1
            tenant.start = max(tenant.start, self._virtual)
            if not tenant.listed:
                tenant.listed = True
                heapq.heappush(self._everyone, (tenant.start, tenant.serial, tenant))
        insort(tenant.items, entry)
        self._lane(tenant, item.shape_key, entry)
        tenant.rows += item.rows
        self.rows += item.rows
        self.count += 1
        self._resized(tenant, len(tenant.items) - 1)

    def _lane(self, tenant: _Tenant, key: Hashable, entry: _Entry) -> None:
        lane = tenant.lanes.get(key)
        if lane is None:
            tenant.lanes[key] = [entry]
        else:
            insort(lane, entry)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group()
        group.waiting += 1
        if tenant.serial not in group.members:
            group.members.add(tenant.serial)
            heapq.heappush(group.heap, (tenant.start, tenant.serial, tenant))

    def _new_tenant(self, name: str) -> _Tenant:
        if len(self._tenants) - self._active >= _IDLE_TENANTS_MAX:
            # Whoever is not ahead of virtual time begins there anyway; of the others it is the bound that counts.
            self._tenants = {known: tenant for known, tenant in self._tenants.items() if tenant.items}
        self._serial += 1
        tenant = self._tenants[name] = _Tenant(name, self._serial)
        return tenant

    def first(self) -> Pending | None:
        """The request that goes first, None when nothing waits."""
        heap = self._everyone
        while heap:
            start, serial, tenant = heap[0]
            if not tenant.items:
                heapq.heappop(heap)
                tenant.listed = False
            elif start != tenant.start:
                heapq.heapreplace(heap, (tenant.start, serial, tenant))
            else:
                self._virtual = start
                return tenant.items[-1][2]
        return None

    def first_of(self, key: Hashable) -> Pending | None:
        """The request with this shape key that goes first, None when there is none."""
        group = self._groups.get(key)
        if group is None:
            return None
        heap = group.heap
        while True:  # a group goes with its last request
            start, serial, tenant = heap[0]
            lane = tenant.lanes.get(key)
            if lane is None:
                heapq.heappop(heap)
                group.members.discard(serial)
            elif start != tenant.start:
                heapq.heapreplace(heap, (tenant.start, serial, tenant))
            else:
                return lane[-1][2]

    def take(self, item: Pending) -> None:
        """It runs: take it out, and charge its tenant."""
        tenant = self._tenants[item.work.tenant]
        tenant.start += item.rows or 1
        self._remove(tenant, item)

    def remove(self, item: Pending) -> None:
        """It leaves without running."""
        self._remove(self._tenants[item.work.tenant], item)

    def _remove(self, tenant: _Tenant, item: Pending) -> None:
        entry = (-item.order_ns, -item.serial, item)
        _discard(tenant.items, entry)
        key = item.shape_key
        lane = tenant.lanes[key]
        _discard(lane, entry)
        if not lane:
            del tenant.lanes[key]
        group = self._groups[key]
        group.waiting -= 1
        if not group.waiting:
            del self._groups[key]
        tenant.rows -= item.rows
        self.rows -= item.rows
        self.count -= 1
        if not tenant.items:
            self._active -= 1
        self._resized(tenant, len(tenant.items) + 1)

    def _resized(self, tenant: _Tenant, before: int) -> None:
        """Keep tenants by how many requests they hold, so that the one that holds most is known at once."""
        by_size, serial, now = self._by_size, tenant.serial, len(tenant.items)
        if before:
            bucket = by_size[before]
            del bucket[serial]
            if not bucket:
                del by_size[before]
        if now:
            by_size.setdefault(now, {})[serial] = tenant
            self._most = max(self._most, now)
        if self._most not in by_size:
            self._most = now  # nobody else held as many

    def longest(self) -> Pending | None:
        """The last request of the tenant that holds most, None when nothing waits."""
        bucket = self._by_size.get(self._most)
        return None if bucket is None else next(iter(bucket.values())).items[0][2]

    def held(self, tenant: str) -> int:
        """Requests that a tenant holds."""
        known = self._tenants.get(tenant)
        return 0 if known is None else len(known.items)

    @property
    def most_held(self) -> int:
        """Requests of the tenant that holds most."""
        return self._most

    def rows_ahead(self, item: Pending) -> int:
        """Rows of the level that run before this request would, if it were queued now; not more than that.

        Within its tenant, those of earlier deadlines; of the others, as many as fairness gives them meanwhile.
        """
        tenant = self._tenants.get(item.work.tenant)
        own, others, own_rows = 0, self._active, 0
        if tenant is not None and tenant.items:
            later = bisect_left(tenant.items, (-item.order_ns, -item.serial))
            own_rows, others = tenant.rows, others - 1
            own = own_rows * (len(tenant.items) - later) // len(tenant.items)
        return own + min(self.rows - own_rows, others * (own + (item.rows or 1)))


def _discard(entries: list[_Entry], entry: _Entry) -> None:
    """Take an entry out of a sorted list; mostly it is the last."""
    if entries[-1][2] is entry[2]:
        entries.pop()
    else:
        del entries[bisect_left(entries, entry[:2])]
