"""Training makes a run; a resumed run is bitwise the same; mistakes are named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import smalto
from smalto.core.errors import ConfigError, DataError, RunError
from smalto.core.progress import Progress
from smalto.training.recipe import change_recipe
from smalto.training.recipe_file import load_recipe
from smalto.training.run_folder import RunFolder, read_jsonl
from smalto.training.tokenizer_recipe import TokenizerRecipe
from smalto.training.trainer import Interrupted
from tests.conftest import write_images


class StopAfter(Progress):
    """Asks the run to stop after some steps, as Ctrl-C does."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def advance(self, number: int = 1, **metrics: float) -> None:
        import signal

        self.left -= number
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)


class Listener(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def run(image_folder: Path, tiny_recipe: TokenizerRecipe, tmp_path: Path) -> Path:
    smalto.train(image_folder, tiny_recipe, out=tmp_path / "run", device="cpu", workers=0)
    return tmp_path / "run"


def test_a_run_holds_all_that_was_promised(run: Path, image_folder: Path) -> None:
    names = {p.name for p in run.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "recipe.toml",
        "log.jsonl",
        "times.jsonl",
        "events.jsonl",
    }
    assert names >= {"checkpoints", "metrics.json", "report.html", "split.json"}
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "step-00000004",
        "step-00000006",
    ]
    log = read_jsonl(run / "log.jsonl")
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    assert all(isinstance(value, (int, float)) for row in log for value in row.values())
    assert [row["step"] for row in log if "held_out_psnr" in row] == [3, 6]
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["measured_on"] == "held-out images"
    assert metrics["num_images"] == 1
    assert metrics["usage_window"] == 120  # one image of 40 x 48 has 120 tokens
    assert metrics["bits_per_pixel"] == pytest.approx(4 / 16)
    assert (
        metrics["fingerprint"]
        == smalto.load(run).fingerprint()
        == smalto.load(run / "checkpoints" / "step-00000006").fingerprint()
    )
    assert load_recipe(RunFolder(run).path / "recipe.toml").data.source == str(
        image_folder.resolve()
    )


