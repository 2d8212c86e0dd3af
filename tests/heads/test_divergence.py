"""What a head learns from the base model: its outputs, in bounded memory; the hidden state that it reads."""

import itertools
from typing import Any

import engine_jobs as jobs
import pytest
import torch
from head_models import VOCABULARY, WIDTH, build, cross_entropy, hidden_and_labels
from largest_result import LargestResult
from ranks import RankPool
from torch import Tensor, nn

from ds_interlock import InProcessPipeline
from ds_interlock.config import HeadConfig, InterlockConfig
from ds_interlock.errors import ConfigError
from ds_interlock.heads import factory as heads
from ds_interlock.heads.divergence import kl_divergence, relative_error
from ds_interlock.heads.factory import head_factory
from ds_interlock.models.lm import LMConfig, lm_layers, lm_loss

N, D, V = 23, 7, 31
BOTH = {"cross_entropy": 0.5, "kl": 0.25}
LM = lm_layers(LMConfig(vocab_size=VOCABULARY, seq_length=7, width=WIDTH, num_blocks=2, num_heads=3, seed=5))


def capped(outputs: Tensor) -> Tensor:
    """As models do that bound their outputs."""
    return 2 * torch.tanh(outputs / 2)


def written_out(hidden_nd: Tensor, base_nd: Tensor, unembed: Any) -> Tensor:
    log_p_nv, log_q_nv = (x - x.logsumexp(-1, keepdim=True) for x in (unembed(base_nd), unembed(hidden_nd)))
    return (log_p_nv.exp() * (log_p_nv - log_q_nv)).sum()


def inputs(dtype: torch.dtype = torch.float64, n: int = N) -> tuple[Tensor, Tensor, Any]:
    generator = torch.Generator().manual_seed(3)
    weight_vd = torch.randn(V, D, generator=generator).to(dtype)
    hidden_nd, base_nd = (torch.randn(n, D, generator=generator).to(dtype) for _ in range(2))
    return hidden_nd.requires_grad_(), base_nd, lambda x_nd: capped(x_nd @ weight_vd.T)


