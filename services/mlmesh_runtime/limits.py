"""Every bound of the runtime in one value. Nothing in a process grows without one of these."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of one server or channel. Times are seconds, sizes are bytes.

    A stuck reader of large messages pins about twenty of them in the transport before its writer is held back, so
    ``streams_per_peer_max`` times twenty messages is what one peer can make a server hold.
    """

    message_bytes_max: int = 16 * MIB
    """Largest message sent or received, after decompression. A larger one is RESOURCE_EXHAUSTED, no handler runs."""
    concurrent_rpcs_max: int = 1000
    """RPCs handled at once by a server, health and reflection apart; the next one is RESOURCE_EXHAUSTED."""
    streams_per_peer_max: int = 100
    """Streaming RPCs at once from one identity (or one address, where identities are unknown)."""
    stream_idle_s: float = 600.0
    """A request stream on which nothing moved for this long, in either direction, is ended. 0: never."""
    keepalive_time_s: float = 20.0
    """Idle time on a connection before it is pinged."""
    keepalive_timeout_s: float = 5.0
    """A ping unanswered for this long ends the connection: calls on it fail with UNAVAILABLE."""
    connection_age_s: float = 3600.0
    """TLS connections are replaced after this long, so a rotated certificate reaches everyone. Open calls finish."""
    retry_after_s: float = 1.0
    """What a caller is told to wait when a bound was reached."""
    watchers_max: int = 200
    """Health watchers at once."""


DEFAULT = Limits()
