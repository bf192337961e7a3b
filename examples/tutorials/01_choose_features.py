# %% [markdown]
# # Choose k features
#
# Ten of the 64 pixels of a digit must be enough to read it. Which ten? The latent variable is a
# *k-subset*: one score a pixel, and exactly k pixels are shown to the classifier. The scores learn
# from the classifier's loss alone.
#
# Two estimators are compared: `SST`, a relaxation that differentiates the classifier, and
# `Reinforce`, which only looks at the value of the loss.

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from structgrad.common.pictures import line
from structgrad.estimators import SST, Reinforce
from structgrad.structures import KSubset

K = 10
STEPS = 1000
EVERY = 50

digits = load_digits()
x = torch.tensor(digits.data / 16, dtype=torch.float32)  # [1797, 64], ink from 0 to 1
y = torch.tensor(digits.target)
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
train, test = order[:1297], order[1297:]
pixels = KSubset(K)

# %% [markdown]
# The objective takes the vertices, 0/1 vectors with ten ones, and the rows of the batch that they
# belong to. It returns a loss for each vertex. While training, SST shows it vertices that are
# relaxed to numbers between 0 and 1.


# %%
def classifier():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def accuracy(model, subset):
    return (model(x[test] * subset).argmax(-1) == y[test]).float().mean().item()


def learn(estimator, subset=None):
    """Trains a classifier and, without a given subset, the scores; returns the subset and the accuracies."""
    torch.manual_seed(0)
    model, scores = classifier(), nn.Parameter(torch.zeros(64))
    optimizer = torch.optim.Adam([{"params": model.parameters(), "lr": 3e-3}, {"params": [scores], "lr": 3e-2}])
    curve = []
    for step in range(STEPS + 1):
        batch = train[torch.randint(len(train), (64,))]

        def loss(vertices, rows, batch=batch):
            shown = x[batch][rows] * vertices
            return nn.functional.cross_entropy(model(shown), y[batch][rows], reduction="none")

        if step % EVERY == 0:
            with torch.no_grad():
                best = pixels.argmax(scores) if subset is None else subset
                curve.append(accuracy(model, best))
        if subset is None:
            surrogate = estimator(scores.expand(64, 64), loss).surrogate
        else:
            surrogate = loss(subset.expand(64, 64), torch.arange(64))
        optimizer.zero_grad()
        surrogate.mean().backward()
        optimizer.step()
    return best, curve


# %% [markdown]
# Beside the two estimators: ten pixels that were chosen at random (once), and all pixels.

# %%
torch.manual_seed(1)
found = {
    "SST": learn(SST(pixels, temperature=0.5)),
    "REINFORCE": learn(Reinforce(pixels, baseline="loo", n_samples=4)),
    "random pixels": learn(None, pixels.sample(torch.zeros(64))),
    "all pixels": learn(None, torch.ones(64)),
}
for name, (_, curve) in found.items():
    print(f"{name:14} accuracy on unseen digits {curve[-1]:.1%}")

# %% The pixels that each estimator chose, over the mean digit, and accuracy during training
figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained", width_ratios=[1, 1, 2])
for panel, name in zip(axes, ("SST", "REINFORCE"), strict=False):
    panel.imshow(x.mean(0).reshape(8, 8), cmap="gray_r")
    rows, columns = found[name][0].reshape(8, 8).nonzero().T
    panel.scatter(columns, rows, marker="s", s=190, facecolors="none", edgecolors=line(1)["color"], linewidths=2)
    panel.set(title=name, xticks=[], yticks=[])
for index, (name, (_, curve)) in enumerate(found.items()):
    axes[2].plot(range(0, STEPS + 1, EVERY), curve, label=name, **line(index))
axes[2].set(xlabel="step", ylabel="accuracy", ylim=(0, 1.02))
axes[2].legend(frameon=False, loc="lower right")
plt.show()

# %% [markdown]
# Chosen pixels read digits better than random ones. The scores are the same for all examples here,
# so one subset is learnt. With an encoder that maps an input to scores, every input gets its own
# subset: that is [learning to explain](../tasks/l2x.md).
