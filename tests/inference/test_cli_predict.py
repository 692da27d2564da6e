"""``fastnas predict`` and ``fastnas export`` as they are typed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_model_file import NB201, arguments, trained, write

from fastnas.cli import main
from fastnas.inference import load_model, read_image, save_model


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A folder with a model of 3 channels and 16x16 images, and a folder of images."""
    network = arguments("nb201", layers=1, in_channels=3)
    fits = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)}
    write(tmp_path / "model.pt", trained(NB201, network), NB201, network, **fits)
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for name, mode, shape in (("b.png", "RGB", (20, 40, 3)), ("a.jpg", "L", (16, 16)), ("c[x].png", "RGBA", (9, 5, 4))):
        Image.fromarray(rng.integers(256, size=shape, dtype=np.uint8)).convert(mode).save(tmp_path / "images" / name)
    for name in ("notes.txt", "._b.png"):
        (tmp_path / "images" / name).write_text("no image")
    return tmp_path


def test_one_image(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_folder / "images" / "b.png"
    assert main(["predict", str(path), "--checkpoint", str(run_folder), "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    model = load_model(run_folder / "model.pt")
    p = model.predict(read_image(path, 3, 16)[None])[0]
    best = sorted(zip(p.tolist(), model.classes, strict=True), reverse=True)[:2]
    assert [line.split() for line in lines] == [[name, f"{v:.2%}"] for v, name in best]


def test_a_folder_as_json_and_as_a_table(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder / "images"
    assert main(["predict", str(folder), "--checkpoint", str(run_folder / "model.pt"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [Path(r["image"]).name for r in rows] == ["a.jpg", "b.png", "c[x].png"]
    for row in rows:
        values = [c["probability"] for c in row["classes"]]
        assert values == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(1, abs=1e-5)
    assert main(["predict", str(folder), "--checkpoint", str(run_folder), "--top", "1"]) == 0
    out = capsys.readouterr().out
    assert all(f"{Path(r['image']).name}" in out and r["classes"][0]["name"] in out for r in rows)


def test_what_cannot_be_read_does_not_stop_the_others(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = run_folder / "bad.png"
    whole = (run_folder / "images" / "b.png").read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    text = run_folder / "images" / "notes.txt"
    names = [bad, run_folder / "none.png", text, run_folder / "images" / "b.png"]
    assert main(["predict", *map(str, names), "--checkpoint", str(run_folder), "--json"]) == 2
    captured = capsys.readouterr()
    errors = captured.err.splitlines()
    assert [json.loads(captured.out)[0]["image"]] == [str(names[-1])]
    assert len(errors) == 3
    assert f"{bad} holds no image that can be read" in errors[0]
    assert f"{names[1]}: No such file" in errors[1]
    assert f"{text} holds no image" in errors[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "{}/genotype.json"], "is damaged or is no model of fastnas .*; give the model.pt"),
        (
            ["--checkpoint", "{}/checkpoint.pt"],
            "is a fastnas search checkpoint, not a trained model; give",
        ),
        (["--checkpoint", "{}/none.pt"], "none.pt: No such file"),
        (["--checkpoint", "{}/empty"], "empty/model.pt: No such file"),
        (["{}/empty", "--checkpoint", "{}"], "no image in the folder"),
        (["--checkpoint", "{}", "--device", "tpu9"], "device='tpu9' is no device; use cpu"),
        (["--checkpoint", "{}", "--top", "0"], "top=0: expected a whole number above 0"),
        ([], "checkpoint"),
    ],
)
def test_wrong_arguments(
    run_folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    NB201.save(run_folder / "genotype.json")
    torch.save({"format": "fastnas search checkpoint", "version": 2, "state": {}}, run_folder / "checkpoint.pt")
    (run_folder / "empty").mkdir()
    arguments = [a.format(run_folder) for a in arguments]
    arguments = arguments if message.startswith("no image") else [str(run_folder / "images" / "b.png"), *arguments]
    assert main(["predict", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert re.search(message, captured.err), captured.err


def test_a_model_of_more_channels(tmp_path: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = arguments("nb201", layers=1)
    write(tmp_path / "two.pt", trained(NB201, network), NB201, network)
    assert main(["predict", str(run_folder / "images" / "b.png"), "--checkpoint", str(tmp_path / "two.pt")]) == 2
    assert "images of 2 channels" in capsys.readouterr().err


def test_export(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run_folder), "--to", "pt2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{run_folder / 'model.pt2'} (")
    assert "images (N, 3, 16, 16)" in out
    assert (run_folder / "model.pt2").exists()
    assert main(["export", str(run_folder), "--to", "tflite"]) == 2


def test_images_are_cropped_to_the_middle(tmp_path: Path) -> None:
    pixels = np.zeros((8, 24), np.uint8)
    pixels[:, 8:16] = 200
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert torch.equal(read_image(tmp_path / "wide.png", 1, 8), torch.full((1, 8, 8), 200, dtype=torch.uint8))
    assert read_image(tmp_path / "wide.png", 3, 4).shape == (3, 4, 4)
    deep = np.full((4, 4), 200 * 256, np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert torch.equal(read_image(tmp_path / "deep.png", 1, 4), torch.full((1, 4, 4), 200, dtype=torch.uint8))


def test_grey_models(tmp_path: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = arguments("nb201", layers=1, in_channels=1)
    model = trained(NB201, network)
    given = {"classes": "abc", "mean": (0.5,), "std": (0.5,), "image_size": 8, "metrics": {}}
    save_model(tmp_path / "grey.pt", model, genotype=NB201, network=network, **given)
    assert main(["predict", str(run_folder / "images"), "--checkpoint", str(tmp_path / "grey.pt")]) == 0
    assert "c[x].png" in capsys.readouterr().out
