"""The examples run as their own docstrings say."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def run(path, *arguments, cwd):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "error", str(path), *arguments]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


OTHERS = [path for path in sorted((ROOT / "examples").glob("*.py")) if path.stem != "own_space"]


@pytest.mark.parametrize("path", OTHERS, ids=lambda p: p.stem)
def test_example(path, tmp_path):
    assert run(path, cwd=tmp_path)


def test_own_space_leaves_a_run_folder(tmp_path):
    out = run(ROOT / "examples" / "own_space.py", "--out", "strokes", cwd=tmp_path)
    files = {path.name for path in (tmp_path / "strokes").iterdir()}
    assert {"config.yaml", "metrics.csv", "genotype.txt", "cell.png", "alphas.png", "report.html"} <= files
    genotype = (tmp_path / "strokes" / "genotype.txt").read_text()
    assert genotype in out
    assert genotype.strip() in (tmp_path / "strokes" / "report.html").read_text()


@pytest.fixture(scope="module")
def strokes():
    from fastnas.nn import OPS
    from fastnas.spaces import SPACES

    before = set(OPS), set(SPACES)
    spec = importlib.util.spec_from_file_location("own_space", ROOT / "examples" / "own_space.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["own_space"] = module  # where dataclasses look up its annotations
    spec.loader.exec_module(module)
    yield module.STROKES
    del sys.modules["own_space"]
    for registry, names in zip((OPS, SPACES), before, strict=True):
        for name in set(registry) - names:
            del registry[name]


def test_own_space_derives_what_it_encodes(strokes):
    generator = torch.Generator().manual_seed(0)
    drawn = [strokes.sample(generator) for _ in range(50)]
    assert len(set(drawn)) > 45
    for genotype in drawn:
        assert strokes.derive(strokes.encode(genotype)) == genotype


def test_own_space_leaves_no_node_without_input(strokes):
    scores = torch.zeros(6, 5)
    scores[:, 0] = 1  # none, everywhere
    scores[2, 3] = 0.5  # the best other candidate of the second node
    assert strokes.derive({"cell": scores}).ops == (
        "skip_connect",
        "none",
        "strip_conv_5",
        "skip_connect",
        "none",
        "none",
    )
    with pytest.raises(ValueError, match="edges x primitives"):
        strokes.derive({"cell": scores[:, :4]})
    with pytest.raises(ValueError, match="edges x primitives"):
        strokes.derive({"cell": scores / 0})


def test_own_supernet_computes_what_the_architecture_does(strokes):
    torch.manual_seed(0)
    x = torch.randn(4, 1, 8, 8)
    genotype = strokes.sample(torch.Generator().manual_seed(1))
    supernet = strokes.supernet(4, 2, num_classes=7, in_channels=1)
    network = strokes.network(genotype, 4, 2, num_classes=7, in_channels=1)
    mine = supernet.state_dict()
    theirs = {}
    for name, value in network.state_dict().items():
        head, edge, rest = name.partition(".edges.")
        e, _, inside = rest.partition(".")
        op = strokes.primitives.index(genotype.ops[int(e)]) if edge else 0
        source = f"{head}.edges.{e}._ops.{op}.{inside}" if edge else name
        theirs[name] = mine.get(source, value)  # a scale of 1 and a shift of 0, which the supernet's norms lack
    network.load_state_dict(theirs)
    torch.testing.assert_close(supernet(x, strokes.encode(genotype)), network(x), rtol=1e-4, atol=1e-4)


def test_own_supernet_is_trained_whole(strokes):
    supernet = strokes.supernet(4, 2)
    alphas = strokes.init_alphas(torch.Generator().manual_seed(0))
    logits = supernet(torch.randn(4, 1, 8, 8), {"cell": alphas["cell"].softmax(1)})
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in supernet.parameters())
    assert alphas["cell"].grad.all()
    assert [e for _, e, _ in supernet.mixed_ops()] == [*range(6)] * 2
