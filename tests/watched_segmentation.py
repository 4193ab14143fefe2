"""A user's segmentation that writes down every call, and takes orders for single images: for tests, by tests/night.py.

It is copied beside a configuration, whose folder is then on PYTHONPATH. There lie: `calls`, a line of JSON a call;
`pause`, seconds that each call takes; `orders/IMAGE` (`orders/any` for all), a word: `hold` waits until the order is
gone, `linger` takes 3 s, `raise` raises, `hog` takes 3 GB of
memory, once. Orders are for array tasks; whoever plans or settles has none.
"""

import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
TASK = "hpcguard-attribute-"
TOLD = ("SLURM_JOB_NAME", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "CUDA_VISIBLE_DEVICES")


def image_name(pixels: np.ndarray) -> str:
    """Of float64 [H, W, C]."""
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()[:16]


def segment(pixels: np.ndarray) -> np.ndarray:
    """Nine equal rectangles."""
    name = image_name(pixels)
    if os.environ.get("SLURM_JOB_NAME", "").startswith(TASK):
        _write_down(name)
        _obey(name)
    height, width = pixels.shape[:2]
    return (np.arange(height) * 3 // height)[:, None] * 3 + (np.arange(width) * 3 // width)[None, :]


def _write_down(name: str) -> None:
    told = {variable: os.environ.get(variable) for variable in TOLD}
    call = {"image": name, "pid": os.getpid(), "parent": os.getppid(), "node": os.uname().nodename, **told}
    file = os.open(HERE / "calls", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(file, (json.dumps(call) + "\n").encode())
    os.close(file)


def _obey(name: str) -> None:
    for order in (HERE / "orders" / name, HERE / "orders" / "any"):
        word = _read(order)
        if word == "hold":
            while order.exists():
                time.sleep(0.02)
        if word == "linger":
            time.sleep(3)
        if word == "raise":
            raise ValueError(f"told to raise at {name}")
        if word == "hog":
            order.unlink()
            hoard = np.ones(3 * 2**27)  # 3 GiB, every page of it written
            time.sleep(60)
            del hoard
    time.sleep(float(_read(HERE / "pause") or 0))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:  # released at this moment
        return ""
