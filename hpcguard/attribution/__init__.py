"""LIME for many images at once: superpixels, sampling designs, weighted-ridge surrogate, one engine.

Takes arrays and a callable, gives arrays; knows nothing of files, clusters or models.
"""

from hpcguard.attribution.explain import Attribution, explain_batch, true_and_runner_up
from hpcguard.attribution.sensitivity import segment_sensitivity
from hpcguard.config import LimeConfig

__all__ = ["Attribution", "LimeConfig", "explain_batch", "segment_sensitivity", "true_and_runner_up"]
