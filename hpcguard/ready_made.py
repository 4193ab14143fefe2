"""Weights of a model that its callable gives ready-made, as a run's baseline."""

from hpcguard.config import Config
from hpcguard.data import ImageSet
from hpcguard.models.external import keep_ready_made
from hpcguard.runs import RunFolder


def keep_baseline(config: Config, folder: RunFolder, images: ImageSet) -> None:
    """Write them, where the configuration names a callable and no other origin of weights, and they are not there yet.

    Raises InputError if the callable gives other weights every time.
    """
    path = folder.weights("baseline")
    named = ":" in config.model.name and config.model.weights is None and config.baseline is None
    if named and not path.exists():
        folder.create()
        keep_ready_made(config.model, len(images.classes), images.shape[0], path)
