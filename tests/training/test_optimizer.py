"""The schedule worked by hand, which parameters decay, clipping, and the step that is skipped."""

import math

import pytest
import torch
from torch import nn

from openemu3.records import InputError
from openemu3.training.optimizer import OptimizerConfig, apply_update, build_optimizer, compute_learning_rate, round_by_chance


@pytest.mark.parametrize(
    ("schedule", "step", "share"),
    [
        ("cosine", 0, 0.25),  # warm-up of four steps: a quarter at the first
        ("cosine", 3, 1.0),
        ("cosine", 4, 1.0),
        ("cosine", 6, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))),
        ("cosine", 8, 0.1 + 0.9 * 0.5),  # half way from 4 to 12
        ("cosine", 12, 0.1),
        ("cosine", 99, 0.1),  # and stays there
        ("linear", 6, 0.1 + 0.9 * 0.75),
        ("linear", 12, 0.1),
        ("constant", 2, 0.75),
        ("constant", 11, 1.0),
    ],
)
def test_schedule(schedule, step, share):
    config = OptimizerConfig(learning_rate=2e-3, num_steps=12, warmup_steps=4, schedule=schedule, final_share=0.1)
    assert compute_learning_rate(config, step) == pytest.approx(2e-3 * share, rel=1e-12)


def test_no_warm_up_and_nothing_but_warm_up():
    assert compute_learning_rate(OptimizerConfig(1.0, num_steps=10, warmup_steps=0), 0) == 1.0
    assert compute_learning_rate(OptimizerConfig(1.0, num_steps=2, warmup_steps=2), 1) == 1.0
    for warmup in (-1, 11):
        with pytest.raises(InputError, match=f"warmup_steps is {warmup}"):
            OptimizerConfig(num_steps=10, warmup_steps=warmup)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(3)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x):
        return self.matrix(self.norm(x))


def test_matrices_decay_vectors_do_not_frozen_ones_are_left_out():
    module = Small()
    optimizer = build_optimizer(OptimizerConfig(weight_decay=0.3), module)
    decays, keeps = optimizer.param_groups
    assert decays["weight_decay"] == 0.3 and keeps["weight_decay"] == 0
    assert [p is module.matrix.weight for p in decays["params"]] == [True]
    assert {id(p) for p in keeps["params"]} == {id(module.matrix.bias), id(module.norm.weight), id(module.norm.bias)}


def test_update_is_adamw_at_this_steps_rate():
    """First step of AdamW: every entry moves by the rate against the gradient's sign; matrices have shrunk by rate * decay before."""
    config = OptimizerConfig(learning_rate=0.1, num_steps=10, warmup_steps=2, weight_decay=0.5, max_grad_norm=1e9)
    module = Small()
    before = {name: p.clone() for name, p in module.named_parameters()}
    module(torch.tensor([[1.0, 5.0, -2.0]])).square().sum().backward()
    signs = {name: p.grad.sign() for name, p in module.named_parameters() if p.grad is not None}
    apply_update(build_optimizer(config, module), config, step=0)  # rate 0.1 / 2
    shrunk = before["matrix.weight"] * (1 - 0.05 * 0.5)
    torch.testing.assert_close(module.matrix.weight, shrunk - 0.05 * signs["matrix.weight"])
    torch.testing.assert_close(module.matrix.bias, before["matrix.bias"] - 0.05 * signs["matrix.bias"])
    assert module.frozen.weight.equal(before["frozen.weight"])
    assert all(p.grad is None for p in module.parameters())


