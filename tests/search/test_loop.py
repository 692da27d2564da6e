import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastnas.data import normalize
from fastnas.nn import MixedOp
from fastnas.relaxations import softmax
from fastnas.search import DivergenceError, Search, checkpoint, first_order, search
from fastnas.search.checkpoint import CheckpointError
from fastnas.search.loop import alpha_spread


def _bits(search):
    """Everything that decides how the search goes on, as a flat list of tensors."""
    state = search.state_dict()
    optimizers = [
        value
        for name in ("weight_optimizer", "alpha_optimizer")
        for slot in state[name]["state"].values()
        for value in slot.values()
        if isinstance(value, torch.Tensor)
    ]
    return [*state["supernet"].values(), *state["alphas"].values(), *optimizers, *search.weights[-1].values()]


def _same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _numbers(history):
    return [{k: v for k, v in dataclasses.asdict(r).items() if k not in ("seconds", "peak_memory")} for r in history]


@pytest.fixture(scope="module")
def finished(images):
    """A search that ran to its end, with its bits."""
    from fastnas.search import SearchConfig

    done = Search(SearchConfig(channels=4, layers=3, batch_size=16, epochs=2, device="cpu"), data=images)
    result = done.run()
    return done, result


def test_result(finished, tiny):
    _, result = finished
    assert result.finished
    assert result.config == tiny
    assert [r.epoch for r in result.history] == [1, 2]
    assert len(result.weights) == 3
    assert {name: tuple(w.shape) for name, w in result.weights[0].items()} == {"normal": (14, 8), "reduce": (14, 8)}
    for name, alpha in result.alphas.items():
        torch.testing.assert_close(result.weights[-1][name], softmax(alpha), rtol=0, atol=0)
    assert len(result.genotype.validate().normal) == 8
    last = result.history[-1]
    assert 0 <= last.valid_accuracy <= 1
    assert 0 < last.entropy <= math.log(8)
    assert last.seconds > 0
    assert last.peak_memory > 2**20
    assert [r.lr for r in result.history] == pytest.approx([tiny.lr, tiny.lr_min + (tiny.lr - tiny.lr_min) / 2])


def test_alphas_move(finished):
    _, result = finished
    first = result.weights[0]
    assert alpha_spread(result.alphas) == result.history[-1].alpha_spread
    for name, weights in result.weights[-1].items():
        assert ((weights - first[name]).abs().amax(1) > 0).all(), "every edge has moved"


def test_training_learns(tiny, images):
    config = dataclasses.replace(tiny, epochs=6, pad=0)
    history = search(config, data=images).history
    assert history[-1].train_loss < 0.8 * history[0].train_loss


def test_same_seed_same_bits(finished, tiny, images):
    done, _ = finished
    again = Search(tiny, data=images)
    torch.manual_seed(99)  # nothing depends on torch's global generator
    result = again.run()
    assert _same(_bits(done), _bits(again))
    assert _numbers(result.history) == _numbers(done.history)


def test_other_seed_other_bits(finished, tiny, images):
    done, _ = finished
    other = Search(dataclasses.replace(tiny, seed=1), data=images)
    assert not any(torch.equal(a, b) for a, b in zip(done.weights[0].values(), other.weights[0].values(), strict=True))
    other.run()
    for name in done.alphas:
        assert not torch.equal(done.alphas[name], other.alphas[name])


def test_global_state_is_left_alone(tiny, images):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    seen = []
    config = dataclasses.replace(tiny, threads=threads + 1, epochs=1)
    search(config, data=images, on_step=lambda s: seen.append(torch.get_num_threads()))
    assert torch.equal(torch.get_rng_state(), state)
    assert set(seen) == {threads + 1}
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("stop_after", [1, 2, 3], ids=["inside an epoch", "at an epoch's end", "inside the last epoch"])
def test_resume_is_exact(finished, tiny, images, tmp_path, stop_after):
    done, _ = finished
    first = Search(tiny, data=images)
    steps = []

    def count(search):
        steps.append(search.step)
        if len(steps) == stop_after:
            search.stop()

    stopped = first.run(on_step=count)
    assert not stopped.finished
    assert len(steps) == stop_after
    checkpoint.save(tmp_path / "c.pt", first.state_dict())
    del first

    second = Search(tiny, data=images)
    second.load_state_dict(checkpoint.load(tmp_path / "c.pt"))
    result = second.run()
    assert result.finished
    assert _same(_bits(done), _bits(second))
    assert _numbers(result.history) == _numbers(done.history)
    assert all(_same(list(a.values()), list(b.values())) for a, b in zip(done.weights, result.weights, strict=True))


def test_a_saved_state_survives_a_longer_run(tiny, images, tmp_path):
    """What was written is the state at that moment, not a view of the running search."""
    run = Search(tiny, data=images)
    run.run(on_step=lambda s: checkpoint.save(tmp_path / f"{s.epoch}{s.step}.pt", s.state_dict()))
    early, late = checkpoint.load(tmp_path / "01.pt"), checkpoint.load(tmp_path / "12.pt")
    assert not torch.equal(early["alphas"]["normal"], late["alphas"]["normal"])


