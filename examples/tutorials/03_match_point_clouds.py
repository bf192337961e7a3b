# %% [markdown]
# # Match two point clouds
#
# The second cloud is the first one, rotated, shifted, shuffled and noisy. Which point belongs to
# which, and what was the motion? Each question is easy if the other is answered. The latent
# variable is a `Matching`; its scores are minus the squared distances after the present estimate of
# the motion. The motion is learnt through the matching.

# %%
import matplotlib.pyplot as plt
import torch

from structgrad.common.pictures import BLUE, INK, RULE, VERMILION, line
from structgrad.estimators import SST
from structgrad.structures import Matching

STEPS = 200
N = 20

torch.manual_seed(0)
first = torch.randn(N, 2) * torch.tensor([1.6, 0.7])
turn, shift = 0.9, torch.tensor([0.8, -0.5])


def move(points, angle, shift):
    cos, sin = angle.cos(), angle.sin()
    return points @ torch.stack([torch.stack([cos, sin]), torch.stack([-sin, cos])]) + shift


truth = torch.randperm(N)
second = move(first, torch.tensor(turn), shift)[truth] + 0.03 * torch.randn(N, 2)

# %% [markdown]
# `Matching` has no closed-form relaxation. The Sinkhorn iterations, normalising rows and columns in
# turn, give a matrix whose rows and columns sum to one (a doubly stochastic one).

# %%
structure = Matching()
estimator = SST(structure, relaxation="sinkhorn", temperature=0.2)
angle, offset = torch.zeros((), requires_grad=True), torch.zeros(2, requires_grad=True)
optimizer = torch.optim.Adam([angle, offset], lr=0.05)
curve, frames = [], {}
for step in range(STEPS + 1):
    moved = move(first, angle, offset)
    scores = -torch.cdist(moved, second).square()[None]  # row: point of the first cloud; column: of the second

    def loss(vertices, rows, moved=moved):
        return (vertices @ second - moved).square().sum((-1, -2)) / N

    surrogate = estimator(scores, loss).surrogate.mean()
    optimizer.zero_grad()
    surrogate.backward()
    optimizer.step()
    found = structure.read(structure.argmax(scores.detach()[0]))
    curve.append((truth[found] == torch.arange(N)).float().mean().item())
    if step in (0, STEPS // 4, STEPS):
        frames[step] = (moved.detach(), found, curve[-1])
print(f"turn {turn:.2f}, found {angle.item():.2f}")
print(f"shift {[round(v, 2) for v in shift.tolist()]}, found {[round(v, 2) for v in offset.tolist()]}")
print(f"pairs that are right: {curve[0]:.0%} before, {curve[-1]:.0%} after")

# %% The moved first cloud (circles), the second (crosses) and the best matching over the course of training
figure, axes = plt.subplots(1, 4, figsize=(12, 3), layout="constrained")
for panel, (step, (moved, found, share)) in zip(axes, frames.items(), strict=False):
    for i in range(N):
        right = truth[found[i]] == i
        ends = torch.stack([moved[i], second[found[i]]]).T
        panel.plot(*ends, color=INK if right else VERMILION, linestyle="-" if right else ":", linewidth=1, zorder=1)
    panel.scatter(*moved.T, s=26, facecolors="white", edgecolors=BLUE, linewidths=1.4, zorder=2)
    panel.scatter(*second.T, s=26, marker="x", color=INK, zorder=2)
    panel.set(title=f"step {step}: {share:.0%} right", xticks=[], yticks=[], aspect="equal")
    panel.spines[:].set_color(RULE)
axes[3].plot(curve, **line(0))
axes[3].set(xlabel="step", ylabel="share of right pairs", ylim=(0, 1.02))
plt.show()

# %% [markdown]
# The noise of the estimator helps here: a sampled matching, instead of the best one, lets the
# motion leave a wrong start. Turns beyond a quarter of a circle may still end in a local optimum;
# more starts are the usual remedy.
