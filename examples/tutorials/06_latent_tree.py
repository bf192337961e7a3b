# %% [markdown]
# # A latent tree that explains an answer
#
# Seven nodes have colours, and each names its parent. The question: how many red nodes lie on the
# way from one node up to the root, itself included? A network that knows neither parents nor trees
# is trained on questions and answers only. Its latent variable is an `Arborescence`, a directed
# tree whose root is node 0. After training it must be the true tree, because no other one explains
# the answers.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.animation import PillowWriter
from torch import nn

from structgrad.common.pictures import BLUE, INK, RULE, VERMILION, line
from structgrad.estimators import SST
from structgrad.structures import Arborescence

STEPS = 400
N = 7
EVERY = 20


def batch(size):
    """Names [size, N, N] (one-hot, shuffled), names of the parents, colours, a question, its answer, the true tree."""
    name = torch.rand(size, N).argsort(-1)
    parent = torch.stack([torch.zeros(size), *((torch.rand(size) * j).floor() for j in range(1, N))], 1).long()
    places = torch.cat([torch.zeros(size, 1).long(), 1 + torch.rand(size, N - 1).argsort(-1)], 1)  # the root stays 0
    shuffled = torch.zeros_like(parent).scatter(1, places, places.gather(1, parent))
    tree = nn.functional.one_hot(shuffled, N).mT.float()  # [i, j]: i is the parent of j
    tree[:, :, 0] = 0
    names = nn.functional.one_hot(name, N).float()
    red = (torch.rand(size, N) < 0.5).float()
    above = red.clone()
    for _ in range(N):
        above = red + (tree.mT @ above[..., None])[..., 0]
    question = torch.randint(N, (size,))
    return names, tree.mT @ names, red, question, above.gather(1, question[:, None])[:, 0], tree


# %% [markdown]
# The encoder scores an edge from i to j by a bilinear form of i's name and the name of j's parent.
# The decoder walks along the edges of the tree, hard or relaxed, and a small network computes the
# answer from the result.


# %%
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.form = nn.Parameter(0.1 * torch.randn(N, N))
        self.answer = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, N + 1))

    def scores(self, names, called):
        return names @ self.form @ called.mT

    def forward(self, tree, red, question):
        above = red
        for _ in range(N - 1):
            above = red + (tree.mT @ above[..., None])[..., 0]
        return self.answer(above.gather(1, question[:, None]))


torch.manual_seed(0)
structure, model = Arborescence(), Model()
estimator = SST(structure, temperature=1.0)
optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
shown = batch(1)
history = {"answers": [], "edges": []}
frames = []
for step in range(STEPS + 1):
    names, called, red, question, answer, _ = batch(64)

    def loss(vertices, rows, red=red, question=question, answer=answer):
        logits = model(vertices, red[rows], question[rows])
        return nn.functional.cross_entropy(logits, answer[rows].long(), reduction="none")

    surrogate = estimator(model.scores(names, called), loss).surrogate.mean()
    optimizer.zero_grad()
    surrogate.backward()
    optimizer.step()
    if step % EVERY == 0:
        with torch.no_grad():
            names, called, red, question, answer, tree = batch(500)
            found = structure.argmax(model.scores(names, called))
            right = model(found, red, question).argmax(-1) == answer
            history["answers"].append(right.float().mean().item())
            history["edges"].append(((found * tree).sum() / tree.sum()).item())
            frames.append((step, structure.marginals(model.scores(*shown[:2]))[0]))
print(f"right answers:    {history['answers'][0]:.1%} before, {history['answers'][-1]:.1%} after")
print(f"edges recovered:  {history['edges'][0]:.1%} before, {history['edges'][-1]:.1%} after, without seeing one")

# %% [markdown]
# The animation shows one unseen example: the wider an arrow, the more probable the edge (its
# marginal).


# %%
def draw(axes, marginals, truth, title):
    turn = torch.arange(N) * 2 * torch.pi / N + torch.pi / 2
    places = torch.stack([turn.cos(), turn.sin()], -1).tolist()
    axes.clear()
    for i, j in (marginals > 0.05).nonzero().tolist():
        colour, dashes = (BLUE, "-") if truth[i, j] else (VERMILION, "--")
        look = {"arrowstyle": "-|>", "color": colour, "linestyle": dashes, "linewidth": 3 * marginals[i, j].item()}
        axes.annotate("", places[j], places[i], arrowprops=look | {"shrinkA": 7, "shrinkB": 7})
    for place, (a, b) in enumerate(places):
        axes.scatter([a], [b], s=130, color="white" if place else RULE, edgecolors=INK, zorder=3)
    axes.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal", title=title)
    axes.axis("off")


figure, axes = plt.subplots(figsize=(3, 3.2))
writer = PillowWriter(fps=4)
with writer.saving(figure, Path("latent_tree.gif"), dpi=80):
    for step, marginals in [*frames, *frames[-1:] * 6]:
        draw(axes, marginals, shown[-1][0], f"step {step}")
        writer.grab_frame()
plt.close(figure)

# %% [markdown]
# ![The tree of one example over the course of training](../images/tutorials/latent_tree.gif)
#
# *Solid blue: edges of the true tree. Dashed orange: others. The grey node is the root.*

# %% Answers and edges of unseen examples, and the tree of one example before, during and after training
figure, panels = plt.subplots(1, 4, figsize=(12, 3), layout="constrained", width_ratios=[1.4, 1, 1, 1])
panels[0].plot(range(0, STEPS + 1, EVERY), history["answers"], label="right answers", **line(0))
panels[0].plot(range(0, STEPS + 1, EVERY), history["edges"], label="recovered edges", **line(1))
panels[0].set(xlabel="step", ylabel="share", ylim=(0, 1.02))
panels[0].legend(frameon=False, loc="lower right")
for panel, (step, marginals) in zip(panels[1:], (frames[0], frames[len(frames) // 4], frames[-1]), strict=True):
    draw(panel, marginals, shown[-1][0], f"step {step}")
plt.show()

# %% [markdown]
# The network explains its answer: the tree says which nodes it counted.
# [ListOps](../tasks/listops.md) is the same idea on expressions, where the tree is a parse.
