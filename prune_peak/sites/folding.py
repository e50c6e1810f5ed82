"""Fold and slice: pure tensor functions.

A neuron held at a constant adds a constant to the output, so it can be deleted:

    W x + b  =  W_keep x_keep + W_cut x_cut + b   ->   W_keep x_keep + (b + W_cut c)

The constant the paper proposes is the most frequent value, the peak (arXiv 2408.17322, "Investigating Neuron Ablation
in Attention Heads: The Case for Peak Activation Centering").
"""

import torch
from torch import Tensor


def fold(weight: Tensor, bias: Tensor | None, fill: Tensor, keep: Tensor) -> Tensor:
    """The bias that replaces the pruned neurons: b + W_cut c, in float32.

    Args:
        weight: (hidden, neurons), the output projection.
        bias: (hidden,), or None without a bias.
        fill: (neurons,), the constant of each neuron.
        keep: (kept,), indices of the kept neurons.

    Returns:
        (hidden,), float32.

    Example:
        >>> import torch
        >>> weight = torch.tensor([[1.0, 2.0, 3.0]])
        >>> fold(weight, torch.tensor([0.5]), fill=torch.tensor([9.0, 9.0, 0.1]), keep=torch.tensor([0, 1]))
        tensor([0.8000])
    """
    is_cut = cut_mask(len(fill), keep)
    # float64, because the sum runs over thousands of neurons
    folded = weight[:, is_cut].double() @ fill[is_cut].double()
    if bias is not None:
        folded += bias.double()
    return folded.float()


def cut_mask(neurons: int, keep: Tensor) -> Tensor:
    """True where a neuron is pruned, (neurons,).

    Example:
        >>> import torch
        >>> cut_mask(3, torch.tensor([0, 2]))
        tensor([False,  True, False])
    """
    is_cut = torch.ones(neurons, dtype=torch.bool, device=keep.device)
    is_cut[keep] = False
    return is_cut


def cut(tensor: Tensor, keep: Tensor, axis: int) -> Tensor:
    """Only the kept neurons of a tensor, along its neuron axis.

    Example:
        >>> import torch
        >>> cut(torch.tensor([[1, 2, 3]]), torch.tensor([0, 2]), axis=1)
        tensor([[1, 3]])
    """
    return tensor.index_select(axis, keep)


def clear(tensor: Tensor, idle: Tensor, axis: int) -> Tensor:
    """A tensor with zeros at some indices along an axis.

    Example:
        >>> import torch
        >>> clear(torch.tensor([[1, 2, 3]]), torch.tensor([1]), axis=1)
        tensor([[1, 0, 3]])
    """
    return tensor.index_fill(axis, idle, 0)
