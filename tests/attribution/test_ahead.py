"""Segmentation ahead of its use: the same maps in order, a bounded lead, nothing lost and nothing left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from hpcguard.attribution import LimeConfig, ahead
from hpcguard.attribution.ahead import BLOCKS_AHEAD, Block, segmented_ahead
from hpcguard.attribution.segments import segment_image
from hpcguard.cluster.local import cores_of_a_worker
from hpcguard.cluster.plan import attribution_identity, make_plan
from hpcguard.config import Config, ModelConfig, load_config
from hpcguard.data import load_images
from hpcguard.models import build_model
from hpcguard.runs import digest_file
from hpcguard.shards import ShardTask, segmenters

MakeConfig = Callable[..., Path]
SIZES = (3, 1, 4, 2, 5, 1)


@pytest.fixture(scope="module", autouse=True)
def no_pool_is_left() -> Iterator[None]:
    yield
    end_pools()


def end_pools() -> None:
    """Pools keep the import path that they were started with."""
    for processes in list(ahead._pools):
        ahead._drop_pool(processes)


def some_blocks() -> list[Block]:
    """Blocks of smooth images; ids from 100."""
    noise = torch.rand(sum(SIZES), 3, 24, 20, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.avg_pool2d(noise, 5, 1, 2).numpy()
    ends = np.cumsum(SIZES)[:-1]
    return list(zip(np.split(100 + np.arange(len(images)), ends), np.split(images, ends), strict=True))


def expected_maps(config: LimeConfig) -> list[np.ndarray]:
    return [np.stack([segment_image(image, config) for image in images]) for _, images in some_blocks()]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Makes the user's module that configurations here name as mine:segments."""
    end_pools()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    yield lambda body: (tmp_path / "mine.py").write_text(
        f"import os, signal, time\nfrom pathlib import Path\nimport numpy as np\nHERE = Path({str(tmp_path)!r})\n{body}"
    )
    end_pools()


@pytest.mark.parametrize("processes", [0, 2])
def test_the_same_maps_in_order_with_a_bounded_lead(processes: int) -> None:
    drawn = 0

    def counted() -> Iterator[Block]:
        nonlocal drawn
        for block in some_blocks():
            drawn += 1
            yield block

    config = LimeConfig()
    maps = expected_maps(config)
    for number, (ids, images, segments) in enumerate(segmented_ahead(counted(), config, processes)):
        assert np.array_equal(ids, some_blocks()[number][0])
        assert np.array_equal(images, some_blocks()[number][1])
        assert segments.dtype == np.int64
        assert np.array_equal(segments, maps[number])
        assert drawn == min(len(SIZES), number + 1 + (BLOCKS_AHEAD if processes else 0))
    assert number == len(SIZES) - 1


def test_small_blocks_keep_all_processes_busy_and_the_pool_is_kept() -> None:
    list(segmented_ahead(some_blocks()[:1], LimeConfig(), 2))
    pool, drawn = ahead._pools[2], 0

    def singles() -> Iterator[Block]:
        nonlocal drawn
        for number in range(20):
            drawn += 1
            yield np.array([number]), np.zeros((1, 1, 8, 8), np.float32)

    with closing(segmented_ahead(singles(), LimeConfig(segmentation="grid"), 2)) as maps:
        next(maps)
        assert drawn == 2 * 2
    assert ahead._pools[2] is pool


def test_warnings_of_the_processes_are_told_once() -> None:
    blocks = [(np.arange(3), np.ones((3, 3, 32, 32), np.float32))] * 3
    config = LimeConfig(segmentation="felzenszwalb")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        assert len(list(segmented_ahead(blocks, config, 2))) == 3
    assert [str(each.message)[:34] for each in caught] == ["felzenszwalb gives 1 segment(s) on"]


@pytest.fixture
def stage(tmp_path: Path, make_config: MakeConfig) -> Callable[..., Path]:
    """stage(name, segmenters, attribution): a configuration of 40 digits and an untrained model."""
    torch.manual_seed(0)
    torch.save(build_model(ModelConfig(options={"width": 4}), 10, 1).net.state_dict(), tmp_path / "net.pth")

    def make(name: str, processes: int, **attribution: object) -> Path:
        (tmp_path / name).mkdir()
        path = make_config(
            tmp_path / name, baseline=None, device="cpu", model={"weights": str(tmp_path / "net.pth")},
            data={"train_images": 40, "size": 16}, cluster={"workers": 1, "shards": 2, "segmenters": processes},
        )  # fmt: skip
        values = yaml.safe_load(path.read_text())
        values["attribution"] = {"num_samples": 16, "unit": 8, **attribution}
        path.write_text(yaml.safe_dump(values))
        return path

    return make


def test_a_shard_has_the_same_bytes_with_and_without(stage: Callable[..., Path]) -> None:
    """As a worker makes it, in this process."""
    shards = []
    for processes in (0, 2):
        config = load_config(stage(f"with{processes}", processes))
        images = load_images(config.data, "train")
        identity = attribution_identity(config, images, digest_file(config.model.weights))
        plan = make_plan(images.ids, 8, 2, identity)
        units: list[int] = []
        ShardTask(config, plan, 1, "test")(1, 0, units.append)
        assert units == [0, 1, 1, 1]
        shards.append((config.run / "shards/00001.h5").read_bytes())
    assert shards[0] == shards[1]


