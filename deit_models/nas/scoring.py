"""How good a candidate is: the accuracy of its share of the super-network on images that were held out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..augmentation.levels import Levels, TrainInput
from ..checkpoint import Preprocessing
from ..data.inputs import EvalSamples, ShardSampler
from ..data.loading import DamageCount, Watch, explained_worker_failure, make_loader
from ..data.records import ImageRecords
from ..data.transforms import EvalTransform
from ..distributed import Process
from ..errors import DataError
from ..evaluation import autocast
from ..models.vit_resnas import ViTResNAS
from ..training.recipe import Precision
from .costs import Ledger
from .space import Candidate, SearchSpace
from .supernet import extract

SCORES_NAME = "scores.jsonl"


class HeldOut:
    """Labelled images, decoded once and kept as bytes on the device: a search sees them hundreds of times.

    Args:
        records: the images; those that cannot be read are left out.
        preprocessing: the network's.
        process: this one; every process keeps all images.
        workers: loading processes.
        watch: wraps the batches, for a progress bar.

    Raises: DataError: too many images cannot be read, or none can.
    """

    def __init__(
        self, records: ImageRecords, preprocessing: Preprocessing, process: Process, *, workers: int, watch: Watch
    ) -> None:
        samples = EvalSamples(records, EvalTransform(preprocessing).levels)
        order = ShardSampler(len(records))
        loader = make_loader(samples, order, batch_size=64, workers=workers, device=torch.device("cpu"))
        damage, images, labels = DamageCount(records, limit=0.01), [], []
        with explained_worker_failure(workers):
            for values, numbers, failures in watch(loader, len(loader)):
                damage.add(failures)
                images.append(values[failures < 0])
                labels.append(numbers[failures < 0])
        self.images, self.labels = torch.cat(images).to(process.device), torch.cat(labels).to(process.device)
        if not len(self.labels):
            raise DataError(f"no image of {records.name} is left to score candidates on")
        self._to_input, self.process = TrainInput(preprocessing, process.device), process

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images as the network's input, with their labels, on the device, `size` at once, each made as needed."""
        for start in range(0, len(self.labels), size):
            values, labels = self.images[start : start + size], self.labels[start : start + size]
            yield self._to_input(Levels(values, torch.zeros(len(values), 5, dtype=torch.int64))), labels

    @torch.inference_mode()
    def top1(self, network: ViTResNAS, *, precision: Precision, batch_size: int) -> float:
        """Percent of the images whose likeliest class is the label."""
        network = network.to(self.process.device).eval()
        right = torch.zeros((), dtype=torch.int64, device=self.process.device)
        for images, labels in self.batches(batch_size):
            with autocast(self.process.device, precision):
                logits = network(images)
            right += (logits.argmax(1) == labels).sum()
        return round(100 * int(right) / len(self.labels), 4)


class Scorer:
    """Accuracies of candidates with shared weights, each computed once; spread over the processes of a search.

    Args:
        largest: the trained super-network.
        space: its space.
        images: to score on.
        folder: where scores.jsonl is kept; it belongs to these weights and images.
        precision: of the forward pass.
        batch_size: images at once.
    """

    def __init__(
        self,
        largest: ViTResNAS,
        space: SearchSpace,
        images: HeldOut,
        folder: Path,
        *,
        precision: Precision,
        batch_size: int,
    ) -> None:
        self.largest, self.space, self.images = largest, space, images
        self.precision: Precision = precision
        self.batch_size = batch_size
        self.known = Ledger(folder / SCORES_NAME, writes=images.process.is_main)

    def __call__(self, candidates: Sequence[Candidate]) -> list[float]:
        """The accuracy of each candidate in percent; every process passes the same and gets all."""
        process = self.images.process
        new = list({c.key(): c for c in candidates if c.key() not in self.known}.values())
        # in rounds of one candidate a process, so that little is lost if the search is killed
        for start in range(0, len(new), process.world):
            mine = new[start + process.rank : start + process.world][:1]
            own = [(c.key(), self._top1(c)) for c in mine]
            for found in process.gather(own):
                for key, top1 in found:
                    self.known.add(key, {"top1": top1})
        return [self.known[candidate.key()]["top1"] for candidate in candidates]

    def _top1(self, candidate: Candidate) -> float:
        network = extract(self.largest, self.space, candidate)
        return self.images.top1(network, precision=self.precision, batch_size=self.batch_size)
