"""Which corrupted images a model gets right."""

import numpy as np

from hpcguard.data.corrupted import open_corruptions
from hpcguard.evaluation.case import Case, Measured
from hpcguard.metrics.corrupted import right_when_corrupted


def measure_corruptions(case: Case) -> Measured:
    """Column right, bool [B, C, 5]."""
    wanted = case.config.evaluation.corruptions
    corrupted = open_corruptions(wanted, case.test, case.config.data.size)
    right = right_when_corrupted(
        case.model, corrupted.images, wanted.names, case.ids, case.y, case.config.evaluation.batch_size, case.report
    )
    return Measured({"right": np.moveaxis(right, 2, 0)})