def test_checkpoint_of_other_options_is_refused(finished, tiny, images):
    done, _ = finished
    other = Search(dataclasses.replace(tiny, lr=0.01), data=images)
    with pytest.raises(CheckpointError, match=r"lr=0\.1, this one has lr=0\.01"):
        other.load_state_dict(done.state_dict())
    Search(dataclasses.replace(tiny, threads=0), data=images).load_state_dict(done.state_dict())


def test_checkpoints_from_before_an_option(finished, tiny, images):
    """They are of a search with the option's default."""
    done, _ = finished
    state = done.state_dict()
    state["config"] = {k: v for k, v in state["config"].items() if k != "amp"}
    Search(tiny, data=images).load_state_dict(state)
    with pytest.raises(CheckpointError, match="amp='none', this one has amp='bf16'"):
        Search(dataclasses.replace(tiny, amp="bf16"), data=images).load_state_dict(state)


def test_settings_of_the_optimizers_are_the_machines_own(finished, tiny, images):
    """A checkpoint brings the optimizers' state; how the update is computed depends on where the search goes on."""
    done, _ = finished
    state = copy.deepcopy(done.state_dict())
    for group in state["weight_optimizer"]["param_groups"]:
        group.update(fused=False, foreach=True, lr=0.5)  # as a search of another release had it
    resumed = Search(tiny, data=images)
    resumed.load_state_dict(state)
    (group,) = resumed._weight_optimizer.param_groups
    assert group["fused"]
    assert group["lr"] == torch.tensor(tiny.lr)
    momenta = [slot["momentum_buffer"] for slot in resumed._weight_optimizer.state.values()]
    assert _same(momenta, [slot["momentum_buffer"] for slot in done._weight_optimizer.state.values()])


def test_a_state_can_be_forked(tiny, images):
    parent, child = Search(tiny, data=images), Search(tiny, data=images)
    parent.run(on_step=lambda s: s.stop())
    child.load_state_dict(parent.state_dict())
    before = [t.clone() for t in _bits(parent)]
    child.run(on_step=lambda s: s.stop())
    assert _same(before, _bits(parent))
    assert not _same(before, _bits(child))


def test_warm_up_keeps_the_alphas(tiny, images):
    config = dataclasses.replace(tiny, epochs=2, alpha_warmup=1)
    result = search(config, data=images)
    first, warm, last = result.weights
    assert _same(list(first.values()), list(warm.values()))
    assert not torch.equal(warm["normal"], last["normal"])
    assert math.isnan(result.history[0].alpha_loss)
    assert math.isfinite(result.history[1].alpha_loss)


def test_alpha_step_sees_no_weight_gradients(tiny, images, monkeypatch):
    """The architecture step neither uses nor changes the weights or their gradients; the weight step no alpha's."""
    seen = []

    def spy(bilevel, train, valid):
        weights = list(bilevel.supernet.parameters())
        before = [p.detach().clone() for p in weights]
        grads = [None if p.grad is None else p.grad.clone() for p in weights]
        alphas = [a.detach().clone() for a in bilevel.alphas.values()]
        alpha_grads = [None if a.grad is None else a.grad.clone() for a in bilevel.alphas.values()]
        out = first_order(bilevel, train, valid)
        assert _same(before, [p.detach() for p in weights])
        for old, p in zip(grads, weights, strict=True):
            assert (old is None and p.grad is None) or torch.equal(old, p.grad)
        seen.append((alphas, alpha_grads, [a.grad.clone() for a in bilevel.alphas.values()]))
        return out

    monkeypatch.setattr("fastnas.search.loop.first_order", spy)
    search(dataclasses.replace(tiny, epochs=1), data=images)
    (_, none, grads), (_, kept, _) = seen
    assert none == [None, None]
    assert _same(grads, kept), "the weight step between two architecture steps leaves the alphas' gradients"


