"""Images to a token store."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from smalto.core.allocator import retain_freed_memory
from smalto.core.device import Precision
from smalto.core.errors import ConfigError, DataError, RunError, SmaltoError
from smalto.core.files import name_hash, named_path
from smalto.core.progress import Progress
from smalto.images.image_file import ImageFile, Skipped, summary
from smalto.images.image_reader import default_workers, transform_of
from smalto.images.reading import LONGER_SIDE, DeepGray
from smalto.images.retries import SourceCheck
from smalto.images.sources import source_name, walk_source
from smalto.images.transforms import Transform
from smalto.inference.inference_tokenizer import InferenceTokenizer
from smalto.interop.open_tokenizer import open_tokenizer
from smalto.store.schema import StoreHeader
from smalto.store.token_store import TokenStore
from smalto.store.writer import SOME_SMALL_FILES, StoreWriter
from smalto.tokenizing.commit import commit
from smalto.tokenizing.copy_rows import copy_rows
from smalto.tokenizing.local import encode_locally
from smalto.tokenizing.plan import Plan

MIN_ERROR_LIMIT = 100  # a job stops after this many bad images ...
ERROR_SHARE = 0.01  # ... or after this share of the images, if that is more


@dataclass
class Tokenized:
    """What a job did.

    Attributes:
        path: the store.
        num_images: images that were tokenized now; ``num_tokens``: their tokens, views included.
        num_known: images that were in the store already.
        num_ignored: files that are not images.
        num_rows: of the whole store now.
        changed: names of images whose files have changed since they were tokenized; with
            ``update`` they were tokenized again.
        skipped: bad images, those known from before included.
        unreadable: files and folders that the system could not read now. They are not recorded:
            the next run tries them again.
        num_bad: how many of ``skipped`` are damaged; formats that smalto does not read are not.
        notes: name and note of images that a user should look at.
    """

    path: Path
    num_images: int = 0
    num_tokens: int = 0
    num_known: int = 0
    num_ignored: int = 0
    num_rows: int = 0
    changed: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    unreadable: list[Skipped] = field(default_factory=list)
    num_bad: int = 0
    notes: list[tuple[str, str]] = field(default_factory=list)

    def skip(self, images: Iterable[Skipped]) -> None:
        """Add bad images."""
        for image in images:
            self.skipped.append(image)
            self.num_bad += not image.is_unread_format


@retain_freed_memory()
def tokenize(
    source: str | Path | list[ImageFile],
    tokenizer: str | Path,
    out: str | Path,
    *,
    size: int | None = None,
    resize: int | None = None,
    longer_side: int | None = LONGER_SIDE,
    crops: int = 1,
    flip: bool = False,
    deep_gray: DeepGray = "full",
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
    """Write the tokens of a collection to a store, or resume: stored images are not tokenized
    again.

    Args:
        source: a folder (with zip, tar and parquet files in it), one image, ``"bundled"``,
            ``"emoji"``, a list of files, or another store of the same tokenizer, whose rows are
            copied.
        tokenizer: the folder of a tokenizer or run, or a name; it is recorded with the fingerprint.
        out: the store, such as ``tokens.lance``.
        size: resize the shorter side to this and crop a square; None keeps the aspect ratio, and
            every row has its own layout.
        resize: with ``size``: resize the shorter side to this instead, before the crop. VAR uses
            1.125 times ``size``.
        longer_side: without ``size``: larger images are reduced to this; None or 0: not.
        crops: with ``size``: 1, or 5 to add the corner crops, each as a row.
        flip: add a mirrored view of each crop as a row.
        deep_gray: how 16-bit gray becomes 8-bit gray: ``"full"`` or ``"range"``.
        shuffle: tokenize in an order that is random and always the same; reads all names first.
        update: tokenize images again whose files have changed.
        max_errors: stop after more bad images than this, not counting those known from before;
            None: 100, or 1 % of the images if more.
        overwrite: replace the store.
        batch: images per batch. With 1, an image's tokens do not depend on the images beside it.
        device, precision: of the model.
        workers: processes that read images; 0: none.
        progress: receives images, metrics and messages.

    Raises:
        DataError: there are no images, too many bad ones, or the source cannot be read any more.
        RunError: ``out`` holds tokens of another kind, or another process holds its writer lock.
    """
    progress, out = progress or Progress(), named_path(out, "the store")
    if max_errors is not None and max_errors < 0:
        raise ConfigError(f"max_errors must be 0 or more; got {max_errors}.")
    inference = InferenceTokenizer.of(
        open_tokenizer(tokenizer, progress), device, precision, batch, progress
    )
    if not isinstance(source, list) and _is_store(source):
        given = (size, resize, longer_side, crops, flip, deep_gray, shuffle)
        if given != (None, None, LONGER_SIDE, 1, False, "full", False):
            raise ConfigError(
                f"the rows of {source} are copied unchanged: leave out size, resize, longer_side, "
                "crops, flip, deep_gray and shuffle."
            )
        return _copy(TokenStore.open(source), inference, out, overwrite, update, progress)
    transform = transform_of(
        inference.tokenizer.stride,
        size=size,
        resize=resize,
        longer_side=longer_side,
        crops=crops,
        flip=flip,
        deep_gray=deep_gray,
    )
    header = StoreHeader.of(
        inference.identity,
        layout=inference.tokenizer.layout(size, size) if size is not None else None,
        transform=transform,
        precision=precision,
        path=tokenizer,
        source=source_name(source),
    )
    num_workers = default_workers(workers)
    name = source_name(source) or "the list of files"
    files = walk_source(source)
    if not (first := list(itertools.islice(files, 1))):  # before a store is made, or replaced
        raise DataError(f"{name} is empty: name a folder of images.")
    files = itertools.chain(first, files)
    with _destination(out, header, overwrite) as store, store.writing():
        if others := store.other_files():
            progress.message(f"left alone in {out}: {', '.join(others[:8])} (not of the store)")
        progress.start("tokenizing", None, "images")
        with _counting(source, progress):
            plan = Plan(store, _shuffled(files) if shuffle else files, update)
            done = _run(
                store, plan, transform, inference, num_workers, max_errors, update, progress
            )
        store.merge_small_files(SOME_SMALL_FILES)
        done.num_rows = len(store)
    progress.finish()
    if not done.num_rows:
        reasons = summary([*done.unreadable, *done.skipped])
        raise DataError(f"nothing in {name} could be used. {reasons}".strip())
    return done


def _run(
    store: TokenStore,
    plan: Plan,
    transform: Transform,
    inference: InferenceTokenizer,
    workers: int,
    max_errors: int | None,
    update: bool,
    progress: Progress,
) -> Tokenized:
    """Tokenize what the plan finds missing; report progress; stop at too many bad images."""
    done = Tokenized(store.path)
    check = SourceCheck()
    passed = 0

    def catch_up() -> None:
        """Take what the plan has passed, and stop it after too many bad images."""
        nonlocal passed
        _record_plan_errors(plan, writer, done)
        progress.advance(plan.num_passed - passed, images=0, errors=done.num_bad)
        passed = plan.num_passed
        if _is_over_limit(done, plan, max_errors) or check.is_gone:
            plan.stop()  # what is being encoded is still committed

    plan.after_group = catch_up
    with (
        StoreWriter(store) as writer,
        contextlib.closing(encode_locally(plan, transform, inference, workers)) as shards,
    ):
        for shard in shards:
            commit(writer, shard, plan, replace=update)
            done.num_images += len(shard.names)
            done.num_tokens += sum(len(row.tokens) for row in shard.rows)
            done.notes += shard.notes
            done.skip(error.skipped for error in shard.errors)
            done.unreadable += shard.unreadable
            reasons = dict(shard.unreadable)
            for file in shard.files:
                check.add(file, reasons.get(file.name, ""))
            progress.advance(len(shard.files), images=len(shard.names), errors=done.num_bad)
            catch_up()
        catch_up()
    if plan.recovered:
        store.forget_errors(plan.recovered)
    done.num_known, done.num_ignored, done.changed = plan.num_known, plan.num_ignored, plan.changed
    if check.is_gone:
        raise check.error("What was tokenized is kept; then run the same command again.")
    if _is_over_limit(done, plan, max_errors):
        raise DataError(
            f"stopped at {done.num_bad} bad images among the first {plan.num_seen:,}: is this "
            f"the right folder? {summary(done.skipped, 3)} What was tokenized is kept; resume with "
            "a larger --max-errors."
        )
    return done


def _record_plan_errors(plan: Plan, writer: StoreWriter, done: Tokenized) -> None:
    """Take the errors that the plan has found since the last call."""
    for error in plan.errors:
        if error.skipped.is_unreadable:
            done.unreadable.append(error.skipped)
            continue
        if not plan.is_recorded(error):
            writer.put_error(*error)
        done.skip([error.skipped])
    done.skip(plan.known_errors)
    plan.errors.clear()
    plan.known_errors.clear()


def _is_over_limit(done: Tokenized, plan: Plan, max_errors: int | None) -> bool:
    """Return whether there are too many bad images; those known from before do not count."""
    limit = max_errors
    if limit is None:
        limit = max(MIN_ERROR_LIMIT, int(ERROR_SHARE * plan.num_seen))
    return done.num_bad - plan.num_known_errors > limit


def _is_store(source: str | Path) -> bool:
    return (named_path(source, "the source of images") / "head.json").is_file()


@contextlib.contextmanager
def _destination(out: Path, header: StoreHeader, overwrite: bool) -> Iterator[TokenStore]:
    """Open the store to write to if it holds such tokens; otherwise create one.

    A new store without rows is removed at the end: it would fix the kind of the next attempt. With
    ``overwrite`` the old one is put back then.
    """
    if out.exists() and not overwrite:
        store = TokenStore.open(out)
        store.header.check_same(header, out)
        yield store
        return
    with TokenStore.replaced(out) if out.exists() else contextlib.nullcontext():
        store = TokenStore.create(out, header)
        try:
            yield store
        finally:
            with contextlib.suppress(OSError, SmaltoError):  # it was removed during the job
                if not len(store):
                    TokenStore.remove(out)


def _shuffled(files: Iterator[ImageFile | Skipped]) -> Iterator[ImageFile | Skipped]:
    return iter(sorted(files, key=lambda item: name_hash(item.name, "shuffle")))


@contextlib.contextmanager
def _counting(source: str | Path | list[ImageFile], progress: Progress) -> Iterator[None]:
    """Count the images during the block, so that the time left can be estimated."""
    ended = threading.Event()

    def count() -> None:
        number = 0
        with contextlib.suppress(OSError, DataError):  # the job reports it
            for item in walk_source(source):
                number += isinstance(item, ImageFile)
                if ended.is_set():
                    return
            progress.set_total(number)

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _copy(
    source: TokenStore,
    inference: InferenceTokenizer,
    out: Path,
    overwrite: bool,
    update: bool,
    progress: Progress,
) -> Tokenized:
    fingerprint = inference.identity.fingerprint
    if source.header.fingerprint != fingerprint:
        raise RunError(
            f"{source.path} was written by another tokenizer ({source.header.fingerprint[:12]}, "
            f"this one is {fingerprint[:12]}). Tokenize the images themselves: images decoded from "
            "tokens would be worse."
        )
    if out.resolve() == source.path.resolve():
        raise ConfigError(f"{out} cannot be its own source. Name another --out.")
    with _destination(out, source.header, overwrite) as store:
        copied = copy_rows(source, store, update, progress)
        num_rows = len(store)
    return Tokenized(
        out,
        num_images=copied.num_rows,
        num_tokens=copied.num_tokens,
        num_known=copied.num_known,
        num_rows=num_rows,
        changed=copied.changed,
    )
