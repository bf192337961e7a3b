"""One process or several: the processes of a run, whatever a launcher has written into the
environment.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from omegaconf import DictConfig


def number_of_devices(trainer: DictConfig) -> int:
    """The number of devices on which a run is trained, with one process each.

    Args:
        trainer: the configuration of the trainer.
    """
    devices = trainer.devices
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return len(devices)
    if isinstance(devices, int) and devices > 0:
        return devices
    return 1 if trainer.accelerator == "cpu" else max(1, torch.cuda.device_count())


def is_first(trainer: DictConfig) -> bool:
    """Whether this is the process of its run that writes.

    A run on one device is one process. Ranks in the environment then belong to something else, e.g.
    to the tasks of a Slurm job, each with its own run. The processes of a run on several devices
    are numbered by the launcher that Lightning finds: torchrun, srun, or itself.
    """
    if number_of_devices(trainer) == 1:
        return True
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["RANK"]) == 0
    if "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return int(os.environ["SLURM_PROCID"]) == 0
    return int(os.environ.get("LOCAL_RANK", 0)) == 0
