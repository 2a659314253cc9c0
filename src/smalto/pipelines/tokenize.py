"""Images to a token store: lazily walked, decoded in workers, encoded here, committed in the background."""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from smalto.core.allocator import retain_freed_memory
from smalto.core.device import Precision
from smalto.core.errors import ConfigError, DataError, RunError
from smalto.core.files import check_writable, name_hash
from smalto.core.progress import Progress
from smalto.images.archives import open_file
from smalto.images.image_file import ImageFile, Skipped, summary
from smalto.images.image_reader import batches_of_one_shape, default_workers, transform_of
from smalto.images.reading import LONGER_SIDE, NOT_AN_IMAGE, BadImage, bad_image_errors
from smalto.images.sources import source_name, walk_source
from smalto.images.tensors import views_of
from smalto.images.transforms import Prepared, Transform, content_digest
from smalto.images.worker_pool import ReaderPool
from smalto.inference.encoder_threads import Encoders
from smalto.inference.inference_tokenizer import InferenceTokenizer
from smalto.store.schema import StoreHeader, TokenRow, row_id
from smalto.store.token_store import TokenStore
from smalto.store.writer import KEEP_REPLACED, ROWS_PER_COMMIT, SOME_SMALL_FILES, StoreWriter

LEAST_ERRORS, ERROR_SHARE = 100, 0.01  # so many bad images do not stop a job: the larger of the two
_WALKED_AT_ONCE = 1024  # names that are looked up in the store together
_DECODED_TOGETHER = 8


@dataclass
class Tokenized:
    """What a job did.

    Attributes:
        num_images: images that were written now, ``num_tokens`` their tokens, views included.
        num_known: images that were there already.
        changed: names of images whose files have changed since they were tokenized (with ``update`` they were done again).
        skipped: bad images, those known from before too; ``num_ignored``: files that are no images.
        num_rows: of the whole store now.
    """

    path: Path
    num_images: int = 0
    num_tokens: int = 0
    num_known: int = 0
    num_ignored: int = 0
    num_rows: int = 0
    changed: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


