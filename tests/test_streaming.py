"""The block stream gives the numbers of the whole forward, bit for bit."""

from pathlib import Path

import pytest
import torch
from tiny import TINY, VOCABULARY, Tiny, random_inputs

from prune_peak.data.windows import into_batches
from prune_peak.errors import PrunePeakError
from prune_peak.models.bfloat16 import fast_products
from prune_peak.models.loading import open_model
from prune_peak.models.streaming import BlockStream
from prune_peak.sites.finding import find_sites
from prune_peak.stats.collection import collect
from prune_peak.stats.histogram import Stats


@pytest.mark.parametrize("tiny", TINY, ids=lambda tiny: tiny.name)
def test_stream_equals_the_whole_forward(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny.build()
    source = open_model(str(tiny.save(tmp_path)))
    if source.sees_images:
        batches = [random_inputs(model, 2), random_inputs(model, 3)]
    else:
        mask = torch.ones(2, 40, dtype=torch.int64)
        mask[0, :9] = 0
        batches = [random_inputs(model, 2, 40) | {"attention_mask": mask}, random_inputs(model, 2, 40)]
    stream = BlockStream(source, batches, torch.float32)
    for _ in stream.steps():
        pass
    with torch.inference_mode():
        for batch, output in zip(batches, stream.outputs(), strict=True):
            assert torch.equal(output[0], model(**batch)[0])
    assert all(parameter.is_meta for parameter in stream.model.parameters()), "weights stayed in memory"


ONE_EACH = list({tiny.family: tiny for tiny in TINY}.values())


# the other settings of a family are left to `-m real`
@pytest.mark.parametrize(
    "tiny",
    [pytest.param(tiny, marks=[] if tiny in ONE_EACH else pytest.mark.real) for tiny in TINY],
    ids=lambda tiny: tiny.name,
)
def test_stream_equals_the_whole_forward_in_bfloat16(tiny: Tiny, tmp_path: Path) -> None:
    """Also where weights are held in float32, for a processor that has no products of bfloat16."""
    source = open_model(str(tiny.save(tmp_path)))
    model = source.model_class.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    batch = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in random_inputs(model, 2, 24).items()
    }
    stream = BlockStream(source, [batch], torch.bfloat16)
    for _ in stream.steps():
        pass
    with torch.inference_mode(), fast_products():
        assert torch.equal(next(stream.outputs())[0], model(**batch)[0])


def test_a_convolution_between_blocks_is_refused(tmp_path: Path) -> None:
    folder = Tiny("conv", "DebertaV2", "ForMaskedLM", {"conv_kernel_size": 3}).save(tmp_path / "source")
    batches = [{"input_ids": torch.randint(3, VOCABULARY, (1, 8))}]
    with pytest.raises(PrunePeakError, match="changes the hidden states between its blocks"):
        next(BlockStream(open_model(str(folder)), batches, torch.float32).steps())


def test_padding_is_not_counted(tmp_path: Path) -> None:
    tiny = TINY[0]
    source = open_model(str(tiny.save(tmp_path)))
    sites = find_sites(source.meta_model, source.family)
    tokens = torch.randint(3, VOCABULARY, (2, 40))
    mask = torch.ones_like(tokens)
    mask[0, :17] = 0
    seen: list[torch.Tensor] = []
    model = tiny.build()
    model.get_submodule(sites[1].name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        model(tokens, attention_mask=mask)
    expected = Stats(sites[1].neurons, int(mask.sum()))
    expected.add(seen[0][mask.bool()])
    batches = [{"input_ids": tokens, "attention_mask": mask}]
    summary = list(collect(source, sites, batches, torch.float32))[1].stats.summarize()
    assert summary.count == int(mask.sum())
    assert torch.allclose(summary.mean, expected.summarize().mean, atol=1e-6)
    assert torch.allclose(summary.peak, expected.summarize().peak, atol=1e-6)


def test_batching_does_not_change_the_statistics(tmp_path: Path) -> None:
    source = open_model(str(TINY[3].save(tmp_path)))
    sites = find_sites(source.meta_model, source.family)
    windows = torch.randint(3, VOCABULARY, (8, 32))
    one, many = (
        [seen.stats.summarize() for seen in collect(source, sites, into_batches(windows, tokens), torch.float32)]
        for tokens in (8 * 32, 32)
    )
    for first, second in zip(one, many, strict=True):
        assert torch.allclose(first.mean, second.mean, atol=1e-5)
        assert torch.allclose(first.variance, second.variance, rtol=1e-4)
