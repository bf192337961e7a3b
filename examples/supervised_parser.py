"""Learn the parse trees of ListOps expressions: ``python examples/supervised_parser.py [loss [steps]]``.

The losses are those of structgrad.losses: NegativeLogLikelihood, SparseMAPLoss, PerturbedLoss, StructuredHingeLoss.
"""

import sys

import torch
from torch import nn

from structgrad import losses
from structgrad.structures import Arborescence
from structgrad.tasks.listops.data import CLOSE, VOCABULARY, ListOpsData, generate

torch.manual_seed(0)
sizes = {"train": 5000, "val": 50, "test": 500, "length": (5, 20), "depth": (1, 3), "arguments": (2, 5)}
data = generate(ListOpsData(cache="unused", operators=["MIN", "MAX", "MED"], seed=0, **sizes), progress=False)


def graphs(expressions):
    """Tokens, true trees as adjacency matrices (parent -> child), and which edges can be: brackets close nothing."""
    words = (expressions.tokens > 0) & (expressions.tokens != CLOSE)
    edges = words[:, :, None] & words[:, None, :]
    return expressions.tokens, structure.write(expressions.parents, mask=edges), edges


class Parser(nn.Module):
    """How likely each token is the parent of each other one: a bidirectional LSTM and a product of its states."""

    def __init__(self, hidden=64):
        super().__init__()
        self.embed = nn.Embedding(len(VOCABULARY), hidden)
        self.lstm = nn.LSTM(hidden, hidden, batch_first=True, bidirectional=True)
        self.head, self.dependent = nn.Linear(2 * hidden, hidden), nn.Linear(2 * hidden, hidden)

    def forward(self, tokens):
        states, _ = self.lstm(self.embed(tokens))
        return self.head(states) @ self.dependent(states).mT / 8


structure, parser = Arborescence(), Parser()
name, steps = sys.argv[1:] + ["NegativeLogLikelihood", "300"][len(sys.argv) - 1 :]
criterion = getattr(losses, name)(structure)
optimizer = torch.optim.Adam(parser.parameters(), lr=3e-3)
tokens, trees, masks = graphs(data["train"])
for step in range(int(steps) + 1):
    batch = torch.randint(len(tokens), (64,))
    loss = criterion(parser(tokens[batch]), trees[batch], masks[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0:
        test_tokens, test_trees, test_masks = graphs(data["test"])
        found = structure.argmax(parser(test_tokens), test_masks)
        right = (found * test_trees).sum() / test_trees.sum()
        print(f"step {step}: loss {loss.item():.3f}, attachment score of unseen expressions {right:.1%}")
