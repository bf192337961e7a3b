"""Prints the first steps of the sender of a communication game, to see why a run stays at chance.

    python scripts/sender_start.py data=caltech101 estimator=sparsemax

A line has the mean output of the sender's last sigmoids, and two standard deviations of its scores:
of their mean over the images (`common`), and around that mean (`images`). A sender that says the
same of every image can only grow out of the latter. Sigmoids with outputs near 0 or 1 pass hardly
any gradient. Arguments are overrides of task, data and estimator; there is no trainer.
"""

from __future__ import annotations

import sys

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from structgrad.commands import CONFIGS
from structgrad.tasks.communication_game import CommunicationGame
from structgrad.training.composition import assemble
from structgrad.training.errors import ConfigurationError, explain

#: The steps that are printed.
STEPS = (0, 1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300)


def main(overrides: list[str]) -> None:
    """Train for as many steps as are printed."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("config", ["task=communication_game", *overrides])
    torch.manual_seed(config.seed)
    task = assemble(config, dict(override.split("=", 1) for override in overrides))
    assert isinstance(task, CommunicationGame)
    task.prepare_data()
    batch = next(iter(task.batches("train")))
    seen: list[Tensor] = []

    def look(_: nn.Module, inputs: tuple[Tensor], scores: Tensor) -> None:
        seen[:] = inputs[0].detach(), scores.detach() / task.sender.temperature

    task.sender.score.register_forward_hook(look)
    optimizer = task.configure_optimizers()
    print("step  sigmoids  common   images")
    for step in range(STEPS[-1] + 1):
        loss = task.train().step(batch).loss
        if step in STEPS:
            sigmoids, scores = seen
            common = scores.mean(0)
            print(f"{step:4}  {sigmoids.mean():8.4f}  {common.std():.1e}  {(scores - common).std():.1e}", flush=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {explain(error, sys.argv[1:])}")
    except ConfigurationError as error:
        sys.exit(f"error: {error}")
