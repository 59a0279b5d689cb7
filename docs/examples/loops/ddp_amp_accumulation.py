#!/usr/bin/env python3
"""SSCLLoss with DistributedDataParallel, autocast and gradient accumulation: torchrun --nproc_per_node 2 FILE"""
import argparse
from contextlib import ExitStack

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.transforms.functional import to_tensor

from timm_sscl import SSCLLoss, calibrate
from timm_sscl.data import DigitsDataset

ACCUMULATE = 2  # micro-batches of 64 images per step, divided among the processes

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument('--epochs', type=int, default=5)


def load(split):
    return DigitsDataset(split, transform=lambda image: to_tensor(image.resize((16, 16))))


def train(model, epochs, lr, sscl=None):
    """Cross-entropy, and the contrastive loss where there is one."""
    wrapped = [DDP(module) for module in (model, sscl) if module is not None]  # the loss, too: it has parameters
    optimizer = torch.optim.AdamW([p for module in wrapped for p in module.parameters()], lr=lr)
    sampler = DistributedSampler(data, drop_last=True)
    loader = DataLoader(data, 64 // dist.get_world_size(), sampler=sampler, drop_last=True)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        model.train()
        for i, (x, y) in enumerate(loader, 1):
            with ExitStack() as stack:
                if i % ACCUMULATE:  # gradients stay here; the negatives are still gathered from all processes
                    for module in wrapped:
                        stack.enter_context(module.no_sync())
                with torch.autocast('cpu', torch.bfloat16):
                    loss = F.cross_entropy(wrapped[0](x), y)
                    for loss_module in wrapped[1:]:
                        loss = loss + 0.1 * loss_module(x)
                (loss / ACCUMULATE).backward()
            if i % ACCUMULATE == 0:
                optimizer.step()
                optimizer.zero_grad()


@torch.no_grad()
def accuracy(model):
    """Top-1 on the validation images, in percent."""
    x, y = next(iter(DataLoader(load('validation'), 360)))
    return 100 * (model.eval()(x).argmax(1) == y).float().mean().item()


args = parser.parse_args()
dist.init_process_group('gloo')
torch.manual_seed(dist.get_rank())  # DDP sends the first process's weights to all
data = load('train')
teacher = timm.create_model('resnet20_cifar', width=8, num_classes=10)
train(teacher, args.epochs, lr=5e-3)
for statistics in teacher.buffers():  # the last batch's differ; every process needs the same teacher
    dist.broadcast(statistics, 0)
student = timm.create_model('spiking_resnet20_cifar', width=8, timesteps=2, num_classes=10)
calibrate(student, next(iter(DataLoader(data, 128)))[0])
train(student, args.epochs, lr=1e-2, sscl=SSCLLoss(student, teacher, input_size=(3, 16, 16)))
if dist.get_rank() == 0:  # its batch norms' statistics are those that DDP sends to the others
    print(f'spiking student, {dist.get_world_size()} processes: {accuracy(student):.1f} %')
dist.destroy_process_group()
