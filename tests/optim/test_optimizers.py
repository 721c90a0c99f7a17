"""Optimizers: the table of groups, the updates against references, and what their states weigh."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from llmrecipe.core import registry
from llmrecipe.core.errors import LlmRecipeError, RecipeError
from llmrecipe.methods._base.method import ParamGroup
from llmrecipe.models.hooks.hook import DELTA, Hook
from llmrecipe.models.hooks.host import add_hook
from llmrecipe.optim.optimizer import build_optimizer, parameter_groups

KINDS = registry.names("optim")
PAGED = [kind for kind in KINDS if kind.startswith("paged")]


class LowRank(Hook):
    order = DELTA

    def __init__(self, width_in: int, width_out: int, r: int):
        super().__init__()
        self.A = nn.Parameter(torch.randn(r, width_in))
        self.B = nn.Parameter(torch.zeros(width_out, r))
        self.gate = nn.Parameter(torch.ones(1))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y + x @ self.A.T @ self.B.T * self.gate


class Tiny(nn.Module):
    """Embedding, norm, two linears and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 80)
        self.down = nn.Linear(80, 8, bias=False)
        self.experts = nn.Parameter(torch.randn(3, 8, 8) * 0.1)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embed(ids))
        x = self.down(self.up(x).relu()) + torch.einsum("td,edo->to", x, self.experts)
        return self.head(x)


def make(kind: str = "adamw", **options):
    return registry.load_class("optim", kind)(**options)


def table(groups) -> list[tuple]:
    return [(g.kind, g.lr, g.weight_decay, g.names) for g in groups]


def test_table_of_a_fully_trained_model():
    assert table(parameter_groups(Tiny(), make(lr=1e-3, weight_decay=0.1))) == [
        ("matrix", 1e-3, 0.1, ("experts", "up.weight", "down.weight")),
        ("embedding", 1e-3, 0.1, ("embed.weight",)),
        ("vector", 1e-3, 0.0, ("norm.weight", "norm.bias", "up.bias")),
    ]


def test_table_of_an_adapter_has_no_decay_unless_asked():
    model = Tiny().requires_grad_(False)
    add_hook(model.up, "lora", LowRank(8, 80, 2), "lora")
    names = ("up.lora.A", "up.lora.B", "up.lora.gate")
    assert table(parameter_groups(model, make(lr=1e-3, weight_decay=0.1))) == [("adapter", 1e-3, 0.0, names)]
    asked = parameter_groups(model, make(lr=1e-3, weight_decay=0.1, decay_adapters=True))
    assert table(asked) == [("adapter", 1e-3, 0.1, names[:2]), ("adapter", 1e-3, 0.0, names[2:])]


def test_what_a_method_asks_for_wins():
    model = Tiny().requires_grad_(False)
    add_hook(model.up, "lora", LowRank(8, 80, 2), "lora")
    asked = [ParamGroup(frozenset({"up.lora.B"}), lr_scale=16.0), ParamGroup(frozenset({"up.lora.A"}), weight_decay=0.3)]
    assert table(parameter_groups(model, make(lr=1e-3), asked)) == [
        ("adapter", 1e-3, 0.3, ("up.lora.A",)),
        ("adapter", 16e-3, 0.0, ("up.lora.B",)),
        ("adapter", 1e-3, 0.0, ("up.lora.gate",)),
    ]
    with pytest.raises(LlmRecipeError, match=r"'up\.lora\.C', which the model does not have"):
        parameter_groups(model, make(), [ParamGroup(frozenset({"up.lora.C"}))])
    with pytest.raises(LlmRecipeError, match="two methods"):
        parameter_groups(model, make(), [ParamGroup(frozenset({"up.lora.A"})), ParamGroup(frozenset({"up.lora.A"}))])


def test_rows_of_the_table_and_the_meta_device():
    with torch.device("meta"):
        model = Tiny()
    rows = [g.row() for g in parameter_groups(model, make(lr=1e-3, weight_decay=0.1))]
    assert list(rows[0].items()) == [
        ("group", "matrix"),
        ("tensors", 3),
        ("parameters", 3 * 64 + 640 + 640),
        ("lr", 1e-3),
        ("weight_decay", 0.1),
        ("example", "experts"),
    ]
    assert sum(r["parameters"] for r in rows) == sum(p.numel() for p in model.parameters())


def test_nothing_to_train_is_an_error():
    with pytest.raises(RecipeError, match="nothing is left to train"):
        parameter_groups(Tiny().requires_grad_(False), make())


def test_a_device_the_optimizer_cannot_step_on_is_an_error():
    with torch.device("meta"):
        model = Tiny()
    with pytest.raises(RecipeError, match=r"optim\.kind: adamw_8bit cannot step on the device 'meta' .*cpu, cuda, xpu"):
        build_optimizer(make("adamw_8bit"), parameter_groups(model, make("adamw_8bit")))


def losses(kind: str, steps: int = 40, **options) -> list[float]:
    torch.manual_seed(0)
    model = Tiny()
    config = make(kind, **options)
    optimizer = build_optimizer(config, parameter_groups(model, config))
    ids = torch.arange(11)
    found = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(ids), (ids + 1) % 11)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_optimizer_learns_on_this_machine(kind):
    rates = {"sgd": 0.3, "lion": 3e-3, "lion_8bit": 3e-3, "paged_lion": 3e-3, "paged_lion_8bit": 3e-3}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Paged")
        found = losses(kind, lr=rates.get(kind, 1e-2))
    assert found[-1] < 0.7 * found[0]


