"""How the experts of a block are used, and in which order they can leave.

An expert that leaves is replaced by the next one that the router prefers. So the error that its removal causes is not
the size of what it computes. It is computed on sampled tokens, for which the outputs f of all experts are known: with
the weights g of the full router and g' of a router that chooses among fewer experts, the output changes by

    sum_e (g - g')_e f_e

The mean norm of this change decides, not its square, which few tokens with giant activations would dominate.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..sites.routing import Router, RoutingSample
from .distributed import ProcessGroup
from .histogram import check_tensors

ROUNDS = 16  # at least, in which experts leave; the costs are computed again after each


@dataclass(frozen=True)
class UseSummary:
    """How the experts of a block are used; tensors are (experts,)."""

    served: Tensor  # tokens, int64
    norm: Tensor  # mean over the served tokens of weight times norm of the output, float64: REAP's score
    stay: Tensor | None  # the round in which an expert leaves, float64; None where the router cannot run alone


class ExpertUse:
    """The running sums of one block's experts."""

    def __init__(self, experts: int, groups: int) -> None:
        self.groups = groups
        self.served = torch.zeros(experts, dtype=torch.int64)
        self.norms = torch.zeros(experts, dtype=torch.float64)
        self.inputs: list[Tensor] = []
        self.grams: list[Tensor] = []
        self.router: Router | None = None

    def add(self, norms: Tensor, sample: RoutingSample | None) -> None:
        """Add a batch: weighted norms, (tokens, experts), zero where an expert is not chosen, and a sample of it."""
        self.served, self.norms = self.served.to(norms.device), self.norms.to(norms.device)
        self.served += (norms > 0).sum(0)
        self.norms += norms.sum(0, dtype=torch.float64)
        if sample is not None:
            self.router = self.router or sample.router
            self.inputs.append(sample.inputs)
            self.grams.append(sample.grams)

    def reduce(self, group: ProcessGroup) -> None:
        """Combine all processes."""
        self.served, self.norms = group.reduce_sum(self.served), group.reduce_sum(self.norms)
        self.inputs = [each for part in group.gather(self.inputs) for each in part]
        self.grams = [each for part in group.gather(self.grams) for each in part]

    def summarize(self) -> UseSummary:
        stay = None
        if self.router is not None and self.groups == 1:
            stay = removal_order(self.router, torch.cat(self.inputs), torch.cat(self.grams))
        return UseSummary(self.served.cpu(), (self.norms / self.served.clamp_min(1)).cpu(), stay)


def removal_order(router: Router, inputs: Tensor, grams: Tensor) -> Tensor:
    """The round in which each expert leaves by backward elimination, (experts,); the last one has the largest number.

    Args:
        inputs: of the router, (tokens, hidden).
        grams: products of the outputs of every two experts, (tokens, experts, experts).
    """
    everyone = list(range(router.count))
    full = router.weigh(inputs, torch.tensor(everyone, device=inputs.device))
    chosen = int((full != 0).sum(1).max())
    now, errors = full.clone(), full.new_zeros(len(inputs))
    left, stay = set(everyone), torch.zeros(router.count, dtype=torch.float64)
    number = 0
    while len(left) > chosen:
        costs: dict[int, float] = {}
        for expert in sorted(left):
            (tokens,) = (now[:, expert] != 0).nonzero(as_tuple=True)
            if len(tokens):
                weights = router.weigh(inputs[tokens], torch.tensor(sorted(left - {expert}), device=inputs.device))
                costs[expert] = float((_errors(full[tokens] - weights, grams[tokens]) - errors[tokens]).sum())
            else:
                costs[expert] = 0.0
        leaving = min(max(1, router.count // ROUNDS), len(left) - chosen)
        for expert in sorted(costs, key=lambda expert: costs[expert])[:leaving]:
            left.remove(expert)
            stay[expert] = number
            number += 1
        now = router.weigh(inputs, torch.tensor(sorted(left), device=inputs.device))
        errors = _errors(full - now, grams)
    for expert in left:
        stay[expert] = number
    return stay


def _errors(change: Tensor, grams: Tensor) -> Tensor:
    """The norm of sum_e change_e f_e for every token, (tokens,)."""
    squares = torch.einsum("te,tef,tf->t", change, grams, change)
    return squares.clamp_min(0).sqrt()


def read_use(tensors: Mapping[str, Tensor], experts: int) -> UseSummary:
    """The inverse of `vars` of a summary; raise KeyError or ValueError if a tensor is missing or invalid."""
    wide = {name: ((experts,), torch.float64) for name in ("norm", "stay") if name != "stay" or "stay" in tensors}
    check_tensors(tensors, served=((experts,), torch.int64), **wide)
    return UseSummary(tensors["served"], tensors["norm"], tensors.get("stay"))
