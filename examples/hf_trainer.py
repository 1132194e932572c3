"""Hugging Face: gradient accumulation with the gradient of one batch, exact evaluation.

``python examples/hf_trainer.py``, or on two processes
``torchrun --standalone --nproc-per-node=2 examples/hf_trainer.py``.
"""

from __future__ import annotations

import gc
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import EvalPrediction, Trainer, TrainingArguments

from twloss import MultiTaskLoss, RankingQuality

TASKS = ["like", "reply", "share"]
# A window of 8 + 8 + 6 rows is an optimizer step; the evaluation ends unevenly too.
FEATURES, TRAIN_ROWS, EVAL_ROWS, GLOBAL_BATCH, WINDOW = 4, 22, 45, 8, 3


class Ranker(nn.Module):
    """A linear ranker; the loss, and with it the running sums, is a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Linear(FEATURES, len(TASKS), dtype=torch.float64)
        # No global_batch: the Trainer multiplies by the number of ranks itself.
        self.loss = MultiTaskLoss("bce_with_logits", TASKS)

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | None = None,
        **_: Any,  # without it the Trainer passes no num_items_in_batch
    ) -> dict[str, Tensor]:
        """The loss of the rows, divided by the count of the window on all ranks."""
        logits = self.heads(features)
        losses = self.loss(logits, labels, normalizer=num_items_in_batch)
        return {"loss": losses["loss"], "logits": logits}


class RankerTrainer(Trainer):
    """Counts by task, logs the exact loss of each, and repeats no row in training."""

    def get_batch_samples(self, *args: Any) -> tuple[list[dict[str, Tensor]], Tensor]:
        """A window's batches, and what its means divide by, as num_items_in_batch."""
        batches, _ = super().get_batch_samples(*args)
        count: Tensor = sum(self.model.loss.count(batch["labels"]) for batch in batches)
        return batches, self.accelerator.reduce(count.to(self.args.device), "sum")

    def log(self, logs: dict[str, float], *args: Any) -> None:
        """Add the losses of all rows since the last log, on every rank."""
        if "loss" in logs:
            for key, value in self.model.loss.compute().items():
                logs[f"train/{key}"] = value.item()
            self.model.loss.reset()
        super().log(logs, *args)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Accelerate would fill the last batch up with rows from the beginning."""
        self.accelerator.even_batches = False
        loader: DataLoader[Any] = super().get_train_dataloader()
        # For evaluation, whose repeated rows the Trainer drops.
        self.accelerator.even_batches = True
        return loader


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The quality over the evaluation, of which every rank gets all rows."""
    quality = RankingQuality(TASKS, sync_on_compute=False)
    logits, labels = prediction.predictions, prediction.label_ids
    quality.update(torch.as_tensor(logits), torch.as_tensor(labels))
    return {key: value.item() for key, value in quality.compute().items()}


class Rows(Dataset[dict[str, Tensor]]):
    """Features ``(FEATURES,)`` and labels ``(tasks,)``, by forward's argument names."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.features = torch.randn(count, FEATURES, generator=generator).double()
        noise = torch.randn(count, len(TASKS), generator=generator)
        self.labels = (self.features[:, : len(TASKS)] + noise > 0).double()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        return {"features": self.features[n], "labels": self.labels[n]}


def main(epochs: int = 3) -> RankerTrainer:
    """Train, and return the trainer, whose state.log_history has what it logged."""
    torch.manual_seed(0)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    arguments = TrainingArguments(
        output_dir=str(Path(tempfile.gettempdir(), "hf_trainer")),
        num_train_epochs=epochs,
        per_device_train_batch_size=GLOBAL_BATCH // world_size,
        per_device_eval_batch_size=GLOBAL_BATCH // world_size,
        gradient_accumulation_steps=WINDOW,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        eval_strategy="epoch",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        ddp_find_unused_parameters=False,
    )
    trainer = RankerTrainer(
        Ranker(),
        arguments,
        train_dataset=Rows(TRAIN_ROWS, seed=1),
        eval_dataset=Rows(EVAL_ROWS, seed=2),
        compute_metrics=compute_metrics,
    )
    # What the loss warns of, a gradient that is too small, the Trainer's factor undoes.
    warnings.filterwarnings("ignore", "normalizer: got one on several ranks")
    trainer.train()
    return trainer


if __name__ == "__main__":
    trainer = main()
    if trainer.is_world_process_zero():
        for key, value in trainer.state.log_history[-2].items():  # the last evaluation
            print(f"{key:<24} {value:.6f}")
    if dist.is_initialized():
        # A collector's run, because DDP is in reference cycles: gloo aborts a process
        # that ends with a group in use.
        gc.collect()
        dist.destroy_process_group()
