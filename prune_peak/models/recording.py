"""Record the inputs of every block in a pass without the blocks; decide whether the blocks can run one by one."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from transformers import PreTrainedModel


@dataclass
class BlockInputs:
    """The arguments of one call of a block, except the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class StopForward(Exception):  # noqa: N818 - not an error
    """Raised to end a forward pass once the first block's inputs are captured."""


class InputRecorder(nn.Module):
    """Replaces a block: records its inputs and returns the hidden states unchanged, or `output` if it is set."""

    def __init__(self, block: nn.Module, in_tuple: bool | None) -> None:
        super().__init__()
        # attributes that the model reads from its blocks (ModernBERT reads the attention type)
        vars(self).update({name: value for name, value in vars(block).items() if not name.startswith("_")})
        vars(self)["replaced"] = block  # not a submodule
        self.in_tuple = in_tuple  # whether the block returns a tuple; None: stop the forward pass
        self.hidden: Tensor | None = None
        self.call: BlockInputs | None = None
        self.output: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        """Methods that the model calls on its blocks (BigBird changes the kind of attention)."""
        return getattr(vars(self)["replaced"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.hidden, self.call = hidden, BlockInputs(args, kwargs)
        if self.in_tuple is None:
            raise StopForward
        output = hidden if self.output is None else self.output
        return (output, None) if self.in_tuple else output


@dataclass
class _Call:
    hidden: Any
    inputs: BlockInputs
    output: Any


@torch.inference_mode()
def is_streamable(model: PreTrainedModel, blocks: nn.ModuleList, inputs: Mapping[str, Tensor]) -> bool:
    """Whether the blocks of a model can run one by one, with inputs recorded without them, and give the same outputs.

    A whole pass is compared: every block is called once, on what the block before it returned, with the arguments that
    are recorded without the blocks; and returns the same with those that are recorded without the head, too
    (Longformer's classifier attends to one token more).
    """
    model.config.use_cache = False
    with _watched(blocks) as calls:
        expected = model(**inputs)
    if sorted(calls) != list(range(len(blocks))) or any(len(each) != 1 for each in calls.values()):
        return False
    real = [calls[index][0] for index in range(len(blocks))]
    states = [_state(call.output) for call in real]
    in_tuple = isinstance(real[0].output, tuple)
    if any(isinstance(call.output, tuple) != in_tuple for call in real):
        return False
    if not all(_equal(state, call.hidden) for state, call in zip(states, real[1:], strict=False)):
        return False
    originals = list(blocks)
    recorders = [InputRecorder(block, in_tuple) for block in originals]
    try:
        for index, recorder in enumerate(recorders):
            blocks[index] = recorder
        model.base_model(**inputs)
        hidden, recorded = [recorder.hidden for recorder in recorders], [recorder.call for recorder in recorders]
        recorders[-1].output = states[-1]
        outputs = model(**inputs)
        again = [
            _state(block(each.hidden, *call.args, **call.kwargs))
            for block, each, call in zip(originals, real, recorded, strict=True)
            if call is not None
        ]
    except Exception:  # the model needs more of its blocks than what recorders give
        return False
    finally:
        for index, block in enumerate(originals):
            blocks[index] = block
    if any(state is not hidden[0] for state in hidden) or not _equal(hidden[0], real[0].hidden):
        return False
    with_head = [recorder.call for recorder in recorders]
    same = all(
        call is not None and _equal((call.args, call.kwargs), (each.inputs.args, each.inputs.kwargs))
        for call, each in zip(with_head, real, strict=True)
    )
    return same and _equal(again, states) and _equal(_first(outputs), _first(expected))


@contextmanager
def _watched(blocks: nn.ModuleList) -> Iterator[dict[int, list[_Call]]]:
    """Gather the calls of every block, by its number."""
    calls: dict[int, list[_Call]] = {}
    with ExitStack() as hooks:
        for index, block in enumerate(blocks):

            def hook(_: nn.Module, args: Any, kwargs: Any, output: Any, index: int = index) -> None:
                hidden, *others = args or (None,)
                calls.setdefault(index, []).append(_Call(hidden, BlockInputs(tuple(others), kwargs), output))

            hooks.callback(block.register_forward_hook(hook, with_kwargs=True).remove)
        yield calls


def _state(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _first(output: Any) -> Any:
    return output.logits if hasattr(output, "logits") else output[0]


def _equal(one: Any, other: Any) -> bool:
    """Whether nested values have equal tensors."""
    first, second = tree_flatten(one)[0], tree_flatten(other)[0]
    if len(first) != len(second):
        return False
    return all(
        (torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else type(a) is type(b))
        for a, b in zip(first, second, strict=True)
    )
