"""Step 4, traffic: the shift, the user who sees v2, the replica that dies."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from mlmesh.local.v1 import local_pb2
from mlmesh_cli.connection import CLIENT_WORKLOAD, CONTROL_DEADLINE_S, find_instance
from mlmesh_cli.demo.story import Story
from mlmesh_cli.demo.tables import shift_table, traffic_table
from mlmesh_cli.demo.traffic import OpenStream, Phase, Traffic
from mlmesh_cli.errors import CliError
from mlmesh_cli.inferring import infer_unary
from mlmesh_cli.render import text as t

_REDRAW_S = 0.2
_RESTART_S = 60.0
_HANG_S = 0.2
# What faults.yaml asks for, and how much earlier Envoy lets a request go: of 2,400 delayed by 300 ms, 16 took less, the
# fastest 297.2 ms. (Its event loop likely counts a timer from when the present turn began.)
_DELAY_S, _TIMER_S = 0.3, 0.005

View = Callable[[], RenderableType]


async def shift(story: Story) -> None:
    """100/0 → 90/10 → 0/100 under traffic, with one stream open all the while."""
    scale, stub = story.scale, await story.connection.inference()
    await story.apply("split-100-0.yaml")
    traffic = Traffic(stub, story.queries, concurrency=scale.concurrency)
    stream = OpenStream(stub, story.queries)
    phases = [
        Phase(name="100/0", target=scale.before, share=0.0),
        Phase(name="90/10", target=scale.during, share=0.1),
        Phase(name="0/100", target=scale.after, share=1.0),
    ]
    files = ("", "split-90-10.yaml", "split-0-100.yaml")

    def view() -> RenderableType:
        done = sum(min(phase.requests, phase.target) for phase in phases)
        left = Text(f"  {done:,} of {scale.requests:,} requests") if done < scale.requests else Text("")
        bar = t.bar(done / scale.requests, width=60) + left if left else Text("")
        return Group(shift_table(phases, story.versions), bar)

    async with asyncio.TaskGroup() as group:
        group.create_task(stream.run())
        with _live(story, view) as live:
            async with traffic.running(Phase(name="warm-up")):
                redrawing = group.create_task(_redraw(live, view))
                for phase, file in zip(phases, files, strict=True):
                    if file:
                        # Requests sent while the change is on its way belong to neither side of it.
                        traffic.begin(Phase(name="changing"))
                        await story.apply(file)
                    traffic.begin(phase)
                    await traffic.reached(phase)
                rotated = await _rotate(story)
            redrawing.cancel()
            live.update(view(), refresh=True)
        stream.finish()
    _judge_shift(story, traffic, stream, phases, rotated)


async def _rotate(story: Story) -> int:
    """New certificates for every sidecar while the stream is open."""
    control = await story.connection.control()
    response = await control.RotateCertificates(local_pb2.RotateCertificatesRequest(), timeout=30)
    return int(response.rotated)


def _live(story: Story, view: View) -> Live:
    terminal = story.terminal
    return Live(view(), console=terminal.err if terminal.json else terminal.out, auto_refresh=False)


async def _redraw(live: Live, view: View) -> None:
    while True:
        await asyncio.sleep(_REDRAW_S)
        live.update(view(), refresh=True)


def _judge_shift(story: Story, traffic: Traffic, stream: OpenStream, phases: list[Phase], rotated: int) -> None:
    failures = traffic.failures
    story.check(
        "no request failed while traffic moved",
        not failures and traffic.requests >= story.scale.requests,
        f"{len(failures)} of {traffic.requests:,} failed" + (f", first: {failures[0]}" if failures else ""),
    )
    worst = max(abs(phase.observed(story.versions[1]) - phase.share) for phase in phases)
    story.check(
        "the observed share is the configured one",
        worst <= story.scale.share_tolerance,
        f"at most {worst * 100:.2f} points off; allowed {story.scale.share_tolerance * 100:.0f}",
    )
    pinned = len(stream.answers) == 1
    answers = ", ".join(f"{count} from version {version}" for version, count in sorted(stream.answers.items()))
    story.check(
        "an open stream outlived both changes and a rotation of all certificates",
        not stream.error and pinned and rotated > 0,
        stream.error or f"{answers}; {rotated} certificates rotated",
    )


async def one_user(story: Story) -> None:
    """A header decides."""
    await story.apply("header.yaml")
    stub = await story.connection.inference()
    ada = await infer_unary(stub, story.queries[:40], metadata=(("x-user", "ada"),), concurrency=4)
    bob = await infer_unary(stub, story.queries[:40], metadata=(("x-user", "bob"),), concurrency=4)
    first, second = story.versions
    seen = [sorted({answer.version or answer.error for answer in answers}) for answers in (ada, bob)]
    detail = f"ada: version {', '.join(seen[0])}; bob: version {', '.join(seen[1])}; 40 requests each"
    story.check("the header x-user: ada leads to v2, any other user to v1", seen == [[second], [first]], detail)
    await story.apply("split-100-0.yaml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """What the client's sidecar counted: requests tried again, and those of them that then went well."""

    retried: int
    rescued: int


