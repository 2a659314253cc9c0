"""The executor of this machine: processes read images, threads of one core each encode shards."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from smalto.images.image_file import ImageFile
from smalto.images.transforms import Transform
from smalto.images.worker_pool import ReaderPool
from smalto.inference.inference_tokenizer import InferenceTokenizer
from smalto.tokenizing.encode_shard import Shard, encode_shard

FILES_PER_READ = 8  # one job of a reading process
FILES_PER_SHARD = 8  # one job of an encoding thread on a CPU
BATCHES_PER_MIXED_SHARD = 4  # elsewhere, where images of several shapes fill several batches


def encode_locally(
    files: Iterable[ImageFile],
    transform: Transform,
    inference: InferenceTokenizer,
    workers: int,
) -> Generator[Shard, None, None]:
    """Yield the encoded shards of files, in their order; a few are encoded ahead.

    On a CPU each thread encodes with one core. No thread waits at the end of each layer for a core
    that a reading process has taken, and pieces are small enough to stay near the core's caches.

    Args:
        files: to tokenize.
        transform: of images.
        inference: the tokenizer.
        workers: processes that read images; 0 reads them in this one.
    """
    on_cpu = inference.device.type == "cpu"
    cores = torch.get_num_threads() if on_cpu else 1
    ahead = 2 * cores if on_cpu else 1
    if on_cpu:
        size = min(FILES_PER_SHARD, inference.batch)
    else:
        size = inference.batch * (BATCHES_PER_MIXED_SHARD if transform.size is None else 1)
    waiting: deque[Future[Shard]] = deque()
    with (
        ReaderPool(workers, transform.prepare) as reader,
        ThreadPoolExecutor(cores, initializer=_use_one_core if on_cpu else None) as threads,
    ):
        images = reader.in_order(files, FILES_PER_READ)
        try:
            while group := list(itertools.islice(images, size)):
                read = [image for _, image in group]
                names = [file for file, _ in group]
                waiting.append(threads.submit(encode_shard, names, transform, inference, read))
                while len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            if on_cpu:
                torch.set_num_threads(cores)


def _use_one_core() -> None:
    torch.set_num_threads(1)  # of this thread; others keep theirs
