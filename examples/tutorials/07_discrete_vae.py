# %% [markdown]
# # A discrete autoencoder of digits
#
# A variational autoencoder (VAE) whose code is discrete: one class of ten (`OneHot`), or six bits
# (`Subset`). Three ways to train through the code are compared: sum over all codes (dense), sum
# over the few that sparsemax keeps, and a relaxed sample (Gumbel-Softmax).

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from structgrad.common.pictures import line
from structgrad.estimators import SST, Marginalize
from structgrad.structures import OneHot, Subset

STEPS = 600
EVERY = 40

digits = load_digits()
x = torch.tensor(digits.data / 16, dtype=torch.float32).round()  # black and white, [1797, 64]
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
train, test = x[order[:1297]], x[order[1297:]]

# %% [markdown]
# `forward` returns the negative ELBO: the expected reconstruction loss and the divergence of the
# code from the uniform prior, which the estimator computes. In training the loss is
# `surrogate + kl`; the value to report is `objective + kl`.


# %%
class VAE(nn.Module):
    def __init__(self, estimator, size):
        super().__init__()
        self.estimator = estimator
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, size))
        self.decoder = nn.Sequential(nn.Linear(size, 64), nn.ReLU(), nn.Linear(64, 64))

    def forward(self, images):
        def reconstruction(vertices, rows):
            logits = self.decoder(vertices.float())
            return nn.functional.binary_cross_entropy_with_logits(logits, images[rows], reduction="none").sum(-1)

        return self.estimator(self.encoder(images), reconstruction)


ways = {
    "one of ten, dense": (lambda: Marginalize(OneHot()), 10),
    "one of ten, sparsemax": (lambda: Marginalize(OneHot(), "sparsemax"), 10),
    "one of ten, Gumbel-Softmax": (lambda: SST(OneHot(), temperature=0.5), 10),
    "six bits, dense": (lambda: Marginalize(Subset()), 6),
    "six bits, relaxed": (lambda: SST(Subset(), utility="logistic", temperature=0.5), 6),
}

# %%
found = {}
for name, (estimator, size) in ways.items():
    torch.manual_seed(0)
    model = VAE(estimator(), size)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    curve, calls = [], 0.0
    for step in range(STEPS + 1):
        model.train()
        estimate = model(train[torch.randint(len(train), (64,))])
        loss = (estimate.surrogate + estimate.kl).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        calls += estimate.metrics["decoder_calls"].item()
        if step % EVERY == 0:
            model.eval()
            with torch.no_grad():
                estimate = model(test)
                curve.append((estimate.objective + estimate.kl).mean().item())
    found[name] = model, curve
    print(f"{name:27} -ELBO of unseen digits {curve[-1]:5.1f} nats, {calls / (STEPS + 1):6.1f} decoder calls an image")

# %% Negative ELBO of unseen digits, and what the decoder makes of each class
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
for index, (name, (_, curve)) in enumerate(found.items()):
    left.plot(range(0, STEPS + 1, EVERY), curve, label=name, **line(index))
left.set(xlabel="step", ylabel="-ELBO (nats)", ylim=(None, 40))
left.legend(frameon=False, fontsize=8)
names = list(ways)[:3]
with torch.no_grad():
    classes = torch.stack([found[name][0].decoder(torch.eye(10)).sigmoid().reshape(10, 8, 8) for name in names])
right.imshow(classes.permute(0, 2, 1, 3).reshape(24, 80), cmap="gray_r")
right.set_yticks([4, 12, 20], [name.split(", ")[1] for name in names])
right.set(xticks=[], title="the ten classes, learnt without labels")
plt.show()

# %% [markdown]
# Sparsemax keeps about four classes an image. It is as good as the sum over all ten, for 4/10 of
# its cost. Relaxed samples cost one call, and are some nats worse. Their decoder learnt from soft
# codes and is tested on hard ones, and the temperature has not been searched. Six bits can name 64
# codes, but that alone is no better: the encoder's bits are independent. [The next
# tutorial](08_which_estimator.md) measures bias, variance and cost of estimators.
