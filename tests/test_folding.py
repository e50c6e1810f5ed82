import torch

from prune_peak.sites.folding import cut, fold


def test_fold_and_cut_equal_holding_the_neurons() -> None:
    weight, bias, fill = torch.randn(8, 20), torch.randn(8), torch.randn(20)
    keep = torch.tensor([0, 3, 4, 11, 19])
    values = torch.randn(50, 20)
    held = fill.expand(50, 20).clone()
    held[:, keep] = values[:, keep]
    expected = held @ weight.T + bias
    ours = values[:, keep] @ cut(weight, keep, axis=1).T + fold(weight, bias, fill, keep)
    assert torch.allclose(ours, expected, atol=1e-5)


def test_fold_adds_to_a_bias_and_starts_one() -> None:
    weight, fill, keep = torch.randn(4, 6), torch.randn(6), torch.tensor([1])
    none = fold(weight, None, fill, keep)
    assert torch.allclose(fold(weight, torch.ones(4), fill, keep), none + 1)


def test_keeping_all_folds_nothing() -> None:
    bias = torch.randn(4)
    assert torch.equal(fold(torch.randn(4, 6), bias, torch.randn(6), torch.arange(6)), bias)
