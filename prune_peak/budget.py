"""How much to cut: from a ratio, or from the size that the result may have, to the neurons kept at every site."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy
from transformers import PreTrainedModel

from .errors import PrunePeakError, UsageError
from .hosts import AUTO, choose_target
from .selection import kept_width, width_step
from .sites import Site
from .source import Blueprint

Ratio = float | Mapping[str, float]
Widths = dict[str, int]  # kind of site: neurons kept

MOST_SPLITS = 8  # ways of one target that are compared


@dataclass(frozen=True)
class Budget:
    """What was asked for; exactly one of the first three."""

    ratio: Ratio | None = None
    target_params: float | None = None  # share of all parameters that may stay
    target_bytes: int | None = None
    keep_shape: bool = False

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.ratio, self.target_params, self.target_bytes)) != 1:
            raise UsageError("pass one of --ratio, --target-params and --target-bytes: how much to cut.")
        if self.keep_shape and self.ratio is None:
            raise UsageError("--keep-shape saves nothing, so no target is reached; pass --ratio.")
        if self.target_params is not None and not 0 < self.target_params < 1:
            raise UsageError(f"--target-params {self.target_params}: expected a share between 0 and 1, e.g. 0.8.")

    @property
    def options(self) -> dict[str, object]:
        """As the recipe tells them."""
        ratio = dict(self.ratio) if isinstance(self.ratio, Mapping) else self.ratio
        return {"ratio": ratio, "target_params": self.target_params, "target_bytes": self.target_bytes}

    @property
    def label(self) -> str:
        """For the name of a folder."""
        if isinstance(self.ratio, Mapping):
            return "-".join(f"{kind}{share}" for kind, share in self.ratio.items())
        if self.ratio is not None:
            return str(self.ratio)
        return f"params{self.target_params}" if self.target_bytes is None else f"bytes{self.target_bytes}"

    def kinds(self, sites: Sequence[str] | None) -> tuple[str, ...]:
        """The kinds of site to cut: those asked for, those that the ratio names, or the MLP."""
        named = tuple(self.ratio) if isinstance(self.ratio, Mapping) else None
        if sites is not None and named is not None and set(sites) != set(named):
            raise UsageError(f"--ratio names {', '.join(named)}, but --sites {', '.join(sites)}.")
        return tuple(sites or named or ("mlp",))

    def splits(
        self, source: Blueprint, sites: Sequence[Site], multiple_of: int | None = None, host: str = AUTO
    ) -> list[Widths]:
        """The ways to keep to the budget: neurons kept at every site, by the site's kind.

        One way for a ratio, or where one kind of site is cut. A target over two kinds has several: for every number
        of heads (at most `MOST_SPLITS`, evenly spread) the widest MLP that fits; a kind left whole is not named.

        Raises:
            PrunePeakError: nothing would be cut, nothing kept, or the target cannot be reached.
        """
        first: dict[str, Site] = {}
        for site in sorted(sites, key=lambda site: site.kind):  # attention before the MLP, whose steps are finer
            first.setdefault(site.kind, site)
        steps = {kind: width_step(site, multiple_of) for kind, site in first.items()}
        if self.ratio is not None:
            ratios = self.ratio if isinstance(self.ratio, Mapping) else dict.fromkeys(first, self.ratio)
            return [{kind: kept_width(site.neurons, ratios[kind], steps[kind]) for kind, site in first.items()}]

        *others, last = first  # at most one other
        choices: list[Widths] = [{}]
        for kind in others:
            widths = range(steps[kind], first[kind].neurons + 1, steps[kind])
            few = dict.fromkeys(widths[round(part)] for part in numpy.linspace(0, len(widths) - 1, MOST_SPLITS))
            choices = [{kind: width} for width in few]
        widths = range(steps[last], first[last].neurons + 1, steps[last])
        if not widths:
            raise PrunePeakError(
                f"multiples of {steps[last]} of {first[last].neurons} neurons would keep none. Choose a smaller "
                "--multiple-of."
            )
        splits = []
        for chosen in choices:
            sizes = _Sizes(source, sites, host, chosen, last, widths)
            fitting = bisect_right(sizes, self._most_parameters(source))
            whole = {kind: width for kind, width in chosen.items() if width < first[kind].neurons}
            if fitting:
                width = widths[fitting - 1]
                splits.append(whole | ({last: width} if width < first[last].neurons else {}))
        if {} in splits:
            raise PrunePeakError(f"{source.name} is within the target already: nothing would be cut.")
        if not splits:
            least = _Sizes(source, sites, host, choices[0], last, widths)[0]
            raise PrunePeakError(
                f"the target cannot be reached: with one unit left at every site, {least:,} parameters remain. "
                "Choose a larger target, or cut both kinds (--sites mlp,attention)."
            )
        return splits

    def _most_parameters(self, source: Blueprint) -> int:
        if self.target_bytes is not None:
            return self.target_bytes // source.dtype.itemsize
        assert self.target_params is not None
        return int(self.target_params * count_parameters(source.blank))


@dataclass(frozen=True)
class _Sizes(Sequence[int]):
    """Parameters left, by the number of a width of the last kind: built as they are asked for, to bisect."""

    source: Blueprint
    sites: Sequence[Site]
    host: str
    chosen: Widths
    last: str
    widths: range

    def __len__(self) -> int:
        return len(self.widths)

    def __getitem__(self, number: int) -> int:  # type: ignore[override]
        kept = self.chosen | {self.last: self.widths[number]}
        return count_parameters(choose_target(self.source, self.sites, kept, self.source.dtype, self.host).blank)


def count_parameters(blank: PreTrainedModel) -> int:
    """Parameters of a model on `meta`, tied ones once."""
    twins = blank.all_tied_weights_keys
    return sum(tensor.numel() for name, tensor in blank.state_dict().items() if name not in twins)
