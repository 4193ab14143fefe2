"""Tables of a comparison: accuracies, paired differences, and both unrounded as CSV."""

import csv
import io
from collections.abc import Mapping, Sequence

from hpcguard.metrics.paired import Paired
from hpcguard.reporting.arms import attack_title
from hpcguard.reporting.compare_results import Measured
from hpcguard.reporting.tables import Table, percent

Pairs = Mapping[str, Mapping[str, Paired]]
"""By model, all but the first, and attack."""

CSV_COLUMNS = (
    "model", "attack", "eps", "right", "of", "accuracy", "low", "high", "trusted", "against", "only_first", "only_this",
    "difference", "difference_low", "difference_high", "mcnemar_exact_p", "mcnemar_mid_p",
)  # fmt: skip


def accuracy_rows(results: Sequence[Measured]) -> Table:
    """A line an attack, a column a model."""
    columns = ["attack", *(one.arm.name + ("" if one.trusted else " (not trusted)") for one in results)]
    rows = [
        [attack_title(attack), *(percent(one.arm.attacks[attack]) for one in results)]
        for attack in results[0].arm.attacks
    ]
    return Table(columns, rows)


def paired_rows(first: str, pairs: Pairs) -> Table:
    """A line a model and attack: the difference from the model `first` on the same images."""
    columns = ["model", "attack", f"difference from {first}", "only it", f"only {first}", "McNemar p", "mid-p"]
    rows = [
        [
            model, attack_title(attack),
            f"{100 * pair.difference:+.1f} points [{100 * pair.low:+.1f}, {100 * pair.high:+.1f}]",
            str(pair.second), str(pair.first), f"{pair.exact:.2g}", f"{pair.mid_p:.2g}",
        ]
        for model, by_attack in pairs.items()
        for attack, pair in by_attack.items()
    ]  # fmt: skip
    return Table(columns, rows)


def comparison_csv(results: Sequence[Measured], pairs: Pairs) -> str:
    """Unrounded, one line a model and attack."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    first = results[0].arm.name
    for one in results:
        for attack, row in one.arm.attacks.items():
            eps = 0 if attack == "clean" else one.arm.evaluation["eps"]
            numbers = [row[key] for key in ("right", "of", "accuracy", "low", "high")]
            pair = pairs.get(one.arm.name, {}).get(attack)
            paired = (
                [first, pair.first, pair.second, pair.difference, pair.low, pair.high, pair.exact, pair.mid_p]
                if pair
                else [""] * 8
            )
            writer.writerow([one.arm.name, attack, eps, *numbers, one.trusted, *paired])
    return out.getvalue()
