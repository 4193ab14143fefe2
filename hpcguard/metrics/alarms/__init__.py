"""Alarms of masked gradients: signs that an attack failed, and not that the model is robust.

After Athalye, Carlini & Wagner 2018 (arXiv 1802.00420), Carlini et al. 2019 (arXiv 1902.06705) and AutoAttack's own
checks (Croce & Hein 2020). Each alarm is a function that gives one row; `raise_alarms` measures all of them.
"""

from hpcguard.metrics.alarms.row import Alarm, trusted
from hpcguard.metrics.alarms.table import raise_alarms
from hpcguard.metrics.alarms.trial import Trial

__all__ = ["Alarm", "Trial", "raise_alarms", "trusted"]
