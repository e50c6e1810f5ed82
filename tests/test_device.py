"""What a run does on the device of the blocks, and what it moves between that and the processor.

`FakeDevice` is a device without hardware: its tensors are of `meta:1` by name, hold their numbers in the processor's
memory, and take no part in an operation with tensors of the processor. It counts what is moved.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXAMPLES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import prune_peak
from prune_peak.data.windows import into_batches
from prune_peak.errors import UsageError
from prune_peak.evaluation.quality import build_eval_set, evaluate_model
from prune_peak.models.execution import ExecutionConfig, find_device
from prune_peak.models.families import find_blocks
from prune_peak.models.loading import open_model
from prune_peak.options import PruningOptions
from prune_peak.pruning.site_pruning import plan_site
from prune_peak.sites.finding import find_sites
from prune_peak.sites.plan import SiteResult
from prune_peak.stats.collection import collect

DEVICE = torch.device("meta", 1)
CPU = torch.device("cpu")


class Held(Tensor):
    """A tensor of the device."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "Held":
        held: Held = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
        )
        held.values = values
        return held

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{function} outside the device's mode")


class FakeDevice(TorchDispatchMode):
    """Runs operations on tensors of the device, and counts what crosses: the shapes moved each way."""

    def __init__(self) -> None:
        super().__init__()
        self.moved_in: list[tuple[int, ...]] = []
        self.moved_out: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"):
            with self:  # `to` in inference mode
                return function.decompose(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        target = kwargs.get("device")
        is_here = any(isinstance(tensor, Held) for tensor in tensors)
        moves = function._overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        if moves and tensors:
            self._count(tensors, target)
        elif is_here:
            others = [t for t in tensors if not isinstance(t, Held) and t.dim() > 0]
            assert not others, f"{function} of the device and of {others[0].device}"
        if target == DEVICE:
            kwargs["device"] = CPU
        plain_args, plain_kwargs = tree_map_only(Held, lambda held: held.values, (args, kwargs))
        result = function(*plain_args, **plain_kwargs)
        if target == DEVICE or (is_here and target is None and not (moves and not isinstance(args[0], Held))):
            return tree_map_only(Tensor, Held, result)
        return result

    def _count(self, tensors: Sequence[Tensor], target: torch.device | None) -> None:
        source, destination = tensors[-1], target or tensors[0].device
        if source.dim() and source.device != destination:
            if destination == DEVICE:
                self.moved_in.append(tuple(source.shape))
            elif isinstance(source, Held):
                self.moved_out.append(tuple(source.shape))


@pytest.fixture
def device() -> Iterator[FakeDevice]:
    with FakeDevice() as mode:
        yield mode


def test_the_fake_device_is_one(device: FakeDevice) -> None:
    here = torch.arange(3.0).to(DEVICE)
    assert here.device == DEVICE
    assert (here + 1).cpu().tolist() == [1, 2, 3]
    assert (device.moved_in, device.moved_out) == ([(3,)], [(3,)])
    with pytest.raises(AssertionError, match="of the device and of cpu"):
        here + torch.arange(3.0)


@pytest.mark.parametrize("windows", [4, 12], ids=["activations", "covariances"])
def test_statistics_and_refit_stay_on_the_device(windows: int) -> None:
    """Of a block, its weights come in, and the plans of its sites go out; of a run, what precedes the blocks."""
    source = open_model(str(EXAMPLES / "llama-mini"))
    sites = find_sites(source.meta_model, source.family, ("mlp", "attention"))[:4]
    kept = {site.name: 256 if site.label == "mlp" else 64 for site in sites}
    ids = torch.randint(3, source.vocabulary, (windows, 64), generator=torch.Generator().manual_seed(0))

    def plan(execution: ExecutionConfig) -> list[SiteResult]:
        observed = collect(source, sites, into_batches(ids, 128), torch.float32, True, execution)
        return [plan_site(source, one, kept[one.site.name], PruningOptions()) for one in observed]

    expected = plan(ExecutionConfig())
    with FakeDevice() as device:
        found = plan(ExecutionConfig(device=DEVICE))
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one.plan.keep, other.plan.keep)
        assert torch.allclose(one.plan.weight, other.plan.weight, atol=1e-4)  # type: ignore[arg-type]
        assert torch.allclose(one.plan.bias, other.plan.bias, atol=1e-4)  # type: ignore[arg-type]
    blocks = list(find_blocks(source.meta_model, source.family))[:2]
    weights = Counter(tuple(weight.shape) for block in blocks for weight in block.parameters())
    projections = Counter(tuple(source.meta_model.get_submodule(site.name).weight.shape) for site in sites)
    once = Counter(device.moved_in) - weights - projections
    batches = windows // 2
    assert once == Counter({(2, 64, 128): batches, (1, 64, 32): 2, (1, 64): 1})  # states; rotary tables and positions
    plans = [part for one in found for part in (one.plan.keep, one.plan.fill, one.plan.weight, one.plan.bias)]
    assert Counter(device.moved_out) == Counter(tuple(part.shape) for part in plans if part is not None)


@pytest.mark.parametrize("whole", [False, True])
def test_quality_is_measured_on_the_device(whole: bool) -> None:
    source = open_model(str(EXAMPLES / "llama-mini"))
    if whole:
        source = replace(source, family=replace(source.family, streamable=False))
    windows = torch.randint(3, source.vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
    eval_set = build_eval_set(source, windows, "drawn")
    expected = evaluate_model(source, eval_set)
    with FakeDevice() as device:
        found = evaluate_model(source, eval_set, execution=ExecutionConfig(device=DEVICE))
    assert torch.allclose(found.losses, expected.losses)
    assert device.moved_out == [(16,)] * 4  # losses and hits of each window


@pytest.mark.real
def test_compress_on_a_device(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It verifies; what it moves in are weights, more than once a block only where it evaluates."""
    for module in ("job", "memory"):
        monkeypatch.setattr(f"prune_peak.{module}.find_device", lambda _: DEVICE)
    with FakeDevice() as device:
        prune_peak.compress(str(EXAMPLES / "llama-mini"), 0.3, tmp_path / "cut", calibration=str(text), samples=4)
    assert device.moved_in.count((4, 128, 128)) == 1  # the states of the calibration
    assert device.moved_out[:4] == [(128, 272), (128,), (272,), (384,)]
    assert len(device.moved_out) == 4 * 3 + 4


def test_auto_is_the_accelerator_or_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in ("cuda", "xpu", "mps"):
        with monkeypatch.context() as patched:
            patched.setattr("torch.accelerator.current_accelerator", lambda found=found, **_: torch.device(found))
            assert find_device("auto").type == find_device(found).type == found
            with pytest.raises(UsageError, match="finds no such device here"):
                find_device("mps" if found != "mps" else "cuda")
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda **_: None)
    assert find_device("auto") == CPU
