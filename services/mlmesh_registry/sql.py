"""The few pieces of SQL that SQLite and PostgreSQL spell differently, and text as the tables to search by have it."""

import sys
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

START_CHARS = 100
"""Characters of a value that its index holds."""


def folded(text: str) -> str:
    """Text as it is compared without case."""
    return text.casefold()


def after_all(start: str) -> str | None:
    """First text behind all that starts so, character by character; None where there is none."""
    stem = start.rstrip(chr(sys.maxunicode))
    if not stem:
        return None
    follower = ord(stem[-1]) + 1
    # No character of UTF-8 has a number from 0xD800 to 0xDFFF.
    return stem[:-1] + chr(0xE000 if follower == 0xD800 else follower)


class Unindexed(FunctionElement[Any]):
    """A column by which SQLite is not to look rows up: without statistics it takes any index for a good one."""

    inherit_cache = True

    def __init__(self, column: sa.ColumnElement[Any]) -> None:
        super().__init__(column)
        self.type = column.type


class Position(FunctionElement[int]):
    """Where a text holds another, from 1; 0 where it does not."""

    inherit_cache = True
    type = sa.Integer()


def _arguments(element: FunctionElement[Any], compiler: SQLCompiler, **kwargs: Any) -> str:
    return str(compiler.process(element.clauses, **kwargs))


@compiles(Unindexed)
def _plain(element: FunctionElement[Any], compiler: SQLCompiler, **kwargs: Any) -> str:
    return f"({_arguments(element, compiler, **kwargs)})"


@compiles(Unindexed, "sqlite")
def _unindexed(element: Unindexed, compiler: SQLCompiler, **kwargs: Any) -> str:
    return f"+({_arguments(element, compiler, **kwargs)})"


@compiles(Position)
def _position(element: Position, compiler: SQLCompiler, **kwargs: Any) -> str:
    return f"instr({_arguments(element, compiler, **kwargs)})"


@compiles(Position, "postgresql")
def _strpos(element: Position, compiler: SQLCompiler, **kwargs: Any) -> str:
    return f"strpos({_arguments(element, compiler, **kwargs)})"
