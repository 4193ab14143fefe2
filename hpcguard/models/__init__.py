"""Classifiers by name, with normalisation inside, and their weights."""

from hpcguard.models.build import build_model
from hpcguard.models.inference import check_answers, check_gradient, fastest_layout, for_inference
from hpcguard.models.load import load_model
from hpcguard.models.normalized import Normalized
from hpcguard.models.weights import load_weights, save_weights

__all__ = [
    "Normalized",
    "build_model",
    "check_answers",
    "check_gradient",
    "fastest_layout",
    "for_inference",
    "load_model",
    "load_weights",
    "save_weights",
]
