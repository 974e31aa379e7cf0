"""Why a file that a person wrote cannot be read, in the words of an error."""

from __future__ import annotations

import yaml


def unreadable(error: OSError | UnicodeDecodeError | yaml.YAMLError) -> str:
    """What is wrong, and of YAML where; without the numbers of the system and the names of a parser's buffers."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}"
    told = error.strerror if isinstance(error, OSError) else None
    return " ".join((told or str(error)).split())
