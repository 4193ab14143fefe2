"""resnet4b, an adversarially trained net of alpha,beta-CROWN's benchmarks (CIFAR-10, 2/255)."""

import torch
from real_data import RESNET20
from torch import Tensor, nn

from hpcguard.models import Normalized

RESNET4B = RESNET20.with_name("resnet4b.pth")


class Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1)
        self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride)) if stride > 1 else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + self.shortcut(x))


class ResNet4b(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 2, 1)
        self.layer1 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1))
        self.layer2 = nn.Sequential(Block(32, 32, 2), Block(32, 32, 1))
        self.linear1, self.linear2 = nn.Linear(512, 100), nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(torch.relu(self.conv1(x)))).flatten(1)
        return self.linear2(torch.relu(self.linear1(x)))


def resnet4b() -> Normalized:
    net = ResNet4b()
    net.load_state_dict(torch.load(RESNET4B, map_location="cpu", weights_only=True)["state_dict"])
    return Normalized(net, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)).eval()
