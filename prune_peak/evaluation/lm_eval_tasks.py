"""Tasks of lm-evaluation-harness (the extra `eval`), run on models side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import PrunePeakError, UsageError, brief, spell
from ..models.execution import default_dtype
from ..models.loading import open_model


@dataclass(frozen=True)
class Scores:
    """The scores of one model, by task and metric, with the names of the harness (`acc`, `acc_stderr`)."""

    model: str
    tasks: Mapping[str, Mapping[str, float]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run_tasks(
    models: Sequence[str], tasks: Sequence[str], dtype: str | None = None, revision: str | None = None
) -> list[Scores]:
    """Run tasks on models, with the settings of the harness.

    Args:
        models: folders or Hub ids.
        tasks: names of the harness, or YAML files that define a task of the same name.
        dtype: the type to compute in; by default that of each model's files, but float32 for float16.
        revision: of Hub models.

    Raises:
        UsageError: an unknown task.
        PrunePeakError: the extra is missing.

    Example:
        >>> run_tasks(["SmolLM2-135M", "SmolLM2-135M-peak-0.3"], ["arc_easy", "hellaswag"])    # doctest: +SKIP
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise PrunePeakError(f"{spell('tasks')} needs lm-evaluation-harness: pip install 'prune-peak[eval]'.") from None
    files = [Path(task) for task in tasks if Path(task).suffix == ".yaml"]
    manager = TaskManager(include_path=[str(file.resolve().parent) for file in files] or None)
    names = [Path(task).stem if Path(task) in files else task for task in tasks]
    for task, name in zip(tasks, names, strict=True):
        if name not in manager.all_tasks:
            raise UsageError(f"{spell('tasks', task)}: lm-evaluation-harness has no such task.")
    sources = [open_model(model, revision) for model in models]
    scores = []
    for source in sources:
        arguments = {"pretrained": str(source.folder), "dtype": dtype or default_dtype(source)}
        try:
            found: Any = simple_evaluate("hf", arguments, names, device="cpu", task_manager=manager, log_samples=False)
        except OSError as error:  # also what datasets raises without a connection
            raise PrunePeakError(
                f"{spell('tasks', tuple(tasks))}: their data cannot be loaded ({brief(error)}). The harness reads it "
                "from the Hub: run the command once with a connection, or pass a YAML file with data of your own."
            ) from None
        results = {
            task: {key.removesuffix(",none"): value for key, value in metrics.items() if isinstance(value, float)}
            for task, metrics in found["results"].items()
        }
        scores.append(Scores(source.label, results))
    return scores
