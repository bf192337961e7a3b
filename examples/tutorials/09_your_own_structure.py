# %% [markdown]
# # Your own structure
#
# The latent variable of this page is not in the library: an *interval*, any stretch of neighbouring
# positions. `argmax` and `log_partition` are enough for most estimators.

# %%
import itertools

import matplotlib.pyplot as plt
import torch
from torch import nn

from structgrad.common.pictures import line
from structgrad.estimators import SST, Marginalize, Reinforce
from structgrad.structures import ActiveSetProjection, Gibbs, KBest, Vector

STEPS = 300
N = 12

# %% [markdown]
# `argmax` is the best vertex, and `log_partition` the logarithm of the sum of all `exp(score)`. An
# interval's score is a difference of two cumulative sums, so both use a table of all starts and
# ends. The mixins derive the rest: `Gibbs` takes marginals, probabilities and entropy from
# `log_partition`; `KBest` and `ActiveSetProjection` build `top_k`, `project` and `sparsemap` on
# `argmax`.


# %%
class Interval(Gibbs, KBest, ActiveSetProjection):
    """Non-empty stretches of neighbouring ones in a vector of n parts."""

    def __init__(self):
        self.layout = Vector()

    def shape(self, n):
        return (n,)

    def _table(self, scores):
        """[*batch, n, n]: the score of the interval from i to j; -inf below the diagonal."""
        total = nn.functional.pad(scores.cumsum(-1), (1, 0))
        table = total[..., None, 1:] - total[..., :-1, None]
        below = torch.ones_like(table, dtype=torch.bool).tril(-1)
        return table.masked_fill(below, -torch.inf)

    def _vertex(self, index, like):
        n = like.shape[-1]
        start, end, at = (index // n)[..., None], (index % n)[..., None], torch.arange(n)
        return ((at >= start) & (at <= end)).to(like)

    def argmax(self, scores, mask=None):
        self.check(scores, mask)
        return self._vertex(self._table(scores).flatten(-2).argmax(-1), scores)

    def log_partition(self, scores, mask=None):
        self.check(scores, mask)
        return self._table(scores).flatten(-2).logsumexp(-1)

    def sample(self, scores, mask=None):
        self.check(scores, mask)
        logits = self._table(scores).flatten(-2)
        return self._vertex(torch.distributions.Categorical(logits=logits).sample(), scores)

    def enumerate(self, n):
        ends = itertools.combinations(range(n + 1), 2)
        return torch.stack([((torch.arange(n) >= i) & (torch.arange(n) < j)).float() for i, j in ends])


structure = Interval()
print("oracles:", ", ".join(sorted(structure.oracles)))
print("number of vertices at n = 4:", len(structure.enumerate(4)))

# %% [markdown]
# Is it right? Compare with the list of all vertices. `structgrad.testing.StructureContract` does
# this for every oracle, with masks, extreme scores and gradients; [your own](../your_own.md) shows
# the test file. (Masks are left out here.)

# %%
torch.manual_seed(0)
scores, every = torch.randn(4, dtype=torch.float64), structure.enumerate(4).double()
listed = (every @ scores).softmax(0) @ every
print("largest difference of the marginals:", f"{(structure.marginals(scores) - listed).abs().max():.1e}")

# %% [markdown]
# Now learn with it: a sequence of noisy flags has one raised interval, and the answer is the mean
# of *other* numbers over it. The interval is never shown.


# %%
def batch(size):
    ends = torch.rand(size, N + 1).argsort(-1)[:, :2].sort(-1).values
    at = torch.arange(N)
    truth = ((at >= ends[:, :1]) & (at < ends[:, 1:])).float()
    values = torch.randn(size, N)
    return truth + 0.5 * torch.randn(size, N), values, (truth * values).sum(-1), truth


curves = {}
for name, estimator in {
    "SST, SparseMAP relaxation": SST(structure, relaxation="euclidean"),
    "REINFORCE, 4 samples": Reinforce(structure, baseline="loo", n_samples=4),
    "sum over SparseMAP's support": Marginalize(structure, "sparsemap"),
}.items():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Unflatten(1, (1, N)), nn.Conv1d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv1d(16, 1, 1))
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.01)
    curves[name] = []
    for step in range(STEPS + 1):
        flags, values, answer, _ = batch(64)

        def loss(vertices, rows, values=values, answer=answer):
            return ((vertices * values[rows]).sum(-1) - answer[rows]) ** 2

        surrogate = estimator(encoder(flags)[:, 0], loss).surrogate.mean()
        optimizer.zero_grad()
        surrogate.backward()
        optimizer.step()
        if step % 20 == 0:
            with torch.no_grad():
                flags, _, _, truth = batch(1000)
                found = structure.argmax(encoder(flags)[:, 0])
                curves[name].append(((found * truth).sum(-1) / ((found + truth) > 0).sum(-1)).mean().item())
    print(f"{name:29} overlap with the true interval {curves[name][0]:.1%} before, {curves[name][-1]:.1%} after")

# %% Overlap (intersection over union) of the best interval with the true one on unseen sequences
figure, axes = plt.subplots(figsize=(5.5, 3), layout="constrained")
for index, (name, curve) in enumerate(curves.items()):
    axes.plot(range(0, STEPS + 1, 20), curve, label=name, **line(index))
axes.set(xlabel="step", ylabel="overlap", ylim=(0, 1.02))
axes.legend(frameon=False, loc="lower right")
plt.show()
