"""Products by oneDNN against `F.linear`: numbers, gradients, and where they are left alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cotgen_pl.products import ROWS_THAT_PAY, _OneDNNProducts, pack, product, products_on

CPU = torch.device("cpu")
MANY = 2 * ROWS_THAT_PAY


def make(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def gradients(hidden, weight, bias, *, on):
    tensors = [t.clone().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    with products_on(CPU, made_once=on):
        found = F.linear(*tensors)
    found.square().sum().backward()
    return found, [tensor.grad for tensor in tensors]


def name_of_gradient(hidden, weight):
    return type(F.linear(hidden, weight).grad_fn).__name__


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(MANY, 24), (2, MANY, 24), (2, 3, MANY, 24)])
def test_numbers_and_gradients_are_those_of_linear(shape, biased):
    hidden, weight, bias = make(*shape), make(40, 24), make(40) if biased else None
    expected, theirs = gradients(hidden, weight, bias, on=False)
    found, ours = gradients(hidden, weight, bias, on=True)
    assert type(found.grad_fn).__name__ == "_ProductBackward"
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_rows_that_are_not_next_to_each_other_are_read_right():
    hidden, weight = make(24, MANY).t().requires_grad_(), make(40, 24)
    with products_on(CPU, made_once=True):
        found = F.linear(hidden, weight)
    torch.testing.assert_close(found, F.linear(hidden, weight))
    ours = torch.autograd.grad(found, hidden, make(40, MANY).t())
    theirs = torch.autograd.grad(F.linear(hidden, weight), hidden, make(40, MANY).t())
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "bias", [make(1).expand(40), make(80)[::2], make(40, 3)[:, 0], make(1), make(1, 40)], ids=str
)
def test_a_bias_that_lies_otherwise_is_read_right(bias):
    hidden, weight = make(MANY, 24), make(40, 24)
    with products_on(CPU, made_once=True):
        found = F.linear(hidden, weight, bias)
    torch.testing.assert_close(found, F.linear(hidden, weight, bias))
    if bias.shape == (40,):
        torch.testing.assert_close(product(hidden, pack(weight), bias), found)


@pytest.mark.parametrize("trains", ["hidden", "weight"])
def test_only_what_a_gradient_needs_is_kept(trains):
    hidden, weight = make(MANY, 24), make(40, 24)
    (hidden if trains == "hidden" else weight).requires_grad_()
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor
    )
    with products_on(CPU, made_once=True), hooks:
        F.linear(hidden, weight)
    assert kept == [weight.shape if trains == "hidden" else hidden.shape]


def test_torchs_own_switch_is_obeyed():
    weight = make(40, 24)
    with torch.backends.mkldnn.flags(enabled=False):
        assert pack(weight) is weight


def test_only_what_is_asked_for_has_a_gradient():
    hidden, weight = make(MANY, 24), make(40, 24).requires_grad_()
    with products_on(CPU, made_once=True):
        F.linear(hidden, weight).sum().backward()
    assert hidden.grad is None
    assert weight.grad is not None


def test_a_second_derivative_is_refused():
    hidden, weight = make(MANY, 24).requires_grad_(), make(40, 24)
    with products_on(CPU, made_once=True):
        found = F.linear(hidden, weight).square().sum()
    (first,) = torch.autograd.grad(found, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(
    "hidden, weight",
    [
        (make(ROWS_THAT_PAY - 1, 24), make(40, 24)),
        (make(MANY, 24, dtype=torch.float64), make(40, 24, dtype=torch.float64)),
        (make(MANY, 24).bfloat16(), make(40, 24).bfloat16()),
    ],
    ids=["few rows", "float64", "bfloat16"],
)
def test_what_does_not_pay_is_left_alone(hidden, weight):
    weight.requires_grad_()
    with products_on(CPU, made_once=True):
        assert name_of_gradient(hidden, weight) != "_ProductBackward"


def test_autocast_decides_the_type():
    hidden, weight = make(MANY, 24), make(40, 24).requires_grad_()
    with products_on(CPU, made_once=True), torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.linear(hidden, weight).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "device, made_once", [(torch.device("cuda"), True), (CPU, False)], ids=["GPU", "made again"]
)
def test_elsewhere_nothing_changes(device, made_once):
    assert not isinstance(products_on(device, made_once=made_once), _OneDNNProducts)


def test_outside_nothing_changes():
    hidden, weight = make(MANY, 24), make(40, 24).requires_grad_()
    with products_on(CPU, made_once=True):
        assert name_of_gradient(hidden, weight) == "_ProductBackward"
    assert name_of_gradient(hidden, weight) != "_ProductBackward"


@pytest.mark.parametrize("rows", [1, 2, 300])
def test_packed_weights_give_the_same_products(rows):
    weight, bias, hidden = make(40, 24), make(40), make(rows, 24)
    packed = pack(weight)
    assert packed.is_mkldnn
    torch.testing.assert_close(product(hidden, packed, bias), F.linear(hidden, weight, bias))


@pytest.mark.parametrize(
    "weight",
    [make(4, 3, dtype=torch.float64), make(4, 3).bfloat16(), make(0, 3), make(4, 3, 2)],
    ids=["float64", "bfloat16", "empty", "three dimensions"],
)
def test_what_has_no_order_is_not_packed(weight):
    assert pack(weight) is weight


def test_a_packed_weight_is_a_copy():
    weight = nn.Parameter(make(40, 24))
    packed, hidden = pack(weight), make(2, 24)
    before = product(hidden, packed)
    with torch.no_grad():
        weight.zero_()
    assert torch.equal(product(hidden, packed), before)
