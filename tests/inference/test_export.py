"""Exported networks give the model's logits in the programs that read them."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_model_file import NB201, arguments, trained, write

from fastnas.compat.darts import NASNet
from fastnas.genotype import AnyGenotype, Genotype
from fastnas.inference import TrainedModel, export, export_onnx, export_program, load_model, save_model

DARTS = Genotype(  # every kind of operation, and edges of both strides
    normal=[("sep_conv_3x3", 0), ("max_pool_3x3", 1), ("dil_conv_5x5", 2), ("skip_connect", 0)],
    normal_concat=range(2, 4),
    reduce=[("skip_connect", 0), ("avg_pool_3x3", 1), ("sep_conv_5x5", 1), ("skip_connect", 2)],
    reduce_concat=range(2, 4),
)
NASNET = Genotype(  # the kinds of the NASNet space that the others lack
    normal=[("sep_conv_7x7", 0), ("conv_7x1_1x7", 1)],
    normal_concat=[2],
    reduce=[("sep_conv_7x7", 1), ("conv_7x1_1x7", 0)],
    reduce_concat=[2],
)
assert {op for op, _ in NASNet.normal + NASNet.reduce} & {"sep_conv_7x7"}


def model(path: Path, genotype: AnyGenotype = NB201, network: dict[str, object] | None = None) -> TrainedModel:
    network = network or arguments("nb201", layers=1)
    write(path / "model.pt", trained(genotype, network), genotype, network)
    return load_model(path)


NETWORKS = [(DARTS, arguments("darts", layers=2)), (NASNET, arguments("darts", layers=1)), (NB201, None)]


@pytest.mark.parametrize(("genotype", "network"), NETWORKS, ids=["darts", "nasnet", "nb201"])
def test_onnx(tmp_path: Path, genotype: AnyGenotype, network: dict[str, object] | None) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    own = model(tmp_path, genotype, network)
    assert export_onnx(tmp_path / "model.pt", tmp_path / "model.onnx") < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for n in (1, 3):
        images = torch.randint(256, (n, 2, 16, 16), dtype=torch.uint8)
        (logits,) = session.run(["logits"], {"images": own.normalise(images).numpy()})
        torch.testing.assert_close(torch.from_numpy(logits).softmax(1), own.predict(images), rtol=1e-4, atol=1e-5)
    facts = session.get_modelmeta().custom_metadata_map
    assert facts["genotype"] == genotype.to_text()
    assert json.loads(facts["classes"]) == ["cat", "dog", "owl"]
    assert (json.loads(facts["mean"]), json.loads(facts["std"])) == ([0.5, 0.25], [0.2, 0.1])
    assert {p.name for p in tmp_path.iterdir()} == {"model.pt", "model.onnx"}


def test_a_program_runs_with_torch_alone(tmp_path: Path) -> None:
    own = model(tmp_path, DARTS, arguments("darts", layers=2))
    assert export_program(own, tmp_path / "model.pt2") < 1e-5
    x = torch.randn(3, 2, 16, 16)
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, json, torch\nfacts = {'fastnas.json': ''}\n"
        "program = torch.export.load('model.pt2', extra_files=facts)\n"
        "torch.save(program.module()(torch.load('x.pt')), 'y.pt')\n"
        "print(json.loads(facts['fastnas.json'])['classes'], 'fastnas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == '["cat", "dog", "owl"] False'
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "y.pt").detach(), own.network(x), rtol=1e-4, atol=1e-5)


def test_nothing_is_written_where_the_logits_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = model(tmp_path)
    program = export._program

    def other(network: torch.nn.Module, images: torch.Tensor) -> torch.export.ExportedProgram:
        exported = program(copy.deepcopy(network), images)  # which shares its parameters
        with torch.no_grad():
            network.classifier.bias += 0.01
        return exported

    monkeypatch.setattr(export, "_program", other)
    with pytest.raises(ValueError, match=r"logits differ from the model's by 1\.0e-02: not written"):
        export_program(own, tmp_path / "model.pt2")
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"pip install 'fastnas\[onnx\]'"):
        export_onnx(model(tmp_path), tmp_path / "model.onnx")


def test_a_network_that_cannot_take_its_images(tmp_path: Path) -> None:
    network = arguments("nb201", layers=1)
    given = {"classes": "abc", "mean": (0, 0), "std": (1, 1), "image_size": 10, "metrics": {}}
    save_model(tmp_path / "model.pt", trained(NB201, network), genotype=NB201, network=network, **given)
    with pytest.raises(ValueError, match="multiples of 4"):
        export_program(tmp_path, tmp_path / "model.pt2")
