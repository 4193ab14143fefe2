"""What a run shows, in sentences computed from its numbers, and what to be careful about."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from hpcguard.reporting.arms import Arm, attack_title, radius
from hpcguard.reporting.tables import percent


def summarise(arms: Sequence[Arm]) -> list[str]:
    """One plain paragraph, as sentences. A difference is claimed only where the 95% intervals are disjoint."""
    strongest = arms[0].strongest[0]
    images, eps = arms[0].result["images"], radius(arms[0].evaluation)
    where = f"Under {attack_title(strongest)} at eps {eps} on {images} {arms[0].split} images"
    if strongest == "clean":
        where = f"On {images} clean {arms[0].split} images"
    guided = next((arm for arm in arms if arm.name == "guided"), None)
    others = [arm for arm in arms if arm is not guided]
    if guided is None:
        kept = ", ".join(f"{_noun(arm)} keeps {percent(arm.strongest[1])}" for arm in others)
        return [f"{where} {kept}.", "The guided model is not measured yet, so nothing is compared."]
    controls = [arm for arm in others if arm.name != "baseline"]
    sentences = [_compare(guided, arm, where) for arm in controls]
    if not controls:
        sentences.append(
            f"{where} {_noun(guided)} keeps {percent(guided.strongest[1])}. No control is measured, so this run cannot "
            "show what guidance adds to the same training without it."
        )
    sentences += [_compare(guided, arm, "") for arm in others if arm.name == "baseline"]
    if strongest != "clean":
        clean = ", ".join(f"{arm.name} {percent(arm.attacks['clean'])}" for arm in arms)
        sentences.append(f"Accuracy on the same images unattacked: {clean}.")
    return sentences


def verdict(row: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """'higher' or 'lower' if the intervals are disjoint, else 'within the noise'."""
    if row["low"] > other["high"]:
        return "higher"
    if row["high"] < other["low"]:
        return "lower"
    return "within the noise"


def cautions(arms: Sequence[Arm], store: Mapping[str, Any] | None) -> list[str]:
    """What in these very numbers a reader should be careful about."""
    strongest = list(arms[0].attacks)[-1]
    found = [f"{arm.name} is not to be trusted: {row['name']}. {row['meaning']}" for arm in arms for row in arm.red]
    if not strongest.startswith("autoattack"):
        found.append("AutoAttack was not run; gradient attacks alone can overstate robustness.")
    elif strongest != "autoattack":
        found.append(f"{attack_title(strongest)} is not the standard AutoAttack that published figures use.")
    found += [f"{arm.name} has no alarms: whether its attacks worked is not known." for arm in arms if not arm.checked]
    for arm in arms:
        rows = list(arm.attacks.items())
        for (weak, row), (strong, stronger) in pairwise(rows):
            if stronger["right"] > row["right"]:
                found.append(
                    f"{arm.name}: {attack_title(strong)} leaves more images right than the weaker "
                    f"{attack_title(weak)} ({stronger['right']} against {row['right']}); gradients may be masked."
                )
    trained = [arm for arm in arms if arm.training and arm.name != "baseline"]
    if len({arm.training["steps"] for arm in trained if arm.training}) > 1:
        steps = ", ".join(f"{arm.name} {arm.training['steps']}" for arm in trained if arm.training)
        found.append(f"The arms were trained for different numbers of steps: {steps}.")
    for arm in trained:
        explained = arm.training["identity"].get("store") if arm.training else None
        if store and explained not in (None, store["fingerprint"]):
            found.append(f"{arm.name} was trained with another store than the one described here.")
    return found


def _compare(guided: Arm, other: Arm, where: str) -> str:
    row, control = guided.strongest[1], other.strongest[1]
    points = abs(row["accuracy"] - control["accuracy"]) * 100
    finding = {
        "higher": f"the intervals are disjoint, and guided is {points:.1f} points higher",
        "lower": f"the intervals are disjoint, and guided is {points:.1f} points lower",
        "within the noise": "the intervals overlap, so this run alone does not tell them apart",
    }[verdict(row, control)]
    if not where:
        return f"{_noun(other).capitalize()} keeps {percent(control)}: {finding}."
    return f"{where} {_noun(guided)} keeps {percent(row)}, {_noun(other)} {percent(control)}: {finding}."


def _noun(arm: Arm) -> str:
    return {"baseline": "the baseline", "guided": "the guided model"}.get(arm.name, f"the control {arm.name}")
