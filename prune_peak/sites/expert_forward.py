"""Run the experts of a block one by one, so that the neurons of each can be measured and held.

transformers runs all experts of a block in one product of stacked weights, where no hook sees the neurons of one.
Within `routed_through`, a module of experts runs as transformers' interface for experts defines it, expert by expert.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# neurons (tokens, neurons), weight (hidden, neurons), bias (hidden,) or None, tokens (tokens,)
# -> output (tokens, hidden)
Project = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]
# hidden states (tokens, hidden), weighted norms of the experts' outputs (tokens, experts), zero where not chosen
Listener = Callable[[Tensor, Tensor], None]

FEWEST_TOKENS = 16  # of a batch, that an expert is measured on; where it serves fewer, on others as well
STATE = "_prune_peak_state"


@dataclass
class State:
    """Who takes part in the run of a module of experts."""

    projects: dict[int, tuple[Project, bool]] = field(default_factory=dict)  # by expert; whether it is measured
    listeners: list[Listener] = field(default_factory=list)


@contextmanager
def one_by_one(experts: nn.Module) -> Iterator[State]:
    """Within the context, a module of experts runs expert by expert."""
    is_first = STATE not in vars(experts)
    state: State = vars(experts).setdefault(STATE, State())
    if is_first:
        experts.forward = partial(_run, experts, state)
    try:
        yield state
    finally:
        if is_first:
            del experts.forward
            del vars(experts)[STATE]


@contextmanager
def routed_through(experts: nn.Module, number: int, project: Project, measured: bool = False) -> Iterator[None]:
    """Within the context, `project` computes the output of one expert.

    Args:
        measured: give it at least `FEWEST_TOKENS` tokens of each batch, whose output then counts for nothing.
    """
    with one_by_one(experts) as state:
        assert number not in state.projects
        state.projects[number] = project, measured
        try:
            yield
        finally:
            del state.projects[number]


@contextmanager
def listened(experts: nn.Module, listener: Listener) -> Iterator[None]:
    """Within the context, `listener` is told of every batch."""
    with one_by_one(experts) as state:
        state.listeners.append(listener)
        try:
            yield
        finally:
            state.listeners.remove(listener)


def _run(experts: Any, state: State, *args: Tensor, **kwargs: Tensor) -> Tensor:
    """The forward of an experts module: hidden states (tokens, hidden), experts and weights (tokens, chosen)."""
    hidden, chosen, weights = (*args, *kwargs.values())
    total = torch.zeros_like(hidden)
    norms = torch.zeros(len(hidden), len(experts.down_proj), device=hidden.device)
    for number in range(len(experts.down_proj)):
        token, place = torch.where(chosen == number)
        project, measured = state.projects.get(number, (_project, False))
        served = len(token)
        if measured and served < FEWEST_TOKENS:
            others = torch.linspace(0, len(hidden) - 1, min(FEWEST_TOKENS - served, len(hidden)), device=token.device)
            token = torch.cat([token, others.long()])
        if not len(token):
            continue
        output = _output(experts, number, hidden[token], token, project)
        token = token[:served]
        weighted = output[:served] * weights[token, place, None]
        if state.listeners:
            norms[token, number] = weighted.float().norm(dim=-1)
        total.index_add_(0, token, weighted.to(total.dtype))
    for listener in state.listeners:
        listener(hidden, norms)
    return total


def every_output(experts: Any, hidden: Tensor) -> Tensor:
    """What every expert makes of every token, (experts, tokens, hidden)."""
    tokens = torch.arange(len(hidden), device=hidden.device)
    return torch.stack([_output(experts, number, hidden, tokens, _project) for number in range(len(experts.down_proj))])


def _output(experts: Any, number: int, hidden: Tensor, tokens: Tensor, project: Project) -> Tensor:
    """The output of one expert, without the weight of the router."""
    bias = experts.down_proj_bias[number] if experts.has_bias else None
    output = project(_neurons(experts, number, hidden), _matrix(experts, "down_proj", number), bias, tokens)
    if getattr(experts, "has_post_expert_norm", False):
        output = experts.post_expert_norm(output)
    return output


def _neurons(experts: Any, number: int, hidden: Tensor) -> Tensor:
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    bias = getattr(experts, f"{name}_bias")[number] if experts.has_bias else None
    made = nn.functional.linear(hidden, _matrix(experts, name, number), bias)
    neurons: Tensor = experts._apply_gate(made) if experts.has_gate else experts.act_fn(made)
    return neurons


def _matrix(experts: Any, name: str, number: int) -> Tensor:
    """The weight of one expert, (rows of the output, columns that multiply the input)."""
    matrix: Tensor = getattr(experts, name)[number]
    return matrix.T if experts.is_transposed else matrix


def _project(neurons: Tensor, weight: Tensor, bias: Tensor | None, _: Tensor) -> Tensor:
    return nn.functional.linear(neurons, weight, bias)
