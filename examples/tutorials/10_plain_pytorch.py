# %% [markdown]
# # In a plain PyTorch loop
#
# Structures and estimators are ordinary functions and modules. This page puts them into a loop of
# your own, compiles the step, runs it in mixed precision, and on two processes. The model chooses 3
# of 12 numbers so that their sum is a given one.

# %%
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from structgrad.estimators import SST
from structgrad.structures import KSubset

STEPS = 300


class Chooser(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, 12))
        self.estimator = SST(KSubset(3), temperature=0.5)

    def forward(self, numbers, wanted):
        scores = self.encoder(torch.cat([numbers, wanted[:, None]], 1))
        return self.estimator(scores, lambda x, rows: ((x * numbers[rows]).sum(-1) - wanted[rows]) ** 2)


def batch(size=256):
    numbers = torch.randn(size, 12)
    chosen = torch.rand(size, 12).argsort(-1) < 3
    return numbers, (numbers * chosen).sum(-1)


# %% [markdown]
# ## A loop
#
# In `train()` the vertices are relaxed samples. In `eval()` they are hard, so the error is that of
# a real choice.


# %%
def train(step, model):
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        step(*batch()).backward()
        optimizer.step()


def error(model):
    model.eval()
    with torch.no_grad():
        found = model(*batch(2000)).objective.mean().item()
    model.train()
    return found


torch.manual_seed(0)
model = Chooser()
before = error(model)
train(lambda *data: model(*data).surrogate.mean(), model)
print(f"squared error of a sampled choice: {before:.2f} before, {error(model):.2f} after")

# %% [markdown]
# ## torch.compile
#
# The whole step, estimator included, is one graph. `backend="aot_eager"` needs no compiler, so that
# this page runs everywhere; leave it out to have kernels generated.

# %%
torch.manual_seed(0)
model = Chooser()
compiled = torch.compile(lambda *data: model(*data).surrogate.mean(), backend="aot_eager", fullgraph=True)
train(compiled, model)
print(f"compiled: {error(model):.2f}")

# %% [markdown]
# ## Mixed precision
#
# Under autocast the encoder computes in bfloat16. Structures are exempt: sums over sets of vertices
# stay in float32.

# %%
torch.manual_seed(0)
model = Chooser()


def in_bfloat16(*data):
    with torch.autocast("cpu", torch.bfloat16):
        return model(*data).surrogate.mean()


train(in_bfloat16, model)
print(f"bfloat16: {error(model):.2f}")

# %% [markdown]
# ## Two processes
#
# `DistributedDataParallel` wraps the model, not the estimator. It is a script, started by
# `torchrun`.

# %%
script = """
import os
import torch
from torch import nn
from torch.distributed import destroy_process_group, get_rank, init_process_group
from torch.nn.parallel import DistributedDataParallel
from structgrad.estimators import SST
from structgrad.structures import KSubset

init_process_group("gloo")
torch.manual_seed(0)  # the same weights
encoder = DistributedDataParallel(nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, 12)))
estimator = SST(KSubset(3), temperature=0.5)
optimizer = torch.optim.Adam(encoder.parameters(), lr=3e-3)
torch.manual_seed(get_rank())  # other data and noise
for step in range(int(os.environ["STEPS"]) + 1):
    numbers = torch.randn(128, 12)
    wanted = (numbers * (torch.rand(128, 12).argsort(-1) < 3)).sum(-1)
    scores = encoder(torch.cat([numbers, wanted[:, None]], 1))
    estimate = estimator(scores, lambda x, rows: ((x * numbers[rows]).sum(-1) - wanted[rows]) ** 2)
    optimizer.zero_grad()
    estimate.surrogate.mean().backward()
    optimizer.step()
total = sum(p.detach().double().sum() for p in encoder.parameters())
print(f"process {get_rank()}: relaxed error {estimate.objective.mean():.2f}, sum of weights {total:.6f}")
destroy_process_group()
"""
with tempfile.TemporaryDirectory() as folder:
    Path(folder, "train.py").write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"{folder}/train.py"]
    run = subprocess.run(launch, env=os.environ | {"STEPS": str(STEPS)}, capture_output=True, text=True)
print("\n".join(sorted(run.stdout.splitlines())) or run.stderr)

# %% [markdown]
# Both processes end with the same weights, because gradients are averaged in every step. Runs of
# the library's tasks do all of this by options: [a GPU](../gpu.md), [runs](../runs.md).