def test_the_report_needs_nothing_else(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert (
        page.count("data:image/webp;base64,") == 6
    )  # image, reconstruction, error, tokens, JPEG, WebP
    for words in (
        "PSNR",
        "SSIM",
        "usage@120",
        "perplexity",
        "bits per pixel",
        "images/s",
        "parameters",
        "seed",
        "versions",
    ):
        assert words in page
    assert page.count("<svg") == 4
    assert "prefers-color-scheme: dark" in page


def test_an_interrupted_run_saves_itself_and_ends_the_same(
    image_folder: Path, tiny_recipe: TokenizerRecipe, run: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    with pytest.raises(Interrupted, match="stopped after step 3"):
        smalto.train(
            image_folder, tiny_recipe, out=other, device="cpu", workers=0, progress=StopAfter(3)
        )
    assert RunFolder(other).steps() == [2, 3]
    assert not (other / "metrics.json").exists()
    smalto.resume(other, device="cpu", workers=0)
    for name in ("model.safetensors", "log.jsonl"):
        assert (other / name).read_bytes() == (run / name).read_bytes()
    events = read_jsonl(other / "events.jsonl")
    assert [
        (e["event"], e.get("step")) for e in events if e["event"] in ("interrupted", "resumed")
    ] == [("interrupted", 3), ("resumed", 3)]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    image_folder: Path, tiny_recipe: TokenizerRecipe, run: Path, tmp_path: Path
) -> None:
    expected = (run / "model.safetensors").read_bytes()
    newest = run / "checkpoints" / "step-00000006" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    smalto.resume(run, device="cpu", workers=0)
    (event,) = [
        row for row in read_jsonl(run / "events.jsonl") if row["event"] == "damaged checkpoint"
    ]
    assert event == {
        "event": "damaged checkpoint",
        "step": 6,
        "text": "step-00000006: state.safetensors is damaged: its checksum differs.",
    }
    assert (run / "model.safetensors").read_bytes() == expected
    assert RunFolder(run).restore(smalto.load).step == 6  # a good one has taken its place
    assert (run / "checkpoints" / "damaged-step-00000006").is_dir()


def test_no_checkpoint_left_is_an_error(run: Path) -> None:
    for folder in (run / "checkpoints").iterdir():
        (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match="no checkpoint that can be read"):
        smalto.resume(run, device="cpu", workers=0)


def test_a_resumed_run_may_go_further_but_stays_itself(run: Path) -> None:
    trained = smalto.resume(run, settings={"steps": 8}, device="cpu", workers=0)
    assert trained.training.steps == 8
    assert len(read_jsonl(run / "log.jsonl")) == 8
    for key in ("tokenizer.quantizer.codebook_size", "seed", "data.source"):
        with pytest.raises(ConfigError, match=f"keeps its {key}"):
            smalto.resume(run, settings={key: 1})
    with pytest.raises(ConfigError, match="is at step 8 already"):
        smalto.resume(run, settings={"steps": 3}, device="cpu", workers=0)


def test_what_is_there_is_not_overwritten_unasked(
    run: Path,
    image_folder: Path,
    tiny_recipe: TokenizerRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(RunError, match=r"exists already. Resume it with --resume .* --overwrite"):
        smalto.train(image_folder, tiny_recipe, out=run)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="not a run of smalto"):
        smalto.train(image_folder, tiny_recipe, out=mine, overwrite=True)
    (run / "thesis.txt").write_text("more years of work")
    with pytest.raises(RunError, match=r"holds files that are not of the run \(thesis\.txt\)"):
        smalto.train(image_folder, tiny_recipe, out=run, overwrite=True)
    assert (mine / "thesis.txt").exists()
    assert (run / "thesis.txt").exists()
    (run / "thesis.txt").unlink()
    with pytest.raises(RunError, match="lies inside"):
        smalto.train(
            run / "decoded",
            tiny_recipe,
            out=write_images(run / "decoded", 5).parent,
            overwrite=True,
            workers=0,
        )
    shutil.rmtree(run / "decoded")
    monkeypatch.chdir(run)
    with pytest.raises(RunError, match="is the current folder"):
        smalto.train(image_folder, tiny_recipe, out=".", overwrite=True)
    monkeypatch.chdir(tmp_path)
    smalto.train(
        image_folder,
        change_recipe(tiny_recipe, {"steps": 1}),
        out=run,
        overwrite=True,
        device="cpu",
        workers=0,
    )
    assert len(read_jsonl(run / "log.jsonl")) == 1
    with pytest.raises(RunError, match="is not a run"):
        smalto.resume(mine)


def test_few_images_are_measured_in_training_and_say_so(
    tmp_path: Path, tiny_recipe: TokenizerRecipe
) -> None:
    observer = Listener()
    folder = write_images(tmp_path / "three", 3)
    trained = smalto.train(
        folder, tiny_recipe, out=tmp_path / "run", device="cpu", workers=0, progress=observer
    )
    assert trained.metrics.measured_on == "training images"
    assert trained.metrics.num_images == 3
    assert any("none held out" in text for text in observer.said)
    assert "overestimate" in (tmp_path / "run" / "report.html").read_text()


def test_a_dataset_of_tensors_of_any_channels(tmp_path: Path, tiny_recipe: TokenizerRecipe) -> None:
    class Noise(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Tensor:
            return torch.rand(2, 20, 24, generator=torch.Generator().manual_seed(index)) * 2 - 1

    recipe = change_recipe(tiny_recipe, {"tokenizer.autoencoder.in_channels": 2})
    trained = smalto.train(Noise(), recipe, out=tmp_path / "run", device="cpu")
    assert trained.metrics.num_images == 1
    with pytest.raises(ConfigError, match="pass it again"):
        smalto.resume(tmp_path / "run")
    smalto.resume(tmp_path / "run", Noise(), settings={"steps": 7}, device="cpu")
    with pytest.raises(ValueError, match=r"must be a tensor \[B, 3, H, W\]"):
        smalto.train(Noise(), tiny_recipe, out=tmp_path / "other", device="cpu")


def test_a_run_follows_its_images_to_another_folder(
    run: Path, image_folder: Path, tmp_path: Path
) -> None:
    image_folder.rename(tmp_path / "moved")
    with pytest.raises(DataError, match="does not exist"):
        smalto.resume(run, settings={"steps": 7}, device="cpu", workers=0)
    trained = smalto.resume(run, tmp_path / "moved", settings={"steps": 7}, device="cpu", workers=0)
    assert trained.metrics.measured_on == "held-out images"
    assert RunFolder(run).split().source == str((tmp_path / "moved").resolve())


def test_no_steps_leave_the_start_on_disk(
    image_folder: Path, tiny_recipe: TokenizerRecipe, tmp_path: Path
) -> None:
    trained = smalto.train(
        image_folder,
        change_recipe(tiny_recipe, {"steps": 0}),
        out=tmp_path / "run",
        device="cpu",
        workers=0,
    )
    assert trained.training.fingerprint == smalto.load(tmp_path / "run").fingerprint()


def test_logs_that_are_lost_or_damaged_do_not_stop_a_run(run: Path) -> None:
    (run / "times.jsonl").unlink()
    (run / "log.jsonl").write_bytes((run / "log.jsonl").read_bytes() + b"7\n\xff\xfe")
    trained = smalto.resume(run, settings={"steps": 7}, device="cpu", workers=0)
    assert [row["step"] for row in read_jsonl(run / "log.jsonl")] == list(range(1, 8))
    assert trained.training.times.images_per_second > 0  # of the one step that is known
    (run / "split.json").write_text("{}")
    with pytest.raises(RunError, match=r"split\.json is damaged"):
        smalto.resume(run, device="cpu", workers=0)


def test_images_smaller_than_a_token_do_not_spoil_a_run(
    tmp_path: Path, tiny_recipe: TokenizerRecipe
) -> None:
    folder = write_images(tmp_path / "p", 5, 2, 3)
    trained = smalto.train(folder, tiny_recipe, out=tmp_path / "run", device="cpu", workers=0)
    assert trained.metrics.num_images == 1


def test_names_that_are_not_text(tmp_path: Path, tiny_recipe: TokenizerRecipe) -> None:
    folder = write_images(tmp_path / "p", 6)
    for path in list(folder.iterdir()):
        os.rename(path, os.fsencode(path).replace(b"photo", b"caf\xe9 <b>\x1b[31m"))
    smalto.train(folder, tiny_recipe, out=tmp_path / "run", device="cpu", workers=0)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "caf\\udce9 &lt;b&gt;\\x1b[31m" in page
    os.rename(folder, os.fsencode(folder) + b"\xff")
    with pytest.raises(DataError, match="is not plain text"):
        smalto.train(
            os.fsdecode(os.fsencode(folder) + b"\xff"),
            tiny_recipe,
            out=tmp_path / "other",
            workers=0,
        )


def test_diverged_training_says_what_to_do(
    tmp_path: Path, image_folder: Path, tiny_recipe: TokenizerRecipe
) -> None:
    recipe = change_recipe(tiny_recipe, {"optimizer.lr": 1e4, "steps": 200})
    with pytest.raises(RunError, match=r"has diverged.*optimizer\.lr"):
        smalto.train(image_folder, recipe, out=tmp_path / "run", device="cpu", workers=0)


def test_bf16_trains(tmp_path: Path, image_folder: Path, tiny_recipe: TokenizerRecipe) -> None:
    trained = smalto.train(
        image_folder,
        change_recipe(tiny_recipe, {"precision": "bf16"}),
        out=tmp_path / "run",
        device="cpu",
        workers=0,
    )
    assert trained.metrics.precision == "bf16"
    assert trained.tokenizer.state_dict()["encoder.0.weight"].dtype == torch.float32


def test_no_images_and_no_such_device(
    tmp_path: Path, image_folder: Path, tiny_recipe: TokenizerRecipe
) -> None:
    with pytest.raises(DataError, match="does not exist"):
        smalto.train(tmp_path / "nowhere", tiny_recipe, out=tmp_path / "run")
    with pytest.raises(ConfigError, match='expected "auto", "cpu"'):
        smalto.train(image_folder, tiny_recipe, out=tmp_path / "run", device="abacus", workers=0)
    assert not (tmp_path / "run").exists()


def test_training_leaves_the_global_random_state_alone(
    tmp_path: Path, image_folder: Path, tiny_recipe: TokenizerRecipe
) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    smalto.train(image_folder, tiny_recipe, out=tmp_path / "run", device="cpu", workers=0)
    assert torch.equal(torch.get_rng_state(), before)


OTHER_QUANTIZERS = {
    "residual": {
        "kind": "residual",
        "num_stages": 2,
        "stage.codebook_size": 16,
        "stage.latent_dim": 8,
        "stage.code_dim": 4,
    },
    "product": {"kind": "product", "num_heads": 2, "head.codebook_size": 16, "head.latent_dim": 4},
    "projected": {"codebook": "projected"},
}


@pytest.mark.parametrize("kind", OTHER_QUANTIZERS)
def test_every_quantizer_trains_tokenizes_and_decodes(
    kind: str, tmp_path: Path, image_folder: Path, tiny_recipe: TokenizerRecipe
) -> None:
    settings = {
        f"tokenizer.quantizer.{key}": value for key, value in OTHER_QUANTIZERS[kind].items()
    }
    trained = smalto.train(
        image_folder,
        change_recipe(tiny_recipe, settings),
        out=tmp_path / "run",
        device="cpu",
        workers=0,
    )
    metrics = trained.metrics
    side = {"residual": 2, "product": 2, "projected": 1}[kind]
    assert metrics.bits_per_pixel == pytest.approx(side * 4 / 16)
    assert 0 < metrics.usage <= 1
    assert (
        f"{side * 120:,} tokens" in (tmp_path / "run" / "report.html").read_text()
    )  # 40 x 48 pixels
    result = smalto.tokenize(
        image_folder, tmp_path / "run", tmp_path / "tokens", device="cpu", workers=0
    )
    assert result.num_tokens == side * 120 * 6
    assert len(smalto.decode(tmp_path / "tokens", tmp_path / "decoded", device="cpu")) == 6
    assert smalto.info(tmp_path / "tokens")["rows"] == 6
    resumed = smalto.resume(tmp_path / "run", settings={"steps": 8}, device="cpu", workers=0)
    assert resumed.metrics.psnr > 0


def test_a_kill_between_the_last_checkpoint_and_the_runs_own_model_is_mended(run: Path) -> None:
    expected = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(
        (RunFolder(run).checkpoint(4) / "model.safetensors").read_bytes()
    )
    smalto.resume(run, device="cpu", workers=0)
    assert (run / "model.safetensors").read_bytes() == expected


def test_metrics_of_an_earlier_end_go_when_a_run_goes_further(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    assert (run / "metrics.json").is_file()
    monkeypatch.setattr("smalto.evaluation.run_summary.evaluate_tokenizer", stop)
    with pytest.raises(KeyboardInterrupt):
        smalto.resume(run, settings={"steps": 8}, device="cpu", workers=0)
    assert not (run / "metrics.json").exists()


def test_a_resumed_run_follows_changed_settings_and_keeps_its_discriminator(
    image_folder: Path, tiny_recipe: TokenizerRecipe, tmp_path: Path
) -> None:
    adversarial = {
        "losses.adversarial.weight": 0.1,
        "losses.adversarial.layers": 2,
        "losses.adversarial.width": 4,
    }
    models = []
    for name, settings in (
        ("same", {}),
        ("other", {"optimizer.weight_decay": 0.9, "optimizer.betas": [0.5, 0.5]}),
    ):
        smalto.train(
            image_folder,
            change_recipe(tiny_recipe, adversarial),
            out=tmp_path / name,
            device="cpu",
            workers=0,
        )
        smalto.resume(tmp_path / name, settings={"steps": 12, **settings}, device="cpu", workers=0)
        models.append((tmp_path / name / "model.safetensors").read_bytes())
    assert models[0] != models[1]
    with pytest.raises(ConfigError, match=r"keeps its losses\.adversarial\.width"):
        smalto.resume(tmp_path / "same", settings={"losses.adversarial.width": 8})


def test_where_only_held_out_images_can_be_read_resuming_is_exact_too(
    tiny_recipe: TokenizerRecipe, tmp_path: Path
) -> None:
    from smalto.images.splits import held_out_order

    names = [path.name for path in sorted(write_images(tmp_path / "images", 6).iterdir())]
    for place in held_out_order(names)[1:]:
        (tmp_path / "images" / names[place]).write_bytes(b"broken")
    longer = change_recipe(tiny_recipe, {"optimizer.decay": False, "steps": 12})
    smalto.train(tmp_path / "images", longer, out=tmp_path / "whole", device="cpu", workers=0)
    smalto.train(
        tmp_path / "images",
        change_recipe(longer, {"steps": 5}),
        out=tmp_path / "part",
        device="cpu",
        workers=0,
    )
    smalto.resume(tmp_path / "part", settings={"steps": 12}, device="cpu", workers=0)
    assert (tmp_path / "part" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_of_many_held_out_images_some_of_every_folder_are_measured(
    tiny_recipe: TokenizerRecipe, tmp_path: Path
) -> None:
    for folder in "abcdefgh":
        write_images(tmp_path / "images" / folder, 12)
    recipe = change_recipe(tiny_recipe, {"steps": 1, "evaluate.images": 5})
    trained = smalto.train(
        tmp_path / "images", recipe, out=tmp_path / "run", device="cpu", workers=0
    )
    held_out = trained.run.split().held_out
    assert len(held_out) > 6
    assert trained.metrics.num_images == 5
    assert trained.metrics.measured_on == f"held-out images, drawn from {len(held_out)}"
    page = (tmp_path / "run" / "report.html").read_text()
    assert any(name in page for name in held_out[5:])  # not just the first five by name
