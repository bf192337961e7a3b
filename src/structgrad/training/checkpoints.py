"""Checkpoints with a checksum, in a folder that may be moved."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import ModelCheckpoint

from structgrad.common.files import write_bytes
from structgrad.common.private import save_last
from structgrad.training.errors import RunError
from structgrad.training.folder import is_sealed, seal


class CheckedFiles(TorchCheckpointIO):
    """Writes a checkpoint completely or not at all, and refuses to read one that has changed since."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """See :func:`~structgrad.training.folder.seal`."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, seal(buffer.getvalue()))

    def load_checkpoint(self, path: str | Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Load a checkpoint. A changed file is a :class:`~structgrad.training.errors.RunError`."""
        file = Path(path)
        if not file.is_file() or not is_sealed(file):
            state = "damaged (its checksum does not match)" if file.exists() else "missing"
            raise RunError(f"checkpoint {file} is {state}; delete the folder {file.parent.parent} to start again")
        return super().load_checkpoint(path, *arguments, **options)


class BestAndLast(ModelCheckpoint):
    """Saves the last state after every validation, whether or not it is the best.

    Lightning's own callback saves the last state only together with a new best one. A run that is
    killed long after its best validation would repeat all steps since then. Files are remembered by
    name, so a run continues wherever its folder is moved.
    """

    _FILES = ("best_model_path", "kth_best_model_path", "last_model_path")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the best first, because the last state refers to it."""
        super().on_validation_end(trainer, pl_module)
        save_last(self, trainer)

    def state_dict(self) -> dict[str, Any]:
        """Lightning's state without the folder."""
        state = super().state_dict()
        return state | {
            "dirpath": "",
            "best_k_models": {Path(file).name: score for file, score in state["best_k_models"].items()},
            **{key: Path(state[key]).name for key in self._FILES},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load it with the folder in which the run lies now."""

        def here(name: str) -> str:
            return str(Path(str(self.dirpath)) / name) if name else ""

        super().load_state_dict(
            state_dict
            | {
                "dirpath": self.dirpath,
                "best_k_models": {here(name): score for name, score in state_dict["best_k_models"].items()},
                **{key: here(state_dict[key]) for key in self._FILES},
            }
        )
