"""The cross-entropy that never holds all logits: a case worked by hand, torch's own as the oracle, and its memory."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from openemu3.training import objectives
from openemu3.training.objectives import compute_cross_entropy


def make_case(num_tokens=23, width=8, num_ids=37, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    head = torch.randn(num_ids, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(num_ids, (num_tokens,), generator=generator)
    weights = torch.rand(num_tokens, generator=generator)
    weights[::5] = 0
    return hidden, head, targets, weights


def test_worked_by_hand():
    """Width 1, two ids, logits (0, ln 3): probabilities 1/4 and 3/4."""
    hidden = torch.ones(2, 1, requires_grad=True)
    head = torch.tensor([[0.0], [math.log(3)]], requires_grad=True)
    loss, losses = compute_cross_entropy(hidden, head, torch.tensor([1, 0]), torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(losses, torch.tensor([math.log(4 / 3), math.log(4)]))
    assert loss.item() == pytest.approx(2 * math.log(4 / 3) + math.log(4))
    loss.backward()
    # weight * (probabilities - one-hot): 2 (1/4, -1/4) for the first token, (-3/4, 3/4) for the second
    torch.testing.assert_close(hidden.grad, math.log(3) * torch.tensor([[-0.5], [0.75]]))
    torch.testing.assert_close(head.grad, torch.tensor([[0.5 - 0.75], [-0.5 + 0.75]]))


@pytest.mark.parametrize("chunk", [1, 4, 23, 1024])
def test_equals_torch_whatever_the_chunk(chunk):
    hidden, head, targets, weights = make_case()
    loss, losses = compute_cross_entropy(hidden, head, targets, weights, chunk)
    (3 * loss).backward()
    found = [loss.detach(), losses, hidden.grad, head.grad]
    hidden, head, targets, weights = make_case()
    expected_losses = F.cross_entropy(hidden @ head.t(), targets, reduction="none")
    expected = (expected_losses * weights).sum()
    (3 * expected).backward()
    for one, other in zip(found, [expected.detach(), expected_losses.detach(), hidden.grad, head.grad], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert not losses.requires_grad


def test_large_logits_stay_finite():
    hidden, head, targets, weights = make_case()
    loss, _ = compute_cross_entropy(hidden.detach() * 1000, head, targets, weights)
    expected = (F.cross_entropy(hidden.detach() * 1000 @ head.t(), targets, reduction="none") * weights).sum()
    torch.testing.assert_close(loss, expected)


def test_gradients_by_differences():
    """Losses are fp32 whatever goes in, so the steps are coarse and the tolerance is theirs."""
    hidden, head, targets, weights = make_case(num_tokens=5, width=3, num_ids=4, dtype=torch.float64)

    def compute():
        return compute_cross_entropy(hidden, head, targets, weights.double(), 2)[0]

    loss = compute()
    loss.backward(retain_graph=True)
    with torch.no_grad():
        for tensor in (hidden, head):
            for place in range(tensor.numel()):
                value = tensor.view(-1)[place].item()
                ends = []
                for step in (1e-2, -1e-2):
                    tensor.view(-1)[place] = value + step
                    ends.append(compute().item())
                tensor.view(-1)[place] = value
                assert tensor.grad.view(-1)[place].item() == pytest.approx((ends[0] - ends[1]) / 2e-2, abs=2e-3, rel=1e-2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # gradients are handed out once, not copied
        loss.backward()


def test_bf16_hidden_states_and_an_fp32_head():
    hidden, head, targets, weights = make_case(num_tokens=64, width=32)
    narrow = hidden.detach().bfloat16().requires_grad_()
    loss, _ = compute_cross_entropy(narrow, head, targets, weights)
    loss.backward()
    assert loss.dtype == head.grad.dtype == torch.float32 and narrow.grad.dtype == torch.bfloat16
    found = head.grad.clone()
    head.grad = None
    expected = (F.cross_entropy(narrow.detach().float() @ head.t(), targets, reduction="none") * weights).sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    assert (found - head.grad).norm() < 0.02 * head.grad.norm()


def test_no_tokens_cost_nothing():
    hidden, head, targets, weights = make_case(num_tokens=0)
    loss, losses = compute_cross_entropy(hidden, head, targets, weights)
    loss.backward()
    assert loss.item() == 0 and len(losses) == 0 and not head.grad.any()


class Largest(TorchDispatchMode):
    """The most elements that any result has had, and of those in fp32, and how many matrix products there were."""

    def __init__(self):
        super().__init__()
        self.num_elements = self.num_fp32_elements = self.num_products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.num_elements = max(self.num_elements, result.numel())
            if result.dtype == torch.float32:
                self.num_fp32_elements = max(self.num_fp32_elements, result.numel())
        self.num_products += func.overloadpacket is torch.ops.aten.mm
        return result


def test_logits_exist_for_one_chunk_at_a_time():
    hidden, head, targets, weights = make_case(num_tokens=4096, width=4, num_ids=512)
    with Largest() as seen:
        compute_cross_entropy(hidden, head, targets, weights, chunk=64)[0].backward()
    assert seen.num_elements == 64 * 512
    assert seen.num_products == 3 * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp32_logits_exist_for_a_few_tokens_at_a_time(dtype, monkeypatch):
    """And how few they are changes no bit."""
    results = []
    for tile in (1, 512 * 5, 2**20):
        monkeypatch.setattr(objectives, "CPU_TILE", tile)
        hidden, head, targets, weights = make_case(num_tokens=256, width=4, num_ids=512, dtype=dtype)
        with Largest() as seen:
            loss, losses = compute_cross_entropy(hidden, head, targets, weights, chunk=64)
            loss.backward()
        results.append([loss.detach(), losses, hidden.grad, head.grad])
        if dtype == torch.bfloat16:
            # Of the sizes that do not depend on the tile the head's gradient is the largest.
            assert seen.num_fp32_elements == max(512 * 4, min(64, max(1, tile // 512)) * 512)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_measuring_makes_no_gradients():
    hidden, head, targets, weights = make_case(num_tokens=4096, width=4, num_ids=512)
    with torch.no_grad(), Largest() as seen:
        loss, _ = compute_cross_entropy(hidden, head, targets, weights, chunk=64)
    assert seen.num_products == 64
    assert loss.item() == pytest.approx(compute_cross_entropy(hidden, head, targets, weights, chunk=64)[0].item(), rel=1e-6)


def test_a_frozen_head_gets_no_gradient_and_no_memory_for_one():
    hidden, head, targets, weights = make_case()
    compute_cross_entropy(hidden, head, targets, weights, chunk=7)[0].backward()
    expected, frozen = hidden.grad.clone(), head.detach()
    hidden.grad = None
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape == frozen.shape:
                made.append(function)
            return result

    with Watch():
        compute_cross_entropy(hidden, frozen, targets, weights, chunk=7)[0].backward()
    assert hidden.grad.equal(expected) and not made