def test_a_failure_names_segmentation_and_image_and_the_pool_goes_on(own: Callable[[str], None]) -> None:
    own(
        "def segments(pixels):\n"
        "    if pixels[0, 0, 0] == 0:\n"
        "        raise KeyError('black')\n"
        "    return np.arange(pixels[..., 0].size).reshape(pixels.shape[:2])\n"
    )
    config = LimeConfig(segmentation="mine:segments")
    images = np.ones((4, 1, 8, 8), np.float32)
    images[2] = 0
    blocks = [(np.array([7, 8, 9, 10]), images), *some_blocks()]
    for processes in (1, 0):
        with pytest.raises(RuntimeError, match=r"mine:segments: KeyError: 'black' \(image id 9\)"):
            list(segmented_ahead(blocks, config, processes))
    maps = expected_maps(LimeConfig())
    for (_, _, segments), expected in zip(segmented_ahead(some_blocks(), LimeConfig(), 1), maps, strict=True):
        assert np.array_equal(segments, expected)


def test_a_killed_process_is_warned_of_and_changes_nothing(own: Callable[[str], None]) -> None:
    """Killed in the middle, then while idle: each time the caller goes on alone, and then has a new pool."""
    own(
        "def segments(pixels):\n"
        "    if pixels[0, 0, 0] == 0.5 and not (HERE / 'killed').exists():\n"
        "        (HERE / 'killed').touch()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return np.argsort(np.argsort(pixels[..., 0], axis=None)).reshape(pixels.shape[:2])\n"
    )
    config = LimeConfig(segmentation="mine:segments")
    blocks = some_blocks()
    blocks[2][1][1, :, 0, 0] = 0.5
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = [segments for _, _, segments in segmented_ahead(blocks, config, 1)]
        assert sum("a segmentation process died" in str(each.message) for each in caught) == 1
        second = [segments for _, _, segments in segmented_ahead(blocks, config, 1)]
        for process in multiprocessing.active_children():
            process.kill()
            process.join()
        third = [segments for _, _, segments in segmented_ahead(blocks, config, 1)]
        assert sum("a segmentation process died" in str(each.message) for each in caught) == 2
    for number, (_, images) in enumerate(blocks):
        expected = [np.argsort(np.argsort(image[0], axis=None)).reshape(24, 20) for image in images]
        assert all(np.array_equal(maps[number], expected) for maps in (first, second, third))


def test_how_many_segment() -> None:
    def of(device: str, **settings: object) -> int:
        config = Config(attribution={"segmentation": settings.pop("segmentation", "slic")}, cluster=settings)
        return segmenters(config, min(config.cluster.workers, config.cluster.shards), device, 3)

    cores = len(os.sched_getaffinity(0))
    assert cores_of_a_worker(1) == cores
    assert cores_of_a_worker(10 * cores) == 1
    assert of("cuda", workers=1) == min(4, cores - 1)
    assert of("cuda", workers=10 * cores, shards=10 * cores) == 0
    assert of("cuda", workers=1, segmentation="quickshift") == 0
    assert of("cpu", workers=1) == 0
    assert of("cpu", segmenters=3) == of("cuda", segmenters=3, segmentation="quickshift") == 3
    assert of("cuda", workers=1, segmenters=0) == 0


# the stage, killed


WAITS = """
def segments(pixels):
    (HERE / f"{os.getpid()}.{os.getppid()}").touch()
    if not (HERE / "go").exists() and (HERE / "run").exists():
        time.sleep(600)
    return np.arange(pixels.shape[0])[:, None].repeat(pixels.shape[1], 1) // 2
"""


def session(leader: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, sid = path.read_text().rsplit(")", 1)[1].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(sid) == leader and state != "Z":
            found.append(int(path.parent.name))
    return found


def wait_for(condition: Callable[[], object], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(condition())


def test_nothing_outlives_a_killed_worker_or_stage(
    tmp_path: Path, own: Callable[[str], None], stage: Callable[..., Path]
) -> None:
    """kill -9 of the worker: its segmenter ends, the shard starts again with another. kill -9 of the stage: all end."""
    own(WAITS)
    path = stage("killed", 1, segmentation="mine:segments")
    (tmp_path / "run").touch()
    (tmp_path / "go").touch()  # for the stage's own first look at the callable
    command = [sys.executable, "-m", "hpcguard.attribute", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)

    def segmenter(besides: int = 0) -> tuple[int, int] | None:
        pairs = [tuple(map(int, each.name.split("."))) for each in tmp_path.glob("[0-9]*.[0-9]*")]
        return next((pair for pair in pairs if process.pid not in pair and besides not in pair), None)

    assert wait_for(lambda: (tmp_path / f"{process.pid}.{os.getpid()}").exists())
    (tmp_path / "go").unlink()
    assert wait_for(segmenter)
    child, worker = segmenter() or (0, 0)
    assert {process.pid, child, worker} <= set(session(process.pid))
    os.kill(worker, signal.SIGKILL)
    assert wait_for(lambda: child not in session(process.pid), 10)
    assert wait_for(lambda: segmenter(besides=child))
    assert process.poll() is None
    process.kill()
    process.wait()
    assert wait_for(lambda: not session(process.pid), 10), session(process.pid)
    assert not list((path.parent / "run/shards").glob("*.json"))
