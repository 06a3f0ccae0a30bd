"""Random healthy trainings: the guard says nothing of them but what it leaves out. ``make soak`` runs it.

    python tests/support/soak_alarms.py [TRAININGS] [FIRST]

Each number draws a training of its own: shapes, frozen and resting layers, optimizers, schedules, precision, what an
evaluation does. ``python tests/support/soak_alarms.py 1 4711`` runs number 4711 alone, and shows what it is.
"""

from __future__ import annotations

import copy
import gc
import logging
import random
import re
import sys
import time
import warnings
from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import peft_gradguard  # isort: skip
import peft
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_gradguard.troubles.ended import say_what_has_ended

OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "Adam with weight decay": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2, foreach=False),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2, tolerance_grad=0, tolerance_change=0),
}
REST = ("no", "no", "no", "no", "at random", "at random, zeros", "never used", "from the middle", "every other step")
EVALUATIONS = (
    "none",
    "none",
    "plain",
    "disabled",
    "merged",
    "other adapter",
    "copy",
    "state",
    "reference at each step",
)


BFLOAT16 = "Scores of adapters in bfloat16 underflow to zero or become equal"
TIES = "Some ranks have equal scores"
"""Said where it is so, as of gradients that are clipped by value: the ranks are others than the target."""


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(inputs)))


