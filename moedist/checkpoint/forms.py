"""In what forms a checkpoint holds the experts, so that a model can be built before it is loaded."""

from __future__ import annotations

from pathlib import Path

from moedist.checkpoint.store import stored_shapes
from moedist.errors import CheckpointError
from moedist.model import ExpertForm
from moedist.model.forms import forms_by_expert


def forms_of(checkpoint: Path) -> dict[int, dict[int, ExpertForm]]:
    """Layer -> expert -> form, read from the names and shapes of the tensors alone.

    Raises:
        CheckpointError: its index is damaged, or names tensors that make no expert.
    """
    try:
        return forms_by_expert(stored_shapes(checkpoint))
    except ValueError as error:
        raise CheckpointError(f"{checkpoint} holds experts in a form unknown here ({error}); open it with the version of "
                              "moedist that wrote it") from error
