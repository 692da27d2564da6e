"""Model files: what was saved comes back, and nothing else is taken for a model."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from fastnas.compat.darts import DARTS_V2, AmoebaNet
from fastnas.genotype import AnyGenotype, ChainGenotype, NASBench201Genotype, OneShotGenotype
from fastnas.inference import build_network, load_model, save_model
from fastnas.inference.model_file import VERSION

NB201 = NASBench201Genotype.from_text(
    "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|avg_pool_3x3~0|nor_conv_1x1~1|nor_conv_3x3~2|"
)
MACRO = ChainGenotype.from_text("22012102")
NB101 = OneShotGenotype(("conv3x3-bn-relu", "maxpool3x3"), ((0,), (0, 1), (1, 2)))


def arguments(space: str, **changes: object) -> dict[str, object]:
    return {"space": space, "channels": 4, "layers": 3, "num_classes": 3, "in_channels": 2, **changes}


def trained(genotype: AnyGenotype, network: dict[str, object], seed: int = 0, **training: object) -> nn.Module:
    """A network whose every parameter and statistic is drawn at random."""
    torch.manual_seed(seed)
    model = build_network(genotype, network, **training)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 2)
            nn.init.normal_(norm.weight, 1, 0.3)
            nn.init.normal_(norm.bias, 0, 0.3)
    return model.eval()


def write(path: Path, model: nn.Module, genotype: AnyGenotype, network: dict[str, object], **changes: object) -> None:
    given = {
        "classes": ["cat", "dog", "owl"],
        "mean": (0.5, 0.25),
        "std": (0.2, 0.1),
        "image_size": 16,
        "metrics": {"test_accuracy": 0.75},
    }
    save_model(path, model, genotype=genotype, network=network, **{**given, **changes})


@pytest.mark.parametrize(
    ("genotype", "network"),
    [
        (DARTS_V2, arguments("darts", stem="cifar")),
        (AmoebaNet, arguments("darts", stem="imagenet")),
        (NB201, arguments("nb201", layers=1)),
        (NB101, arguments("nb101")),
        (MACRO, arguments("nb-macro", layers=8)),
    ],
    ids=["darts", "imagenet", "nb201", "nb101", "nb-macro"],
)
def test_what_was_saved_comes_back(tmp_path: Path, genotype: AnyGenotype, network: dict[str, object]) -> None:
    model = trained(genotype, network)
    write(tmp_path / "model.pt", model, genotype, network)
    loaded = load_model(tmp_path / "model.pt")
    assert (loaded.genotype, loaded.classes, loaded.image_size) == (genotype, ("cat", "dog", "owl"), 16)
    assert (loaded.mean, loaded.std, loaded.metrics) == ((0.5, 0.25), (0.2, 0.1), {"test_accuracy": 0.75})
    assert not loaded.network.training
    images = torch.randint(256, (2, 2, 32, 32), dtype=torch.uint8)
    x = (images / 255 - torch.tensor([0.5, 0.25]).view(2, 1, 1)) / torch.tensor([0.2, 0.1]).view(2, 1, 1)
    with torch.no_grad():
        expected = model(x).softmax(1)
    torch.testing.assert_close(loaded.predict(images), expected)
    assert all(p.requires_grad for p in loaded.network.parameters())  # it can be trained further


def test_the_auxiliary_head_stays_behind(tmp_path: Path) -> None:
    network = arguments("darts")
    model = trained(DARTS_V2, network, auxiliary=True, drop_path=0.2)
    write(tmp_path / "model.pt", model.double(), DARTS_V2, network)
    state = load_model(tmp_path / "model.pt").network.state_dict()
    assert state.keys() == {k for k in model.state_dict() if "auxiliary" not in k}
    assert {t.dtype for t in state.values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ["cat", "dog"]}, "classes has 2 names, the network 3 logits"),
        ({"mean": [0.5]}, "mean has 1 values, the images 2 channels"),
        ({"std": [0.5, 0.0]}, "std must be positive"),
        ({"image_size": 0}, "image_size"),
        ({"metrics": {"loss": torch.zeros(())}}, "metrics .* plain"),
        ({"network": arguments("darts", num_classes=2)}, "classes has 3 names"),
        ({"network": arguments("darts", channels=8)}, "not those of the genotype and network"),
        ({"network": arguments("nb201")}, "genotype is none of the space 'nb201'"),
        ({"network": arguments("resnet")}, "space='resnet': expected one of darts, nb201"),
        ({"network": arguments("darts", channels=4.0)}, "channels not given"),
        ({"network": arguments("darts", width=1)}, "width unknown"),
    ],
)
def test_what_does_not_fit_is_not_written(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    network = arguments("darts")
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "model.pt", trained(DARTS_V2, network), DARTS_V2, **{"network": network, **changes})
    assert list(tmp_path.iterdir()) == []


def test_training_choices_of_other_spaces() -> None:
    with pytest.raises(ValueError, match="choices of the space 'darts'"):
        build_network(NB201, arguments("nb201"), auxiliary=True)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("1/0",)


def damaged(path: Path, kind: str) -> None:
    network = arguments("nb201", layers=1)
    write(path, trained(NB201, network), NB201, network)
    content = torch.load(path, weights_only=True)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "text":
        path.write_text("Genotype(normal=...)")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Evil()))
    elif kind == "code":
        torch.save({**content, "metrics": Evil()}, path)
    elif kind == "weights":
        torch.save(content["state"], path)
    elif kind == "search":
        torch.save({"format": "fastnas search checkpoint", "version": 2, "state": {}}, path)
    elif kind == "newer":
        torch.save({**content, "version": VERSION + 1, "fastnas": "9.0"}, path)
    elif kind == "classes":
        torch.save({**content, "classes": ["cat"]}, path)
    elif kind == "lacks":
        content.pop("mean")
        torch.save(content, path)
    elif kind == "huge":
        torch.save({**content, "network": arguments("nb201", layers=1, channels=10**6)}, path)
    else:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a", "b")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", "damaged or is no model"),
        ("text", "damaged or is no model.*give the model.pt"),
        ("pickle", "damaged or is no model"),
        ("code", "damaged or is no model"),
        ("zip", "damaged or is no model"),
        ("weights", "is no model of fastnas"),
        ("search", "is a fastnas search checkpoint, not a trained model; give the model.pt"),
        ("newer", "model version 2, written by fastnas 9.0.*update"),
        ("classes", "classes has 1 names, the network 3 logits"),
        ("lacks", "no complete model.*mean"),
        ("huge", "not those of the genotype and network"),
    ],
)
def test_what_is_no_model(tmp_path: Path, kind: str, message: str) -> None:
    path = tmp_path / "model.pt"
    damaged(path, kind)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        load_model(tmp_path / "none.pt")


@pytest.mark.parametrize("images", [torch.zeros(1, 2, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)])
def test_images_that_do_not_fit(tmp_path: Path, images: torch.Tensor) -> None:
    network = arguments("nb201", layers=1)
    write(tmp_path / "m.pt", trained(NB201, network), NB201, network)
    with pytest.raises(ValueError, match=r"expected torch.uint8 \(N, 2, H, W\)"):
        load_model(tmp_path / "m.pt").predict(images)
