"""Learn dependency trees: ``python examples/supervised_parser.py [loss [steps [TRAIN.conllu TEST.conllu]]]``.

The losses are those of structgrad.losses: NegativeLogLikelihood, SparseMAPLoss, PerturbedLoss, StructuredHingeLoss.
Without files the trees are parse trees of ListOps expressions. CoNLL-U files are those of Universal Dependencies
(https://universaldependencies.org/format.html); the columns ID, FORM and HEAD are read.
"""

import sys

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from structgrad import losses
from structgrad.structures import Arborescence
from structgrad.tasks.listops.data import CLOSE, VOCABULARY, ListOpsData, generate

PAD, ROOT, UNKNOWN = 0, 1, 2  # tokens of the files; node 0 of every sentence is ROOT, the parent of its head


def read_conllu(path):
    """The sentences of a file, each a list of words and a list of their heads: 1 is the first word, 0 the root."""
    sentences, words, heads = [], [], []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate([*file, ""], 1):  # the last sentence may lack its empty line
            columns = line.rstrip("\n").split("\t")
            if not line.strip():
                if wrong := [head for head in heads if not 0 <= head <= len(words)]:
                    sys.exit(f"error: {path}, before line {number}: no word {wrong[0]} in a sentence of {len(words)}")
                for word in range(1, len(words) + 1):
                    for _ in words:
                        word = heads[word - 1] if word else 0
                    if word:
                        sys.exit(f"error: {path}, before line {number}: the heads of a sentence go in a circle")
                if words:
                    sentences.append((words, heads))
                words, heads = [], []
            elif line.startswith("#") or "-" in columns[0] or "." in columns[0]:
                continue  # a comment, a token of several words (1-2), or an empty node (1.1)
            elif len(columns) != 10 or columns[0] != str(len(words) + 1) or not columns[6].isdecimal():
                sys.exit(f"error: {path}, line {number}: 10 columns with ID {len(words) + 1} and a HEAD are needed")
            else:
                words.append(columns[1])
                heads.append(int(columns[6]))
    return sentences or sys.exit(f"error: {path} has no sentences")


def encode(sentences, vocabulary):
    """Tokens ``[sentences, n + 1]``, parents of the same shape, and which edges can be."""
    tokens = [torch.tensor([ROOT] + [vocabulary.get(word, UNKNOWN) for word in words]) for words, _ in sentences]
    parents = [torch.tensor([-1, *heads]) for _, heads in sentences]
    tokens = pad_sequence(tokens, batch_first=True, padding_value=PAD)
    parents = pad_sequence(parents, batch_first=True, padding_value=-1)
    words = tokens != PAD
    return tokens, parents, words[:, :, None] & words[:, None, :]


def from_files(train, test):
    """The tokens, trees and masks of both files, and the number of tokens. Words that occur once are unknown ones."""
    sentences, count = read_conllu(train), {}
    for words, _ in sentences:
        for word in words:
            count[word] = count.get(word, 0) + 1
    vocabulary = {word: 3 + i for i, word in enumerate(word for word in count if count[word] > 1)}
    splits = [encode(split, vocabulary) for split in (sentences, read_conllu(test))]
    return *[(tokens, structure.write(parents, mask=m), m) for tokens, parents, m in splits], 3 + len(vocabulary)


def from_listops():
    """The same of ListOps expressions, made here. Brackets that close are no nodes."""
    sizes = {"train": 5000, "val": 50, "test": 500, "length": (5, 20), "depth": (1, 3), "arguments": (2, 5)}
    data = generate(ListOpsData(cache="unused", operators=["MIN", "MAX", "MED"], seed=0, **sizes), progress=False)
    splits = []
    for expressions in (data["train"], data["test"]):
        words = (expressions.tokens > 0) & (expressions.tokens != CLOSE)
        edges = words[:, :, None] & words[:, None, :]
        parents = expressions.parents.masked_fill(~words, -1)
        splits.append((expressions.tokens, structure.write(parents, mask=edges), edges))
    return *splits, len(VOCABULARY)


class Parser(nn.Module):
    """How likely each token is the parent of each other one: a bidirectional LSTM and a product of its states."""

    def __init__(self, vocabulary, hidden=64):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, hidden)
        self.lstm = nn.LSTM(hidden, hidden, batch_first=True, bidirectional=True)
        self.head, self.dependent = nn.Linear(2 * hidden, hidden), nn.Linear(2 * hidden, hidden)

    def forward(self, tokens):
        states, _ = self.lstm(self.embed(tokens))
        return self.head(states) @ self.dependent(states).mT / 8


torch.manual_seed(0)
structure = Arborescence()
name, steps, *files = sys.argv[1:] + ["NegativeLogLikelihood", "300"][len(sys.argv) - 1 :]
(tokens, trees, masks), (test_tokens, test_trees, test_masks), vocabulary = (
    from_files(*files) if files else from_listops()
)
parser = Parser(vocabulary)
criterion = getattr(losses, name)(structure)
optimizer = torch.optim.Adam(parser.parameters(), lr=3e-3)
for step in range(int(steps) + 1):
    batch = torch.randint(len(tokens), (64,))
    loss = criterion(parser(tokens[batch]), trees[batch], masks[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0:
        found = structure.argmax(parser(test_tokens), test_masks)
        right = (found * test_trees).sum() / test_trees.sum()
        print(f"step {step}: loss {loss.item():.3f}, attachment score of unseen sentences {right:.1%}")