def test_clipping_bounds_the_norm_and_reports_the_one_before():
    config = OptimizerConfig(max_grad_norm=0.5, warmup_steps=0)
    module = nn.Linear(2, 1, bias=False)
    optimizer = build_optimizer(config, module)
    module.weight.grad = torch.tensor([[3.0, 4.0]])
    assert apply_update(optimizer, config, 0).item() == pytest.approx(5.0)
    # what AdamW saw: (1 - 0.9) times the clipped gradient (0.3, 0.4)
    torch.testing.assert_close(optimizer.state[module.weight]["exp_avg"], torch.tensor([[0.03, 0.04]]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    config = OptimizerConfig(warmup_steps=0)
    module = nn.Linear(2, 2)
    optimizer = build_optimizer(config, module)
    module(torch.ones(1, 2)).sum().backward()
    apply_update(optimizer, config, 0)
    weights = {name: p.clone() for name, p in module.named_parameters()}
    state = {(p, key): value.clone() for p, values in optimizer.state.items() for key, value in values.items()}
    module.weight.grad, module.bias.grad = torch.ones(2, 2), torch.tensor([1.0, bad])
    assert not torch.isfinite(apply_update(optimizer, config, 1))
    assert all(p.equal(weights[name]) for name, p in module.named_parameters())
    assert all(optimizer.state[p][key].equal(value) for (p, key), value in state.items())
    assert module.weight.grad is None and module.bias.grad is None


def test_a_loss_that_is_not_finite_changes_nothing_though_the_gradient_is():
    module = nn.Linear(2, 2)
    optimizer = build_optimizer(OptimizerConfig(warmup_steps=0), module)
    module(torch.ones(1, 2)).sum().backward()
    before = [p.clone() for p in module.parameters()]
    assert torch.isfinite(apply_update(optimizer, OptimizerConfig(warmup_steps=0), 0, is_finite=False))
    assert all(a.equal(b) for a, b in zip(before, module.parameters(), strict=True))


def test_the_state_is_there_from_the_beginning_and_changes_nothing():
    """Against torch's own AdamW, which makes its state at the first update."""
    torch.manual_seed(0)
    module, inputs = nn.Linear(4, 3), torch.randn(8, 4)
    twin = nn.Linear(4, 3)
    twin.load_state_dict(module.state_dict())
    config = OptimizerConfig(1e-2, schedule="constant", warmup_steps=0, weight_decay=0.1, max_grad_norm=1e9)
    ours = build_optimizer(config, module)
    assert all(ours.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"} for p in module.parameters())
    groups = [{"params": [twin.weight], "weight_decay": 0.1}, {"params": [twin.bias], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, 1e-2, (0.9, 0.95), 1e-8, fused=True)
    for step in range(3):
        module(inputs).square().sum().backward()
        apply_update(ours, config, step)
        twin(inputs).square().sum().backward()
        theirs.step()
        theirs.zero_grad()
    assert all(a.equal(b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))


# ---- bf16 weights and states


def test_rounding_by_chance_is_right_on_average():
    values = torch.tensor([1.001, -1.001, 3e-5, -0.3, 0.0, 2.0]).repeat(40_000, 1)
    rounded = round_by_chance(values, torch.Generator().manual_seed(0))
    assert rounded.dtype == torch.bfloat16
    for column, value in enumerate(values[0].tolist()):
        neighbours = rounded[:, column].unique().float()
        assert len(neighbours) <= 2 and neighbours.min() <= value <= neighbours.max()
        gap = abs(value) * 2**-7  # at most, between two neighbours
        assert rounded[:, column].double().mean().item() == pytest.approx(value, abs=gap * 0.01 + 1e-12)
    assert rounded.equal(round_by_chance(values, torch.Generator().manual_seed(0)))


def test_bf16_follows_fp32_where_rounding_to_the_nearest_would_stand_still():
    """1,000 updates of 1e-4 on weights around 1, whose neighbours in bf16 are 0.0039 and more away."""
    torch.manual_seed(0)
    config = OptimizerConfig(1e-4, schedule="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=1e9)
    start = torch.rand(64, 64) + 0.5
    whole, half = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False).bfloat16()
    with torch.no_grad():
        whole.weight.copy_(start)
        half.weight.copy_(start)
    first = half.weight.detach().clone()
    optimizers = [build_optimizer(config, module) for module in (whole, half)]
    assert {type(optimizer).__name__ for optimizer in optimizers} == {"AdamW", "RoundingAdamW"}
    state = optimizers[1].state[half.weight]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    direction = torch.randn(64, 64).sign()
    for step in range(1000):
        for module, optimizer in zip((whole, half), optimizers, strict=True):
            module.weight.grad = (direction * (1 + 0.1 * (step % 3))).to(module.weight.dtype)
            apply_update(optimizer, config, step)
    moved = (half.weight.float() - first.float()) * -direction
    assert moved.mean().item() == pytest.approx(0.1, rel=0.01)
    assert (half.weight.float() - whole.weight).abs().mean() < 0.02
