"""What each router needs beside the defaults, where tests go over all of them."""

from __future__ import annotations

from typing import Any

GIVEN: dict[str, dict[str, dict[str, Any]]] = {
    "switch": {"model": {"top_k": 1}},
    "shared_expert": {"model": {"shared_experts": 1}},
    "recurrent": {"router": {"options": {"state": 6}}},
}


def options_of(name: str) -> dict[str, dict[str, Any]]:
    """Sections of a configuration: `model` and `router`."""
    return GIVEN.get(name, {})
