import copy
import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from fastnas.data import normalize
from fastnas.nn import MixedOp
from fastnas.search import METHODS, CheckpointError, Search, SearchConfig
from fastnas.search.config import Stage
from fastnas.spaces import get_space


def _config(method="darts", space="darts", **options):
    sizes = {"channels": 4, "layers": 1 if space == "nb201" else 3, "batch_size": 16, "device": "cpu", "pad": 0}
    if method == "drnas-progressive":
        options.setdefault("stages", [[4, 0, 2, 1], [2, 3, 2, 1]])
    elif method != "random":
        options = {"epochs": 2, **options}
    if "pc-darts" in method:
        options.setdefault("alpha_warmup", 1)
    if METHODS[method].values.get("select") == "evaluate":
        options.setdefault("candidates", 3)
    return SearchConfig(method=method, space=space, **{**sizes, **options})


def _bits(search):
    state = search.state_dict()
    tensors = [*state["supernet"].values(), *state["alphas"].values(), *search.weights[-1].values()]
    for name in ("weight_optimizer", "alpha_optimizer"):
        for slot in state[name]["state"].values():
            tensors += [v for v in slot.values() if isinstance(v, torch.Tensor)]
    return tensors


def _same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _numbers(search):
    rows = [dataclasses.asdict(r) for r in search.history]
    return [{k: repr(v) for k, v in r.items() if k not in ("seconds", "peak_memory")} for r in rows]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_has_its_page(method):
    docs = Path(__file__).parents[2] / "docs"
    assert f"methods/{method}.md" in (docs / "methods.md").read_text()
    assert f"fastnas search --method {method}" in (docs / "methods" / f"{method}.md").read_text()


