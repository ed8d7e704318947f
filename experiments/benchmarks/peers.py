"""PyTorch's networks of the benchmarks, the same as ours layer by layer; `pip install -e '.[bench]'`."""

import torchvision
from torch import nn
from torch.nn import functional as F


def train_step(model, optimizer, x, y):
    """One step of a plain loop; the loss."""
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


def lenet5():
    """LeNet-5 as it is trained today: ReLU, maximum pooling."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def _conv3(inputs, outputs, stride=1):
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


class Basic(nn.Module):
    """The block of He et al. 2015 with their option A, a shortcut without parameters."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.norm1 = _conv3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = _conv3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x):
        """[B, C, H, W] -> [B, C', H', W']."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        half = self.extra // 2
        x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return F.relu(y + x)


class Wide(nn.Module):
    """The block of Zagoruyko & Komodakis 2016: norm and activation first."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), _conv3(inputs, outputs, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(outputs), _conv3(outputs, outputs)
        self.shortcut = None
        if inputs != outputs or stride > 1:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        """[B, C, H, W] -> [B, C', H', W']."""
        y = F.relu(self.norm1(x))
        shortcut = self.shortcut(y) if self.shortcut else x
        return self.conv2(F.relu(self.norm2(self.conv1(y)))) + shortcut


def _stages(block, widths, blocks, inputs):
    layers = []
    for width in widths:
        for i in range(blocks):
            layers.append(block(inputs, width, 2 if i == 0 and width != widths[0] else 1))
            inputs = width
    return layers


def _head(features):
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, 10)]


def resnet20():
    """For CIFAR (He et al. 2015)."""
    stem = [_conv3(3, 16), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *_stages(Basic, (16, 32, 64), 3, 16), *_head(64))


def wrn16_4():
    """For CIFAR (Zagoruyko & Komodakis 2016)."""
    blocks = _stages(Wide, (64, 128, 256), 2, 16)
    return nn.Sequential(_conv3(3, 16), *blocks, nn.BatchNorm2d(256), nn.ReLU(), *_head(256))


def resnet18():
    """ResNet-18 with the stem for small images."""
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1, model.maxpool = _conv3(3, 64), nn.Identity()
    return model


def resnet50():
    """At 224 pixels, 1,000 classes."""
    return torchvision.models.resnet50()


def mobilenet_v2():
    """At 224 pixels, 1,000 classes."""
    return torchvision.models.mobilenet_v2(dropout=0.0)
