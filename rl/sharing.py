"""Tensors that two processes of one machine hold together, without a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from posttrain.rl.types import SharedTensor

if TYPE_CHECKING:
    from torch import Tensor


def share(tensor: Tensor) -> SharedTensor:
    """A handle for another process; the tensor's memory must outlive every use of it.

    GPU memory goes by CUDA IPC, which memory of vLLM's sleeping allocator and of expandable segments does not support.
    Main memory is copied when the handle is pickled.
    """
    if not tensor.is_cuda:
        return SharedTensor(tensor.detach())
    from torch.multiprocessing.reductions import reduce_tensor

    rebuild, arguments = reduce_tensor(tensor.detach())
    return SharedTensor((rebuild, arguments))


def opened(shared: SharedTensor) -> Tensor:
    """The tensor behind a handle: the same memory, an ordinary tensor that may enter autograd.

    CUDA refuses to open a handle in the process that made it.
    """
    import torch

    if isinstance(shared.handle, torch.Tensor):
        return shared.handle
    rebuild, arguments = shared.handle
    with torch.inference_mode(False):
        return rebuild(*arguments)