async def retries(story: Story) -> Retries:
    """Reads the counters of the sidecar that this command calls through."""
    status = await story.connection.status()
    admin = find_instance(status, CLIENT_WORKLOAD).admin_address
    url = f"http://{admin}/stats?format=json&filter=upstream_rq_retry"

    def read() -> list[dict[str, object]]:
        with urllib.request.urlopen(url, timeout=CONTROL_DEADLINE_S) as response:
            stats = json.load(response)["stats"]
        return [stat for stat in stats if "inference.mlmesh" in str(stat.get("name", ""))]

    stats = await asyncio.to_thread(read)

    def total(name: str) -> int:
        return sum(int(str(stat["value"])) for stat in stats if str(stat["name"]).endswith(f".{name}"))

    return Retries(retried=total("upstream_rq_retry"), rescued=total("upstream_rq_retry_success"))


async def replica_dies(story: Story) -> None:
    """One of two replicas hangs for a moment and is killed, under traffic."""
    before = await retries(story)
    victim = await _replica(story, "inference-v1")
    stub = await story.connection.inference()
    traffic = Traffic(stub, story.queries, concurrency=story.scale.concurrency)
    calm = Phase(name="with two replicas", target=150)
    storm = Phase(name="after kill -9", target=story.scale.during // 4)
    async with traffic.running(calm):
        await traffic.reached(calm)
        traffic.begin(storm)
        # It hangs, then it dies: requests are under way in it, and its sidecar has to answer for it. Killed at once it
        # may be between two requests, and leave the mesh so quickly that nobody has to try again.
        os.kill(victim.application_pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(_HANG_S)
        finally:
            os.kill(victim.application_pid, signal.SIGKILL)
        await traffic.reached(storm)
        # A burst around the restart, too: the replica that comes back must not be asked before it is ready.
        revived = await _revived(story, victim)
    after = await retries(story)
    story.show(traffic_table([calm, storm]))
    failed = traffic.failures
    story.check(
        "nobody noticed that a replica was killed",
        not failed,
        f"{victim.name} killed (pid {victim.application_pid}); {len(failed)} of {traffic.requests:,} requests failed"
        + (f", first: {failed[0]}" if failed else ""),
    )
    tried = after.retried - before.retried
    detail = (
        f"{tried} attempts failed and were repeated elsewhere, {after.rescued - before.rescued} of them with success"
    )
    story.check("because the sidecar tried again on the other replica", tried > 0, detail)
    state = f"restarts {revived.restarts}, pid {revived.application_pid}"
    story.check("the supervisor started it again", revived.application_pid != victim.application_pid, state)


async def _replica(story: Story, workload: str) -> local_pb2.Instance:
    instance = find_instance(await story.connection.status(), workload)
    if not instance.application_pid:
        raise CliError(f"{instance.name} is not running", "its log in the state folder tells why")
    return instance


async def _revived(story: Story, victim: local_pb2.Instance) -> local_pb2.Instance:
    deadline = asyncio.get_running_loop().time() + _RESTART_S
    while asyncio.get_running_loop().time() < deadline:
        status = await story.connection.status()
        now = next(i for i in status.instances if i.name == victim.name)
        if now.state == local_pb2.INSTANCE_STATE_READY and now.application_pid not in (0, victim.application_pid):
            return now
        await asyncio.sleep(_REDRAW_S)
    raise CliError(
        f"{victim.name} did not come back within {_RESTART_S:.0f} s", "its log tells why", reason="NOT_READY"
    )


async def faults(story: Story) -> None:
    """Injected faults are shown as they are."""
    await story.apply("faults.yaml")
    before = await retries(story)
    stub = await story.connection.inference()
    delayed = await Traffic(stub, story.queries, concurrency=8, metadata=(("x-fault", "delay"),)).run(
        Phase(name="with x-fault: delay", target=40)
    )
    refused = await Traffic(stub, story.queries, concurrency=8, metadata=(("x-fault", "abort"),)).run(
        Phase(name="with x-fault: abort", target=200)
    )
    plain = await Traffic(stub, story.queries, concurrency=8).run(Phase(name="without a header", target=40))
    after = await retries(story)
    story.show(traffic_table([delayed, refused, plain]))
    fastest = min(delayed.latencies_s)
    felt = fastest >= _DELAY_S - _TIMER_S
    detail = f"fastest answer after {t.duration(fastest)}; {t.duration(_DELAY_S)} asked"
    story.check("an injected delay is felt in full", felt, detail)
    codes = sorted({failure.split(":")[0] for failure in refused.failures})
    share = len(refused.failures) / refused.requests
    # Retried like a real UNAVAILABLE, only an eighth would be left.
    story.check(
        "an injected abort is not retried, in Istio as here",
        0.35 < share < 0.65 and codes == ["UNAVAILABLE"] and after.retried == before.retried,
        f"{t.percent(share)} refused with {', '.join(codes) or 'nothing'}, half was asked for; "
        f"{after.retried - before.retried} retries",
    )
    story.check("requests without the header are spared", not plain.failures, f"0 of {plain.requests} failed")
    await story.apply("split-100-0.yaml")
