from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastnas.genotype import ChainGenotype, NASBench201Genotype, parse_genotype
from fastnas.nn.chain import Skeleton
from fastnas.nn.counting import count
from fastnas.relaxations import get_relaxation
from fastnas.saliency import Batch, get_score
from fastnas.saliency.freedarts import FreeDarts
from fastnas.saliency.perturbation import perturb
from fastnas.search.candidates import Candidates
from fastnas.spaces import ChainSpace, get_space
from fastnas.tabular import open_table

DATA = Path(__file__).parents[3] / "shared" / "data" / "macro" / "nas_bench_macro_cifar10.csv.gz"
MACRO, PROXYLESS, CIFAR = (get_space(name) for name in ("nb-macro", "proxyless", "proxyless-cifar"))
SKIP = "skip_connect"
TINY = ChainSpace("tiny", ("mb3_3x3", "mb6_5x5", SKIP), Skeleton(4, 1, 0, ((4, 2, 2), (8, 1, 1)), 8), projections=False)


def closed_form(ops):
    """Parameters and multiply-adds of a chain of NAS-Bench-Macro by arithmetic: 32 pixels, 32 channels."""
    C, size = 32, 32
    params, flops = 27 * C + 2 * C, 27 * C * size**2
    for layer, op in enumerate(ops):
        stride = 2 if layer in (0, 2, 5) else 1
        D, to = stride * C, size // stride
        if op == 0 and stride == 2:
            params, flops = params + C * D + 2 * D, flops + C * D * to**2
        elif op:
            M, k = (3 * C, 3) if op == 1 else (6 * C, 5)
            params += C * M + M * k**2 + M * D + 4 * M + 2 * D
            flops += C * M * size**2 + (M * k**2 + M * D) * to**2
        C, size = D, to
    return params + C * 1280 + 2 * 1280 + 1280 * 10 + 10, flops + C * 1280 * size**2 + 1280 * 10


def test_every_chain_of_nas_bench_macro_has_the_published_size():
    if not DATA.exists():
        pytest.skip("the table of NAS-Bench-Macro is not on this machine")
    table = open_table(DATA, "nb-macro")
    assert [genotype.to_text() for genotype in MACRO.all()] == sorted(table.rows)
    sizes = np.array([closed_form([int(digit) for digit in row]) for row in table.rows])
    assert sizes[:, 0].tolist() == table.column("params").tolist()
    assert sizes[:, 1].tolist() == table.column("flops").tolist()


@pytest.mark.parametrize("text", ["00000000", "22222222", "22212202", "10201201", "01120012"])
def test_networks_have_the_size_of_the_closed_form(text):
    genotype = ChainGenotype.from_text(text)
    size = count(MACRO.network(genotype), (3, 32, 32))
    assert (size.parameters, size.multiply_adds) == closed_form([int(digit) for digit in text])


def test_proxyless_has_the_published_skeleton():
    assert PROXYLESS.layers == 21
    assert [place.C_out for place in PROXYLESS.skeleton.places] == [
        *[24] * 4,
        *[40] * 4,
        *[80] * 4,
        *[96] * 4,
        *[192] * 4,
        320,
    ]
    assert [i for i, place in enumerate(PROXYLESS.skeleton.places) if place.stride == 2] == [0, 4, 8, 16]
    allowed = PROXYLESS.allowed["chain"]
    assert allowed[:, :6].all()
    assert [i for i in range(21) if not allowed[i, 6]] == [0, 4, 8, 12, 16, 20]
    with torch.device("meta"):
        net = PROXYLESS.network(PROXYLESS.sample())
        assert net.stem(torch.empty(1, 3, 224, 224)).shape == (1, 16, 112, 112)