@pytest.mark.parametrize("space", ["darts", "nb201", "nb1shot1-s2"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_searches(method, space, images):
    config = _config(method, space, layers=3 if space != "nb201" else 1)
    if space == "nb1shot1-s2" and (config.k > 1 or config.relaxation == "gdas"):
        # it has neither partial channels nor edges with candidates
        with pytest.raises(ValueError, match=r"set (stages|edge_normalization|relaxation) to"):
            Search(config, data=images)
        return
    search = Search(config, data=images)
    before = {name: alpha.detach().clone() for name, alpha in search.alphas.items()}
    weight = next(search.supernet.parameters()).detach().clone()
    result = search.run()
    assert result.finished
    assert len(result.history) == config.epochs
    space_ = get_space(space)
    encoded = space_.encode(result.genotype)
    assert {name: t.shape for name, t in encoded.items()} == {name: a.shape for name, a in before.items()}
    for record in result.history:
        assert math.isfinite(record.train_loss)
        assert 0 <= record.valid_accuracy <= 1
        assert 0 <= record.measures["discrete/accuracy"] <= 1
        assert type(result.genotype).from_text(record.genotype)
    moved = any(not torch.equal(before[name], alpha) for name, alpha in search.alphas.items())
    assert moved == (config.order > 0)
    assert torch.equal(weight, next(search.supernet.parameters())) == (config.epochs == 0)


@pytest.mark.parametrize(
    ("method", "space"),
    [
        *((method, "nb201") for method in sorted(METHODS.keys() - {"random"})),
        *((method, "darts") for method in ("darts-2nd", "drnas-progressive", "gdas", "pc-darts")),
    ],
)
def test_stopped_and_resumed_it_goes_on_with_the_same_bits(method, space, images):
    """Stopped in an epoch's middle, in every stage, with its state handed to a fresh search."""
    options = {"skip_dropout": 0.3} if method == "drnas-progressive" else {}
    config = _config(method, space, **options)
    whole = Search(config, data=images)
    whole.run()
    steps = 0
    search = Search(config, data=images)

    def stop(running):
        nonlocal steps
        steps += 1
        if steps % 3 == 1:
            running.stop()

    while search.epoch < config.epochs:
        search.run(on_step=stop)
        state = copy.deepcopy(search.state_dict())
        search = Search(config, data=images)
        search.load_state_dict(state)
    assert steps > 3
    assert _same(_bits(search), _bits(whole))
    assert _numbers(search) == _numbers(whole)
    assert search.genotype() == whole.genotype()


def test_chance_outside_has_no_part_in_it(images):
    """Global generators are neither read nor moved, so that two searches in one process are what they are alone."""
    config = _config("drnas", "nb201", skip_dropout=0.5)
    torch.manual_seed(1)
    first = Search(config, data=images)
    first.run()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = Search(config, data=images)
    second.run()
    assert torch.equal(torch.get_rng_state(), before)
    assert _same(_bits(first), _bits(second))
    assert not _same(_bits(first), _bits(_run(dataclasses.replace(config, seed=1), images)))


def _run(config, images, **callbacks):
    search = Search(config, data=images)
    search.run(**callbacks)
    return search


class TestStages:
    config = _config("drnas-progressive", "nb201", stages=[[4, 0, 2, 1], [2, 3, 2, 1], [1, 2, 1, 0]])

    def test_schedule(self):
        assert self.config.schedule == (Stage(4, 0, 2, 1), Stage(2, 3, 2, 1), Stage(1, 2, 1, 0))
        assert (self.config.k, self.config.epochs, self.config.alpha_warmup) == (4, 5, 1)
        assert SearchConfig().schedule == (Stage(1, 0, 8, 0),)

    def test_edges_lose_their_worst_operations_and_channels_are_added(self, images):
        seen = []
        search = _run(self.config, images, on_epoch=lambda s, r: seen.append((r.stage, r.k, s.stage, dict(s.kept))))
        assert [s[:3] for s in seen] == [(1, 4, 0), (1, 4, 1), (2, 2, 1), (2, 2, 2), (3, 1, 2)]
        assert seen[0][3] == {}
        first, second = seen[1][3]["cell"], seen[3][3]["cell"]
        assert (first.shape, second.shape) == ((6, 3), (6, 2))
        expected = search.weights[2]["cell"].topk(3, dim=1).indices.sort(dim=1).values
        assert torch.equal(first, expected)
        assert all(set(b.tolist()) < set(a.tolist()) for a, b in zip(first, second, strict=True))
        for _, edge, op in search.supernet.mixed_ops():
            assert op.k == 1
            alive = {i for i, candidate in enumerate(op._ops) if any(True for _ in candidate.parameters())}
            assert alive == {2, 3} & set(second[edge].tolist())
        weights = search.weights[-1]["cell"]
        assert torch.equal((weights > 0).nonzero()[:, 1].view(6, 2), second)
        torch.testing.assert_close(weights.sum(1), torch.ones(6))
        chosen = [search.space.primitives.index(op) for op in search.genotype().ops]
        assert all(o in row.tolist() for o, row in zip(chosen, second, strict=True))

    def test_alphas_rest_at_the_start_of_every_stage(self, images):
        alphas = []
        _run(self.config, images, on_epoch=lambda s, r: alphas.append(s.alphas["cell"].detach().clone()))
        moved = [not torch.equal(a, b) for a, b in itertools.pairwise(alphas)]
        assert moved == [True, False, True, True]

    def test_momentum_goes_along_and_the_learning_rate_falls_on(self, images):
        config = _config("drnas-progressive", "nb201", stages=[[2, 0, 1, 0], [1, 5, 1, 0]])
        search = Search(config, data=images)
        search._run_epoch(None)
        old = {
            name: (p.detach().clone(), search._weight_optimizer.state[p]["momentum_buffer"].clone())
            for name, p in search.supernet.named_parameters()
        }
        search._end_epoch()
        assert search.stage == 1
        widened = 0
        for name, p in search.supernet.named_parameters():
            weight, momentum = old[name]
            now = search._weight_optimizer.state[p]["momentum_buffer"]
            assert p in set(search._weight_optimizer.param_groups[0]["params"])
            corner = tuple(slice(n) for n in weight.shape)
            assert torch.equal(p[corner], weight)
            assert torch.equal(now[corner], momentum)
            if p.shape != weight.shape:
                widened += 1
                # each further filter is one of the old, and so is its momentum: the same one
                for j in range(len(weight), len(p)):
                    copies = [i for i in range(len(weight)) if torch.equal(p[j], p[i])]
                    assert any(torch.equal(now[j], now[i]) for i in copies)
        assert widened > 10
        search.run()
        lrs = [r.lr for r in search.history]
        assert lrs == pytest.approx([config.lr, (config.lr + config.lr_min) / 2])

    def test_bad_stages(self):
        for stages, message in [
            ([[4, 5, 2]], "expected a list of stages"),
            ([[4, 5, 0, 0]], "expected a list of stages"),
            ([[4, 5, 2, 2]], "warm-up=2 with epochs=2"),
            ([[3, 5, 2, 0]], "k=3 does not divide channels=4"),
            ([[2, 0, 1, 0], [4, 3, 1, 0]], "can grow"),
            ([[2, 3, 1, 0], [1, 4, 1, 0]], "can grow"),
        ]:
            with pytest.raises(ValueError, match=message):
                _config("drnas-progressive", "nb201", stages=stages)
        with pytest.raises(ValueError, match="epochs=7 with stages="):
            SearchConfig(method="drnas-progressive", space="nb201", epochs=7)

    def test_the_first_stage_has_everything(self, images):
        for stages, message in [
            ([[2, 3, 1, 0]], "stage 1 has 3 of 5"),
            ([[2, 0, 1, 0], [1, 8, 1, 0]], "stage 2 has 8 of 5"),
            ([[2, 0, 1, 0], [1, 1, 1, 0]], "one operation may be none"),
        ]:
            with pytest.raises(ValueError, match=message):
                Search(_config("drnas-progressive", "nb201", stages=stages), data=images)

    def test_perturbation_leaves_pruned_operations_out(self, images):
        config = _config("sdarts-rs", "nb201", stages=[[2, 0, 1, 0], [1, 2, 1, 0]], perturbation_radius=(0.3, 0.3))
        search = _run(config, images)
        batch = torch.randn(16, 1, 8, 8), torch.zeros(16, dtype=torch.int64)
        for kind in ("random", "adversarial"):
            search.config = dataclasses.replace(config, perturbation=kind)
            weights = search._perturbed(search._arguments(), *batch)["cell"]
            assert torch.equal((weights > 0).sum(1) <= 2, torch.ones(6, dtype=torch.bool))
            torch.testing.assert_close(weights.gather(1, search.kept["cell"]).sum(1), torch.ones(6))

    def test_a_state_of_an_earlier_stage_is_refused(self, images):
        search = Search(self.config, data=images)
        early = copy.deepcopy(search.state_dict())
        search.run()
        with pytest.raises(CheckpointError, match="of stage 1, this search is in stage 3"):
            search.load_state_dict(early)


def test_edges_are_chosen_by_alpha_times_beta(images):
    search = Search(_config("pc-darts"), data=images)
    with torch.no_grad():
        for name, alpha in search.alphas.items():
            alpha.zero_()
            alpha[:, 4] = 1.0  # every edge: sep_conv_3x3
            search._edge_alphas[name].zero_()
            search._edge_alphas[name][[0, 3, 4, 6, 7]] = 1.0
    kept = [j for _, j in search.genotype().normal]
    # nodes 2 and 5 are ties but for edge 0; node 3 keeps edges 3, 4 (from 1, 2), node 4 its edges 6, 7 (from 1, 2)
    assert kept == [0, 1, 1, 2, 1, 2, 0, 1]
    weights = torch.cat(list(search._edge_weights().values()))
    sums = [part.sum() for cell in weights.view(2, 14) for part in cell.split([2, 3, 4, 5])]
    torch.testing.assert_close(torch.stack(sums), torch.ones(8))


def test_betas_learn_beside_the_alphas(images):
    search = Search(_config("pc-darts", "nb201"), data=images)
    before = {name: beta.detach().clone() for name, beta in search._edge_alphas.items()}
    search.run()
    assert all(not torch.equal(before[name], beta) for name, beta in search._edge_alphas.items())


@pytest.mark.parametrize("alpha_first", [True, False])
def test_order_of_a_step(images, alpha_first):
    search = Search(_config(epochs=1, alpha_first=alpha_first), data=images)
    steps = []
    alphas, weights = search._alpha_step, search._weight_step
    search._alpha_step = lambda *batch: (steps.append("alphas"), alphas(*batch))
    search._weight_step = lambda *batch: (steps.append("weights"), weights(*batch))
    search.run()
    assert steps[:2] == (["alphas", "weights"] if alpha_first else ["weights", "alphas"])


def test_exponentiated_gradient_multiplies_the_weights(images):
    """One step of GAEA against its formula."""
    search = Search(_config("gaea", "nb201", epochs=1), data=images)
    before, gradients = search.mean_weights()["cell"].double(), []
    step = search._alpha_optimizer.step

    def spy():
        gradients.append(search.alphas["cell"].grad.double().clone())
        step()

    search._alpha_optimizer.step = spy
    search.run(on_step=lambda s: s.stop())
    expected = before * torch.exp(-search.config.alpha_lr * gradients[0])
    expected /= expected.sum(1, keepdim=True)
    torch.testing.assert_close(search.mean_weights()["cell"].double(), expected, rtol=1e-5, atol=0)


def test_temperature_falls_in_a_line(images):
    search = Search(_config("gdas", "nb201", epochs=3, temperature=(10.0, 0.1)), data=images)
    seen = []
    search.run(on_step=lambda s: seen.append(s._temperature()))
    assert seen == pytest.approx([10, 10, 5.05, 5.05, 0.1, 0.1])


@pytest.mark.parametrize("kind", ["random", "adversarial"])
def test_perturbed_weights_train_the_network(images, kind):
    config = _config("darts", "nb201", epochs=1, perturbation=kind, perturbation_radius=(0.2, 0.2))
    search = Search(config, data=images)
    seen = []
    logits = search._logits

    def spy(pixels, arguments):
        if torch.is_grad_enabled() and not arguments["weights"]["cell"].requires_grad:
            seen.append(arguments["weights"]["cell"].clone())
        return logits(pixels, arguments)

    search._logits = spy
    search.run(on_step=lambda s: s.stop())
    mean = search.mean_weights()["cell"]
    used = seen[-1]
    assert not torch.equal(used, mean)
    assert (used >= 0).all()
    torch.testing.assert_close(used.sum(1), torch.ones(6))
    assert used.std() > 0.02


def test_accumulated_gradients_are_the_mean_of_the_parts(images):
    """A step on a batch in two parts against the two parts by hand."""
    config = _config("darts", "nb201", epochs=1, batch_size=32, clip=0.0, momentum=0.0, weight_decay=0.0)
    search = Search(dataclasses.replace(config, accumulate=2, nesterov=False), data=images)
    twin = Search(dataclasses.replace(config, nesterov=False), data=images)
    batches = []
    step = search._weight_step
    search._weight_step = lambda *batch: (batches.append(batch), step(*batch))
    search.run(on_step=lambda s: s.stop())
    pixels, labels = batches[0]
    twin.supernet.train()
    weights = twin.mean_weights()
    loss = sum(
        F.cross_entropy(twin.supernet(part, weights), answers)
        for part, answers in zip(pixels.chunk(2), labels.chunk(2), strict=True)
    )
    (loss / 2).backward()
    for a, b in zip(search.supernet.parameters(), twin.supernet.parameters(), strict=True):
        torch.testing.assert_close(a, b - config.lr * b.grad, rtol=1e-4, atol=1e-6)


def test_accumulated_gradient_of_the_alphas(images):
    config = _config("drnas", "nb201", epochs=1, batch_size=32, alpha_optimizer="sgd", alpha_lr=1.0, regularizer="none")
    parts = Search(dataclasses.replace(config, accumulate=2), data=images)
    batches = []
    step = parts._alpha_step
    parts._alpha_step = lambda *batch: (batches.append(batch), step(*batch))
    start = parts.alphas["cell"].detach().clone()
    parts.run(on_step=lambda s: s.stop())
    moved = start - parts.alphas["cell"].detach()
    # as they were before the step of the weights, and one draw of the mixed operations' weights for both parts
    fresh = Search(config, data=images)
    fresh.supernet.train()
    weights = {"cell": fresh.relaxation(fresh.alphas["cell"], fresh._chance.generator)}
    *_, pixels, labels = batches[0]
    loss = sum(
        F.cross_entropy(fresh.supernet(part, weights), answers)
        for part, answers in zip(pixels.chunk(2), labels.chunk(2), strict=True)
    )
    (gradient,) = torch.autograd.grad(loss / 2, fresh.alphas["cell"])
    torch.testing.assert_close(moved, gradient, rtol=1e-3, atol=1e-6)


def test_random_search_with_weight_sharing_keeps_the_best(images):
    search = _run(_config("random-ws", "nb201", candidates=6), images)
    candidates = list(itertools.islice(search._random_architectures(), 6))
    accuracies = [search.evaluate(genotype)[1] for genotype in candidates]
    assert search.genotype() == candidates[accuracies.index(max(accuracies))]
    assert len(set(accuracies)) > 1


def test_an_architecture_is_evaluated_by_its_own_path(images):
    search = _run(_config("darts", "nb201", epochs=1), images)
    buffers = [b.clone() for b in search.supernet.buffers()]
    genotype = search.space.sample(torch.Generator().manual_seed(3))
    loss, accuracy = search.evaluate(genotype)
    assert _same(buffers, list(search.supernet.buffers()))
    assert search.supernet.training
    weights = search.space.encode(genotype)
    total = correct = 0.0
    for part in search.parts[1].split(search.config.batch_size):
        pixels = normalize(images.images[part], images.mean, images.std)
        with torch.no_grad():
            logits = search.supernet(pixels, weights)
        total += F.cross_entropy(logits, images.labels[part], reduction="sum").item()
        correct += (logits.argmax(1) == images.labels[part]).sum().item()
    assert loss == pytest.approx(total / len(search.parts[1]), rel=1e-5)
    assert accuracy == correct / len(search.parts[1])


@pytest.mark.parametrize("space", ["darts", "nb201"])
def test_an_architecture_has_no_other_edges(space, images):
    """With partial channels, too: what is not of the architecture, or none, adds nothing to a node."""
    search = Search(_config("pc-darts", space), data=images)
    genotype = search.space.sample(torch.Generator().manual_seed(1))
    arguments = search._arguments_of(genotype)
    for name, table in search.space.encode(genotype).items():
        edges = arguments["edge_weights"][name]
        chosen = [bool(row.any()) and search.space.primitives[int(row.argmax())] != "none" for row in table]
        assert [bool(e > 0) for e in edges] == chosen
        sums = [float(node.sum()) for node in edges.detach().split(search._fan_in())]
        assert all(s == pytest.approx(1) or s == 0 for s in sums)


def test_random_search_trains_architectures_of_the_space(images, monkeypatch):
    search = Search(_config("random-ws", "darts"), data=images)
    for _ in range(3):
        path = search._arguments()["path"]
        assert all(sum(o > 0 for o in choices) == 8 for choices in path.values())  # of 14 edges, the others none


@pytest.mark.parametrize("options", [{"skip_dropout": 0.4}, {"method": "drnas"}, {"method": "gdas"}], ids=str)
def test_measures_leave_the_search_as_it_was(images, options):
    config = _config(options.pop("method", "darts"), "nb201", **options)
    plain = _run(dataclasses.replace(config, discrete=False), images)
    hessian = 0 if config.relaxation == "gdas" else 1
    measured = _run(dataclasses.replace(config, hessian=hessian, checkpoint_cells=False), images)
    assert _same(_bits(plain), _bits(measured))
    genotype = measured.genotype()
    assert measured.evaluate(genotype) == measured.evaluate(genotype)


def test_hessian_of_cells_that_run_again(images):
    config = _config("darts", "nb201", epochs=1, hessian=1)
    plain, again = (_run(dataclasses.replace(config, checkpoint_cells=c), images) for c in (False, True))
    assert again.supernet.checkpoint_cells
    assert again.history[0].measures == plain.history[0].measures


def test_the_result_says_what_the_architecture_was_derived_from(images):
    search = Search(_config("pc-darts"), data=images)
    result = search.run()
    assert search.space.derive(result.scores) == result.genotype


def test_single_paths_run_one_candidate_an_edge(images, monkeypatch):
    """Of a step's edges, nothing but the chosen candidate is asked for."""
    search = Search(_config("gdas", "nb201", epochs=1), data=images)
    calls = []
    forward = type(search.supernet).forward

    def spy(self, x, weights, *args, **kwargs):
        calls.append((weights["cell"].detach().clone(), kwargs.get("path")))
        return forward(self, x, weights, *args, **kwargs)

    monkeypatch.setattr(type(search.supernet), "forward", spy)
    search.run(on_step=lambda s: s.stop())
    assert len(calls) == 2
    for weights, path in calls:
        assert torch.equal(weights, F.one_hot(torch.tensor(path["cell"]), 5).float())
    assert all(isinstance(m, MixedOp) for _, _, m in search.supernet.mixed_ops())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relaxation": "softmax", "regularizer": "kl"}, "regularizer 'kl' is of the relaxation"),
        ({"order": 3}, "order=3: expected 0, 1 or 2"),
        ({"select": "best"}, "select='best': expected one of derive"),
        ({"perturbation": "noise"}, "expected one of none"),
        ({"temperature": (0.0, 1.0)}, "two numbers above 0"),
        ({"perturbation_radius": (0.1,)}, "two numbers from 0 to 1"),
        ({"order": 2, "accumulate": 2}, "accumulate with order=2"),
        ({"accumulate": 40}, "batch norm wants 2 images"),
        ({"epochs": 0}, "epochs=0 with select=derive"),
        ({"skip_dropout": 1.0}, "a probability"),
        ({"cuda_graphs": True, "device": "cuda", "order": 2}, "cuda_graphs=True with order=2"),
        ({"cuda_graphs": True, "device": "cuda", "relaxation": "gdas"}, "cuda_graphs=True with relaxation='gdas'"),
        ({"cuda_graphs": True, "device": "cuda", "method": "snas"}, "cuda_graphs=True with temperature="),
        ({"relaxation": "uniform"}, "relaxation=uniform with select=derive"),
        ({"order": 0}, "order=0 with select=derive"),
        ({"select": "evaluate"}, "order=1 with select=evaluate"),
        ({"relaxation": "gdas", "perturbation": "random"}, "whose weights are 1 and 0"),
        ({"relaxation": "exponentiated"}, "method gaea has them"),
        ({"method": "random", "stages": [[1, 0, 1, 0], [1, 3, 1, 0]]}, "nothing says what to prune"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        SearchConfig(**options)
