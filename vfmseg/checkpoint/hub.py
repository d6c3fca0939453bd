"""Where a segmenter lies: a folder, or a repository of the hub that is fetched."""

from __future__ import annotations

import os
from pathlib import Path

from vfmseg.errors import CheckpointError


def local_segmenter(checkpoint: str | Path) -> Path:
    """The folder of a segmenter by path or hub id; CheckpointError if there is none."""
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        return path
    looks_like_path = path.is_absolute() or str(checkpoint).startswith((".", "~")) or str(checkpoint).count("/") != 1
    if looks_like_path or path.exists():
        found = "is a file" if path.exists() else "no such folder"
        raise CheckpointError(f"{checkpoint}: {found}; expected a segmenter folder such as runs/NAME/best")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(str(checkpoint)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise CheckpointError(
            f"{checkpoint}: no such folder here, and not to be had from the hub{offline}: {type(error).__name__}; "
            "check the name, or download it first"
        ) from None
