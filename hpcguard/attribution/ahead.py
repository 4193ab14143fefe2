"""Segmentation of coming blocks of images in worker processes, while the caller explains the present one.

Each process hangs on a pipe and nothing else: it needs no semaphores that a killed caller would leave behind, and ends
by itself when the pipe does.
"""

import itertools
import os
import signal
import traceback
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from queue import SimpleQueue

import numpy as np
import torch

from hpcguard.attribution.segments import segment_image
from hpcguard.cluster.lifetime import end_with_parent
from hpcguard.config import LimeConfig

BLOCKS_AHEAD = 2  # one is segmented while another waits, so that an uneven block does not leave the caller waiting
IMAGES_A_PROCESS = 2  # at least so many under way, however small the blocks: one at work, one at hand

Block = tuple[np.ndarray, np.ndarray]
"""(ids int64 [B], images float32 [B, C, H, W])"""
Task = tuple[np.ndarray, LimeConfig, int]
"""(image, how to segment it, its id)"""
Answer = tuple[np.ndarray, list[tuple[type[Warning], str]]]
"""(labels uint16 [H, W], warnings raised on the way)"""


class ProcessDied(Exception):
    """A segmentation process is gone."""


@dataclass(frozen=True)
class _Pool:
    threads: ThreadPoolExecutor  # one a process, for the caller is busy; they only wait for answers
    free: SimpleQueue[Connection]  # processes without a task


_pools: dict[int, _Pool] = {}  # kept while this process lives: a start costs seconds of imports


def segmented_ahead(
    blocks: Iterable[Block], config: LimeConfig, processes: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (ids, images, segment maps int64 [B, H, W]) of each block in order; the maps are those of segment_image.

    While the caller has one block, the next BLOCKS_AHEAD are drawn from `blocks` and segmented by so many processes;
    0: the caller's own does it when a block's turn comes. Close the generator to drop what is under way.
    Raises what segment_image raises. If a process dies, that is warned of and the caller's own goes on alone.
    """
    source = iter(blocks)
    waiting: deque[tuple[Block, list[Future[Answer]]]] = deque()
    try:
        while processes:
            while _room(waiting, processes) and (block := next(source, None)) is not None:
                waiting.append((block, _submit(block, config, processes)))
            if not waiting:
                return
            block, futures = waiting[0]
            try:
                maps = _collect(futures)
            except (ProcessDied, CancelledError):
                _drop_pool(processes)
                warnings.warn(
                    "a segmentation process died; the one that it worked for goes on without such help", stacklevel=2
                )
                break
            waiting.popleft()
            yield *block, maps
        for ids, images in itertools.chain([block for block, _ in waiting], source):
            pairs = zip(images, ids, strict=True)
            yield ids, images, np.stack([segment_image(image, config, int(name)) for image, name in pairs])
    finally:
        for future in itertools.chain.from_iterable(futures for _, futures in waiting):
            future.cancel()


def _room(waiting: deque[tuple[Block, list[Future[Answer]]]], processes: int) -> bool:
    """Whether another block may be drawn; the first in line is as good as the caller's."""
    return len(waiting) <= BLOCKS_AHEAD or sum(len(ids) for (ids, _), _ in waiting) < IMAGES_A_PROCESS * processes


def _submit(block: Block, config: LimeConfig, processes: int) -> list[Future[Answer]]:
    if processes not in _pools:
        _pools[processes] = _start_pool(processes)
    pool = _pools[processes]
    pairs = zip(*block, strict=True)
    return [pool.threads.submit(_ask, pool.free, (image, config, int(image_id))) for image_id, image in pairs]


def _collect(futures: list[Future[Answer]]) -> np.ndarray:
    answers = [future.result() for future in futures]
    for category, text in itertools.chain.from_iterable(caught for _, caught in answers):
        warnings.warn(text, category, stacklevel=3)
    return np.stack([labels for labels, _ in answers]).astype(np.int64)


def _start_pool(processes: int) -> _Pool:
    context = get_context("spawn")  # a fork of a process with threads, or with a GPU in use, may hang
    pool = _Pool(ThreadPoolExecutor(processes, "segmentation"), SimpleQueue())
    for _ in range(processes):
        ours, theirs = context.Pipe()
        # Daemonic: when this process ends in order, it ends them instead of waiting for them.
        context.Process(target=_serve, args=(theirs, os.getpid()), daemon=True).start()
        theirs.close()
        pool.free.put(ours)
    return pool


def _drop_pool(processes: int) -> None:
    """The living processes end when the last thread lets go of the pipes."""
    pool = _pools.pop(processes, None)
    if pool:  # else another generator has done it
        pool.threads.shutdown(wait=False, cancel_futures=True)


def _ask(free: SimpleQueue[Connection], task: Task) -> Answer:
    """Have a free process do the task; in a thread."""
    pipe = free.get()
    try:
        pipe.send(task)
        answer = pipe.recv()
    except (EOFError, OSError) as error:
        raise ProcessDied from error
    finally:
        free.put(pipe)
    if isinstance(answer, Exception):
        raise answer
    return answer


def _serve(pipe: Connection, parent: int) -> None:
    """The life of a segmentation process."""
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent ends us in order
    torch.set_num_threads(1)  # torch is imported but has nothing to do here
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            pipe.send(_answer(*task))
        except SystemExit as error:  # a user's callable may call sys.exit
            pipe.send(RuntimeError(f"{task[1].segmentation} called sys.exit({error.code!r})"))
        except Exception as error:
            error.add_note(traceback.format_exc())  # for a log: a traceback does not travel
            pipe.send(error)


def _answer(image: np.ndarray, config: LimeConfig, image_id: int) -> Answer:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        labels = segment_image(image, config, image_id)
    return labels.astype(np.uint16), [(each.category, str(each.message)) for each in caught]
