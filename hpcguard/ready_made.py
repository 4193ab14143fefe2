"""Weights of a model that its callable gives ready-made, as a run's baseline."""

from hpcguard.config import Config
from hpcguard.data import ImageSet
from hpcguard.models.external import check_ready_made, keep_ready_made
from hpcguard.runs import RunFolder


def keep_baseline(config: Config, folder: RunFolder, images: ImageSet, dry_run: bool = False) -> None:
    """Write them, where the configuration names a callable and no other origin of weights, and they are not there yet.

    Raises InputError if the callable gives other weights every time, or others than those that were kept.
    """
    path = folder.weights("baseline")
    if ":" not in config.model.name or config.model.weights is not None or config.baseline is not None:
        return
    if path.exists():
        check_ready_made(config.model, len(images.classes), images.shape[0], path)
    elif not dry_run:
        folder.create()
        keep_ready_made(config.model, len(images.classes), images.shape[0], path)
