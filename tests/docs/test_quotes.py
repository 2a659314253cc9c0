"""Every metric in the READMEs and the documentation is the stored result's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
READMES = [ROOT / "README.md", ROOT / "README.zh.md"]
QUANTIZERS = [ROOT / "docs" / language / "quantizers.md" for language in ("en", "zh")]

GENERATION = [ROOT / "docs" / language / "generation.md" for language in ("en", "zh")]
PRETRAINED = [ROOT / "docs" / language / "pretrained.md" for language in ("en", "zh")]

on_readmes = pytest.mark.parametrize("page", READMES, ids=lambda page: page.name)
on_quantizers = pytest.mark.parametrize("page", QUANTIZERS, ids=lambda page: page.parent.name)


def result(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def quotes(text: str, value: str) -> bool:
    """Return whether a page holds a number as such, not as a part of a longer one."""
    return re.search(rf"(?<![\d.,]){re.escape(value)}(?!\d)", text) is not None


def table_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def quality_row(name: str, row: dict[str, float]) -> str:
    shares = f"{row['usage']:.1%}", f"{row['perplexity']:.0f}", f"{row['training_usage']:.1%}"
    return table_row(
        name,
        f"{row['psnr']:.2f}",
        *shares,
        f"{row['bits_per_pixel']:.3f}",
        f"{row['parameters']:,.0f}",
        f"{row['steps_per_second']:.1f}",
    )


def search_row(row: dict[str, Any]) -> str:
    times = [f"{row[f'{name}_ms']:.1f} ms" for name in ("smalto", "tiled", "faiss", "cdist")]
    return table_row(
        row["shape"],
        *times,
        f"{row['ratio']:.1f}",
        f"{row['smalto_extra_mib']:.0f} MiB",
        f"{row['cdist_extra_mib']:.0f} MiB",
    )


def step_row(row: dict[str, Any]) -> str:
    memory = f"{row['smalto_extra_mib']:.0f} MiB", f"{row['peer_extra_mib']:.0f} MiB"
    return table_row(
        row["shape"],
        f"{row['smalto_ms']:.0f} ms",
        f"{row['peer_ms']:.0f} ms",
        f"{row['ratio']:.1f}",
        *memory,
    )


def pretrained_rows(name: str) -> list[str]:
    measured = result(f"pretrained-{name}")
    rows = []
    for label, kind in ((f"`{name}`", "tokens"), ("JPEG", "JPEG"), ("WebP", "WEBP")):
        row = measured[kind]
        cells = [f"{row['coded_bits_per_pixel']:.3f}", f"{row['psnr']:.2f} dB"]
        cells += [f"{row[key]:.4f}" for key in ("ssim", "ms_ssim", "lite0_distance")]
        rows.append(table_row(label, *cells))
    return rows


@pytest.mark.parametrize("page", PRETRAINED, ids=lambda page: page.parent.name)
def test_pretrained_tokenizers_are_quoted(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in ("photos-f8", "photos-f4"):
        measured = result(f"pretrained-{name}")
        assert "\n".join(pretrained_rows(name)) in text
        assert quotes(text, str(measured["images"]))
        assert quotes(text, f"{measured['speed']['ratio']:.1f} ")


@pytest.mark.parametrize("page", PRETRAINED, ids=lambda page: page.parent.name)
@pytest.mark.parametrize("name_of_result", ["finetuning", "finetuning-textures"])
def test_fine_tuning_is_quoted(page: Path, name_of_result: str) -> None:
    finetuning, text = result(name_of_result), page.read_text(encoding="utf-8")
    for name in ("from photos-f8", "from scratch"):
        assert quotes(text, f"{finetuning[name]['psnr']:.2f} dB")
        assert quotes(text, f"{finetuning[name]['lite0_distance']:.3f}")


def test_what_was_claimed_of_fine_tuning_holds() -> None:
    finetuning = result("finetuning")
    assert finetuning["minutes"] == 10
    tuned, from_scratch = finetuning["from photos-f8"], finetuning["from scratch"]
    assert tuned["psnr"] >= from_scratch["psnr"] + 0.5
    assert tuned["lite0_distance"] <= 0.85 * from_scratch["lite0_distance"]
    textures = result("finetuning-textures")
    assert textures["minutes"] == 10
    assert textures["from photos-f8"]["psnr"] >= textures["from scratch"]["psnr"] + 1


@on_readmes
def test_pretrained_tokenizers_are_quoted_in_short(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "\n".join(pretrained_rows("photos-f8")) in text
    tokens = result("pretrained-photos-f4")["tokens"]
    assert quotes(text, f"{tokens['psnr']:.2f} dB")
    assert quotes(text, f"{tokens['coded_bits_per_pixel']:.3f}")


@on_readmes
def test_the_demo_ends_as_shown(page: Path) -> None:
    demo, text = result("demo"), page.read_text(encoding="utf-8")
    metrics = demo["metrics"]
    number = f"(N = {metrics['psnr_num_images']})"
    rows = {
        "measured on": f"{metrics['num_images']} {metrics['measured_on']}",
        "PSNR": f"{metrics['psnr']:.2f} dB {number}",
        "SSIM": f"{metrics['ssim']:.4f} {number}",
        "MS-SSIM": f"{metrics['ms_ssim']:.4f} {number}",
        "lite0 distance": f"{metrics['lite0_distance']:.4f} {number}",
        f"usage@{metrics['usage_window']:,}": f"{metrics['usage']:.1%} of 512 codes",
        "perplexity": f"{metrics['perplexity']:.1f}",
        "bits per pixel": f"{metrics['bits_per_pixel']:.4f}",
    }
    for name, value in rows.items():
        assert re.search(rf"^{re.escape(name)} +{re.escape(value)}$", text, re.MULTILINE), name
    assert demo["machine"]["processor"] in text


@on_readmes
def test_search_is_quoted(page: Path) -> None:
    search, text = result("search"), page.read_text(encoding="utf-8")
    for row in search["rows"]:
        assert search_row(row) in text
    assert quotes(text, f"{search['geometric_mean_ratio']:.1f}")
    assert quotes(text, f"{search['geometric_mean_ratio_without_faiss']:.1f}")


@on_readmes
def test_one_token_per_position_is_quoted(page: Path) -> None:
    quality, text = result("quality"), page.read_text(encoding="utf-8")
    chosen = {
        name: row
        for name, row in quality["summary"].items()
        if "default" in name or "SimpleVQVAE" in name or "vector" in name
    }
    for name, row in chosen.items():
        if row["bits_per_pixel"] < 1:
            assert quality_row(name, row) in text


@on_quantizers
def test_every_quantizer_is_quoted(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name, row in result("quality")["summary"].items():
        assert quality_row(name, row) in text


@on_quantizers
def test_steps_are_quoted(page: Path) -> None:
    step, text = result("step"), page.read_text(encoding="utf-8")
    for row in step["rows"]:
        assert step_row(row) in text
    assert quotes(text, f"{step['large']['process_mib']:.0f} MiB")
    assert step["machine"]["processor"] in text


VAR = [ROOT / "docs" / language / "var.md" for language in ("en", "zh")]
on_var = pytest.mark.parametrize("page", VAR, ids=lambda page: page.parent.name)


def scale_rows(var: dict[str, Any]) -> list[str]:
    held_out, training = var["multi_scale"]["held_out"], var["multi_scale"]["training"]
    rows = []
    for side, seen, learned in zip(
        (1, 2, 4, 8, 16), held_out["grids"], training["grids"], strict=True
    ):
        shares = f"{learned['used']:.1%}", f"{learned['ceiling']:.1%}"
        rows.append(
            table_row(
                f"{side} x {side}",
                f"{seen['psnr']:.2f}",
                f"{learned['tokens']:,}",
                *shares,
                f"{learned['perplexity']:.0f}",
            )
        )
    total = (
        f"{training['num_tokens']:,}",
        f"{training['used']:.1%}",
        "100.0%",
        f"{training['perplexity']:.0f}",
    )
    return [*rows, table_row("Σ", f"{held_out['psnr']:.2f}", *total)]


def encode_row(name: str, row: dict[str, Any]) -> str:
    encode = f"{row['encode_images_per_second']:.2f}", f"{row['encode_ratio']:.2f}"
    decode = f"{row['decode_images_per_second']:.2f}", f"{row['decode_ratio']:.2f}"
    return table_row(name, *encode, *decode, f"{row['quantizer_share']:.1%}", f"{row['equal']:.1%}")


@on_var
def test_scales_are_quoted(page: Path) -> None:
    var, text = result("var"), page.read_text(encoding="utf-8")
    for row in scale_rows(var):
        assert row in text
    multi, single = var["multi_scale"]["held_out"], var["single_scale"]["held_out"]
    assert quotes(text, f"{multi['psnr']:.2f} dB")
    assert quotes(text, f"{single['psnr']:.2f} dB")
    assert quotes(text, f"{var['multi_scale']['training']['psnr']:.2f} dB")
    assert quotes(text, f"{var['single_scale']['training']['psnr']:.2f} dB")
    assert quotes(text, f"{multi['bits_per_pixel']:.3f}")
    assert quotes(text, f"{single['bits_per_pixel']:.3f}")
    assert quotes(text, f"{multi['steps']:,}")
    assert quotes(text, f"{multi['training_seconds'] / 60:.0f} ")
    assert quotes(text, f"{var['same_tokens_from_vars_file']['of']:,}")


def test_what_was_claimed_of_scales_holds() -> None:
    var = result("var")
    values = [grid["psnr"] for grid in var["multi_scale"]["held_out"]["grids"]]
    assert values == sorted(values)
    assert var["multi_scale"]["held_out"]["psnr"] >= var["single_scale"]["held_out"]["psnr"]
    assert var["multi_scale"]["training"]["used"] >= 0.95
    assert var["multi_scale"]["held_out"]["training_seconds"] <= 20 * 60
    assert var["same_tokens_from_vars_file"]["equal"] == var["same_tokens_from_vars_file"]["of"]


@on_var
def test_speed_is_quoted(page: Path) -> None:
    encode, text = result("encode"), page.read_text(encoding="utf-8")
    for name, row in encode["ways"].items():
        assert encode_row(name, row) in text
    assert encode["machine"]["processor"] in text
    bf16 = result("var")["bf16"]
    for metric in (
        f"{bf16['equal']:.1%}",
        f"{bf16['psnr_bf16']:.2f} dB",
        f"{bf16['psnr_float32']:.2f} dB",
    ):
        assert quotes(text, metric)


def test_what_was_claimed_of_speed_holds() -> None:
    plain, exact, bf16 = (result("encode")["ways"][name] for name in ("plain", "float32", "bf16"))
    assert min(exact["encode_ratio"], exact["decode_ratio"]) >= 1.25
    assert min(bf16["encode_ratio"], bf16["decode_ratio"]) >= 5
    assert exact["equal"] == 1
    assert max(way["quantizer_share"] for way in (plain, exact, bf16)) <= 0.05


TRAINING = [ROOT / "docs" / language / "training.md" for language in ("en", "zh")]
on_training = pytest.mark.parametrize("page", TRAINING, ids=lambda page: page.parent.name)


def train_row(name: str, row: dict[str, float]) -> str:
    ratios = f"{row['times_plain']:.2f}", f"{row['times_peer']:.2f}"
    return table_row(
        name,
        f"{1000 * row['seconds']:.0f} ms",
        f"{row['images_per_second']:.1f}",
        *ratios,
        f"{row['peak_mib']:,.0f} MiB",
    )


def codec_row(name: str, row: dict[str, float]) -> str:
    return table_row(
        name,
        f"{row['bits_per_pixel']:.3f}",
        f"{row['psnr']:.2f} dB",
        f"{row['ssim']:.4f}",
        f"{row['lite0_distance']:.4f}",
    )


@on_training
def test_training_speed_is_quoted(page: Path) -> None:
    train, text = result("train"), page.read_text(encoding="utf-8")
    for name, row in train["rows"].items():
        assert train_row(name, row) in text
    assert train["machine"]["processor"] in text
    for name in ("with the cache", "without it"):
        assert quotes(text, f"{train['waiting'][name]['share_waiting']:.1%}")


def test_what_was_claimed_of_training_speed_holds() -> None:
    train = result("train")
    fastest = train["rows"][train["fastest"]]
    assert fastest["times_plain"] >= 1.7
    assert fastest["times_peer"] >= 2
    assert train["waiting"]["with the cache"]["share_waiting"] < 0.05
    assert train["waiting"]["without it"]["share_waiting"] < 0.05


LOCAL = {  # the rows of benchmarks/local.py, in its order
    "en": [
        "GroupNorm",
        "GroupNorm, shortcuts",
        "GroupNorm, crops of 128",
        "RMSNorm",
        "RMSNorm, shortcuts",
        "no norm",
        "no norm, shortcuts",
        "RMSNorm, shortcuts, patch 2",
        "RMSNorm, shortcuts, patch 2, crops of 128",
        "RMSNorm, shortcuts, patch 4",
    ],
    "zh": [
        "GroupNorm",
        "GroupNorm、捷径",
        "GroupNorm、128 像素裁剪",
        "RMSNorm",
        "RMSNorm、捷径",
        "无归一化",
        "无归一化、捷径",
        "RMSNorm、捷径、patch 2",
        "RMSNorm、捷径、patch 2、128 像素裁剪",
        "RMSNorm、捷径、patch 4",
    ],
}


def local_row(name: str, row: dict[str, float]) -> str:
    return table_row(
        name,
        f"{row['psnr_whole']:.2f}",
        f"{row['psnr_in_tiles']:.2f}",
        f"{row['lite0_distance']:.3f}",
        f"{1000 * row['seconds_a_step']:.0f} ms",
        f"{row['images_per_second']:.2f}",
    )


@on_training
def test_local_networks_are_quoted(page: Path) -> None:
    local, text = result("local"), page.read_text(encoding="utf-8")
    for name, row in zip(LOCAL[page.parent.name], local["contenders"].values(), strict=True):
        assert local_row(name, row) in text
    statistics = local["contenders"]["group"]["with local_statistics"]
    assert quotes(text, f"{statistics['psnr_whole']:.2f} dB")
    assert local["machine"]["processor"] in text


def test_what_was_claimed_of_local_networks_holds() -> None:
    contenders = result("local")["contenders"]
    before, chosen = contenders["group"], contenders["rms-shortcuts-patch2"]
    assert chosen["psnr_whole"] >= chosen["psnr_in_tiles"] - 0.1
    assert chosen["psnr_whole"] >= before["psnr_whole"] + 2.4
    assert chosen["seconds_a_step"] < before["seconds_a_step"] / 2


@on_training
def test_the_discriminators_run_is_quoted(page: Path) -> None:
    vqgan, text = result("vqgan"), page.read_text(encoding="utf-8")
    held_out, adversarial = vqgan["held_out"], vqgan["adversarial"]
    for name, row in (
        ("tokens", held_out),
        *((line["codec"], line) for line in held_out["codecs"]),
    ):
        assert codec_row({"WEBP": "WebP"}.get(name, name), row) in text
    assert quotes(text, f"{held_out['training_seconds'] / 60:.0f} ")
    for key in (
        "psnr_before",
        "lowest_psnr_after",
        "mean_of_five_before",
        "lowest_mean_of_five_after",
        "last_psnr",
    ):
        assert quotes(text, f"{adversarial[key]:.2f}"), key
    for key in (
        "lite0_distance_before",
        "last_lite0_distance",
        "gradient_share_in_the_last_quarter",
    ):
        assert quotes(text, f"{adversarial[key]:.3f}"), key
    for value in vqgan["whole_and_in_tiles"].values():
        assert quotes(text, f"{value:.2f} dB")
    assert quotes(text, f"{held_out['usage']:.1%}")
    assert quotes(text, f"{held_out['usage_window']:,}")


def test_what_was_claimed_of_the_discriminator_holds() -> None:
    vqgan = result("vqgan")
    adversarial = vqgan["adversarial"]
    assert adversarial["lowest_mean_of_five_after"] >= adversarial["mean_of_five_before"] - 0.5
    assert adversarial["last_psnr"] >= adversarial["psnr_before"] - 0.5
    assert adversarial["gradient_share_in_the_last_quarter"] >= 0.1
    assert adversarial["last_lite0_distance"] < adversarial["lite0_distance_before"]
    assert vqgan["held_out"]["training_seconds"] <= 30 * 60


STORE = [ROOT / "docs" / language / "token-store.md" for language in ("en", "zh")]
on_store = pytest.mark.parametrize("page", STORE, ids=lambda page: page.parent.name)


def bytes_a_row(store: dict[str, Any], tokens: int) -> float:
    """Measured at 680 tokens a row: what is no token does not depend on their number."""
    return 2 * tokens + (store["writing"]["bytes_per_token"] - 2) * store["tokens_a_row"]


def size_row(store: dict[str, Any], exponent: int) -> str:
    sizes = [10**exponent * bytes_a_row(store, tokens) for tokens in (256, 680, 1024)]
    return table_row(
        f"10^{exponent}",
        *(f"{size / 1e9:,.2f} GB" if size < 1e12 else f"{size / 1e12:,.2f} TB" for size in sizes),
    )


def job_row(row: dict[str, Any]) -> str:
    speeds = [f"{row[key]:.1f}" for key in ("images_per_second", "model_alone", "cores_bound")]
    return table_row(
        row["model"], row["precision"], row["jpeg"], *speeds, f"{row['share_of_bound']:.2f}"
    )


@on_store
def test_sizes_and_speeds_of_the_store_are_quoted(page: Path) -> None:
    store, text = result("store"), page.read_text(encoding="utf-8")
    for exponent in (6, 7, 8, 9):
        assert size_row(store, exponent) in text
    reading, passes = store["reading"], store["passes"]
    appends = store["writing"]["append_4096_rows_ms"]
    metrics = [
        f"{store['writing']['bytes_per_token']:.2f}",
        f"{bytes_a_row(store, 0):.0f} ",
        f"{reading['open_ms']:.1f} ",
        f"{reading['random_batch_of_256_ms']:.1f} ",
        f"{passes['microseconds_a_row']['smalto']:.1f} ",
        f"{passes['times_as_fast_as']['one .npy file a row']:.0f} ",
        f"{passes['times_as_fast_as']['LMDB of pickled rows']:.1f} ",
        f"{appends['first tenth']:.0f} ",
        f"{appends['last tenth']:.0f} ",
        f"{reading['look_up_4096_ids_ms']:.0f} ",
    ]
    bends = {row["fragments"]: row for row in store["many_fragments"]}
    metrics += [f"{bends[number]['commit_ms']:.0f} " for number in (1000, 10_000, 100_000)]
    most = bends[100_000]
    metrics += [
        f"{most['open_ms']:.0f} ",
        f"{most['manifest_mib']:.1f} MiB",
        f"{most['metadata_mib']:.0f} MiB",
    ]
    for metric in metrics:
        assert quotes(text, metric), metric
    assert store["machine"]["processor"] in text


@on_store
def test_the_tokenizing_job_is_quoted(page: Path) -> None:
    job, text = result("tokenization"), page.read_text(encoding="utf-8")
    for row in job["rows"]:
        assert job_row(row) in text
    for peak in job["peak_mib"].values():
        assert quotes(text, f"{peak:,.0f} MiB")
    for share in job["speed_with_batch_1"].values():
        assert quotes(text, f"{share:.2f}")


@on_readmes
def test_the_store_is_quoted(page: Path) -> None:
    store, text = result("store"), page.read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if "benchmarks/store.py" in line]
    faster = store["passes"]["times_as_fast_as"]
    metrics = [
        f"{store['reading']['open_ms']:.1f} ",
        f"{store['reading']['random_batch_of_256_ms']:.1f} ",
    ]
    metrics += [f"{faster['one .npy file a row']:.0f} ", f"{faster['LMDB of pickled rows']:.1f} "]
    metrics += [f"{min(row['share_of_bound'] for row in result('tokenization')['rows']):.2f} "]
    for metric in metrics:
        assert metric in line, metric


def test_what_was_claimed_of_the_store_holds() -> None:
    store = result("store")
    assert store["reading"]["open_ms"] < 200
    assert store["reading"]["random_batch_of_256_ms"] < 10
    assert store["writing"]["bytes_per_token"] <= 2.1
    assert store["passes"]["times_as_fast_as"]["one .npy file a row"] >= 15
    assert store["passes"]["times_as_fast_as"]["LMDB of pickled rows"] >= 2
    job = result("tokenization")
    assert min(row["share_of_bound"] for row in job["rows"]) >= 0.9
    assert job["memory_ratio"] <= 1.05


@pytest.mark.parametrize("page", GENERATION, ids=lambda page: page.parent.name)
def test_the_generator_is_quoted(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    emoji = result("emoji")
    run, shown = emoji["run"], emoji["guidance"]["3"]
    values = [
        f"{run['held_out']['loss']:.3f}",
        f"{run['training']['loss']:.3f}",
        f"{run['below_histogram']:.1%}",
        f"{shown['accuracy']:.1%}",
        f"{emoji['accuracy_of_held_out']:.1%}",
        f"{shown['fid']:.1f}",
        f"{emoji['fid_of_training']:.1f}",
        f"{emoji['num_training']:,}",
    ]
    generate = result("generate")
    values += [f"{generate[name]:.2f}" for name in ("decoding", "decoding_default")]
    values.append(f"{generate['cache']['allocated'] / 2**20:.0f} MiB")
    for seconds in generate["seconds"].values():
        values += [f"{value:.2f}" for value in seconds.values()]
    for value in values:
        assert quotes(text, value), value
