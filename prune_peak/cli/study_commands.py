"""The commands of studies: they measure a model and write no checkpoint."""

from typing import Any

import click

from ..studies.options import AblateOptions, AnalyzeOptions
from .output import print_analysis, print_study
from .parameters import echo_json, model_argument, options_of, output_options


@click.command()
@model_argument
@options_of(AblateOptions)
@output_options
def ablate(model: str, as_json: bool, **options: Any) -> None:
    """Measure what held neurons cost: cross-entropy and top-1, over fills, fractions and kinds of site.

    It writes tables (CSV and JSON), a picture and a report; the model is not changed. A neuron of attention is one
    input of its output projection. By default the model runs about 270 times; the second example is a first look. A
    study that was stopped resumes.

    \b
    Examples:
      prune-peak ablate HuggingFaceTB/SmolLM2-135M --calibration notes.txt
      prune-peak ablate ./my-model --fill peak --fill mean --fraction 0.3 --seeds 1
    """
    from ..studies.ablation import ablate as run

    study = run(model, **options)
    echo_json(study.to_json()) if as_json else print_study(study)


@click.command()
@model_argument
@options_of(AnalyzeOptions)
@output_options
def analyze(model: str, as_json: bool, **options: Any) -> None:
    """Measure how neurons are distributed, by site, head and block; with several data sets, how stable that is.

    It writes tables (CSV and JSON), pictures and a report that any browser opens offline.

    \b
    Examples:
      prune-peak analyze HuggingFaceTB/SmolLM2-135M --data notes.txt
      prune-peak analyze ./my-model --data news.txt --data code.txt
    """
    from ..studies.analysis import analyze as run

    analysis = run(model, **options)
    echo_json(analysis.to_json()) if as_json else print_analysis(analysis)
