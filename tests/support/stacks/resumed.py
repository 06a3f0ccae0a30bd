"""Trainings stopped and taken up again from each stack's own checkpoint. Arguments: the stacks."""

from __future__ import annotations

import functools
import os
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from scenarios import FINALISING, TOTAL
from stacks.common import ARGUMENTS, FOLDER, RANK, TIMEOUT, allocator_state, batch, model_for, run
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP  # noqa: N817
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from peft_gradguard import AllocatorState
from peft_gradguard.integrations.transformers import AdaLoraCallback

if TYPE_CHECKING:
    from collections.abc import Callable

STOPS = (2, 9, FINALISING + 1)
"""In warm-up, between masking steps, and in the final phase."""


class Ddp:
    """A hand-written loop; the other stacks do a few things in another way."""

    def __init__(self) -> None:
        self.tuner = model_for("trunk.0").base_model
        self.model = self.wrapped()
        self.optimizer = torch.optim.AdamW([p for p in self.tuner.parameters() if p.requires_grad], lr=1e-2)
        self.allocator = AllocatorState(self.tuner)

    def wrapped(self) -> Any:
        return DistributedDataParallel(self.tuner, find_unused_parameters=True)

    def whole(self, **_: Any) -> AbstractContextManager[Any]:
        """In this block the parameters are there."""
        return nullcontext()

    def step(self, step: int) -> None:
        inputs = self.batch(step)
        labels = inputs.pop("labels")
        torch.nn.functional.cross_entropy(self.model(**inputs).logits, labels).backward()
        self.optimizer.step()
        with self.whole(with_grads=True):
            self.tuner.update_and_allocate(step)
        self.optimizer.zero_grad()

    def batch(self, step: int) -> dict[str, Any]:
        # The branch is used on one process only, and in some steps on none.
        return batch(step, step % 3 == RANK)

    def save(self, folder: str) -> None:
        if RANK == 0:
            torch.save({name: part.state_dict() for name, part in self.parts().items()}, folder)
        dist.barrier()

    def load(self, folder: str) -> None:
        saved = torch.load(folder, weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(saved[name])

    def parts(self) -> dict[str, Any]:
        return {"model": self.tuner, "optimizer": self.optimizer, "allocator": self.allocator}

    def facts(self) -> dict[str, Any]:
        with self.whole():
            return facts(self.tuner)


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Fsdp2(Ddp):
    """Saved and loaded in pieces."""

    def wrapped(self) -> Any:
        return fully_shard(self.tuner, mesh=init_device_mesh("cpu", (2,)))

    def batch(self, step: int) -> dict[str, Any]:
        # In the first step too: torch cannot load the optimizer's state of what it has not stepped before.
        return batch(step, step % 3 == 1)

    def save(self, folder: str) -> None:
        with self.whole():
            allocator = self.allocator.state_dict()
        dcp.save({**self.own(), "allocator": allocator}, checkpoint_id=folder)

    def load(self, folder: str) -> None:
        own = self.own()
        with self.whole():
            allocator = self.allocator.state_dict()
        dcp.load({**own, "allocator": allocator}, checkpoint_id=folder)
        set_state_dict(
            self.model, self.optimizer, model_state_dict=own["model"], optim_state_dict=own["optimizer"], options=FLAT
        )
        with self.whole():
            self.allocator.load_state_dict(allocator)

    def own(self) -> dict[str, Any]:
        return dict(zip(("model", "optimizer"), get_state_dict(self.model, self.optimizer, options=FLAT), strict=True))


class Fsdp1(Fsdp2):
    def wrapped(self) -> Any:
        return FSDP(self.tuner, use_orig_params=True, device_id=torch.device("cpu"))

    def whole(self, **more: Any) -> AbstractContextManager[Any]:
        return FSDP.summon_full_params(self.model, **more)


class Zero(Ddp):
    """DeepSpeed's engine; ZeRO 1 or 2."""

    def __init__(self, stage: int) -> None:
        self.stage = stage
        super().__init__()

    def wrapped(self) -> Any:
        import deepspeed
        from stacks.uncompiled import leave_out_shared_memory

        leave_out_shared_memory()
        deepspeed.init_distributed("gloo", timeout=TIMEOUT)
        config = {
            "train_micro_batch_size_per_gpu": 6, "zero_optimization": {"stage": self.stage},
            "zero_allow_untested_optimizer": True,
        }  # fmt: skip
        self.remembered = transformers.integrations.HfDeepSpeedConfig(config)
        optimizer = torch.optim.AdamW([p for p in self.tuner.parameters() if p.requires_grad], lr=1e-2)
        return deepspeed.initialize(model=self.tuner, optimizer=optimizer, config=config)[0]

    def step(self, step: int) -> None:
        self.model.backward(self.model(**batch(step, step % 3 == 0)).loss)
        self.tuner.update_and_allocate(step)
        self.model.step()

    def save(self, folder: str) -> None:
        self.model.save_checkpoint(folder, client_state={"allocator": self.allocator.state_dict()})

    def load(self, folder: str) -> None:
        _, own = self.model.load_checkpoint(folder)
        self.allocator.load_state_dict(own["allocator"])


def facts(tuner: Any) -> dict[str, Any]:
    """What must be the same; scores too, which PEFT forgets where it settles the ranks."""
    state = allocator_state(tuner)
    # save_pretrained takes the adapter out of the names.
    pattern = {name.removesuffix(".default"): keep for name, keep in (state["pattern"] or {}).items()}
    weights = {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in tuner.named_parameters()
    }
    return {**state, "pattern": pattern, "weights": weights}


def outside() -> None:
    """Ask for the state where there are flat pieces only."""
    Fsdp1().allocator.state_dict()


def loop(make: Callable[[], Ddp], resumed_at: int) -> list[dict[str, Any]]:
    """What there is after each step."""
    training = make()
    folder = f"{FOLDER}/{make}"
    if resumed_at:
        training.load(f"{folder}{resumed_at}")
    history = []
    for step in range(resumed_at + 1, TOTAL + 1):
        training.step(step)
        history.append(training.facts())
        if step in STOPS and not resumed_at:
            training.save(f"{folder}{step}")
    return history


class Points(torch.utils.data.Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 500

    def __getitem__(self, index: int) -> dict[str, Any]:
        inputs = torch.randn(8, generator=torch.Generator().manual_seed(index))
        return {"inputs": inputs, "labels": inputs[:3].argmax()}


class Kept(transformers.TrainerCallback):
    """Keeps what there is after each step, and has the Trainer save at the stops."""

    def __init__(self, tuner: Any) -> None:
        self.tuner, self.history = tuner, []

    def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
        self.history.append(facts(self.tuner))
        control.should_save = state.global_step in STOPS


def trainer(resumed_at: int) -> list[dict[str, Any]]:
    """What there is after each step."""
    model = model_for("trunk.0")
    kept = Kept(model.base_model)
    arguments = transformers.TrainingArguments(
        f"{FOLDER}/{'resumed' if resumed_at else 'never'}", max_steps=TOTAL, per_device_train_batch_size=2,
        use_cpu=True, report_to=[], disable_tqdm=True, learning_rate=1e-2, dataloader_pin_memory=False,
        save_strategy="no",
    )  # fmt: skip
    run = transformers.Trainer(model, arguments, train_dataset=Points(), callbacks=[AdaLoraCallback(), kept])
    run.train(resume_from_checkpoint=f"{FOLDER}/never/checkpoint-{resumed_at}" if resumed_at else None)
    assert isinstance(run.model_wrapped, DistributedDataParallel)
    return kept.history


STACKS: dict[str, Callable[[int], list[dict[str, Any]]]] = {
    "ddp": functools.partial(loop, Ddp),
    "trainer": trainer,
    "fsdp1": functools.partial(loop, Fsdp1),
    "fsdp2": functools.partial(loop, Fsdp2),
    "zero1": functools.partial(loop, functools.partial(Zero, 1)),
    "zero2": functools.partial(loop, functools.partial(Zero, 2)),
}

if __name__ == "__main__":
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    cases = {f"{name} {stop}": functools.partial(STACKS[name], stop) for name in ARGUMENTS for stop in (0, *STOPS)}
    run({**cases, "outside": outside} if "fsdp1" in ARGUMENTS else cases)