class Net(nn.Module):
    """Blocks with a residual path around each, so that any of them may rest."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(plan.width, plan.hidden) for _ in plan.rests)
        self.head = nn.Linear(plan.width, 3)
        if plan.tied == "weights" and len(self.blocks) > 1:
            self.blocks[1].up.weight = self.blocks[0].up.weight
        self.plan = plan
        self.at: tuple[int, int] = (0, 0)
        """The step, and the micro-batch."""

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        hidden = inputs
        for number, block in enumerate(self.blocks):
            gate = self.plan.is_used(number, *self.at)
            zeros = self.plan.rests[number] == "at random, zeros"
            if not gate and not zeros:
                continue
            for _ in range(2 if self.plan.tied == "layers" and number == 0 else 1):
                if self.plan.checkpoints and self.training:
                    out = checkpoint(block, hidden, use_reentrant=False)
                else:
                    out = block(hidden)
                hidden = hidden + out * float(gate)
        logits = self.head(hidden)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return Output(loss, logits)


class Output(dict):
    """As PEFT wants it: with a loss to which it may add its regulariser."""

    def __init__(self, loss: torch.Tensor | None, logits: torch.Tensor) -> None:
        super().__init__(loss=loss, logits=logits)
        self.loss, self.logits = loss, logits


class Plan:
    """What one training is, drawn from its number."""

    def __init__(self, number: int) -> None:
        chance = random.Random(number)
        self.number = number
        pick = chance.choice
        self.width, self.hidden = chance.randint(3, 6), chance.randint(2, 6)
        self.rests = ["no", *(pick(REST) for _ in range(pick([0, 1, 1, 1, 2, 3])))]
        chance.shuffle(self.rests)
        self.tied = pick(["no"] * 6 + ["weights", "layers"])
        self.init_r = chance.randint(2, 6)
        self.target_r = chance.randint(1, self.init_r - 1)
        self.every = chance.randint(1, 5)
        self.tinit, self.tfinal = pick([0, 0, 1, 2, 3, 5]), pick([0, 0, 1, 2, 3, 5])
        self.first = pick([1, 1, 1, 0]) if self.tfinal else 1
        # At least one masking step before the finalising one.
        masking = (self.tinit // self.every + 1) * self.every
        self.final = masking + 1 + pick([0, 1, 2, 3, 5, 8])
        self.total = self.final + self.tfinal
        self.beyond = pick([0, 0, 0, 3])
        self.beta = pick([0.85, 0.85, 0.5, 0.1])
        self.regularised = pick([True, True, False])
        self.regulariser = pick([0.5, 0.1, 1e-4])
        self.precision = pick(["float32"] * 6 + ["float64", "bfloat16 base", "autocast", "bfloat16"])
        self.optimizer = pick(list(OPTIMIZERS))
        self.optimizers = 1 if self.optimizer == "LBFGS" else pick([1, 1, 1, 2])
        self.wrapped = pick(["no"] * 8 + ["SAM", "closure"]) if self.optimizers == 1 else "no"
        if self.optimizer == "LBFGS":
            self.wrapped = "closure"
        self.schedule = pick(["none", "none", "warm-up from 0", "warm-up", "cosine", "one cycle", "step"])
        if self.schedule == "warm-up from 0":
            # Else the final ranks are settled before anything has trained.
            self.final, self.total = self.final + 2, self.total + 2
        self.accumulates = 1 if self.wrapped != "no" else pick([1, 1, 1, 2, 3])
        self.clips = pick(["no", "no", "norm", "value"] + ["tiny norm"] * self.optimizer.startswith("Ada"))
        self.scaler = self.wrapped == "no" and chance.random() < 0.2
        self.overflows = pick([0.0, 0.1, 0.3])
        # Gradient descent would stand still or diverge.
        self.scale = pick([1.0, 1.0, 1e-3, 1e3]) if self.optimizer.startswith("Ada") else 1.0
        self.zero_grad = pick(["none", "none", "zeros", "model", "by hand"])
        self.clears_first = chance.random() < 0.4
        self.measures = chance.random() < 0.1
        """Whether the gradients are measured after the step, by a clipping that only writes to them."""
        self.checkpoints = chance.random() < 0.15
        self.evaluates = pick(EVALUATIONS)
        self.interval = chance.randint(1, 4)
        self.other_adapter = self.evaluates == "other adapter" or chance.random() < 0.1
        self.frozen = pick(["no", "no", "no", "some", "some parts", "thawed", "frozen later"])
        self.frozen_blocks = [n for n in range(len(self.rests)) if chance.random() < 0.5 and self.rests[n] != "no"]
        self.part = pick(["lora_A", "lora_B", "lora_E"])
        self.saves_head = chance.random() < 0.2
        # PEFT cannot give the state of an adapter whose name is a part of the names of its modules, as "a" may be.
        self.adapter = pick(["default", "default", "task"] + ["a"] * (self.evaluates != "state"))
        self.calls_by = pick(["base_model", "model"])
        self.batch = pick([1, 4, 8])
        # Of a single input all might be dropped, and the gradients be zeros.
        self.dropout = pick([0.0, 0.0, 0.1, 0.5]) if self.batch > 1 else 0.0
        self.rest_seed = chance.random()
        self.targets = pick([["up", "down"], ["up", "down"], ["up"], ["down"]])

    def is_used(self, block: int, step: int, batch: int) -> bool:
        kind = self.rests[block]
        if kind.startswith("at random"):
            return random.Random(f"{self.rest_seed} {block} {step} {batch}").random() < 0.5
        return {
            "no": True,
            "never used": False,
            "from the middle": step > self.final // 2,
            "every other step": step % 2 == 0,
        }[kind]

    def __str__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in vars(self).items())


class Training:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        torch.manual_seed(plan.number)
        net = Net(plan)
        if plan.precision == "float64":
            net.double()
        elif plan.precision.startswith("bfloat16"):
            net.bfloat16()
        self.dtype = net.head.weight.dtype
        more = {"modules_to_save": ["head"]} if plan.saves_head else {}
        config = self.config(**more)
        casts = {"autocast_adapter_dtype": False} if plan.precision == "bfloat16" else {}
        self.model = peft.get_peft_model(net, config, adapter_name=plan.adapter, **casts)
        self.net = net
        if plan.other_adapter:
            self.model.add_adapter("other", self.config(inference_mode=True))
            self.model.set_adapter(plan.adapter)
        self.adapter = {n: p for n, p in self.model.named_parameters() if n.endswith(f".{plan.adapter}")}
        if plan.frozen in ("some", "thawed"):
            self.freeze(True)
        elif plan.frozen == "some parts":
            self.freeze(True, plan.part)
        trainable = [p for n, p in self.model.named_parameters() if p.requires_grad or n in self.adapter]
        halves = [trainable] if plan.optimizers == 1 else [trainable[::2], trainable[1::2]]
        self.optimizers = [OPTIMIZERS[plan.optimizer](half) for half in halves if half]
        self.schedulers = [s for o in self.optimizers if (s := self.scheduler(o)) is not None]
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5) if plan.scaler else None
        self.chance = random.Random(plan.number)

    def config(self, **more: Any) -> peft.AdaLoraConfig:
        plan = self.plan
        return peft.AdaLoraConfig(
            target_modules=plan.targets, init_r=plan.init_r, target_r=plan.target_r, tinit=plan.tinit,
            tfinal=plan.tfinal, deltaT=plan.every, total_step=plan.total, beta1=plan.beta, beta2=plan.beta,
            orth_reg_weight=plan.regulariser, lora_dropout=plan.dropout, lora_alpha=8, **more,
        )  # fmt: skip

    def scheduler(self, optimizer: Any) -> Any:
        kinds = torch.optim.lr_scheduler
        return {
            "none": lambda: None,
            "warm-up from 0": lambda: kinds.LambdaLR(optimizer, lambda n: min(1.0, n / 4)),
            "warm-up": lambda: kinds.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / 4)),
            "cosine": lambda: kinds.CosineAnnealingLR(optimizer, self.plan.total + 5),
            "one cycle": lambda: kinds.OneCycleLR(
                optimizer, max_lr=0.02, total_steps=self.plan.total + 9, cycle_momentum=False
            ),
            "step": lambda: kinds.StepLR(optimizer, 3, 0.5),
        }[self.plan.schedule]()

    def freeze(self, on: bool, part: str = "lora_") -> None:
        for name, parameter in self.adapter.items():
            if part in name and any(f".blocks.{n}." in name for n in self.plan.frozen_blocks):
                parameter.requires_grad = not on

    def loss(self, step: int, batch: int) -> torch.Tensor:
        plan = self.plan
        self.net.at = (step, batch)
        inputs = torch.randn(plan.batch, plan.width, generator=torch.Generator().manual_seed(97 * step + batch))
        labels = inputs.abs().sum(dim=1).long() % 3
        with torch.autocast("cpu", torch.bfloat16) if plan.precision == "autocast" else nullcontext():
            if plan.regularised:
                loss = self.model.base_model(inputs.to(self.dtype), labels=labels).loss
            else:
                loss = nn.functional.cross_entropy(self.model(inputs.to(self.dtype)).logits.float(), labels)
        return loss * plan.scale / plan.accumulates

    def backward(self, step: int) -> None:
        for batch in range(self.plan.accumulates):
            loss = self.loss(step, batch)
            if self.scaler is not None:
                # Never in the first step, so that something is scored even in the shortest training.
                overflows = step > self.plan.first and self.chance.random() < self.plan.overflows
                loss = self.scaler.scale(loss) * (float("inf") if overflows else 1.0)
            loss.backward()

    def clip(self) -> None:
        trainable = [p for p in self.model.parameters() if p.grad is not None]
        if self.plan.clips == "norm":
            nn.utils.clip_grad_norm_(trainable, 0.5)
        elif self.plan.clips == "tiny norm":
            nn.utils.clip_grad_norm_(trainable, 1e-6)
        elif self.plan.clips == "value":
            nn.utils.clip_grad_value_(trainable, 0.1)

    def zero_grad(self) -> None:
        if self.plan.zero_grad == "model":
            self.model.zero_grad()
        elif self.plan.zero_grad == "by hand":
            for parameter in self.model.parameters():
                parameter.grad = None
        else:
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=self.plan.zero_grad == "none")

    def optimize(self, step: int) -> None:
        plan = self.plan
        if plan.wrapped == "closure":

            def closure() -> torch.Tensor:
                self.zero_grad()
                loss = self.loss(step, 0)
                loss.backward()
                return loss

            self.optimizers[0].step(closure)
            return
        self.backward(step)
        if plan.wrapped == "SAM":
            self.climb()
            self.backward(step)
            self.descend()
        if self.scaler is not None:
            for optimizer in self.optimizers if plan.clips != "no" else ():
                self.scaler.unscale_(optimizer)
            self.clip()
            for optimizer in self.optimizers:
                # One that holds nothing which has a gradient is refused by the scaler.
                if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
                    self.scaler.step(optimizer)
            self.scaler.update()
            return
        self.clip()
        for optimizer in self.optimizers:
            optimizer.step()

    def climb(self) -> None:
        """The first half of sharpness-aware minimisation: go up by the gradient, and forget it."""
        self.places = {}
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    self.places[parameter] = parameter.clone()
                    parameter.add_(parameter.grad, alpha=0.05)
        self.zero_grad()

    def descend(self) -> None:
        with torch.no_grad():
            for parameter, place in self.places.items():
                parameter.copy_(place)

    def evaluate(self, step: int) -> None:
        plan, model = self.plan, self.model
        kind = plan.evaluates
        if kind == "none" or (kind != "reference at each step" and step % plan.interval):
            return
        model.eval()
        with torch.no_grad():
            inputs = torch.randn(3, plan.width, dtype=self.dtype)
            if kind in ("disabled", "reference at each step"):
                with model.disable_adapter():
                    model(inputs)
            elif kind == "merged":
                model.merge_adapter()
                model(inputs)
                model.unmerge_adapter()
            elif kind == "other adapter":
                flags = {p: p.requires_grad for p in self.adapter.values()}
                model.set_adapter("other")
                model(inputs)
                model.set_adapter(plan.adapter)
                for parameter, flag in flags.items():
                    parameter.requires_grad = flag
            elif kind == "copy":
                self.copied = copy.deepcopy(model)
                self.copied(inputs)
            elif kind == "state":
                best = {name: value.clone() for name, value in model.state_dict().items()}
                peft.get_peft_model_state_dict(model, adapter_name=plan.adapter)
                model.load_state_dict(best)
            else:
                model(inputs)
        model.train()

    def run(self) -> None:
        plan = self.plan
        self.model.train()
        for step in range(plan.first, plan.total + 1 + plan.beyond):
            if step == plan.final // 2 and plan.frozen in ("thawed", "frozen later"):
                self.freeze(plan.frozen == "frozen later")
            if plan.clears_first:
                self.zero_grad()
            self.optimize(step)
            for scheduler in self.schedulers:
                scheduler.step()
            if plan.measures:
                nn.utils.clip_grad_norm_(self.model.parameters(), float("inf"))
            (self.model.base_model if plan.calls_by == "base_model" else self.model).update_and_allocate(step)
            if not plan.clears_first:
                self.zero_grad()
            self.evaluate(step)


class Heard(logging.Handler):
    """Keeps what is said at WARNING and above, but for what is left out."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if not hasattr(record, "parameters"):
            self.texts.append(record.getMessage())


