"""The claim of arXiv:2601.00968 for one model and rule: explain images, flag segments, attack them. N images."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcguard.attribution import LimeConfig, explain_batch, segment_sensitivity, true_and_runner_up
from hpcguard.config import SpuriousConfig
from hpcguard.config.explanations import VulnerabilityConfig
from hpcguard.errors import InputError
from hpcguard.metrics.robustness import Model, is_right
from hpcguard.metrics.stability import noise_instability
from hpcguard.metrics.vulnerability import Arrays, measure_vulnerability
from hpcguard.metrics.vulnerability_summary import summarise_vulnerability
from hpcguard.refinement.spurious import flag_segments


def explained_rows(model: Model, x: Tensor, y: Tensor, ids: np.ndarray, config: LimeConfig, noisy: bool) -> Arrays:
    """What every criterion looks at, by the store's column names: explanations of the true label and the strongest
    wrong one, sensitivity, and where `noisy` instability. model: logits, differentiable."""
    units = [slice(start, start + config.unit) for start in range(0, len(x), config.unit)]
    parts = [_unit_rows(model, x[unit], y[unit], ids[unit], config, noisy) for unit in units]
    widest = max(part["coefficients"].shape[2] for part in parts)
    columns = {name: [part[name] for part in parts] for name in parts[0]}
    per_segment = {"coefficients", "standard_error", "interval", "sensitivity", "instability"}
    return {
        name: np.concatenate([_widened(each, widest) if name in per_segment else each for each in values])
        for name, values in columns.items()
    }


def _unit_rows(model: Model, x: Tensor, y: Tensor, ids: np.ndarray, config: LimeConfig, noisy: bool) -> Arrays:
    def predict(batch: Tensor) -> Tensor:
        return model(batch).softmax(1)

    with torch.no_grad():
        targets = true_and_runner_up(predict(x), y).cpu().numpy()
    found = explain_batch(predict, x, ids, config, targets=targets)
    rows = {
        "image_id": np.asarray(ids), "num_segments": found.num_segments, "segments": found.segments,
        "coefficients": found.coefficients, "standard_error": found.standard_error, "interval": found.interval,
        "sensitivity": segment_sensitivity(model, x, ids, targets, found.segments, config.batch_size),
    }  # fmt: skip
    if noisy:
        rows["instability"] = noise_instability(predict, x, ids, config, targets, found.segments)[:, 0]
    return rows


def _widened(values: np.ndarray, width: int) -> np.ndarray:
    """NaN-padded on the last axis."""
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, width - values.shape[-1])], constant_values=np.nan)


def flagged_and_random(rows: Arrays, rule: SpuriousConfig, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Flagged segments, bool [N, S], and as many draws of random ones of equal area, bool [draws, N, S].

    Raises InputError for the criterion outside, whose foreground masks are those of training images.
    """
    if "outside" in rule.criteria:
        raise InputError("spurious.criteria = outside: its masks are of training images, and test images have none")
    own, control = (rule.model_copy(update={"random": random}) for random in (False, True))
    chance = [flag_segments(rows, control, seed + draw) for draw in range(draws)]
    return flag_segments(rows, own, seed), np.stack(chance)


def measure_claim(
    model: Model, x: Tensor, y: Tensor, rows: Arrays, rule: SpuriousConfig, config: VulnerabilityConfig,
    batch_size: int, seed: int = 0,
) -> tuple[Arrays, list[dict[str, Any]]]:  # fmt: skip
    """claim_outcomes and their summary, a row a radius; both are empty if no image can be used."""
    outcomes = claim_outcomes(model, x, y, rows, rule, config, batch_size, seed)
    return outcomes, summarise_vulnerability(outcomes, config.radii, seed) if outcomes else []


def claim_outcomes(
    model: Model, x: Tensor, y: Tensor, rows: Arrays, rule: SpuriousConfig, config: VulnerabilityConfig,
    batch_size: int, seed: int = 0,
) -> Arrays:  # fmt: skip
    """Outcomes by image, see measure_vulnerability; image_id says whose.

    Only images that are right when clean and have segments both flagged and not; nothing if there is none.
    """
    flagged, random = flagged_and_random(rows, rule, config.draws, seed)
    count = flagged.sum(1)
    mixed = torch.from_numpy((count > 0) & (count < rows["num_segments"])).to(x.device)
    usable = mixed & is_right(model, x, y, batch_size)
    some = usable.cpu().numpy()
    if not some.any():
        return {}
    outcomes = measure_vulnerability(
        model, x[usable], y[usable], rows["segments"][some], flagged[some], random[:, some], config.radii,
        config.steps, batch_size,
    )  # fmt: skip
    return {"image_id": rows["image_id"][some], **outcomes}
