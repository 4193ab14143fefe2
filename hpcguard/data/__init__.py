"""Image sets by name: what a run explains, trains on and is judged on."""

from hpcguard.data.image_set import ImageSet
from hpcguard.data.load import load_images

__all__ = ["ImageSet", "load_images"]