# The networks that were found for a phone and for a GPU, with the widths and the number of parameters of the released
# ones: expansion and kernel of each block, 0 for none (pytorchcv, proxylessnas.py).
FOUND = {
    "mobile": (
        "35 33 0 0 37 33 35 35 67 35 35 35 65 35 35 35 67 67 37 37 67",
        (32, 16, (32, 40, 80, 96, 192, 320), 1280),
        4_080_512,
    ),
    "gpu": (
        "35 0 0 0 37 0 0 33 67 0 0 35 65 0 33 35 67 67 67 65 67",
        (40, 24, (32, 56, 112, 128, 256, 432), 1728),
        7_119_848,
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_found_networks_have_the_published_number_of_parameters(name):
    blocks, (stem, first, widths, head), parameters = FOUND[name]
    stages = tuple((C, n, s) for C, (_, n, s) in zip(widths, PROXYLESS.skeleton.stages, strict=True))
    skeleton = replace(PROXYLESS.skeleton, stem=stem, first=first, stages=stages, head=head)
    ops = [SKIP if b == "0" else f"mbconv{b[0]}_{b[1]}x{b[1]}" for b in blocks.split()]
    with torch.device("meta"):
        net = replace(PROXYLESS, skeleton=skeleton).network(ChainGenotype(tuple(ops)), num_classes=1000)
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_reduced_sizes():
    net = CIFAR.supernet(8, num_classes=4, in_channels=1)
    x, g = torch.randn(2, 1, 8, 8), CIFAR.sample(torch.Generator().manual_seed(0))
    assert net(x, CIFAR.encode(g)).shape == (2, 4)
    assert PROXYLESS.network(g, 16).stem[0].out_channels == 16
    small = replace(CIFAR, name="small", skeleton=replace(CIFAR.skeleton, stages=((24, 2, 1), (40, 1, 2))))
    assert small.layers == 3
    assert small.network(small.sample())(torch.randn(2, 3, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("space", [MACRO, PROXYLESS, TINY], ids=lambda s: s.name)
def test_what_is_encoded_is_derived(space):
    generator = torch.Generator().manual_seed(0)
    assert space.edges[:2] == ((1, 0), (2, 1))
    assert len(space.edges) == space.layers
    for _ in range(20):
        genotype = space.sample(generator)
        assert space.derive(space.encode(genotype)) == genotype
        assert parse_genotype(genotype.to_text()) == parse_genotype(genotype.to_json()) == genotype
    alphas = space.init_alphas(torch.Generator().manual_seed(0), scale=0.5)
    assert alphas["chain"].shape == (space.layers, len(space.primitives))
    assert alphas["chain"].requires_grad


def test_nothing_is_derived_that_is_not_allowed():
    table = torch.zeros(3, 3)
    table[:, 2] = 1.0
    assert TINY.derive({"chain": table}).ops == ("mb3_3x3", SKIP, "mb3_3x3")
    table[0, 1] = 0.5
    assert TINY.derive({"chain": table}).ops == ("mb6_5x5", SKIP, "mb3_3x3")
    drawn = Counter(TINY.sample(g).ops for g in [torch.Generator().manual_seed(0)] for _ in range(600))
    assert len(drawn) == 2 * 3 * 2
    assert max(abs(n - 50) for n in drawn.values()) < 28  # 4 standard deviations


@pytest.mark.parametrize("name", ["softmax", "dirichlet", "gumbel_softmax", "gdas", "uniform", "exponentiated"])
def test_relaxations_give_nothing_to_what_is_not_allowed(name):
    candidates = Candidates(TINY.allowed)
    relaxation = get_relaxation(name)
    alphas = {"chain": torch.randn(3, 3, requires_grad=True), "other": torch.randn(2, 4)}
    split = candidates.split(alphas)
    assert {key: tuple(part.shape) for key, part in split.items()} == {
        "chain": (2, 2),
        "chain+1": (1, 3),
        "other": (2, 4),
    }
    generator = torch.Generator().manual_seed(0)
    weights = candidates.join({key: relaxation(part, generator, 0.5) for key, part in split.items()})
    torch.testing.assert_close(weights["chain"].sum(1), torch.ones(3))
    assert torch.all(weights["chain"][~TINY.allowed["chain"]] == 0)
    assert relaxation.single_path == bool((weights["chain"].amax(1) == 1).all())
    assert weights["other"].shape == (2, 4)
    (weights["chain"] * torch.randn(3, 3)).sum().backward()
    assert torch.all(alphas["chain"].grad[~TINY.allowed["chain"]] == 0)
    # in their places: the parts go back where they came from
    whole = candidates.join(candidates.split({"chain": torch.arange(9.0).view(3, 3) + 1}))["chain"]
    assert whole.tolist() == [[1, 2, 0], [4, 5, 6], [7, 8, 0]]


@pytest.mark.parametrize("pruning", ["once", "candidates", "edges"])
@pytest.mark.parametrize("saliency", ["synflow", "snip", "grasp"])
def test_search_without_training(saliency, pruning):
    batch = Batch(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 1]))
    for space, channels in ((TINY, 4), (CIFAR, 4)) if pruning == "once" else ((TINY, 4),):
        found = FreeDarts(space, saliency, pruning=pruning, channels=channels, num_classes=3).search(0, batch)
        assert space.encode(found.genotype)["chain"].sum() == space.layers


@pytest.mark.parametrize("score", ["synflow", "naswot", "snip", "params"])
def test_scores_of_networks(score):
    batch = Batch(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 1]))
    for space in (MACRO, CIFAR):
        net = space.network(space.sample(torch.Generator().manual_seed(1)), 8, num_classes=3)
        assert torch.isfinite(get_score(score)(net, batch))


def test_zero_cost_pt_keeps_what_is_allowed():
    torch.manual_seed(0)
    batch = Batch(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 1]))
    found = perturb(TINY, TINY.supernet(4, num_classes=3), [batch], iterations=3)
    assert all(TINY.encode(genotype)["chain"].sum() == 3 for genotype, _ in found.candidates)


def test_errors():
    with pytest.raises(ValueError, match="k=4: the space 'nb-macro' has no partial channels, set k to 1"):
        MACRO.supernet(k=4)
    with pytest.raises(ValueError, match="layers=5: the space 'nb-macro' has 8, set layers to that"):
        MACRO.supernet(layers=5)
    with pytest.raises(ValueError, match="channels=0 must be at least 1"):
        MACRO.network(ChainGenotype.from_text("0" * 8), 0)
    for genotype in (NASBench201Genotype((SKIP,)), ChainGenotype.from_text("00")):
        with pytest.raises(ValueError, match="genotype is no chain of 8 blocks of the space 'nb-macro'"):
            MACRO.encode(genotype)
    with pytest.raises(
        ValueError, match=r"ops\[2\] is skip_connect, but layer 2 of the space 'tiny' changes the shape"
    ):
        TINY.network(ChainGenotype(("mb3_3x3", SKIP, SKIP)))
    with pytest.raises(ValueError, match=r"scores\['chain'\] has NaN on layer 1"):
        TINY.derive({"chain": torch.tensor([[0.0, 0, 0], [0, torch.nan, 0], [0, 0, 0]])})
    with pytest.raises(ValueError, match="primitives: conv_9x9 unknown: register them"):
        replace(TINY, primitives=("conv_9x9",))
    with pytest.raises(ValueError, match="primitives must be different names, one of them for every layer"):
        replace(TINY, primitives=(SKIP,))