@pytest.mark.parametrize("rows", [1, 5, 23, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_numbers_are_those_of_the_formula(rows: int, dtype: torch.dtype, tolerance: float) -> None:
    hidden_nd, base_nd, unembed = inputs(dtype)
    found = kl_divergence(hidden_nd, base_nd, unembed, V, chunk_bytes=2 * rows * V * dtype.itemsize)
    expected = written_out(hidden_nd, base_nd, unembed)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    gradients = [torch.autograd.grad(0.3 * value, hidden_nd)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=tolerance)


def test_half_precision_is_summed_in_float32() -> None:
    hidden_nd, base_nd, unembed = inputs(torch.bfloat16, n=4096)
    found = kl_divergence(hidden_nd, base_nd, unembed, V, chunk_bytes=2**10)
    assert found.dtype is torch.float32
    expected = written_out(hidden_nd.double(), base_nd.double(), lambda x: unembed(x.bfloat16()).double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)
    (gradient,) = torch.autograd.grad(found, hidden_nd)
    assert gradient.dtype is torch.bfloat16


def test_without_positions_it_is_zero() -> None:
    hidden_nd, base_nd, unembed = inputs(n=0)
    found = kl_divergence(hidden_nd, base_nd, unembed, V)
    found.backward()
    assert found == 0
    assert hidden_nd.grad.shape == (0, D)


def test_without_gradients_none_is_computed() -> None:
    hidden_nd, base_nd, unembed = inputs()
    with torch.no_grad():
        found = kl_divergence(hidden_nd, base_nd, unembed, V, chunk_bytes=2000)
    assert not found.requires_grad
    torch.testing.assert_close(found, written_out(hidden_nd, base_nd, unembed))


def test_gradients_can_be_taken_once() -> None:
    found = kl_divergence(*inputs(), V)
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        found.backward()


def test_no_tensor_is_larger_than_a_chunk() -> None:
    hidden_nd, base_nd, unembed = inputs(n=400)
    with LargestResult() as largest:
        kl_divergence(hidden_nd, base_nd, unembed, V, chunk_bytes=2 * 100 * V * 8).backward()
    assert largest.numel == 100 * V
    assert 400 * D < 100 * V, "else a gradient of the inputs is the largest"


# The distance of hidden states.


def test_the_relative_error_by_hand() -> None:
    hidden_nd = torch.tensor([[3.0, 4.0], [1.0, 7.0], [2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    base_nd = torch.tensor([[0.0, 5.0], [1.0, 7.0 + 1e-9], [1.0, 0.0]], dtype=torch.float64)
    error = relative_error(hidden_nd, base_nd)
    assert error.item() == (9 + 1) / 25 + 0 + 1 / 1
    error.backward()
    assert hidden_nd.grad.tolist() == [[6 / 25, -2 / 25], [0, 0], [2, 0]], "2 (hidden - base) / |base|^2"


def test_states_that_differ_by_rounding_give_no_gradient() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base_nd = torch.randn(5, 64).to(dtype)
        eps = torch.finfo(dtype).eps
        hidden_nd = (base_nd.double() * (1 + eps / 2)).to(dtype).requires_grad_()
        error = relative_error(hidden_nd, base_nd)
        assert error.dtype is torch.float32
        error.backward()
        assert not hidden_nd.grad.any()


# In a head.


def lens(**config: Any) -> Any:
    head = head_factory(HeadConfig(type="lens", **config), [*LM, capped])(PLACE)
    for parameter in head.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2))
    return head.double()


PLACE = heads.LossHead(stage=0, after_layer=3)


def taught() -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    hidden_btd, labels_bt = hidden_and_labels(num_ignored=4)
    base_btd = torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(8))
    return hidden_btd.double().requires_grad_(), (labels_bt, torch.tensor([12.5]), base_btd)


@pytest.mark.parametrize("translator", ["after_norm", "before_norm"])
@pytest.mark.parametrize(("of_labels", "of_base"), [(0.0, 2.0), (0.5, 0.25)])
def test_the_loss_of_a_head(of_labels: float, of_base: float, translator: str) -> None:
    factors = {"cross_entropy": of_labels, "kl": of_base}
    objective = {name: factor for name, factor in factors.items() if factor}
    head = lens(objective=objective, translator=translator).train()
    hidden_btd, labels = taught()
    labelled = labels[0] != -100
    sources = [hidden_btd, *head.readout.translator.parameters()]

    def outputs_of(normed: Tensor) -> Tensor:
        return capped(normed @ head.readout.unembedding.weight.T)

    log_q = head(hidden_btd)[labelled].log_softmax(-1)
    log_p = outputs_of(labels[2].double())[labelled].log_softmax(-1)
    from_labels = -log_q.gather(1, labels[0][labelled][:, None]).sum() / 12.5
    from_base = (log_p.exp() * (log_p - log_q)).sum() / 12.5
    expected = of_labels * from_labels + of_base * from_base
    found = head.loss(hidden_btd, labels, lm_loss())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(found, sources), torch.autograd.grad(expected, sources), rtol=1e-9, atol=1e-12
    )
    head.eval()
    torch.testing.assert_close(head.loss(hidden_btd, labels, lm_loss()), from_labels)


def test_a_head_that_reconstructs_trains_the_layers_and_nothing_else() -> None:
    """The data bring places in the states; the loss is of the labelled positions; weights add up."""
    hidden_btd, (labels_bt, normaliser_1, base_btd) = taught()
    order_n = torch.randperm(21, generator=torch.Generator().manual_seed(6))
    places_bt = order_n.argsort().view(3, 7)
    labels = (labels_bt, normaliser_1, places_bt)
    states_nd = base_btd.flatten(0, 1)[order_n]

    def head_of(objective: Any, **more: Any) -> Any:
        head = lens(objective=objective, **more).train()
        head.base_states = {"kl": states_nd.neg().__getitem__, "reconstruction": states_nd.__getitem__}
        return head

    head, labelled = head_of("reconstruction", token_fraction=0.5), labels_bt != -100
    base_nd = base_btd.double()[labelled]
    errors_n = (hidden_btd[labelled] - base_nd).square().sum(-1) / base_nd.square().sum(-1)
    found = head.loss(hidden_btd, labels, lm_loss())
    torch.testing.assert_close(found, errors_n.sum() / 12.5, rtol=1e-12, atol=0)
    expected = torch.autograd.grad(errors_n.sum() / 12.5, hidden_btd)
    torch.testing.assert_close(torch.autograd.grad(found, hidden_btd, retain_graph=True), expected)
    found.backward()
    assert all(parameter.grad is None for parameter in head.parameters())

    kl = lens(objective="kl").train().loss(hidden_btd, (*labels[:2], -base_btd), lm_loss())
    torch.testing.assert_close(head_of("kl").loss(hidden_btd, labels, lm_loss()), kl)
    both = head_of({"kl": 0.5, "reconstruction": 3}).loss(hidden_btd, labels, lm_loss())
    torch.testing.assert_close(both, 0.5 * kl + 3 * found)

    whole = head_of("reconstruction")
    fitted = whole.loss(hidden_btd.detach(), labels, lm_loss())  # as before the layers train
    assert torch.autograd.grad(fitted, whole.readout.translator.change.weight)[0].any()
    torch.testing.assert_close(fitted, whole.eval().loss(hidden_btd, labels[:2], lm_loss()))
    with pytest.raises(
        ConfigError, match=r'objective: "reconstruction" needs the hidden states \[3, 7, 12\]'
    ):
        whole.train().loss(hidden_btd, (*labels[:2], base_btd), lm_loss())


def test_sampled_positions_are_an_unbiased_estimate_of_both_losses() -> None:
    head = lens(objective=BOTH, token_fraction=0.3).train()
    exact_head = lens(objective=BOTH).train()
    hidden_btd, labels = taught()
    with torch.no_grad():
        exact = exact_head.loss(hidden_btd, labels, lm_loss())
        torch.manual_seed(1)
        losses = torch.stack([head.loss(hidden_btd, labels, lm_loss()) for _ in range(3000)])
    error = losses.std() / len(losses) ** 0.5
    assert 0 < error < 0.02 * exact, "the check must be able to tell"
    assert abs(losses.mean() - exact) < 4 * error


@pytest.mark.parametrize("num_parts", [2, 3])
def test_sampling_keeps_the_parts_of_labels_together(num_parts: int) -> None:
    head = build(LM, token_fraction=0.5, fused=False).train()
    hidden_btd, labels_bt = hidden_and_labels(num_ignored=4)  # leaves 17
    labels_bt[labels_bt != -100] = torch.arange(17)
    base_btd = labels_bt.unsqueeze(-1).expand(3, 7, WIDTH).float()
    seen = []

    def loss_fn(outputs: Tensor, labels: Any) -> Tensor:
        seen.append(labels)
        return outputs.sum()

    head.loss(hidden_btd, (labels_bt, torch.tensor([10.0]), base_btd)[:num_parts], loss_fn)
    labels_1n, normaliser_1, *base = seen[0]
    assert labels_1n.shape == (1, 8)
    torch.testing.assert_close(normaliser_1, torch.tensor([10.0 * 8 / 17]))
    assert len(base) == num_parts - 2
    for base_1nd in base:
        assert torch.equal(base_1nd[..., 3], labels_1n.float())


def test_without_any_label_a_sampled_loss_is_zero() -> None:
    head = lens(objective="kl", token_fraction=0.5).train()
    hidden_btd, (labels_bt, *rest) = taught()
    loss = head.loss(hidden_btd, (torch.full_like(labels_bt, -100), *rest), lm_loss())
    loss.backward()
    assert loss == 0
    assert torch.equal(hidden_btd.grad, torch.zeros_like(hidden_btd))


@pytest.mark.bad_input
def test_what_a_base_model_needs_is_said() -> None:
    head = lens(objective="kl").train()
    hidden_btd, (labels_bt, normaliser_1, base_btd) = taught()
    for labels in (labels_bt, (labels_bt, normaliser_1), (labels_bt, normaliser_1, base_btd[..., 1:])):
        with pytest.raises(
            ConfigError, match=r'interlock\.head\.objective: "kl" needs labels .*\[3, 7, 12\]'
        ):
            head.loss(hidden_btd, labels, lm_loss())
    head.eval()
    assert head.loss(hidden_btd, labels_bt, lm_loss()) > 0, "evaluation needs none"


@pytest.mark.bad_input
def test_a_head_that_is_no_lens_cannot_learn_from_a_base_model() -> None:
    config = HeadConfig(objective="kl")
    with pytest.raises(ConfigError, match=r'interlock\.head\.objective: "kl" needs a lens, but type auto'):
        head_factory(config, LM)
    head_factory(config, LM, pretrained=True)


def test_labels_with_a_normaliser_may_go_to_any_loss_function() -> None:
    head = build(LM)
    hidden_btd, labels_bt = hidden_and_labels()
    labels = (labels_bt, torch.tensor([3.0]))
    found = head.loss(hidden_btd, labels, lambda outputs, parts: cross_entropy(outputs, parts[0]) / parts[1])
    torch.testing.assert_close(found, cross_entropy(head(hidden_btd), labels_bt).reshape(1) / 3)


# In a pipeline.

SECTION = {
    "mode": "interlock",
    "window": 2,
    "head": {"objective": BOTH, "warmup_steps": 1, "warmup_learning_rate": 0.1},
}


def taught_micro_batches(num: int) -> list[Any]:
    """Of different lengths, each with the same normaliser and what a base model makes of it."""
    batches = [
        jobs.micro_batches(1, seed=seed, length=length)[0]
        for seed, length in enumerate(itertools.islice(itertools.cycle((5, 2, 7, 3)), num))
    ]
    normaliser_1 = torch.tensor([sum(labels.numel() for _, labels in batches) / num])
    generator = torch.Generator().manual_seed(4)
    return [
        (ids, (labels, normaliser_1, torch.randn(*labels.shape, jobs.WIDTH, generator=generator)))
        for ids, labels in batches
    ]


def train_on_taught(job: jobs.Job) -> dict[str, Any]:
    engine = jobs.make_engine(job)
    engine.fit_heads(iter(taught_micro_batches(4)), 1)
    before = jobs.parameters_of(engine)
    engine.train_batch(iter(taught_micro_batches(4)))
    loss = float(engine.drain())
    evaluated = engine.eval_batch(
        iter([(x, y[:2]) for x, y in taught_micro_batches(4)]), return_head_losses=True
    )
    result = {"before": before, "after": jobs.parameters_of(engine), "loss": loss, "plan": engine.plan}
    engine.destroy()
    return result | {"evaluated": evaluated[1]}


def test_a_pipeline_of_a_pretrained_model_learns_from_its_base(ranks4: RankPool) -> None:
    sgd = {"optimizer": {"type": "SGD", "params": {"lr": 1.0}}, "gradient_clipping": 0.0}
    job = jobs.Job(SECTION, extra=sgd, module={"loss_fn": lm_loss(), "pretrained": True})
    results = ranks4.run(train_on_taught, job=job)
    plan, specs = results[0]["plan"], jobs.layers()
    head = head_factory(InterlockConfig.from_deepspeed(job.config()).head, specs, pretrained=True)
    net = InProcessPipeline([spec.build() for spec in specs], lm_loss(), plan, head)
    net.load_state_dict({name: p for result in results for name, p in result["before"].items()})
    losses = net.accumulate_gradients(taught_micro_batches(4))
    torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0).step()
    found = {name: p for result in results for name, p in result["after"].items()}
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-5, atol=1e-6, msg=name)
    assert [n for n in found if "translator" in n], "type auto is a lens here"
    assert results[0]["loss"] == pytest.approx(float(losses[plan.final]), rel=1e-6)
    expected = net.evaluate([(ids, labels[:2]) for ids, labels in taught_micro_batches(4)])
    assert list(results[0]["evaluated"].values()) == pytest.approx(
        [float(v) for v in expected.values()], rel=1e-5
    )
