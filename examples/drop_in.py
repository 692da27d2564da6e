"""A search script of one's own, in the style of DARTS: only MixedOp comes from fastnas.

The network is a chain of mixed operations, each with a row of alphas. The script trains its weights and its alphas in
turns on handwritten digits, and prints the operation that each edge has come to prefer.

    python examples/drop_in.py
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from fastnas import MixedOp  # instead of the script's own class
from fastnas.nn import PRIMITIVES


class Network(nn.Module):
    """Stem, three mixed operations (the second halves the image), classifier."""

    def __init__(self, C: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, C, 3, padding=1, bias=False), nn.BatchNorm2d(C))
        self.edges = nn.ModuleList([MixedOp(C, 1), MixedOp(C, 2), MixedOp(C, 1)])
        self.classifier = nn.Linear(C, classes)
        # As in DARTS, the architecture parameters are no parameters of the module.
        self.alphas = (1e-3 * torch.randn(len(self.edges), len(PRIMITIVES))).requires_grad_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the logits."""
        x = self.stem(x)
        for edge, weights in zip(self.edges, F.softmax(self.alphas, dim=-1), strict=True):
            x = edge(x, weights)
        return self.classifier(x.mean((2, 3)))


def main(epochs: int) -> float:
    """Returns the accuracy on the half of the images that trained the alphas."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels))
    train, valid = order[: len(order) // 2], order[len(order) // 2 :]

    net = Network(16, 10)
    weights = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=3e-4)
    alphas = torch.optim.Adam([net.alphas], 0.02, betas=(0.5, 0.999), weight_decay=1e-3)
    for epoch in range(epochs):
        for batch in train[torch.randperm(len(train))].split(64)[:-1]:
            other = valid[torch.randint(len(valid), (64,))]
            net.alphas.grad = torch.autograd.grad(F.cross_entropy(net(images[other]), labels[other]), net.alphas)[0]
            alphas.step()
            weights.zero_grad()
            loss = F.cross_entropy(net(images[batch]), labels[batch])
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 5)
            weights.step()
        net.eval()
        with torch.no_grad():
            accuracy = (net(images[valid]).argmax(1) == labels[valid]).float().mean().item()
        net.train()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, validation accuracy {accuracy:.1%}")
    for i, row in enumerate(F.softmax(net.alphas, dim=-1)):
        print(f"edge {i}: {PRIMITIVES[row.argmax()]} ({row.max().item():.3f})")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    main(parser.parse_args().epochs)
