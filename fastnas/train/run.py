"""Run folders: what a training leaves on disk."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import ClassVar

from fastnas._files import write_table
from fastnas.inference.model_file import save_model
from fastnas.runs.folder import Folder
from fastnas.train.config import GROUPS, TrainConfig
from fastnas.train.loop import CHECKPOINTS, EpochRecord, Training


class TrainFolder(Folder):
    """The folder of one training; use it as a context manager around the training.

    | file | what |
    | --- | --- |
    | `config.yaml` | every option, resolved: `fastnas train --config config.yaml` repeats the training |
    | `genotype.json`, `genotype.txt` | the architecture |
    | `metrics.csv` | one row an epoch, the fields of :class:`~fastnas.train.EpochRecord` |
    | `events.out.tfevents.*` | the same for TensorBoard |
    | `checkpoint.pt` | the state to resume from |
    | `model.pt` | after the last epoch: the trained network, for `fastnas predict` and `fastnas export` |
    | `best.pt` | the same after the epoch with the best top-1 accuracy on the test images |

    Args:
        path: The folder.
    """

    COMMAND = "train"
    KIND = "A training"
    FILES = ("config.yaml", "metrics.csv", "checkpoint.pt", "best.pt", "model.pt", "genotype.json", "genotype.txt")
    GROUPS: ClassVar[tuple[type, ...]] = GROUPS

    def start(self, config: TrainConfig, *, overwrite: bool = False) -> None:
        """Makes the folder for a new training and writes its ``config.yaml`` and the architecture.

        With ``overwrite`` the files of an earlier training are removed; other files in the folder stay.

        Raises:
            FileExistsError: as :meth:`check_free`.
            OSError: where the folder cannot be written.
        """
        self._start(config.to_dict(), overwrite=overwrite)
        for name in ("genotype.json", "genotype.txt"):
            config.architecture().save(self.path / name)

    def config(self) -> TrainConfig:
        """Returns the options of the training in this folder.

        Raises:
            FileNotFoundError: where the folder holds no training.
            ValueError: where its ``config.yaml`` is damaged.
        """
        options = self.options()
        try:
            return TrainConfig.from_dict(options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.path / 'config.yaml'} cannot be read: {error}") from error

    def resume(self, training: Training) -> None:
        """Puts ``training`` where the one in this folder stopped.

        Raises:
            CheckpointError: where there is no checkpoint that fits.
        """
        training.load_state_dict(CHECKPOINTS.load(self.path / "checkpoint.pt"))
        self._write_metrics(training)  # rows of epochs after the checkpoint will come again

    def save(self, training: Training) -> None:
        """Writes the checkpoint; atomically, as every file here."""
        CHECKPOINTS.save(self.path / "checkpoint.pt", training.state_dict())

    def record(self, training: Training, record: EpochRecord) -> None:
        """Writes what an epoch came to: metrics, events and checkpoints."""
        self._write_metrics(training)
        tags = {
            "loss/train": record.train_loss,
            "loss/test": record.test_loss,
            "accuracy/train": record.train_accuracy,
            "accuracy/test": record.top1,
            "accuracy/test_top5": record.top5,
            "run/lr": record.lr,
            "run/drop_path": record.drop_path,
            "run/seconds": record.seconds,
        }
        self._write_events(record.epoch, tags)
        state = training.state_dict()  # where a weight is no longer a number it raises, and nothing is written
        if record is max(training.history, key=lambda r: r.top1):
            self._save_model("best.pt", training)
        CHECKPOINTS.save(self.path / "checkpoint.pt", state)

    def finish(self, training: Training) -> Path:
        """Returns the path of ``model.pt`` after writing the trained network to it."""
        return self._save_model("model.pt", training)

    def _save_model(self, name: str, training: Training) -> Path:
        """Returns the path of the model file after writing the network as it is now to it."""
        path, source = self.path / name, training.source
        metrics = asdict(training.history[-1])
        save_model(
            path,
            training.network,
            genotype=training.genotype,
            network=training.network_options,
            classes=source.classes,
            mean=source.mean,
            std=source.std,
            image_size=source.shape[1],
            crop=source.crop,
            metrics={**metrics, "seconds": sum(r.seconds for r in training.history)},
        )
        return path

    def _write_metrics(self, training: Training) -> None:
        columns = [f.name for f in fields(EpochRecord)]
        write_table(self.path / "metrics.csv", columns, [asdict(r) for r in training.history])
