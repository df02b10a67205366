"""Values of headers that Envoy sets: text with variables such as %DOWNSTREAM_REMOTE_ADDRESS%."""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_VARIABLE = re.compile(
    r"""%(?:
        %                                                  # a percent sign
      | [^%(]*%                                            # %NAME%
      | [^%(]*\(\ *(?:
            \[\ *"(?:[^"\\)]|\\.)*"(?:\ *,\ *"(?:[^"\\)]|\\.)*")*\ *\]\ *\)   # %NAME(["a", "b"])%
          | [^\[ )](?:[^\\)"]|\\.)*\)                      # %NAME(a)%
        )\ *%
    )""",
    re.VERBOSE | re.DOTALL,
)


def header_value_problem(value: str) -> str:
    """What is wrong with the value of a header, or empty: control characters, or a percent sign that is no variable."""
    if _CONTROL.search(value):
        return "the value of a header must not have control characters"
    place = value.find("%")
    while place >= 0:
        match = _VARIABLE.match(value, place)
        if match is None:
            return f'"{value}" has a percent sign that begins no variable such as %PROTOCOL%; write %% for the sign'
        place = value.find("%", match.end())
    return ""
