"""A few words of torch.distributed: who am I, add up, gather. Without torchrun every one of them does nothing.

`torchrun --nproc_per_node N train/train_lora.py ...` starts N processes; gloo connects them on CPUs, nccl on GPUs.
"""

import os

import torch
import torch.distributed as dist


def start(device: str) -> str:
    """Join the group that torchrun announces; returns the device of this process."""
    if "RANK" not in os.environ:
        return device
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return device


def stop() -> None:
    """Leave the group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process may print and write."""
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Replace every gradient by its sum over all processes, in one message."""
    if not dist.is_initialized():
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    for parameter, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(total.view_as(parameter))


def gather(item: object) -> list:
    """The items of all processes, in the order of their ranks."""
    if not dist.is_initialized():
        return [item]
    items: list = [None] * world_size()
    dist.all_gather_object(items, item)
    return items
