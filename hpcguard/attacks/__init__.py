"""Attacks in [0, 1] pixel space: FGSM and PGD for training and tests, AutoAttack from its library for judging."""

from hpcguard.attacks.autoattack import autoattack
from hpcguard.attacks.gradient import fgsm, margin_loss, pgd, random_start

__all__ = ["autoattack", "fgsm", "margin_loss", "pgd", "random_start"]
