"""Figures and times as people read them."""

from __future__ import annotations

from datetime import UTC, datetime

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from rich.text import Text


def duration(seconds: float) -> str:
    """A length of time: 870 µs, 3.2 ms, 1.4 s, 2 min 5 s, 3 h 12 min, 4 d 2 h."""
    if seconds < 0:
        return "-" + duration(-seconds)
    if seconds < 0.000_999_5:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 0.999_5:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    for unit_s, unit, part_s, part in ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit_s:
            rest = whole % unit_s // part_s
            return f"{whole // unit_s} {unit}" + (f" {rest} {part}" if rest else "")
    return f"{whole} s"


def seconds(value: Duration) -> float:
    """A protobuf Duration in seconds."""
    return value.seconds + value.nanos / 1e9


def unix(value: Timestamp) -> float:
    """A protobuf Timestamp in seconds since 1970."""
    return value.seconds + value.nanos / 1e9


def until(value: Timestamp, now: datetime) -> str:
    """How long until a time: "in 23 h", or "expired 3 min ago"; "-" when it is not set. The smaller unit is dropped."""
    if not value.seconds:
        return "-"
    left = unix(value) - now.timestamp()
    return f"in {_coarse(left)}" if left >= 0 else f"expired {_coarse(-left)} ago"


def _coarse(seconds: float) -> str:
    return " ".join(duration(float(round(seconds))).split()[:2])


def ago(value: Timestamp, now: datetime) -> str:
    """How long ago a time was; "-" when it is not set."""
    if not value.seconds:
        return "-"
    past = max(now.timestamp() - unix(value), 0.0)
    return "now" if past < 1 else f"{duration(float(round(past)))} ago"


def clock(value: Timestamp) -> str:
    """The time of day, local, with milliseconds; "-" when it is not set."""
    if not value.seconds:
        return "-"
    local = datetime.fromtimestamp(unix(value), tz=UTC).astimezone()
    return local.strftime("%H:%M:%S.") + f"{local.microsecond // 1000:03d}"


def size(count: int) -> str:
    """Bytes: 512 B, 1.5 KiB, 3.2 MiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def percent(share: float) -> str:
    """A share from 0 to 1 in per cent; "-" when it is negative, that is, when none applies."""
    return "-" if share < 0 else f"{share * 100:.1f} %"


def bar(share: float, *, width: int = 20, style: str = "cyan") -> Text:
    """A horizontal bar for a share from 0 to 1, drawn in eighths of a cell."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    full, part = divmod(eighths, 8)
    drawn = "█" * full + (" ▏▎▍▌▋▊▉"[part] if part else "")
    return Text(drawn.ljust(width), style=style)


def last(name: str) -> str:
    """The last part of a resource name: "models/mnist/versions/3" → "3"."""
    return name.rsplit("/", 1)[-1]


def model_version(name: str) -> str:
    """A version's resource name, short: "models/mnist/versions/3" → "mnist/3"; other text as it is."""
    parts = name.split("/")
    return f"{parts[1]}/{parts[3]}" if len(parts) == 4 and parts[0] == "models" else name


def enum_name(prefix: str, name: str) -> str:
    """An enum value's name without its prefix, in lower case: JOB_STATE_RUNNING → running."""
    return name.removeprefix(prefix).lower().replace("_", " ")
