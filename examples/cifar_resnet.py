"""ResNet-20 for 32-pixel images, the convnet teacher of `distill_cifar10.py`: 0.27 M parameters, 41 M MACs.

On the command line: `deit-models distill ... --teacher examples/cifar_resnet.py:resnet20 --teacher-weights FILE`.
Source: He et al. 2016, section 4.2; the shortcuts between stages are 1x1 convolutions (their option B).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, C_in, H, W) -> (B, C_out, H / stride, W / stride)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        same = c_in == c_out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The residual step."""
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


def resnet20(num_classes: int = 10) -> nn.Sequential:
    """The network with random weights: (B, 3, 32, 32) -> (B, num_classes)."""
    blocks = []
    c_in = 16
    for stage, width in enumerate((16, 32, 64)):
        for number in range(3):
            blocks.append(BasicBlock(c_in, width, stride=2 if stage and not number else 1))
            c_in = width
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes)]
    return nn.Sequential(*stem, *blocks, *head).to(memory_format=torch.channels_last)
