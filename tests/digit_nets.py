"""Small networks that tell handwritten digits apart."""

import torch
from torch.nn import functional

from hpcguard.config import DataConfig
from hpcguard.data import load_images
from hpcguard.models.small_cnn import SmallCNN


def digit_net(size: int, width: int, epochs: int) -> SmallCNN:
    """The same one for the same arguments."""
    torch.manual_seed(0)
    train = load_images(DataConfig(name="digits", size=size), "train")
    net = SmallCNN(10, 1, width=width)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    x, y = torch.from_numpy(train.images(train.ids)), torch.from_numpy(train.labels)
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(net(x[part]), y[part]).backward()
            optimizer.step()
    return net
