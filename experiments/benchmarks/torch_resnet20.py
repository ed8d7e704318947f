"""The peer of resnet20_cifar.py in PyTorch: same files, order, augmentation, schedule and decay.

    pip install -e '.[torch]'
    python experiments/benchmarks/torch_resnet20.py --epochs=5

Prints a line an epoch: epoch, seconds, training loss, test accuracy. The network is the ResNet-20
of He et al. 2015 (option A), written from the paper.
"""

import argparse
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from jaxcls import datasets, pipeline

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
BATCH = 128


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x):
        """[B, C, H, W] -> [B, C', H', W']."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        half = self.extra // 2
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return F.relu(y + shortcut)


def resnet20():
    """The network, with He's initialisation by fan-out."""
    layers = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    inputs = 16
    for stage, outputs in enumerate((16, 32, 64)):
        for block in range(3):
            layers.append(Block(inputs, outputs, 2 if stage and not block else 1))
            inputs = outputs
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
    return model


def to_tensor(images):
    """uint8 [B, H, W, C] to normalised float [B, C, H, W]."""
    x = torch.from_numpy(np.ascontiguousarray(images)).float() / 255
    x = (x - torch.tensor(MEAN)) / torch.tensor(STD)
    return x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def augment(images, rng):
    """Pads by 4 with black, crops at random, flips half of them."""
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    out = np.empty_like(images)
    for i, (top, left, flip) in enumerate(rng.integers((9, 9, 2), size=(len(images), 3))):
        crop = padded[i, top : top + 32, left : left + 32]
        out[i] = crop[:, ::-1] if flip else crop
    return out


@torch.no_grad()
def accuracy(model, images, labels):
    """On a whole split, in evaluation mode."""
    model.eval()
    right = sum(
        int((model(to_tensor(images[i : i + 500])).argmax(1).numpy() == labels[i : i + 500]).sum())
        for i in range(0, len(images), 500)
    )
    model.train()
    return right / len(images)


def one_cycle(step, total, peak, rise=0.3, start=0.04, end=4e-6):
    """`schedules.one_cycle`."""
    top = max(1, round(rise * total))
    distance = (top - step) / top if step < top else (step - top) / (total - top)
    low = start if step < top else end
    return peak * (low + (1 - low) * 0.5 * (1 + np.cos(np.pi * min(distance, 1))))


def main():
    """Trains and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--epochs', type=int, default=5)
    parser.add_argument('--learning_rate', type=float, default=0.4)
    parser.add_argument('--l2', type=float, default=5e-4)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--data_dir', default='')
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    (images, labels), (test_images, test_labels) = (
        pipeline.load_arrays(pipeline.Reader(datasets.load('tfds:cifar10', s, args.data_dir)))
        for s in ('train', 'test')
    )
    model = resnet20().to(memory_format=torch.channels_last)
    print(f'{sum(p.numel() for p in model.parameters()):,} parameters', flush=True)
    kernels = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{'params': kernels, 'weight_decay': args.l2}, {'params': others}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    per_epoch = -(-len(images) // BATCH)
    total, losses, begin = -(-args.epochs * len(images) // BATCH), [], time.perf_counter()
    for step in range(total):
        for group in optimizer.param_groups:
            group['lr'] = one_cycle(step, total, args.learning_rate)
        index = pipeline.training_order(args.seed, len(images), BATCH, step)['index']
        batch = to_tensor(augment(images[index], rng))
        loss = F.cross_entropy(model(batch), torch.from_numpy(labels[index]).long())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if (step + 1) % per_epoch == 0 or step + 1 == total:
            top1 = accuracy(model, test_images, test_labels)
            seconds = time.perf_counter() - begin
            mean = np.mean(losses[-per_epoch:])
            epoch = (step + 1) / per_epoch
            line = f'epoch {epoch:.2f}  {seconds:.0f} s  loss {mean:.4f}  accuracy {top1:.4f}'
            print(line, flush=True)


if __name__ == '__main__':
    main()