def alarms(number: int) -> list[str]:
    """Train and return what the guard has said; an error counts as said."""
    heard, logger = Heard(), logging.getLogger("peft_gradguard")
    logger.addHandler(heard)
    propagate, logger.propagate = logger.propagate, False
    try:
        plan = Plan(number)
        training = Training(plan)
        training.run()
        del training
        say_what_has_ended()
    except Exception as error:
        heard.texts.append(f"{type(error).__name__}: {error}")
    finally:
        logger.removeHandler(heard)
        logger.propagate = propagate
    so = [TIES, BFLOAT16] if plan.precision == "bfloat16" else [TIES]
    return [text for text in heard.texts if not any(words in text for words in so)]


def main(trainings: int, first: int) -> int:
    assert peft_gradguard.is_enabled()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if trainings == 1:
        print(Plan(first))
    found: dict[str, list[tuple[int, str]]] = defaultdict(list)
    begin = time.perf_counter()
    for number in range(first, first + trainings):
        for text in alarms(number):
            found[re.sub(r"'\w+'|\d+", "...", text)].append((number, text))
        if number % 50 == 0:
            gc.collect()
            say_what_has_ended()
    print(f"{trainings} healthy trainings, {sum(map(len, found.values()))} alarms, {time.perf_counter() - begin:.0f} s")
    for cases in sorted(found.values(), key=len):
        numbers = ", ".join(str(number) for number, _ in cases[:10])
        print(f"{len(cases)} times, as in {numbers}:\n    {cases[0][1]}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*(int(argument) for argument in (sys.argv[1:] + ["2000", "0"][len(sys.argv) - 1 :]))))
