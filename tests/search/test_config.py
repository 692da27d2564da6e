import dataclasses

import pytest
import yaml

from fastnas.search import METHODS, Method, SearchConfig, register_method
from fastnas.search.config import GROUPS
from fastnas.search.run import RunFolder


def test_open_options_take_the_preset_of_the_data():
    digits, cifar = SearchConfig(), SearchConfig(data="cifar10")
    assert (digits.flip, cifar.flip) == (False, True)
    # The published search: arXiv:1806.09055, section 3.1 and A.1.1.
    published = {
        "channels": 16,
        "layers": 8,
        "train_portion": 0.5,
        "batch_size": 64,
        "epochs": 50,
        "lr": 0.025,
        "lr_min": 0.001,
        "momentum": 0.9,
        "weight_decay": 3e-4,
        "clip": 5,
        "alpha_lr": 3e-4,
        "alpha_betas": (0.5, 0.999),
        "alpha_weight_decay": 1e-3,
        "pad": 4,
        "cutout": 0,
        "k": 1,
        "relaxation": "softmax",
        "alpha_scale": 1e-3,
        "alpha_warmup": 0,
    }
    assert {name: getattr(cifar, name) for name in published} == published
    assert SearchConfig(data="cifar100").to_dict() == {**cifar.to_dict(), "data": "cifar100"}


def test_given_options_win_over_the_preset():
    config = SearchConfig(data="cifar10", lr=0.3, flip=False, alpha_warmup=15)
    assert (config.lr, config.flip, config.alpha_warmup) == (0.3, False, 15)
    assert config.epochs == 50
    assert SearchConfig(lr=None) == SearchConfig()


def test_an_instance_has_no_open_values():
    may_stay_open = {"root", "table"}
    for data in ("digits", "cifar10", "cifar100", "npz"):
        options = SearchConfig(data=data).to_dict()
        assert {name for name, value in options.items() if value is None} <= may_stay_open
        assert options["device"] != "auto"


def test_groups_hold_every_option_once():
    names = [field.name for group in GROUPS for field in dataclasses.fields(group)]
    assert sorted(names) == sorted(field.name for field in dataclasses.fields(SearchConfig))
    for group in GROUPS:
        for field in dataclasses.fields(group):
            assert f"\n        {field.name}: " in group.__doc__, f"--{field.name} has no help"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs=0 with select=derive"),
        ({"epochs": 1.5}, TypeError, "epochs=1.5: expected a whole number"),
        ({"epochs": True}, TypeError, "epochs=True: expected a whole number"),
        ({"lr": "big"}, TypeError, "lr='big': expected a number"),
        ({"lr": float("nan")}, ValueError, "lr=nan"),
        ({"lr": -1.0}, ValueError, "lr=-1.0: expected a number above 0"),
        ({"lr": 0.01, "lr_min": 0.1}, ValueError, "lower lr_min"),
        ({"k": 3}, ValueError, "k=3 does not divide channels=16"),
        ({"layers": 0}, ValueError, "layers=0: expected a whole number of at least 1"),
        ({"train_portion": 1.0}, ValueError, "train_portion=1.0: expected a part between 0 and 1"),
        ({"momentum": 1.0}, ValueError, "momentum"),
        ({"alpha_betas": (0.5,)}, ValueError, r"alpha_betas=\(0.5,\): expected two numbers"),
        ({"alpha_betas": 0.5}, TypeError, "alpha_betas=0.5: expected two numbers"),
        ({"alpha_warmup": 50, "epochs": 50}, ValueError, "the alphas would never move"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"threads": -1}, ValueError, "threads=-1"),
        ({"flip": 1}, TypeError, "flip=1: expected true or false"),
        ({"amp": "fp16"}, ValueError, "amp='fp16': expected one of none, bf16"),
        ({"cuda_graphs": True, "device": "cpu"}, ValueError, "cuda_graphs=True with device=cpu: only a GPU has them"),
        ({"amp": True}, TypeError, "amp=True: expected text"),
        ({"method": "magic"}, ValueError, "method 'magic' is unknown: expected one of darts"),
        ({"data": "mnist"}, ValueError, "mnist.*choose one of digits"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        SearchConfig(**options)


def test_cuda_graphs_are_an_option_of_a_gpu():
    config = SearchConfig(device="cuda:1", cuda_graphs=True)
    assert SearchConfig.from_dict(yaml.safe_load(RunFolder.dump(config.to_dict()))) == config
    assert not SearchConfig(device="cuda:1").cuda_graphs


def test_unknown_option():
    with pytest.raises(ValueError, match="unknown option 'learning_rate'"):
        SearchConfig.from_dict({"learning_rate": 1})


def test_yaml_round_trip():
    config = SearchConfig(data="cifar10", root="/somewhere: else", lr=1e-5, lr_min=0.0, alpha_betas=(0.9, 0.99), seed=7)
    config = dataclasses.replace(config, amp="bf16")
    text = RunFolder.dump(config.to_dict())
    assert SearchConfig.from_dict(yaml.safe_load(text)) == config
    assert text.startswith("# A search of fastnas")


def test_a_method_is_a_preset():
    method = Method("frozen-k", "for this test", {"k": 2}, {"nb201": {"k": 1}})
    register_method(method)
    try:
        assert SearchConfig(method="frozen-k").k == 2
        assert SearchConfig(method="frozen-k", space="nb201").k == 1
        assert SearchConfig(method="frozen-k", k=4).k == 4
        with pytest.raises(ValueError, match="already registered"):
            register_method(method)
    finally:
        del METHODS["frozen-k"]
