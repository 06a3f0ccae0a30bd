"""Random trainings of real PEFT models, drawn by Hypothesis, and followed step by step by the oracle."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import peft
import torch
from hypothesis import strategies as st
from oracle import BrokenLoopError, Facts, Key, Oracle, Schedule
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

MODULES = ("a", "b.c", "layer.0", "layer.10", "default", "test", "x.lora", "ba")
SAVED = ("head.original_module", "head.modules_to_save.default", "out.modules_to_save.test.dense")
ADAPTERS = ("default", "test", "def", "a", "lora", "E")
ORDERS = ("in time", "before", "closure", "late", "late, zeros")
OTHERS = ("default_eval", "my_default", "test", "default", "lora_A", "a", "aa", "E2")


@dataclass(frozen=True)
class Step:
    """What happens before and at one optimizer step."""

    freeze: tuple[tuple[int, str], ...] = ()
    """Modules (by number) and factors (``"A"``, ``"EB"``, ...) to freeze before the step."""
    thaw: tuple[tuple[int, str], ...] = ()
    unused: tuple[tuple[int, str], ...] = ()
    """What gets no gradient."""
    zero: tuple[tuple[int, str], ...] = ()
    """What gets a gradient of zeros."""
    spoilt: tuple[tuple[int, str, float], ...] = ()
    """What gets a value of NaN or inf into its gradient."""
    add: str | None = None
    """An adapter to add, for inference."""
    active: str | None = None
    """``"trained"`` or ``"other"``: switch to the trained adapter, or to the one added last, if any."""
    order: str = "in time"
    """``in time``, ``before`` (the optimizer steps), ``closure`` (in time, where the step itself computes the gradients
    and zeroes them before), ``late`` (after ``zero_grad``), ``late, zeros`` (after it wrote zeros)."""
    optimizer_steps: bool = True
    """False as where a ``GradScaler`` leaves the step out."""
    overflow: bool = False
    """Whether the optimizers are told of an overflow and leave the step out, as a ``GradScaler`` has fused ones do."""
    clears: bool = True
    """False where the gradients of the next step are added to those of this one."""
    other_optimizer_steps: bool = False
    """Whether an optimizer that holds other parameters steps before the call."""
    calls: int = 1


@dataclass(frozen=True)
class Training:
    modules: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    schedule: Schedule
    adapter: str
    steps: tuple[Step, ...]
    seed: int = 0
    ties: bool = False
    """Whether values are few, so that many scores are equal."""
    optimizers: str = "one"
    """``one``, ``two`` (one of them for E), ``each`` (one for each parameter), or ``half`` (nobody steps E)."""
    kind: str = "plain"
    """What ``step`` makes of gradients: ``plain``, ``scales`` (in place), ``replaces``, ``clears`` (after it)."""
    start: int = 1
    zeros_at_start: bool = False
    """Whether E is zero, as PEFT starts it."""


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    init_r = draw(st.integers(1, 4))
    tinit, tfinal = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    betas = st.sampled_from([0.85, 0.5, 0.99, 0.1])
    return Schedule(
        init_r=init_r,
        target_r=draw(st.integers(0, init_r - 1)),
        tinit=tinit,
        tfinal=tfinal,
        total=tinit + tfinal + draw(st.integers(1, 6)),
        every=draw(st.integers(1, 3)),
        beta1=draw(betas),
        beta2=draw(betas),
    )


def parts(count: int) -> st.SearchStrategy[tuple[tuple[int, str], ...]]:
    factors = st.sampled_from(["ABE", "A", "B", "E", "AB", "AE", "BE"])
    some = st.lists(st.tuples(st.integers(0, count - 1), factors), min_size=1, max_size=count).map(tuple)
    everything = st.just(tuple((module, "ABE") for module in range(count)))
    return st.one_of(some, some, some, everything)


def rarely(strategy: st.SearchStrategy[Any], nothing: Any = (), times: int = 4) -> st.SearchStrategy[Any]:
    return st.integers(0, times).flatmap(lambda n: strategy if n == times else st.just(nothing))


@st.composite
def steps(draw: st.DrawFn, count: int, orders: list[str], others: list[str]) -> Step:
    if draw(st.booleans()):
        return Step(order=draw(st.sampled_from(orders)))
    some = parts(count)
    spoilt = st.tuples(some, st.sampled_from([float("nan"), float("inf"), -float("inf")])).map(
        lambda found: tuple((module, factors, found[1]) for module, factors in found[0])
    )
    return Step(
        freeze=draw(rarely(some)),
        thaw=draw(rarely(some)),
        unused=draw(rarely(some)),
        zero=draw(rarely(some)),
        spoilt=draw(rarely(spoilt, times=6)),
        add=draw(rarely(st.sampled_from(others), None, times=5)),
        active=draw(rarely(st.sampled_from(["trained", "other"]), None, times=3)),
        order=draw(st.sampled_from(orders)),
        optimizer_steps=draw(rarely(st.just(False), True, times=8)),
        overflow=draw(rarely(st.just(True), False, times=8)),
        clears=draw(rarely(st.just(False), True, times=8)),
        other_optimizer_steps=draw(rarely(st.just(True), False, times=4)),
        calls=draw(st.sampled_from([1, 1, 1, 1, 1, 2, 0])),
    )


@st.composite
def trainings(draw: st.DrawFn) -> Training:
    schedule = draw(schedules())
    modules = draw(st.lists(st.sampled_from(MODULES), min_size=1, max_size=4, unique=True))
    modules += draw(rarely(st.lists(st.sampled_from(SAVED), min_size=1, max_size=2, unique=True), []))
    orders = draw(
        st.sampled_from([["in time"], ["before"], ["closure"], ["late"], ["late, zeros"], list(ORDERS)]),
    )
    adapter = draw(st.sampled_from(ADAPTERS))
    others = draw(st.lists(st.sampled_from(OTHERS).filter(lambda name: name != adapter), min_size=1, max_size=2))
    one = steps(len(modules), orders, others)
    return Training(
        modules=tuple(modules),
        shapes=tuple(draw(st.tuples(st.integers(1, 4), st.integers(1, 4))) for _ in modules),
        schedule=schedule,
        adapter=adapter,
        steps=tuple(draw(one) for _ in range(schedule.total)),
        seed=draw(st.integers(0, 1000)),
        ties=draw(st.booleans()),
        optimizers=draw(rarely(st.sampled_from(["two", "each", "half"]), "one", times=1)),
        kind=draw(rarely(st.sampled_from(["scales", "replaces", "clears"]), "plain", times=1)),
        start=draw(st.sampled_from([1, 1, 1, 0])),
        zeros_at_start=draw(st.booleans()),
    )


class Descent(torch.optim.Optimizer):
    """Gradient descent that leaves out what is not finite, so that only gradients are ever spoilt."""

    def __init__(self, parameters: Any, kind: str = "plain") -> None:
        super().__init__(parameters, {})
        self.kind = kind
        self.found_inf: torch.Tensor | None = None

    def step(self, closure: Callable[[], None] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            closure()
        if self.found_inf is not None:
            return
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                if parameter.grad is not None and parameter.requires_grad and parameter.grad.isfinite().all():
                    self.one_step(parameter)

    def one_step(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        if self.kind == "scales":
            parameter.grad.mul_(0.5)
        elif self.kind == "replaces":
            parameter.grad = parameter.grad.sign()
        parameter.sub_(parameter.grad, alpha=0.125)
        if self.kind == "clears":
            parameter.grad = None


def base_model(training: Training) -> nn.Module:
    root = nn.Module()
    for name, (inputs, outputs) in zip(training.modules, training.shapes, strict=True):
        parent, (*path, last) = root, name.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, nn.Linear(inputs, outputs))
    return root


def config(training: Training, **changes: Any) -> peft.AdaLoraConfig:
    schedule = training.schedule
    return peft.AdaLoraConfig(
        # A pattern, as names in a list would also match what PEFT has put inside the modules named. PEFT 0.5 adds
        # an adapter from the outside, where names are longer.
        target_modules=rf"(base_model\.model\.)?({'|'.join(map(re.escape, training.modules))})",
        init_r=schedule.init_r,
        target_r=schedule.target_r,
        tinit=schedule.tinit,
        tfinal=schedule.tfinal,
        total_step=schedule.total,
        deltaT=schedule.every,
        beta1=schedule.beta1,
        beta2=schedule.beta2,
        lora_alpha=1,
        **changes,
    )


@dataclass
class Run:
    """One training, guarded and foretold."""

    training: Training
    model: peft.PeftModel = field(init=False)
    seen: Counter[str] = field(default_factory=Counter)
    """What occurred, to see whether the trainings drawn are worth something."""

    def __post_init__(self) -> None:
        training = self.training
        self.random = torch.Generator().manual_seed(training.seed)
        self.model = peft.get_peft_model(base_model(training), config(training), adapter_name=training.adapter)
        self.inner = self.model.base_model.model
        self.allocator = self.model.base_model.rankallocator
        suffixes = {f".lora_{factor}.{training.adapter}": factor for factor in "ABE"}
        self.parameters: dict[Key, nn.Parameter] = {}
        self.names: dict[str, Key] = {}
        for name, parameter in self.inner.named_parameters():
            for suffix, factor in suffixes.items():
                if name.endswith(suffix):
                    key = Key(name.removesuffix(suffix), factor)
                    self.parameters[key], self.names[name] = parameter, key
        assert len(self.parameters) == 3 * len(training.modules)
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                if not (training.zeros_at_start and key.factor == "E"):
                    parameter.copy_(self.values(parameter))
        modules = list(dict.fromkeys(key.module for key in self.parameters))
        self.optimizers = [
            (Descent([self.parameters[key] for key in held], training.kind), held) for held in self.held()
        ]
        self.other = torch.nn.Parameter(torch.ones(2))
        self.other_optimizer = Descent([self.other])
        self.oracle = Oracle(training.schedule, modules, inside_saved_copies(modules))

    def held(self) -> list[set[Key]]:
        """What each optimizer holds."""
        keys = list(self.parameters)
        energies = {key for key in keys if key.factor == "E"}
        return {
            "one": [set(keys)],
            "two": [energies, {*keys} - energies],
            "each": [{key} for key in keys],
            "half": [{*keys} - energies],
        }[self.training.optimizers]

    def values(self, like: torch.Tensor) -> torch.Tensor:
        if self.training.ties:
            return torch.randint(1, 3, like.shape, generator=self.random).to(like.dtype)
        return torch.randn(like.shape, generator=self.random)

    def keys(self, wanted: tuple[tuple[int, str], ...]) -> list[Key]:
        return [Key(self.training.modules[module], factor) for module, factors in wanted for factor in factors]

    def train(self) -> Run:
        for number, step in enumerate(self.training.steps, self.training.start):
            self.one_step(number, step)
        return self

    def one_step(self, number: int, step: Step) -> None:
        self.switch_adapters(step)
        for wanted, trainable in ((step.freeze, False), (step.thaw, True)):
            for key in self.keys(wanted):
                self.parameters[key].requires_grad = trainable
        if step.order == "closure" and step.optimizer_steps:
            self.step_optimizers(step)
        else:
            self.backward(step)
        if step.other_optimizer_steps:
            self.other.grad = torch.ones_like(self.other)
            self.other_optimizer.step()
            self.oracle.optimizer_step(set(), {})
        if step.order == "before":
            self.call(number, step.calls)
        if step.order != "closure" and step.optimizer_steps:
            self.step_optimizers(step)
        if step.order in ("in time", "closure"):
            self.call(number, step.calls)
        if step.order != "closure" and step.clears:
            self.zero_grad(set_to_none=step.order != "late, zeros")
        if step.order.startswith("late"):
            self.call(number, step.calls)

    def step_optimizers(self, step: Step) -> None:
        closure = (lambda: self.backward(step)) if step.order == "closure" else None
        for optimizer, held in self.optimizers:
            before = {} if closure else self.gradients()
            optimizer.found_inf = torch.ones(1) if step.overflow else None
            optimizer.step(closure)
            if step.overflow:
                self.oracle.optimizer_left_out(held)
                continue
            after = self.gradients()
            used = {key: before.get(key) if after[key] is None else after[key] for key in held}
            self.oracle.optimizer_step(held, used)

    def zero_grad(self, set_to_none: bool) -> None:
        for parameter in self.parameters.values():
            if parameter.grad is not None and set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    def switch_adapters(self, step: Step) -> None:
        if step.add and step.add not in self.model.peft_config:
            self.model.add_adapter(step.add, config(self.training, inference_mode=True))
            self.seen["adapter added"] += 1
        if step.active:
            added = list(self.model.peft_config)[-1]
            self.model.set_adapter(self.training.adapter if step.active == "trained" else added)
            self.seen["adapter switched"] += step.active == "other" and added != self.training.adapter

    def backward(self, step: Step) -> None:
        """Give each parameter in use a gradient by a real backward, as a tensor's hooks want to see one."""
        if step.order == "closure":
            self.zero_grad(set_to_none=True)
        unused, zero = set(self.keys(step.unused)), set(self.keys(step.zero))
        gradients = {key: self.values(parameter) for key, parameter in self.parameters.items()}
        for key in zero:
            gradients[key].zero_()
        for module, factors, value in step.spoilt:
            for key in self.keys(((module, factors),)):
                gradients[key].view(-1)[-1] = value
        used = [key for key in self.parameters if key not in unused and self.parameters[key].requires_grad]
        if used:
            torch.stack([(self.parameters[key] * gradients[key]).sum() for key in used]).sum().backward()
        self.oracle.backward(set(used), {key for key in used if gradients[key].any()})
        for name, parameter in self.inner.named_parameters():
            if name not in self.names and ".lora_" in name:
                # Another adapter's: where it is active, it has gradients too.
                parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None

    def gradients(self) -> dict[Key, torch.Tensor | None]:
        return {key: parameter.grad for key, parameter in self.parameters.items()}

    def call(self, number: int, times: int) -> None:
        for _ in range(times):
            facts = Facts(
                {key: parameter.detach().clone() for key, parameter in self.parameters.items()},
                self.gradients(),
                {key: parameter.requires_grad for key, parameter in self.parameters.items()},
            )
            try:
                energies: dict[str, torch.Tensor] | None = self.oracle.call(number, facts)
            except BrokenLoopError:
                energies = None
            self.guarded_call(number, raises=energies is None)
            self.compare(facts, energies or {})
            self.take_notes(number)

    def guarded_call(self, number: int, raises: bool) -> None:
        from peft_gradguard import NoGradientError

        try:
            self.model.base_model.update_and_allocate(number)
        except NoGradientError:
            assert raises, f"step {number}: the guard calls the loop broken, the oracle does not"
        else:
            assert not raises, f"step {number}: the oracle calls the loop broken, the guard does not"

    def compare(self, facts: Facts, energies: dict[str, torch.Tensor]) -> None:
        allocator, oracle = self.allocator, self.oracle
        for mine, theirs in (
            (oracle.ipt, allocator.ipt),
            (oracle.sensitivity, allocator.exp_avg_ipt),
            (oracle.uncertainty, allocator.exp_avg_unc),
        ):
            named = {self.names[name]: value for name, value in theirs.items()}
            assert named.keys() == mine.keys()
            for key, value in mine.items():
                assert torch.equal(named[key], value), key
        assert (allocator.init_bgt, allocator.target_bgt) == oracle.budgets
        counted = [f"{module}.%s.{self.training.adapter}" for module in oracle.counted]
        assert list(allocator.name_set) == sorted(counted)
        pattern = self.model.peft_config[self.training.adapter].rank_pattern
        named_pattern = None if pattern is None else {self.names[name].module: keep for name, keep in pattern.items()}
        assert named_pattern == oracle.pattern
        for key, parameter in self.parameters.items():
            masked = energies.get(key.module) if key.factor == "E" else None
            assert torch.equal(parameter, facts.weights[key] if masked is None else masked), key
            assert parameter.grad is facts.gradients[key]
            assert parameter.requires_grad == facts.trainable[key]

    def take_notes(self, number: int) -> None:
        self.seen["calls"] += 1
        self.seen["late"] += self.oracle.late is not None
        self.seen["some pruned"] += any(not all(keep) for keep in (self.oracle.pattern or {}).values())
        self.seen["some unranked"] += len(self.oracle.counted) < len(self.oracle.modules)
        self.seen["final phase"] += number > self.training.schedule.finalising


def inside_saved_copies(modules: list[str]) -> set[str]:
    """The modules of ``SAVED``; an ``original_module`` only beside a copy."""
    copies = {module for module in modules if "modules_to_save" in module}
    originals = {module for module in modules if module == "head.original_module"}
    return copies | (originals if any(module.startswith("head.") for module in copies) else set())
