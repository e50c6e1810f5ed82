"""How far the predictions of a model are from those of another: Kullback-Leibler divergence per token."""

import torch
from torch import Tensor
from torch.nn.functional import kl_div

ROWS = 256  # positions whose distributions are in memory at once


def divergence(expected: Tensor, found: Tensor) -> Tensor:
    """KL(expected || found) in nats for logits, (tokens, vocabulary) each: (tokens,) float32.

    Example:
        >>> divergence(torch.zeros(1, 2), torch.zeros(1, 2)).tolist()
        [0.0]
    """
    parts = [
        kl_div(ours.float().log_softmax(-1), theirs.float().log_softmax(-1), reduction="none", log_target=True).sum(-1)
        for theirs, ours in zip(expected.split(ROWS), found.split(ROWS), strict=True)
    ]
    return torch.cat(parts) if parts else expected.new_zeros(0)
