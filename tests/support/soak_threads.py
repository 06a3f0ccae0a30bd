"""Short trainings in four threads, in time and late, with garbage collections at random moments. ``make soak`` runs it.

    python tests/support/soak_threads.py [TRAININGS]

Half of them run under a switch interval of a microsecond, so that threads meet in the middle of everything. It ends
with status 1 at the first error, and says how far it came.
"""

from __future__ import annotations

import gc
import logging
import random
import sys
import threading
import time

import peft_gradguard  # isort: skip
import peft
import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

THREADS = 4


def train(chance: random.Random) -> None:
    """One training of a few steps, in an order drawn by chance; some are dropped before their end, some never call."""
    modules = chance.randint(1, 6)
    base = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(modules)))
    names = [str(index) for index in range(modules)]
    config = peft.AdaLoraConfig(target_modules=names, init_r=2, target_r=1, tinit=1, tfinal=1, deltaT=1, total_step=6)
    model = peft.get_peft_model(base, config)
    if chance.random() < 0.3:
        model.itself = model
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if chance.random() < 0.3:
        optimizers = [torch.optim.SGD([parameter], lr=1e-3) for parameter in parameters]
    else:
        optimizers = [torch.optim.SGD(parameters, lr=1e-3)]
    order = chance.choice(["in time", "late", "late, zeros", "before", "never"])
    for step in range(1, chance.randint(2, 6)):
        model(torch.randn(2, 4)).pow(2).mean().backward()
        if order == "before":
            model.base_model.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.step()
        if order == "in time":
            model.base_model.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=order != "late, zeros")
        if order.startswith("late"):
            model.base_model.update_and_allocate(step)
        if chance.random() < 0.1:
            gc.collect()


def main(trainings: int) -> int:
    assert peft_gradguard.is_enabled()
    logging.getLogger("peft_gradguard").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    hooks = dict(_global_optimizer_pre_hooks), dict(_global_optimizer_post_hooks)
    errors: list[BaseException] = []
    done = [0] * THREADS

    def work(number: int, until: int) -> None:
        chance = random.Random(number)
        while done[number] < until and not errors:
            try:
                train(chance)
                done[number] += 1
            except BaseException as error:
                errors.append(error)

    begin = time.perf_counter()
    for interval, until in ((sys.getswitchinterval(), trainings // 2), (1e-6, trainings)):
        sys.setswitchinterval(interval)
        threads = [threading.Thread(target=work, args=(number, until // THREADS)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert hooks == (dict(_global_optimizer_pre_hooks), dict(_global_optimizer_post_hooks)), "a hook came or went"
    print(f"{sum(done)} trainings in {THREADS} threads, {len(errors)} errors, {time.perf_counter() - begin:.0f} s")
    for error in errors:
        print(repr(error))
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000))