@retain_freed_memory()
def tokenize(
    source: str | Path | list[ImageFile],
    tokenizer: str | Path,
    out: str | Path,
    *,
    size: int | None = None,
    longer_side: int | None = LONGER_SIDE,
    crops: int = 1,
    flip: bool = False,
    shuffle: bool = False,
    update: bool = False,
    max_errors: int | None = None,
    overwrite: bool = False,
    batch: int = 32,
    device: str = "auto",
    precision: Precision = "float32",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Tokenized:
    """Write the tokens of a collection to a store, or go on with one: what is in the store is not done again.

    Args:
        source: a folder (with zip, tar and parquet files in it), one image, ``"bundled"``, ``"emoji"``, a list of files, or another
            store of the same tokenizer, whose rows are copied.
        tokenizer: the folder of a tokenizer or run; its place and fingerprint are recorded.
        out: the store, such as ``tokens.lance``.
        size: bring the shorter side to this and cut a square; None keeps the shape, and rows have layouts of their own.
        longer_side: where the shape is kept: larger images are reduced to this; None or 0 keeps their size.
        crops: with ``size``: 1, or 5 for the corners too, each a row of its own.
        flip: a mirrored view of each as a row of its own.
        shuffle: go through the source in an order that is random and always the same; reads all names first.
        update: do images again whose files have changed.
        max_errors: stop after more bad images than this; None: 100, or 1 % of the images if that is more.
        overwrite: replace the store.
        workers: decoding processes; 0 decodes in this one.

    Raises:
        DataError: there are no images, or too many bad ones.
        RunError: ``out`` holds tokens of another kind, or another process is writing to it.
    """
    progress, out = progress or Progress(), Path(out)
    if max_errors is not None and max_errors < 0:
        raise ConfigError(f"max_errors is 0 or more; got {max_errors}.")
    inference = InferenceTokenizer.of(tokenizer, device, precision, batch, progress)
    if not isinstance(source, list) and (Path(source) / "head.json").is_file():
        if size is not None or longer_side != LONGER_SIDE or crops != 1 or flip or shuffle:
            raise ConfigError(
                f"the rows of {source} are copied as they are: leave out size, longer_side, crops, flip and shuffle."
            )
        return _copy(TokenStore.open(source), inference, out, overwrite, update, progress)
    transform = transform_of(
        inference.tokenizer.stride, size=size, longer_side=longer_side, crops=crops, flip=flip
    )
    layout = inference.tokenizer.layout(size, size) if size is not None else None
    header = StoreHeader.of(
        inference.tokenizer,
        layout=layout,
        transform=transform,
        precision=precision,
        path=tokenizer,
        source=source_name(source),
        fingerprint=inference.fingerprint,
    )
    workers = default_workers(workers)
    walk = walk_source(source)
    if not (first := list(itertools.islice(walk, 1))):  # before a store is made, or replaced
        raise DataError(
            f"there is nothing in {source_name(source) or 'the list of files'}: name a folder of images."
        )
    walk = itertools.chain(first, walk)
    new = overwrite or not out.exists()
    store = _opened(out, header, overwrite)
    count = threading.Event()
    with store.writing():
        progress.start("tokenizing", None, "images")
        threading.Thread(target=_count, args=(source, progress, count), daemon=True).start()
        try:
            done = _Job(store, inference, transform, update, max_errors, progress).run(
                _shuffled(walk) if shuffle else walk, workers
            )
        finally:
            count.set()
        if store.num_small_files > SOME_SMALL_FILES:
            store.compact(KEEP_REPLACED, lazily=True)
        done.num_rows = len(store)
        if new and not done.num_rows:  # else the next attempt would have to be of the same kind
            shutil.rmtree(out)
    progress.finish()
    if not done.num_rows:
        raise DataError(
            f"nothing in {source_name(source) or 'the list of files'} could be used. {summary(done.skipped)}".strip()
        )
    return done


class _Batch(NamedTuple):
    """Images that are encoded together: [images, views, 3, height, width]."""

    images: list[tuple[ImageFile, Prepared]]
    shape: torch.Size


class _Job:
    """One pass over a source: what is missing goes through the model into the store."""

    def __init__(
        self,
        store: TokenStore,
        inference: InferenceTokenizer,
        transform: Transform,
        update: bool,
        max_errors: int | None,
        progress: Progress,
    ) -> None:
        self._store, self._inference, self._transform = store, inference, transform
        self._update, self._max_errors, self._progress = update, max_errors, progress
        self._reader = TokenStore.open(store.path)  # the writer's thread uses the other
        self._bad_before = self._reader.errors()
        self._seen = 0
        self._healed: list[str] = []  # were bad once, and are good now
        self.done = Tokenized(store.path)

    def run(self, walk: Iterator[ImageFile | Skipped], workers: int) -> Tokenized:
        views = len(self._transform.view_names())
        with (
            StoreWriter(self._store) as self._writer,
            ReaderPool(workers, self._transform.prepare) as decoder,
            Encoders(self._inference) as encoders,
        ):
            decoded = self._good(decoder.in_order(self._missing(walk), _DECODED_TOGETHER))
            batches = batches_of_one_shape(decoded, max(1, self._inference.batch // views))
            flat = (
                (_Batch(prepared, images.shape), images.flatten(0, 1))
                for prepared, images in batches
            )
            for batch, tokens in encoders.encode(flat):
                self._write(batch, tokens)
        if self._healed:
            self._store.forget_errors(self._healed)
        return self.done

    def _missing(self, walk: Iterator[ImageFile | Skipped]) -> Iterator[ImageFile]:
        """The images that are not in the store yet, or have changed."""
        while group := list(itertools.islice(walk, _WALKED_AT_ONCE)):
            for thing in group:
                if isinstance(thing, Skipped):
                    self._skip(thing, 0, 0)
            files = [thing for thing in group if isinstance(thing, ImageFile)]
            self._reader.refresh()
            known = self._reader.known([row_id(file.name) for file in files])
            for file in files:
                self._seen += 1
                metadata = known.get(row_id(file.name))
                reason, *before = self._bad_before.get(file.name, ("", 0, 0))
                if metadata is not None and not _has_changed(file, *metadata):
                    self.done.num_known += 1
                    if reason:
                        self._healed.append(file.name)
                elif reason and before == [file.size, file.modified]:
                    self._bad(Skipped(file.name, reason))
                elif metadata is None:
                    yield file
                    continue
                else:
                    self.done.changed.append(file.name)
                    if self._update:
                        yield file
                        continue
                self._advance(1, images=0)

    def _good(
        self, decoded: Iterator[tuple[ImageFile, Prepared | BadImage]]
    ) -> Iterator[tuple[tuple[ImageFile, Prepared], Tensor]]:
        for file, prepared in decoded:
            if isinstance(prepared, BadImage):
                self._skip(Skipped(file.name, str(prepared)), file.size, file.modified)
                self._advance(1, images=0)
            else:
                yield (
                    (file, prepared._replace(views=_NO_VIEWS)),
                    views_of(prepared.views, self._transform.flip),
                )

    def _write(self, batch: _Batch, tokens: Tensor) -> None:
        layout, names = (
            self._inference.tokenizer.layout(*batch.shape[-2:]),
            self._transform.view_names(),
        )
        small = tokens.numpy().astype(
            self._store.header.dtype
        )  # thousands of rows wait for their commit
        rows = []
        for number, (file, prepared) in enumerate(batch.images):
            for view, name in enumerate(names):
                crop = prepared.crops[view % len(prepared.crops)]
                metadata = (
                    file.label,
                    prepared.height,
                    prepared.width,
                    crop,
                    file.size,
                    file.modified,
                    prepared.digest,
                )
                rows.append(
                    TokenRow(
                        row_id(file.name, name),
                        small[number * len(names) + view],
                        layout,
                        *metadata,
                    )
                )
        self._writer.put(rows, replace=self._update)
        self._healed += [file.name for file, _ in batch.images if file.name in self._bad_before]
        self.done.num_images += len(batch.images)
        self.done.num_tokens += sum(len(row.tokens) for row in rows)
        self._advance(len(batch.images))

    def _skip(self, skipped: Skipped, size: int, modified: int) -> None:
        if skipped.reason == NOT_AN_IMAGE and not size:  # nobody took it for one
            self.done.num_ignored += 1
            return
        if self._bad_before.get(skipped.name) != (skipped.reason, size, modified):
            self._writer.put_error(skipped, size, modified)
        self._bad(skipped)

    def _bad(self, skipped: Skipped) -> None:
        self.done.skipped.append(skipped)
        limit = (
            self._max_errors
            if self._max_errors is not None
            else max(LEAST_ERRORS, int(ERROR_SHARE * self._seen))
        )
        if len(self.done.skipped) > limit:
            raise DataError(
                f"stopped at {len(self.done.skipped)} bad images among the first {self._seen:,}: is this the right folder? "
                f"{summary(self.done.skipped, 3)} What was tokenized is kept; go on with a larger --max-errors."
            )

    def _advance(self, number: int, **metrics: float) -> None:
        self._progress.advance(number, errors=len(self.done.skipped), **metrics)


_NO_VIEWS = numpy.zeros((0, 0, 0, 3), numpy.uint8)  # the pixels go another way


def _has_changed(file: ImageFile, size: int, modified: int, digest: bytes) -> bool:
    """Whether an image is another one than that which was tokenized: by size and time, and only where those differ by its contents."""
    if not size and not digest:
        return False  # the store does not know the file: it was made by hand, or imported
    if (file.size, file.modified) == (size, modified):
        return False
    if file.size != size:
        return True
    try:
        with bad_image_errors(), open_file(file) as stream:
            return content_digest(stream) != digest
    except BadImage:
        return True


def _is_another(row: TokenRow, there: tuple[int, int, bytes]) -> bool:
    """Whether a row is of another image than the one that is there, as far as both know their files."""
    size, _, digest = there
    if not (row.size or row.digest) or not (size or digest):
        return False
    return row.size != size or row.digest != digest


def _opened(out: Path, header: StoreHeader, overwrite: bool) -> TokenStore:
    """The store to write to: the one that is there, if it holds such tokens, or a new one."""
    if out.exists() and overwrite:
        with TokenStore.open(
            out
        ).writing():  # only a token store is replaced, and only one that nobody writes to
            shutil.rmtree(out)
    if out.exists():
        store = TokenStore.open(out)
        store.header.check_same(header, out)
        return store
    check_writable(out)
    return TokenStore.create(out, header)


def _shuffled(walk: Iterator[ImageFile | Skipped]) -> Iterator[ImageFile | Skipped]:
    things = list(walk)
    return iter(sorted(things, key=lambda thing: name_hash(thing.name, "shuffle")))


def _count(source: str | Path | list[ImageFile], progress: Progress, over: threading.Event) -> None:
    """Count the images beside the work, so that the time left can be told."""
    number = 0
    for thing in walk_source(source):
        number += isinstance(thing, ImageFile)
        if over.is_set():
            return
    progress.set_total(number)


def _copy(
    source: TokenStore,
    inference: InferenceTokenizer,
    out: Path,
    overwrite: bool,
    update: bool,
    progress: Progress,
) -> Tokenized:
    """Copy the rows of another store of the same tokenizer; those that are there stay as they are."""
    if source.header.fingerprint != inference.fingerprint:
        raise RunError(
            f"{source.path} was written by another tokenizer ({source.header.fingerprint[:12]}, this one is {inference.fingerprint[:12]}), "
            "and images made of tokens are worse than images. Name the images themselves."
        )
    if out.resolve() == source.path.resolve():
        raise ConfigError(f"{out} cannot be its own source. Name another --out.")
    store = _opened(out, source.header, overwrite)
    done = Tokenized(out)
    progress.start("copying", len(source), "rows")
    with store.writing():
        for start in range(0, len(source), ROWS_PER_COMMIT):
            rows = source.token_rows(start, start + ROWS_PER_COMMIT)
            known = store.known([row.id for row in rows])
            changed = {
                row.id for row in rows if row.id in known and _is_another(row, known[row.id])
            }
            new = [row for row in rows if row.id not in known or (update and row.id in changed)]
            if new:
                store.append(new, replace=update)
            done.changed += sorted(changed)
            done.num_known += len(rows) - len(new) - (0 if update else len(changed))
            done.num_images += len(new)
            done.num_tokens += sum(len(row.tokens) for row in new)
            progress.advance(len(rows))
        if store.num_small_files > SOME_SMALL_FILES:
            store.compact(KEEP_REPLACED, lazily=True)
    progress.finish()
    done.num_rows = len(store)
    return done
