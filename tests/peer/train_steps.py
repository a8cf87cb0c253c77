"""Run by the reference package's Python: a training of given batches by its own trainer.

Usage: train_steps.py CASE RESULT, both of torch.save. CASE holds "model" and "train" (fields of its ModelConfig and
TrainConfig), "weights" (a state dict), and "epochs", a list of lists of batches (pixels (B, 3, S, S) uint8, boxes and
labels of each image). RESULT holds "losses" and "rates" (of every parameter group) by optimizer step, and after the
last the state dicts "weights" and "ema".
"""

from __future__ import annotations

import sys
from typing import Any

import pytorch_lightning as pl
import rfdetr
import torch
from rfdetr.config import TrainConfig
from rfdetr.training import RFDETREMACallback, RFDETRModelModule, build_trainer
from rfdetr.utilities import collate_fn
from torch.utils.data import DataLoader, Dataset

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


class Given(Dataset[Any]):
    """The images of all batches one after the other, as its own datasets hand them out."""

    def __init__(self, epoch: list[dict[str, Any]]) -> None:
        self.images = [
            (pixels, {"boxes": boxes, "labels": labels})
            for batch in epoch
            for pixels, boxes, labels in zip(batch["pixels"], batch["boxes"], batch["labels"], strict=True)
        ]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        pixels, target = self.images[index]
        side = torch.tensor(pixels.shape[-2:])
        numbers = {"image_id": torch.tensor([index]), "orig_size": side, "size": side}
        return (pixels.float() / 255.0 - MEAN) / STD, {**target, **numbers}


class Batches(pl.LightningDataModule):
    """The batches of the case, epoch by epoch."""

    def __init__(self, epochs: list[list[dict[str, Any]]]) -> None:
        super().__init__()
        self.epochs = epochs

    def train_dataloader(self) -> DataLoader[Any]:
        epoch = self.epochs[self.trainer.current_epoch]
        return DataLoader(Given(epoch), batch_size=len(epoch[0]["pixels"]), collate_fn=collate_fn)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # all of it is on the CPU


class Recorder(pl.Callback):
    """What every optimizer step had: the loss before it, and the rates that it used; and the weights after the last.

    When its training is over, the package puts the average into the place of the weights.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.losses: list[float] = []
        self.rates: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.rates.append([float(group["lr"]) for group in optimizer.param_groups])

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        if len(self.losses) == self.steps:
            self.weights = {name: value.clone() for name, value in module.model.state_dict().items()}


def main(case_path: str, result_path: str) -> None:
    torch.set_num_threads(1)
    case = torch.load(case_path, weights_only=True)
    detector = rfdetr.RFDETRNano(pretrain_weights=None, device="cpu", **case["model"])
    train = TrainConfig(**case["train"])
    module = RFDETRModelModule(detector.model_config, train)
    module.model.load_state_dict(case["weights"])
    recorder = Recorder(sum(map(len, case["epochs"])))
    trainer = build_trainer(
        train,
        detector.model_config,
        accelerator="cpu",
        limit_val_batches=0,
        reload_dataloaders_every_n_epochs=1,
        enable_model_summary=False,
    )
    trainer.callbacks.append(recorder)
    trainer.fit(module, datamodule=Batches(case["epochs"]))
    (average,) = [callback for callback in trainer.callbacks if isinstance(callback, RFDETREMACallback)]
    torch.save(
        {
            "losses": recorder.losses,
            "rates": recorder.rates,
            "weights": recorder.weights,
            "ema": average.get_ema_model_state_dict(),
        },
        result_path,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
