"""Range checks of configuration values, in one form."""

from collections.abc import Iterable, Iterator
from typing import Any


def range_errors(group: str, owner: Any, checks: Iterable[tuple[str, bool, str]]) -> Iterator[str]:
    """`group.name=value: what is legal` for each illegal value; `checks` are (name, whether it is legal, what is legal)."""
    for name, is_legal, legal in checks:
        if not is_legal:
            yield f"{group}.{name}={getattr(owner, name)}: {legal}"
