# %% [markdown]
# # Sort by a learnt permutation
#
# A network sees six items in random order and must put them into ascending order of a hidden key.
# It never sees the keys. It sees the features of each item, and the sorted sequence of another
# property, the payload.
#
# The latent variable is a `Permutation`. Scores say how early an item comes; the vertex is a
# permutation matrix. Its relaxation, SoftSort, is a matrix with soft rows.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn

from structgrad.common.pictures import line
from structgrad.estimators import SST
from structgrad.structures import Permutation

STEPS = 600
N = 6

torch.manual_seed(0)
mix = 2 * torch.randn(1, 16)


def batch(size):
    """Features [size, N, 16] of the items, their payloads, and the payloads in ascending order of the keys."""
    key, payload = torch.randn(size, N), torch.randn(size, N)
    features = torch.sin(key[..., None] * mix + mix.flip(-1)) + 0.05 * torch.randn(size, N, 16)
    order = key.argsort(-1)
    return features, payload, payload.gather(-1, order), order


features, payload, answer, order = batch(2)
print("payloads ", [round(v, 1) for v in payload[0].tolist()])
print("answer   ", [round(v, 1) for v in answer[0].tolist()])

# %% [markdown]
# The objective applies the permutation to the payloads and compares. A high score means an early
# position.

# %%
structure = Permutation()
estimator = SST(structure, relaxation="softsort", temperature=0.3)
score = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1))
optimizer = torch.optim.Adam(score.parameters(), lr=3e-3)
curves = {"items in their place": [], "whole sequences": []}
for step in range(STEPS + 1):
    features, payload, answer, _ = batch(64)

    def loss(vertices, rows, payload=payload, answer=answer):
        return (((vertices @ payload[rows, :, None])[..., 0] - answer[rows]) ** 2).sum(-1)

    if step % 20 == 0:
        with torch.no_grad():
            unseen, _, _, order = batch(1000)
            right = structure.read(structure.argmax(score(unseen)[..., 0])) == order
            curves["items in their place"].append(right.float().mean().item())
            curves["whole sequences"].append(right.all(-1).float().mean().item())
    surrogate = estimator(score(features)[..., 0], loss).surrogate.mean()
    optimizer.zero_grad()
    surrogate.backward()
    optimizer.step()
for name, curve in curves.items():
    print(f"{name}: {curve[0]:.1%} before training, {curve[-1]:.1%} after it")

# %% Share of unseen items in their place, and the learnt score of an item over its key
key = torch.linspace(-2.5, 2.5, 200)
with torch.no_grad():
    learnt = score(torch.sin(key[:, None] * mix + mix.flip(-1)))[:, 0]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
for index, (name, curve) in enumerate(curves.items()):
    left.plot(range(0, STEPS + 1, 20), curve, label=name, **line(index))
left.set(xlabel="step", ylabel="share", ylim=(0, 1.02))
left.legend(frameon=False, loc="lower right")
right.plot(key, learnt, **line(0))
right.set(xlabel="hidden key", ylabel="learnt score")
plt.show()

# %% [markdown]
# The score falls with the key, which nobody told the network. Whole sequences are harder than
# single items: two keys that lie close together are confused, because the features are noisy.
