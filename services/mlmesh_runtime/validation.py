"""protovalidate as errors of ours: names the field, what was expected and what came, never bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from google.protobuf.message import Message

from mlmesh_runtime.errors import FieldViolation, InvalidInput

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor

SHOWN_CHARS_MAX = 64

Check = Callable[[Message], None]


def checker(descriptors: list[Descriptor]) -> Check:
    """A function that raises InvalidInput for a message that breaks its rules.

    The rules of `descriptors` (message types of one service's requests) are compiled now, so that a wrong rule stops
    the process at its start and the first request is not slower than the next.
    """
    # Imported here: the CEL engine behind it takes long to import, and not every process validates.
    import protovalidate  # noqa: PLC0415
    from google.protobuf import message_factory  # noqa: PLC0415

    validator: Any = protovalidate.Validator()  # type: ignore[no-untyped-call]
    for descriptor in descriptors:
        validator.collect_violations(message_factory.GetMessageClass(descriptor)())

    def check(message: Message) -> None:
        if found := validator.collect_violations(message):
            violations = [
                FieldViolation(field=field_path(violation.proto.field), description=_describe(violation))
                for violation in found
            ]
            first = violations[0]
            text = f"{first.field}: {first.description}" if first.field else first.description
            if len(violations) > 1:
                text += f" (and {len(violations) - 1} more)"
            raise InvalidInput(text, field=first.field, violations=violations)

    return check


def field_path(path: Any) -> str:
    """A buf.validate.FieldPath as people write it: ``spec.layers[2].units``, ``labels["team"]``."""
    parts: list[str] = []
    for element in path.elements:
        text = element.field_name
        match element.WhichOneof("subscript"):
            case "index":
                text += f"[{element.index}]"
            case "string_key":
                text += f'["{element.string_key}"]'
            case "bool_key" | "int_key" | "uint_key" as kind:
                text += f"[{getattr(element, kind)}]"
        parts.append(text)
    return ".".join(parts)


def _describe(violation: Any) -> str:
    expected = violation.proto.message or violation.proto.rule_id
    if not violation.proto.HasField("field"):
        return str(expected)
    return f"{expected}; got {shown(violation.field_value)}"


def shown(value: Any) -> str:  # noqa: PLR0911  a table
    """A value as an error may show it: short text and numbers as they are, everything else by kind and size."""
    match value:
        case None:
            return "nothing"
        case bool() | int() | float():
            return repr(value)
        case str() if len(value) <= SHOWN_CHARS_MAX:
            return repr(value)
        case str():
            return f"{value[:SHOWN_CHARS_MAX]!r}… ({len(value)} characters)"
        case bytes() | bytearray() | memoryview():
            return f"{len(value)} bytes"
        case Message():
            return "nothing" if not value.ListFields() else f"a {value.DESCRIPTOR.name}"
        case _ if hasattr(value, "__len__"):
            return f"{len(value)} items"
        case _:
            return f"a {type(value).__name__}"
