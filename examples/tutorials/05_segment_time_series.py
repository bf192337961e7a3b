# %% [markdown]
# # Segment a time series
#
# A machine is in one of three states. It stays in a state for a while, and a sensor shows the
# state's level with noise. There are no labels. `SemiMarkov` is the set of labelled segmentations;
# if its scores are joint log-probabilities, its `log_partition` is the log-likelihood of the series
# with the segmentation summed out. So gradient descent on it learns the levels, as the EM algorithm
# would.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn

from structgrad.common.pictures import INK, colour, line
from structgrad.structures import SemiMarkov

STEPS = 150
STATES, LONGEST, LENGTH = 3, 12, 60

torch.manual_seed(0)
levels, noise = torch.tensor([-1.0, 0.3, 1.4]), 0.5


def series():
    """One series [LENGTH] and the state of each position; segments of 4 to 12 positions."""
    states, last = [], -1
    while len(states) < LENGTH:
        state = int(torch.randint(STATES, ()))
        if state != last:
            states += [state] * int(torch.randint(4, LONGEST + 1, ()))
            last = state
    states = torch.tensor(states[:LENGTH])
    return levels[states] + noise * torch.randn(LENGTH), states


data = [series() for _ in range(40)]
x, states = torch.stack([one for one, _ in data]), torch.stack([one for _, one in data])

# %% [markdown]
# Part `[i, k, c, d]` is a segment of state d on the positions i + 1 to i + 1 + k, after one of
# state c that ends at i. Its score is a sum: the log-density of the positions that it covers, the
# log-probability of its length, and the log-probability of the change of state. Sums over any
# stretch are differences of cumulative sums.


# %%
class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        self.level = nn.Parameter(torch.tensor([-0.1, 0.0, 0.1]))
        self.log_noise = nn.Parameter(torch.zeros(()))
        self.duration, self.change = nn.Parameter(torch.zeros(LONGEST)), nn.Parameter(torch.zeros(STATES, STATES))

    def forward(self, x):
        density = torch.distributions.Normal(self.level, self.log_noise.exp()).log_prob(x[..., None])
        total = nn.functional.pad(density.cumsum(1), (0, 0, 1, 0))  # [batch, LENGTH + 1, STATES]
        start = torch.arange(LENGTH - 1)[:, None] + 1
        end = start + torch.arange(LONGEST) + 1
        exists = end <= LENGTH
        covered = total[:, end.clamp_max(LENGTH)] - total[:, start]  # [batch, LENGTH - 1, LONGEST, STATES]
        to_another = self.change - 1e4 * torch.eye(STATES)  # a segment is as long as it can be
        scores = covered[..., None, :] + self.duration.log_softmax(0)[:, None, None] + to_another.log_softmax(-1)
        scores[:, 0] += density[:, 0, None, :, None]  # position 0 is a segment by itself
        return scores, exists[None, :, :, None, None].expand_as(scores)


structure, model = SemiMarkov(STATES, LONGEST), Segmenter()
optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
curve, path = [], []
for _ in range(STEPS + 1):
    scores, mask = model(x)
    loss = -structure.log_partition(scores, mask).mean() / LENGTH
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    curve.append(loss.item())
    path.append(model.level.detach().clone())
print(f"nats a position: {curve[0]:.3f} before, {curve[-1]:.3f} after")
print(f"levels {[round(v, 2) for v in levels.tolist()]}, found {[round(v, 2) for v in model.level.tolist()]}")
print(f"noise {noise}, found {model.log_noise.exp().item():.2f}")

# %%
with torch.no_grad():
    best = structure.read(structure.argmax(*model(x)))  # [series, segments, (first, last, state)]
labels = torch.zeros(len(x), LENGTH, dtype=torch.long)
for one, segments in zip(labels, best, strict=True):
    for first, last, state in segments[segments[:, 0] >= 0].tolist():
        one[first : last + 1] = state
nearest = (x[..., None] - model.level.detach()).abs().argmin(-1)
rank = model.level.detach().argsort().argsort()  # states in the order of their levels, to compare with the truth
print(f"positions in the right state: {(rank[labels] == states).float().mean():.1%}")
print(f"each position alone:          {(rank[nearest] == states).float().mean():.1%}")

# %% A series with the found segments, and the levels during training
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3), layout="constrained", width_ratios=[2, 1])
left.plot(x[0], ".", color=INK, markersize=4, label="sensor")
for first, last, state in best[0][best[0][:, 0] >= 0].tolist():
    level = model.level[state].item()
    left.plot([first - 0.4, last + 0.4], [level, level], color=colour(state), linewidth=3, solid_capstyle="butt")
left.step(range(LENGTH), levels[states[0]], where="mid", color=INK, linestyle=":", linewidth=1, label="true level")
left.set(xlabel="position", ylabel="value")
left.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
for state, values in enumerate(torch.stack(path).T):
    right.plot(values, **line(state))
    right.axhline(levels[state], color=INK, linestyle=":", linewidth=0.8)
right.set(xlabel="step", ylabel="level")
plt.show()

# %% [markdown]
# The levels are found without labels. A segment uses the evidence of all its positions, so the
# segmentation is right far more often than decisions on single positions.
