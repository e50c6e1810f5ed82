"""The training of `heal`: transformers' Trainer, with the distance from the original as the loss."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from ..data.windows import BATCH_IMAGES, IGNORED
from ..errors import PrunePeakError, spell
from ..models.loading import IMAGES
from ..options import LORA
from ..progress import open_bar
from .objectives import NextTokens, Objective, Row, measure_distance
from .windows import HealingData

STEP_TOKENS = 512  # of one update
RATES = {"full": 1e-4, "lora": 1e-3}
RANK = 16  # of the adapters
EVALUATIONS, LEAST_STEPS = 8, 25  # of the held-out rows in the course of a run, and steps between two of them
PATIENCE = 3  # evaluations without an improvement, after which a run stops
METRIC = "eval_kl"


class DistillationTrainer(Trainer):  # type: ignore[misc]  # transformers is not followed
    """Minimizes the distance from the original, summed over what is counted in a step and divided by its number."""

    def __init__(
        self, objective: Objective, original: PreTrainedModel, held_out: Sequence[Row], **options: Any
    ) -> None:
        super().__init__(data_collator=collate, eval_dataset=held_out, **options)
        self.model_accepts_loss_kwargs = True  # so that it counts, whatever the class takes
        self.objective = objective
        self.original = original.to(self.args.device)
        self.held_out = into_batches(objective, held_out, self.args.device)
        self.remove_callback(PrinterCallback)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one batch; `num_items_in_batch` counts the labels of the step in all processes."""
        model.eval()  # what it is to learn has no dropout
        given = self.objective.inputs(inputs)
        with torch.no_grad():
            expected = self.original(**given)
        outputs = model(**given)
        assert num_items_in_batch is not None
        total = self.objective.distances(expected, outputs, inputs).sum()
        loss = total / num_items_in_batch * self.accelerator.num_processes  # gradients are averaged over processes
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The distance on the held-out rows; every process computes the whole."""
        assert self.model is not None
        self.model.eval()
        distance = measure_distance(self.objective, self.original, self.model, self.held_out)
        metrics = {METRIC: distance.divergence}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class Progress(TrainerCallback):  # type: ignore[misc]
    """One progress bar, which starts where a run resumes."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar = open_bar("heal", "step", state.max_steps, state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.update()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self.bar.set_postfix(held_out_KL=f"{kw['metrics'][METRIC]:.4f}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.close()


def train(
    objective: Objective,
    original: PreTrainedModel,
    model: PreTrainedModel,
    data: HealingData,
    tokens: int,
    method: str,
    folder: Path,
    seed: int,
    tokens_at_once: int,
    on_cpu: bool,
) -> PreTrainedModel:
    """Train a model on data, and return it as it was at the best evaluation.

    Args:
        folder: for checkpoints; the newest one there is resumed.
        tokens_at_once: about the tokens of one pass; the gradients of a step of several passes are accumulated.

    Raises:
        PrunePeakError: `lora` without peft.
    """
    if method == LORA:
        model = _add_adapters(model)
    else:  # Trainer reads checkpoints by the names of the class, which differ from those on disk in some
        model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
    model.config.use_cache = False
    arguments = _arguments(objective, data, tokens, method, folder, seed, tokens_at_once, on_cpu)
    bars = [Progress()] if arguments.process_index == 0 else []
    trainer = DistillationTrainer(
        objective,
        original,
        data.held_out,
        model=model,
        args=arguments,
        train_dataset=data.train,
        callbacks=[EarlyStoppingCallback(PATIENCE), *bars],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    best = trainer.accelerator.unwrap_model(trainer.model)
    return best.merge_and_unload() if method == LORA else best


def _arguments(
    objective: Objective,
    data: HealingData,
    tokens: int,
    method: str,
    folder: Path,
    seed: int,
    tokens_at_once: int,
    on_cpu: bool,
) -> TrainingArguments:
    usual = max(1, round(STEP_TOKENS * len(data.train) / data.tokens))
    rows = max(usual, objective.least_rows)  # of a step
    steps = max(1, round(tokens / data.tokens * len(data.train) / rows))
    every = min(steps, max(LEAST_STEPS, steps // EVALUATIONS))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=RATES[method] * objective.rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(5, steps // 4),
        weight_decay=0.0,
        eval_strategy="steps",
        eval_steps=every,
        save_steps=every,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model=METRIC,
        greater_is_better=False,
        logging_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=on_cpu,
        ddp_find_unused_parameters=not isinstance(objective, NextTokens),  # such as a mask token, or a pooler
        bf16=not on_cpu and torch.cuda.is_bf16_supported(),
        seed=seed,
    )
    processes = arguments.world_size
    at_once = 1 if objective.one_row else usual * tokens_at_once // STEP_TOKENS // processes
    arguments.per_device_train_batch_size = max(1, at_once)
    arguments.gradient_accumulation_steps = max(1, rows // (processes * arguments.per_device_train_batch_size))
    return arguments


def _add_adapters(model: PreTrainedModel) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise PrunePeakError(
            f"{spell('method', 'lora')} needs the package peft: pip install 'prune-peak[lora]'."
        ) from None
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Rows as one batch, padded on the right where their lengths differ; rows without labels count once each."""
    if "labels" not in rows[0]:
        [name] = rows[0]
        once = torch.zeros(len(rows), 1, dtype=torch.long)
        return {name: torch.stack([row[name] for row in rows]), "labels": once, "shift_labels": once}
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch = {
        "input_ids": pad_sequence([row["input_ids"] for row in rows], batch_first=True),
        "labels": pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=IGNORED),
    }
    batch["shift_labels"] = batch["labels"]  # Trainer counts these; without them, labels[1:]
    if bool((lengths != lengths[0]).any()):
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return batch


def into_batches(objective: Objective, rows: Sequence[Row], device: torch.device) -> list[dict[str, Tensor]]:
    """Rows as batches of about the tokens of a step, as `measure_distance` takes them."""
    size = BATCH_IMAGES if IMAGES in rows[0] else max(1, STEP_TOKENS // max(len(row["input_ids"]) for row in rows))
    size = 1 if objective.one_row else size
    batches = [collate(rows[start : start + size]) for start in range(0, len(rows), size)]
    return [{name: t.to(device) for name, t in batch.items() if name != "shift_labels"} for batch in batches]
