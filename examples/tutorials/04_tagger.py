# %% [markdown]
# # A tagger with three losses
#
# Tags of neighbouring words depend on each other. A conditional random field scores pairs of
# neighbouring tags and is trained on whole sequences. `LinearChain` is the set of tag sequences;
# `structgrad.losses` has the losses.
#
# The data are made up: five tags follow each other as a Markov chain, and each word is a noisy sign
# of its tag.

# %%
import time

import matplotlib.pyplot as plt
import torch
from torch import nn

from structgrad.common.pictures import colour
from structgrad.losses import NegativeLogLikelihood, SparseMAPLoss, StructuredHingeLoss
from structgrad.structures import LinearChain

STEPS = 300
TAGS, WORDS, LENGTH = 5, 20, 12

torch.manual_seed(0)
moves = torch.softmax(2.5 * torch.randn(TAGS, TAGS), -1)
signs = torch.softmax(1.2 * torch.randn(TAGS, WORDS), -1)


def batch(size):
    """Words and tags, each [size, LENGTH]."""
    tags = [torch.randint(TAGS, (size,))]
    for _ in range(LENGTH - 1):
        tags.append(torch.multinomial(moves[tags[-1]], 1)[:, 0])
    tags = torch.stack(tags, 1)
    return torch.multinomial(signs[tags].flatten(0, 1), 1).reshape(size, LENGTH), tags


# %% [markdown]
# Scores of a chain are a number for each pair of tags between each pair of neighbours:
# `[batch, n - 1, C, C]`. The score of the first tag is added to those of the first pair. `write`
# makes a vertex out of a sequence of tags, `read` does the reverse.


# %%
class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.emit, self.transition = nn.Embedding(WORDS, TAGS), nn.Parameter(torch.zeros(TAGS, TAGS))

    def forward(self, words):
        emitted = self.emit(words)
        scores = emitted[:, 1:, None, :] + self.transition
        return torch.cat([scores[:, :1] + emitted[:, :1, :, None], scores[:, 1:]], 1)


structure = LinearChain(TAGS)
torch.manual_seed(1)
test_words, test_tags = batch(1000)
found = {}
for criterion in (NegativeLogLikelihood(structure), SparseMAPLoss(structure), StructuredHingeLoss(structure)):
    torch.manual_seed(2)
    tagger = Tagger()
    optimizer = torch.optim.Adam(tagger.parameters(), lr=0.05)
    begun = time.process_time()
    for _ in range(STEPS):
        words, tags = batch(32)
        loss = criterion(tagger(words), structure.write(tags))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = (structure.read(structure.argmax(tagger(test_words))) == test_tags).float().mean().item()
    found[type(criterion).__name__] = (tagger, right)
    seconds = time.process_time() - begun
    print(f"{type(criterion).__name__:22} {right:.1%} of unseen tags, {seconds:.1f} s of the processor")

# %% [markdown]
# What do the pairs gain? The same tagger without transitions decides each word alone. It is a
# `LinearChain` too, with the transitions held at zero. The true model, which made the data, shows
# about the best possible result.

# %%
torch.manual_seed(2)
alone = Tagger()
alone.transition.requires_grad_(False)
optimizer = torch.optim.Adam(alone.emit.parameters(), lr=0.05)
criterion = NegativeLogLikelihood(structure)
for _ in range(STEPS):
    words, tags = batch(32)
    loss = criterion(alone(words), structure.write(tags))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
truth = Tagger()
with torch.no_grad():
    truth.emit.weight.copy_(signs.T.log())
    truth.transition.copy_(moves.log())
    for name, tagger in {"each word alone": alone, "the true model": truth}.items():
        right = (structure.read(structure.argmax(tagger(test_words))) == test_tags).float().mean().item()
        found[name] = (tagger, right)
        print(f"{name:22} {right:.1%} of unseen tags")

# %% Share of right tags, and how sure the chain is of each tag in one sentence
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
left.barh(range(len(found)), [share for _, share in found.values()], color=[colour(0)] * 3 + [colour(3), colour(6)])
left.set_yticks(range(len(found)), list(found))
left.invert_yaxis()
left.set(xlabel="share of right tags", xlim=(0, 1))
with torch.no_grad():
    marginals = structure.marginals(found["NegativeLogLikelihood"][0](test_words[:1]))[0]
tag_marginals = torch.cat([marginals[:1].sum(-1), marginals.sum(-2)])
image = right.imshow(tag_marginals.T, cmap="cividis", vmin=0, vmax=1, aspect="auto")
right.plot(range(LENGTH), test_tags[0], "o", color="white", markeredgecolor="black", label="true tag")
right.set(xlabel="position", ylabel="tag", yticks=range(TAGS))
figure.colorbar(image, label="marginal")
right.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
plt.show()

# %% [markdown]
# All three losses come near the true model, and the tagger without pairs has clearly fewer right
# tags. The likelihood also gives probabilities; the SparseMAP loss gives sparse ones; the hinge
# loss needs only the `argmax`, with a cost. [Losses](../losses.md) compares them.
