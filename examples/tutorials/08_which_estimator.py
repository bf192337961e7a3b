# %% [markdown]
# # Which estimator?
#
# An estimator of a gradient has a bias, a variance and a cost. `structgrad.diagnose` measures all
# three on a tiny problem whose true gradient is known by summing over all vertices. Here the
# problem is to choose 2 of 5 parts.

# %%
import matplotlib.pyplot as plt
import torch

from structgrad.common.pictures import MARKERS, colour, line
from structgrad.diagnose import Problem, diagnose
from structgrad.estimators import SST, Marginalize, Reinforce, StraightThrough
from structgrad.structures import KSubset

SAMPLES = 3000

structure = KSubset(2)
problem = Problem.make(structure, (5,), batch=2, seed=0)
estimators = {
    "dense sum": Marginalize(structure),
    "REINFORCE": Reinforce(structure),
    "REINFORCE, 4 samples, leave one out": Reinforce(structure, baseline="loo", n_samples=4),
    "SST, temperature 0.2": SST(structure, temperature=0.2),
    "SST, temperature 1": SST(structure, temperature=1.0),
    "SST, straight-through": SST(structure, temperature=1.0, straight_through=True),
    "straight-through": StraightThrough(structure),
}
found = {}
print(f"{'':36} bias   variance  calls")
for name, estimator in estimators.items():
    torch.manual_seed(0)
    found[name] = diagnose(estimator.double(), problem, SAMPLES)
    quality = found[name].scores
    print(f"{name:36} {quality.bias:5.2f}  {quality.variance:8.2f}  {found[name].decoder_calls:5.0f}")

# %% [markdown]
# Bias and variance are relative to the norm of the true gradient. A relative bias of 1 means that
# the mean estimate is as far from the truth as no estimate at all. A measured bias is never exactly
# 0: for an unbiased estimator it is about the square root of variance / samples.

# %% Bias against variance; the area of a point grows with the number of decoder calls
figure, axes = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
for index, (name, measured) in enumerate(found.items()):
    quality = measured.scores
    place = (max(quality.variance, 1e-3), max(quality.bias, 1e-3))
    look = {"color": colour(index), "marker": MARKERS[index], "alpha": 0.8}
    axes.scatter(*place, s=40 * measured.decoder_calls, label=name, **look)
axes.set(xscale="log", yscale="log", xlabel="relative variance (1e-3: none)", ylabel="relative bias (1e-3: none)")
axes.grid(alpha=0.3)
figure.legend(loc="outside right upper", frameon=False, fontsize=8, markerscale=0.6)
plt.show()

# %% [markdown]
# The temperature of a relaxation trades bias against variance. The command `structgrad-diagnose`
# draws this curve too:

# %% Bias and variance of SST over its temperature
temperatures = [0.1, 0.2, 0.5, 1.0, 2.0, 5.0]
over = [diagnose(SST(structure, temperature=t).double(), problem, SAMPLES).scores for t in temperatures]
figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
axes.plot(temperatures, [q.bias for q in over], marker="o", label="relative bias", **line(0))
axes.plot(temperatures, [q.variance for q in over], marker="s", label="relative variance", **line(1))
axes.set(xscale="log", yscale="log", xlabel="temperature")
axes.legend(frameon=False)
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# If the sum over all vertices is affordable, take it. If the decoder is differentiable, begin with
# SST and search the temperature. If it is a black box, take REINFORCE with several samples and
# leave-one-out baselines. [Estimators](../estimators/README.md) has all of them.