@pytest.mark.parametrize("kind", PAGED)
def test_paged_optimizers_say_in_one_line_that_a_cpu_does_not_page(kind, caplog):
    with caplog.at_level("WARNING", logger="llmrecipe"):
        losses(kind, steps=2)
    assert [r.message for r in caplog.records] == [
        "optim: paging needs a GPU; on CPU the optimizer state stays in ordinary memory"
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_state_weighs_what_the_closed_form_says(kind):
    """Shapes above and below the 4096 entries from which 8-bit states start, a vector and a stack of experts."""
    for shape in [(96, 50), (64, 63), (7,), (3, 40, 41)]:
        parameter = nn.Parameter(torch.randn(shape))
        config = make(kind)
        group = {"params": [parameter], "lr": 1e-3, "weight_decay": 0.0, "kind": "matrix" if len(shape) > 1 else "vector"}
        optimizer = config.build([group])
        parameter.grad = torch.randn(shape)
        optimizer.step()
        state = {k: v for k, v in optimizer.state[parameter].items() if isinstance(v, Tensor) and not k.startswith("qmap")}
        assert sum(v.numel() * v.element_size() for v in state.values()) == config.state_bytes(shape)


def one_step(kind: str, gradients: list[float], start: float, **options) -> float:
    parameter = nn.Parameter(torch.tensor([[start, start]]))
    optimizer = make(kind, **options).build(
        [{"params": [parameter], "lr": options["lr"], "weight_decay": options.get("weight_decay", 0.0), "kind": "embedding"}]
    )
    for gradient in gradients:
        parameter.grad = torch.full((1, 2), gradient)
        optimizer.step()
    return parameter[0, 0].item()


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_adamw_by_hand(kind):
    """Step 1 moves by lr whatever the gradient (m^ = g, v^ = g^2), after decay by lr * wd."""
    assert one_step(kind, [0.3], 2.0, lr=0.1, weight_decay=0.5) == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1, abs=1e-6)


@pytest.mark.parametrize("kind", ["lion", "lion_8bit", "paged_lion", "paged_lion_8bit"])
def test_lion_by_hand(kind):
    """Gradients 1, then -0.05: c = 0.9 * 0.01 * 1 - 0.1 * 0.05 = 0.004 > 0, so both steps go down by lr."""
    assert one_step(kind, [1.0, -0.05], 0.0, lr=0.1) == pytest.approx(-0.2, abs=1e-6)
    # With -0.2, c = 0.009 - 0.02 < 0: the second step comes back.
    assert one_step(kind, [1.0, -0.2], 0.0, lr=0.1) == pytest.approx(0.0, abs=1e-6)
    assert one_step(kind, [1.0], 2.0, lr=0.1, weight_decay=0.5) == pytest.approx(2.0 * 0.95 - 0.1, abs=1e-6)


@pytest.mark.parametrize("kind", ["rmsprop", "rmsprop_8bit"])
def test_rmsprop_by_hand(kind):
    """v = 0.01 g^2 after one step, so the step is lr g / (0.1 g) = 10 lr."""
    assert one_step(kind, [0.3], 0.0, lr=0.01) == pytest.approx(-0.1, abs=1e-5)


def test_sgd_with_momentum_by_hand():
    # u = 1, then 0.5 * 1 + 1 = 1.5: 2.5 lr in total.
    assert one_step("sgd", [1.0, 1.0], 0.0, lr=0.1, momentum=0.5) == pytest.approx(-0.25)
    with pytest.raises(RecipeError, match=r"optim\.nesterov"):
        one_step("sgd", [1.0], 0.0, lr=0.1, nesterov=True)


def test_adafactor_by_hand():
    """A constant gradient has v = g^2, hence u = 1, whose root mean square is not above the threshold."""
    assert one_step("adafactor", [0.3], 0.0, lr=0.1) == pytest.approx(-0.1, abs=1e-6)
    assert one_step("adafactor", [0.3], 0.0, lr=0.1, clip_threshold=0.5) == pytest.approx(-0.05, abs=1e-6)


def test_muon_orthogonalises_matrices_and_leaves_the_rest_to_adamw():
    torch.manual_seed(0)
    matrix, vector = nn.Parameter(torch.zeros(16, 16)), nn.Parameter(torch.zeros(16))
    optimizer = make("muon").build(
        [
            {"params": [matrix], "names": ["m"], "lr": 0.1, "initial_lr": 0.1, "weight_decay": 0.0, "kind": "matrix"},
            {"params": [vector], "names": ["v"], "lr": 0.1, "initial_lr": 0.1, "weight_decay": 0.0, "kind": "vector"},
        ]
    )
    matrix.grad, vector.grad = torch.randn(16, 16), torch.randn(16)
    optimizer.step()
    # Newton-Schulz brings every singular value near 1; matched to AdamW the update is scaled by 0.2 sqrt(16).
    singular = torch.linalg.svdvals(matrix.detach()) / (0.1 * 0.2 * 4)
    assert singular.max() < 1.3 and singular.min() > 0.5
    assert torch.allclose(vector.detach(), -0.1 * vector.grad.sign(), atol=1e-4)
    assert [g["names"] for g in optimizer.param_groups] == [["m"], ["v"]]
    optimizer.param_groups[0]["lr"] = 0.0
    before = matrix.detach().clone()
    optimizer.step()
    assert torch.equal(before, matrix), "the rate of a group reaches the part that steps it"


def test_off_groups_do_not_decay():
    """With zero gradients AdamW moves exactly the tensors that decay."""
    torch.manual_seed(0)
    model = Tiny()
    nn.init.ones_(model.norm.bias)
    config = make(lr=0.1, weight_decay=0.5)
    optimizer = build_optimizer(config, parameter_groups(model, config))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"experts", "up.weight", "down.weight", "embed.weight"}
