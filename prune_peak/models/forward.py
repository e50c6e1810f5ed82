"""One call of a stock class, with its errors as one line."""

from collections.abc import Callable
from typing import Any

import torch
import transformers

from ..errors import LostProcessError, PrunePeakError, brief, is_out_of_memory
from .bfloat16 import fast_products
from .loading import ModelSpec
from .miniature import make_inputs
from .recording import StopForward

FEW, FEWEST = 12, 4  # tokens of a window to compare outputs on


def run(source: ModelSpec, module: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    """The output of a module of a stock class, such as a block.

    Raises:
        PrunePeakError: the class cannot run it; the message has its reason.
    """
    try:
        with fast_products():
            return module(*inputs, **named)
    except (LostProcessError, PrunePeakError, StopForward):  # of observers and recorders
        raise
    except Exception as error:  # every class raises its own kinds
        if is_out_of_memory(error):
            raise
        raise PrunePeakError(
            f"{source.name} does not run: {source.model_class.__name__} of transformers {transformers.__version__} "
            f"stops with {type(error).__name__} ({brief(error)}). Correct config.json."
        ) from error


@torch.no_grad()  # parameters that are made in inference mode would stay so
def check_forward(source: ModelSpec) -> None:
    """Refuse a config whose class does not run, without any weight.

    Raises:
        PrunePeakError: the class raises an error, or its windows are too short to compare outputs on.
    """
    length = min(FEW, source.positions or FEW)
    if length < FEWEST:
        raise PrunePeakError(
            f"{source.name} has windows of {length} tokens; expected at least {FEWEST}. Correct config.json."
        )
    inputs = {name: values.to("meta") for name, values in make_inputs(source.meta_model, length=length).items()}
    try:
        run(source, source.meta_model.eval(), **inputs)
    except PrunePeakError as error:
        if not isinstance(error.__cause__, RuntimeError):  # not of kernels, which do not all run on meta
            raise
