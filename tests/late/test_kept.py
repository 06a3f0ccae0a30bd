"""Gradients kept for late calls: which, how long, as the optimizer used them, and never those of another step."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import needs
import peft
import pytest
import torch
from scenarios import FINALISING, TOTAL, branches, build, loss_of, vectors
from steps import late_step

from peft_gradguard import NoGradientError

if TYPE_CHECKING:
    from collections.abc import Callable


pytestmark = pytest.mark.peft


def test_kept_gradients_go_when_used_and_at_the_finalising_step(
    model: peft.PeftModel, optimizer: torch.optim.Optimizer, listening: Callable[[], int]
) -> None:
    for step in range(1, TOTAL + 1):
        loss_of(model, vectors(step), False).backward()
        gradient = weakref.ref(next(p.grad for n, p in model.named_parameters() if "lora_A" in n))
        optimizer.step()
        optimizer.zero_grad()
        assert (gradient() is not None) == (1 < step <= FINALISING)
        model.base_model.update_and_allocate(step)
        assert gradient() is None
        assert bool(listening()) == (step < FINALISING)
        assert all(parameter.grad is None for parameter in model.parameters())


def test_model_that_goes_away_leaves_nothing_behind(listening: Callable[[], int]) -> None:
    model = build(branches())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in (1, 2, 3):
        late_step(model, optimizer, step)
    loss_of(model, vectors(4), False).backward()
    optimizer.step()
    assert listening() == 1
    references = [weakref.ref(model.base_model.model), weakref.ref(model.base_model.rankallocator)]
    del model, optimizer
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    assert not listening()


def test_gradients_of_a_step_without_a_call_are_not_used_at_a_later_one(
    model: peft.PeftModel, optimizer: torch.optim.Optimizer
) -> None:
    late_step(model, optimizer, 1)
    late_step(model, optimizer, 2)
    loss_of(model, vectors(3), False).backward()
    optimizer.step()
    optimizer.zero_grad()
    before = dict(model.base_model.rankallocator.exp_avg_ipt)
    late_step(model, optimizer, 4, branch=False)
    for name, score in model.base_model.rankallocator.exp_avg_ipt.items():
        assert (score is before[name]) == name.startswith("branch."), name


def test_steps_of_another_optimizer_do_not_touch_kept_gradients(
    model: peft.PeftModel, optimizer: torch.optim.Optimizer
) -> None:
    other = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=1e-2)
    late_step(model, optimizer, 1)
    loss_of(model, vectors(2), False).backward()
    optimizer.step()
    optimizer.zero_grad()
    other.step()
    model.base_model.update_and_allocate(2)
    assert len(model.base_model.rankallocator.exp_avg_ipt) == 12


@pytest.mark.parametrize("rests", ["without gradients", "with zeros"])
@pytest.mark.parametrize("order", ["before the step", "closure"])
def test_gradients_of_the_step_before_are_never_used_instead_of_those_that_are_there(
    model: peft.PeftModel, optimizer: torch.optim.Optimizer, order: str, rests: str
) -> None:
    allocator, base = model.base_model.rankallocator, model.base_model.model
    for step in range(1, FINALISING):

        def backward(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, vectors(step), False)
            if step != 3:
                loss.backward()
            elif rests == "with zeros":
                (loss * 0.0).backward()
            return loss

        if order == "closure":
            optimizer.step(backward)
        else:
            backward()
        before = {name: p.detach().clone() for name, p in base.named_parameters() if ".lora_" in name}
        gradients = {name: p.grad for name, p in base.named_parameters() if ".lora_" in name}
        model.base_model.update_and_allocate(step)
        if step != 3:
            assert all(
                torch.equal(ipt, (before[name] * gradients[name]).abs()) for name, ipt in allocator.ipt.items()
            ), step
        if order != "closure":
            optimizer.step()
    assert len(allocator.ipt) == 12


def test_late_loop_whose_closure_zeroes_at_its_end_is_rescued(
    model: peft.PeftModel, optimizer: torch.optim.Optimizer
) -> None:
    for step in (1, 2):

        def backward(step: int = step) -> torch.Tensor:
            loss = loss_of(model, vectors(step), False)
            loss.backward()
            return loss

        optimizer.step(closure=backward)
        gradients = {name: p.grad for name, p in model.base_model.model.named_parameters() if ".lora_" in name}
        optimizer.zero_grad()
        model.base_model.update_and_allocate(step)
    parameters = dict(model.base_model.model.named_parameters())
    assert len(model.base_model.rankallocator.ipt) == 12
    for name, ipt in model.base_model.rankallocator.ipt.items():
        assert torch.equal(ipt, (parameters[name] * gradients[name]).abs())


def make(**settings: Any) -> peft.PeftModel:
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
    schedule = {"tinit": 50, "tfinal": 10, "total_step": 100, **settings}
    return peft.get_peft_model(base, peft.AdaLoraConfig(target_modules=["0", "2"], init_r=4, target_r=2, **schedule))


def trained(model: peft.PeftModel) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def backward(model: peft.PeftModel, step: int, dtype: torch.dtype = torch.float32) -> None:
    torch.manual_seed(step)
    model(torch.randn(4, 8).to(dtype)).pow(2).mean().backward()


def scores(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    allocator = model.base_model.rankallocator
    kinds = {"average": allocator.exp_avg_ipt, "uncertainty": allocator.exp_avg_unc}
    return {f"{kind} {name}": value for kind, values in kinds.items() for name, value in values.items()}


def assert_same_scores(one: peft.PeftModel, other: peft.PeftModel) -> None:
    ones, others = scores(one), scores(other)
    assert ones
    assert ones.keys() == others.keys()
    for name, value in ones.items():
        assert torch.equal(value, others[name]), name


class Signs(torch.optim.SGD):
    """Puts new gradients in the place of the old ones, and then steps."""

    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.grad = parameter.grad.sign()
        return super().step(closure)


class Clips(torch.optim.SGD):
    """Clips the gradients in place, and then steps."""

    def step(self, closure: Any = None) -> Any:
        torch.nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 0.01)
        return super().step(closure)


class Clears(torch.optim.SGD):
    """Clears the gradients after its step by itself."""

    def step(self, closure: Any = None) -> Any:
        found = super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None
        return found


class Zeroes(torch.optim.SGD):
    """Zeroes the gradients after its step by itself."""

    def step(self, closure: Any = None) -> Any:
        found = super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.grad.zero_()
        return found


class Alone(torch.optim.Optimizer):
    """Gradient descent of its own, so that torch hears of one step and not of one inside of another."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                if parameter.grad is not None:
                    self.use(parameter, parameter.grad)

    def use(self, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        parameter.add_(gradient, alpha=-self.param_groups[0]["lr"])


class HalvesAlone(Alone):
    def use(self, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        super().use(parameter, gradient.mul_(0.5))


class ZeroesAlone(Alone):
    def use(self, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        super().use(parameter, gradient)
        gradient.zero_()


ZEROES = (Zeroes, ZeroesAlone)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, Signs, Clips, Clears, *ZEROES, HalvesAlone])
def test_late_calls_score_what_the_step_has_used(kind: Callable[..., torch.optim.Optimizer], to_none: bool) -> None:
    """What the step clips, replaces or clears by itself too. The first call, by which the guard learns, scores nothing.

    Where the step itself writes zeros, but zero_grad does not, it takes the guard one call more.
    """
    late, in_time = make(), make()
    learnt = 3 if kind in ZEROES and to_none else 2
    for model in (late, in_time):
        # Those that clear by themselves use what plain gradient descent uses.
        used = torch.optim.SGD if model is in_time and kind in (Clears, *ZEROES) else kind
        optimizer = used(trained(model), lr=1e-2)
        for step in range(1, 9):
            backward(model, step)
            optimizer.step()
            if model is late:
                optimizer.zero_grad(set_to_none=to_none)
            if model is late or step >= learnt:
                model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
    assert_same_scores(in_time, late)


@pytest.mark.parametrize("kind", [torch.optim.SGD, Signs, Clips, HalvesAlone])
@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_that_a_call_has_scored_are_not_scored_again(
    kind: Callable[..., torch.optim.Optimizer], to_none: bool
) -> None:
    """Calls before the optimizer's step; at every second step the adapter rests."""
    with_calls, without = make(), make()
    for model in (with_calls, without):
        optimizer = kind(trained(model), lr=1e-2)
        for step in range(1, 11):
            rests = step % 2 == 0
            if not rests:
                backward(model, step)
            if not rests or model is with_calls:
                model.base_model.update_and_allocate(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
    assert_same_scores(without, with_calls)


def test_zeros_that_no_call_has_scored_are_those_of_the_next_step(model: peft.PeftModel) -> None:
    """A branch that rests keeps the zeros of a step before, as nobody has cleared them: the optimizer uses them."""
    factors = [(name, p) for name, p in model.named_parameters() if ".lora_" in name]
    optimizer = torch.optim.SGD([p for _, p in factors], lr=0.1)

    def backward(scale: float, factors: list[tuple[str, torch.nn.Parameter]]) -> None:
        sum((scale * p * p).sum() for _, p in factors).backward()

    backward(1.0, factors)
    optimizer.step()
    model.base_model.update_and_allocate(1)
    optimizer.zero_grad()
    backward(0.0, factors)
    optimizer.step()
    model.base_model.update_and_allocate(2)
    backward(1.0, factors[1:])
    optimizer.step()
    optimizer.zero_grad()
    model.base_model.update_and_allocate(3)
    allocator = model.base_model.rankallocator
    resting, used = (allocator.ipt[name.removeprefix("base_model.model.")] for name, _ in (factors[0], factors[1]))
    assert not resting.any()
    assert used.any()


def test_steps_of_other_optimizers_do_not_count() -> None:
    """A scaler leaves the adapter's first steps out, while another model's optimizer steps: no error."""
    model, other = make(), torch.nn.Linear(8, 1)
    optimizer, others = torch.optim.AdamW(trained(model)), torch.optim.AdamW(other.parameters())
    for step in range(1, 8):
        backward(model, step)
        if step > 4:
            optimizer.step()
        optimizer.zero_grad()
        other(torch.randn(4, 8)).pow(2).mean().backward()
        others.step()
        model.base_model.update_and_allocate(step)
    assert scores(model)


@pytest.mark.parametrize("count", [49, 50])
def test_loop_without_a_torch_optimizer_ends_in_an_error(count: int) -> None:
    model = make(total_step=1000)

    def late_step(step: int) -> None:
        backward(model, step)
        with torch.no_grad():
            for parameter in trained(model):
                parameter -= 0.01 * parameter.grad
                parameter.grad = None
        model.base_model.update_and_allocate(step)

    late_step(1)
    for step in range(2, 51):
        late_step(step)
    # Who passes over the error is told again.
    for step in range(51, 53) if count == 50 else ():
        with pytest.raises(NoGradientError, match="in the last 50 calls no torch optimizer has stepped them"):
            late_step(step)


@pytest.mark.parametrize("how", ["a step", "gradients in time"])
def test_what_breaks_the_row_of_calls_without_a_step(how: str) -> None:
    model = make(total_step=1000)
    optimizer = torch.optim.SGD(trained(model), lr=1e-2)

    def late_step(step: int, breaks: bool = False) -> None:
        backward(model, step)
        if breaks and how == "gradients in time":
            model.base_model.update_and_allocate(step)
        elif breaks:
            optimizer.step()
        optimizer.zero_grad()
        if not breaks or how == "a step":
            model.base_model.update_and_allocate(step)

    late_step(1)
    for step in range(2, 51):
        late_step(step)
    late_step(51, breaks=True)
    for step in range(52, 101):
        late_step(step)
    with pytest.raises(NoGradientError, match="in the last 50 calls no torch optimizer has stepped them"):
        late_step(101)


def estimate_gradients(model: peft.PeftModel, step: int) -> None:
    """Without a backward, as zeroth-order methods do."""
    random = torch.Generator().manual_seed(step)
    for parameter in trained(model):
        parameter.grad = torch.randn(parameter.shape, generator=random)


def test_gradients_written_by_hand_are_kept() -> None:
    model, in_time = make(), make()
    for one in (model, in_time):
        optimizer = torch.optim.SGD(trained(one), lr=1e-2)
        for step in range(1, 11):
            estimate_gradients(one, step)
            optimizer.step()
            if one is in_time and step > 1:
                one.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            if one is model:
                one.base_model.update_and_allocate(step)
    assert_same_scores(in_time, model)


def test_gradients_written_by_hand_are_not_scored_again() -> None:
    """No backward is seen there: which were scored is known by what they are."""
    model, in_time = make(), make()
    for one in (model, in_time):
        optimizer = torch.optim.SGD(trained(one), lr=1e-2)
        for step in range(1, 11):
            estimate_gradients(one, step)
            if step % 2 == 0:
                # It has what it scores; the one after zero_grad finds nothing new.
                one.base_model.update_and_allocate(step)
            optimizer.step()
            optimizer.zero_grad()
            if one is model and step % 2 == 0:
                one.base_model.update_and_allocate(step)
    assert_same_scores(in_time, model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_parameter_that_has_changed_its_type_since_is_lent_nothing(dtype: torch.dtype) -> None:
    model, before = make(), torch.float32
    optimizer = torch.optim.SGD(trained(model), lr=1e-2)
    for step in range(1, 8):
        backward(model, step, dtype if step > 4 else before)
        optimizer.step()
        optimizer.zero_grad()
        if step == 4:
            model.to(dtype)
            of_step_3 = {name: value.clone() for name, value in scores(model).items()}
        model.base_model.update_and_allocate(step)
        if step == 4:
            assert all(torch.equal(value, of_step_3[name]) for name, value in scores(model).items())
        assert all(parameter.grad is None for parameter in model.parameters())
    assert any(not torch.equal(value, of_step_3[name]) for name, value in scores(model).items())


@needs.hook_after_accumulation
def test_one_optimizer_for_each_parameter_that_steps_in_backward() -> None:
    """The steps come in the middle of backward, and clear the gradients at once."""
    late, in_time = make(), make()
    for model in (late, in_time):
        optimizers = {parameter: torch.optim.SGD([parameter], lr=1e-2) for parameter in trained(model)}

        def step_at_once(parameter: torch.Tensor, optimizers: Any = optimizers, late_one: bool = model is late) -> None:
            optimizers[parameter].step()
            if late_one:
                optimizers[parameter].zero_grad()

        for parameter in optimizers:
            parameter.register_post_accumulate_grad_hook(step_at_once)
        for step in range(1, 7):
            backward(model, step)
            if model is late or step > 1:
                model.base_model.update_and_allocate(step)
            model.zero_grad()
    assert_same_scores(in_time, late)


def test_model_of_a_late_loop_is_copied_pickled_and_let_go() -> None:
    model = make()
    optimizer = torch.optim.AdamW(trained(model))
    for step in (1, 2, 3):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        model.base_model.update_and_allocate(step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(model)
        pickle.loads(pickle.dumps(dict(model.named_parameters())))
        torch.save(model.state_dict(), io.BytesIO())
    gone: list[int] = []
    import weakref

    weakref.finalize(model, gone.append, 1)
    del model, optimizer
    gc.collect()
    assert gone
