"""Whether bytes, read as a pickle from their beginning, would import or call something, or are one as a whole.

Nothing is unpickled. Text can be such a program (protocol 0 is ASCII), and so can the beginning of any other format,
when it was made for it. What opcodes take from the stack and leave there is told by the standard library's pickletools.
"""

import pickletools
import re

from mlmesh_registry.formats.source import Refused, Source, Walk

OPCODES_MAX = 100_000
_LINE_BYTES_MAX = 512
# "N.", an abbreviation at the beginning of a text, is a pickle of None.
_BYTES_MIN = 8
_NAME = re.compile(rb"[A-Za-z_][A-Za-z0-9_.]*")
_CALLS = frozenset({"REDUCE", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD"})
_IMPORTS = frozenset({"GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"})
_PAIRS = frozenset({"GLOBAL", "INST"})
_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_OPCODES = {ord(op.code): op for op in pickletools.opcodes}


class Stack:
    """How much is on the stack, and where the marks are. `move` is False where an unpickler would fail."""

    def __init__(self) -> None:
        self._depth = 0
        self._marks: list[int] = []

    def move(self, op: pickletools.OpcodeInfo) -> bool:
        """Do what an opcode does."""
        taken = len(op.stack_before)
        if pickletools.markobject in op.stack_before:
            if not self._marks:
                return False
            self._depth = self._marks.pop()
            taken = op.stack_before.index(pickletools.markobject)
        if self._depth - (self._marks[-1] if self._marks else 0) < taken:
            return False
        self._depth += len(op.stack_after) - taken
        if op.name == "MARK":
            self._depth -= 1
            self._marks.append(self._depth)
        return True


def walk(source: Source, size_bytes: int) -> Walk[None]:
    """Refuse what is *no* pickle in that sense; return when it is one."""
    stack, imported = Stack(), False
    for _ in range(OPCODES_MAX):
        op = _OPCODES.get((yield from source.take(1))[0])
        if op is None:
            raise Refused("no opcode")
        if op.name == "STOP":
            if stack.move(op) and (imported or (source.here == size_bytes >= _BYTES_MIN)):
                return
            raise Refused("only data, or less")
        if not (yield from _argument(source, op)) or not stack.move(op):
            raise Refused("no program")
        imported = imported or op.name in _IMPORTS
        if op.name == "INST" or (imported and op.name in _CALLS):
            return


def _argument(source: Source, op: pickletools.OpcodeInfo) -> Walk[bool]:
    if op.arg is None:
        return True
    if op.arg.n == pickletools.UP_TO_NEWLINE:
        for _ in range(2 if op.name in _PAIRS else 1):
            line = yield from source.line(_LINE_BYTES_MAX)
            if op.name in _PAIRS and not _NAME.fullmatch(line or b""):
                return False
        return True
    count = op.arg.n
    if count in _LENGTH_BYTES:
        count = int.from_bytes((yield from source.take(_LENGTH_BYTES[count])), "little")
    yield from source.skip(count)
    return True
