"""Where a run stands: what a checkpoint holds beside the learner's own files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.rl.errors import CheckpointError
from posttrain.rl.service.production import Batch, batch_from_json, batch_to_json

STATE_FILE = "state.json"
PENDING_FILE = "pending.jsonl"


@dataclass(slots=True, frozen=True)
class Progress:
    """Between two steps: everything up to ``step`` is trained, published and logged."""

    step: int = 0
    cursor: dict[str, Any] = field(default_factory=dict)
    """The data cursor after the last produced batch."""
    policy_version: int = 0
    pending: Sequence[Batch] = ()
    """Batches produced and not yet trained on (only where generation runs ahead, or at a stop)."""
    resumed: bool = False


def write(folder: Path, progress: Progress) -> None:
    """Write into a checkpoint folder; ``state.json`` last, because it marks the checkpoint as whole."""
    with (folder / PENDING_FILE).open("w", encoding="utf-8") as file:
        for batch in progress.pending:
            file.write(json.dumps(batch_to_json(batch), default=str) + "\n")
    state = {"step": progress.step, "policy_version": progress.policy_version, "cursor": progress.cursor}
    (folder / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")


def read(folder: Path) -> Progress:
    """Read what ``write`` wrote."""
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        pending = [
            batch_from_json(json.loads(line))
            for line in (folder / PENDING_FILE).read_text(encoding="utf-8").splitlines()
        ]
        return Progress(state["step"], state["cursor"], state["policy_version"], pending, resumed=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} cannot be resumed from ({error}); delete it to use the one before") from None