def test_first_step_follows_the_definition(tiny, images):
    """One step against its formulas: Adam on the alphas, then SGD on the weights at the new alphas."""
    config = dataclasses.replace(tiny, pad=0, epochs=1, batch_size=32, clip=0.5)
    run = Search(config, data=images)
    twin = Search(config, data=images)
    run.run(on_step=lambda s: s.stop())

    net, (train, valid) = twin.supernet.train(), twin.parts

    def batch(indices):
        return normalize(images.images[indices], images.mean, images.std), images.labels[indices]

    # The part is one batch, and the loss' mean has no order but that of its rounding.
    x, y = batch(valid)
    grads = torch.autograd.grad(
        F.cross_entropy(net(x, {k: softmax(a) for k, a in twin.alphas.items()}), y), list(twin.alphas.values())
    )
    for (name, alpha), grad in zip(twin.alphas.items(), grads, strict=True):
        grad = grad + config.alpha_weight_decay * alpha.detach()
        # Adam's first step: both moments are corrected to the gradient itself.
        expected = alpha.detach() - config.alpha_lr * grad / (grad.abs() + 1e-8)
        torch.testing.assert_close(run.alphas[name].detach(), expected, rtol=0, atol=0.02 * config.alpha_lr)

    x, y = batch(train)
    weights = {k: softmax(a.detach()) for k, a in run.alphas.items()}
    parameters = dict(net.named_parameters())
    grads = torch.autograd.grad(F.cross_entropy(net(x, weights), y), list(parameters.values()))
    norm = torch.cat([g.flatten() for g in grads]).norm()
    assert norm > config.clip
    for (name, p), grad, new in zip(parameters.items(), grads, run.supernet.parameters(), strict=True):
        step = config.lr * (grad * (config.clip / norm) + config.weight_decay * p.detach())
        assert (p.detach() - step - new).norm() <= 0.02 * step.norm() + 1e-7, name


def test_bf16_is_only_inside_the_supernet(tiny, images):
    seen = set()

    def loss(logits, labels, **kwargs):
        seen.add(("logits", logits.dtype))
        return cross_entropy(logits, labels, **kwargs)

    cross_entropy = F.cross_entropy
    run = Search(dataclasses.replace(tiny, amp="bf16", epochs=1), data=images)
    for module in run.supernet.modules():
        if isinstance(module, (MixedOp, nn.Linear)):
            module.register_forward_hook(lambda m, args, y: seen.add((type(m).__name__, y.dtype)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "cross_entropy", loss)
        result = run.run()
    assert seen == {("logits", torch.float32), ("MixedOp", torch.bfloat16), ("Linear", torch.bfloat16)}
    assert {t.dtype for t in _bits(run) if t.is_floating_point()} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")

    full = search(dataclasses.replace(tiny, epochs=1), data=images).history[0]
    half = result.history[0]
    assert half.train_loss != full.train_loss
    # bfloat16 has 8 bits of precision.
    assert half.train_loss == pytest.approx(full.train_loss, rel=0.03)
    assert half.alpha_loss == pytest.approx(full.alpha_loss, rel=0.03)
    assert half.valid_loss == pytest.approx(full.valid_loss, rel=0.03)


def test_bf16_resumes_exactly(tiny, images):
    config = dataclasses.replace(tiny, amp="bf16", epochs=1)
    whole, first, second = (Search(config, data=images) for _ in range(3))
    whole.run()
    first.run(on_step=lambda s: s.stop())
    second.load_state_dict(first.state_dict())
    second.run()
    assert _same(_bits(whole), _bits(second))


def test_evaluation_uses_running_statistics(finished):
    done, result = finished
    loss, accuracy = done.evaluate()
    assert (loss, accuracy) == (result.history[-1].valid_loss, result.history[-1].valid_accuracy)
    before = {k: v.clone() for k, v in done.supernet.state_dict().items()}
    size, training = done.config.batch_size, done.supernet.training
    object.__setattr__(done.config, "batch_size", 5)
    try:
        other_loss, other_accuracy = done.evaluate()
    finally:
        object.__setattr__(done.config, "batch_size", size)
    # Statistics of the batch would make the result depend on how the images are batched.
    assert other_loss == pytest.approx(loss, rel=1e-4)
    assert other_accuracy == accuracy
    assert all(torch.equal(v, before[k]) for k, v in done.supernet.state_dict().items())
    assert done.supernet.training == training


def test_divergence_is_told_with_advice(tiny, images):
    run = Search(tiny, data=images)
    with torch.no_grad():
        run.supernet.classifier.weight.fill_(math.inf)
    with pytest.raises(DivergenceError, match=r"epoch 1, step 1; try a smaller"):
        run.run()


def test_clear_errors(tiny, images):
    with pytest.raises(ValueError, match="batch_size=33 is larger than the 32 training images"):
        Search(dataclasses.replace(tiny, batch_size=33), data=images)
    with pytest.raises(ValueError, match="batch_size=16 is larger than the 7 validation images"):
        Search(dataclasses.replace(tiny, train_portion=0.9), data=images)
    with pytest.raises(ValueError, match="no device"):
        Search(dataclasses.replace(tiny, device="abacus"), data=images)
    with pytest.raises(ValueError, match="cuda:99"):
        Search(dataclasses.replace(tiny, device="cuda:99"), data=images)
    with pytest.raises(ValueError, match="space"):
        Search(dataclasses.replace(tiny, space="nowhere"), data=images)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda(tiny, images):
    results = [search(dataclasses.replace(tiny, device="cuda"), data=images) for _ in range(2)]
    assert results[0].finished
    for name, alpha in results[0].alphas.items():
        assert torch.equal(alpha, results[1].alphas[name])
