"""The resolved recipe as YAML with the origin of every value in a comment.

Knows  how to print. Rejected  ruamel.yaml for the comments: a dependency for two loops.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from lofi.recipe.source import Dumper


def resolved_yaml(values: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    """Every key on a line of its own: `  learning_rate: 0.0002  # file`."""
    lines = []
    for key, value in values.items():
        if key in origins:
            lines.append(_line("", key, value, origins[key]))
            continue
        lines.append(f"{key}:")
        lines += [_line("  ", leaf, inner, origins.get(f"{key}.{leaf}", "default")) for leaf, inner in value.items()]
    return "\n".join(lines) + "\n"


def _line(indent: str, key: str, value: Any, origin: str) -> str:
    text = yaml.dump([value], Dumper=Dumper, default_flow_style=True, allow_unicode=True, width=10**6, sort_keys=False)
    return f"{indent}{key}: {text.strip()[1:-1]}  # {origin}"  # dumped in a list: a bare scalar would end in "..."
