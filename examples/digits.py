"""Handwritten digits: a small vision transformer that knows 0 to 4 learns all ten digits with AdaLoRA.

The training has two things that plain PEFT cannot stand: adapters that the user froze, and a branch that some batches
do not use. ``make demo`` runs it: first plain PEFT, then the fix that people share for it, then the guard. It needs no
network and no GPU, and less than two minutes on two cores.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import peft
import sklearn.datasets
import sklearn.model_selection
import torch
import transformers
from peft.tuners.adalora import RankAllocator
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

FOLDER = Path(__file__).resolve().parent.parent / "demo-adapter"
PRETRAINED = FOLDER / "pretrained"
LOGITS = FOLDER / "logits.pt"
PICTURE = FOLDER / "ranks.png"
RELOAD = "--reload"

PRETRAINING_STEPS, STEPS, BATCH = 200, 400, 64
INIT_R, TARGET_R = 8, 4
NEEDED_ACCURACY = 0.95
LARGEST_DIFFERENCE = 1e-6


class Digits(NamedTuple):
    """Images ``(n, 1, 8, 8)`` with values from -1 to 1, and their labels ``(n,)``."""

    images: torch.Tensor
    labels: torch.Tensor

    def only(self, chosen: torch.Tensor) -> Digits:
        return Digits(self.images[chosen], self.labels[chosen])


class TwoViewViT(transformers.ViTForImageClassification):
    """A vision transformer that also reads a coarse second view of the digit, in the batches that bring one.

    So it is in many data sets with several views or sensors: the second view is there for a part of the data only.
    Its branch is trainable all the time, but a batch without the view gives it no gradient.
    """

    def __init__(self, config: transformers.ViTConfig) -> None:
        super().__init__(config)
        hidden = config.hidden_size
        self.coarse_branch = nn.Sequential(nn.Linear(4 * 4, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.post_init()

    def forward(
        self, images: torch.Tensor, labels: torch.Tensor | None = None, coarse: torch.Tensor | None = None
    ) -> ImageClassifierOutput:
        features = self.vit(images).last_hidden_state[:, 0]
        if coarse is not None:
            features = features + self.coarse_branch(coarse.flatten(1))
        logits = self.classifier(features)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def load_digits() -> tuple[Digits, Digits]:
    """Return the training digits and the test digits: 1,797 in all, a fifth of them held out."""
    bundled = sklearn.datasets.load_digits()
    images = torch.tensor(bundled.images / 8 - 1, dtype=torch.float32).unsqueeze(1)
    digits = Digits(images, torch.tensor(bundled.target))
    train, test = sklearn.model_selection.train_test_split(
        range(len(images)), test_size=0.2, stratify=bundled.target, random_state=0
    )
    return digits.only(torch.tensor(train)), digits.only(torch.tensor(test))


def batches(digits: Digits, steps: int) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Yield ``(step, batch)`` from step 1 on; every third batch brings the second view."""
    random = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        images, labels = digits.only(torch.randperm(len(digits.labels), generator=random)[:BATCH])
        images = slightly_bent(images, random)
        batch = {"images": images, "labels": labels}
        if step % 3 == 0:
            batch["coarse"] = coarse_view(images)
        yield step, batch


def coarse_view(images: torch.Tensor) -> torch.Tensor:
    return nn.functional.avg_pool2d(images, 2)


def slightly_bent(images: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Turn, stretch and shift each image a little: 1,437 digits alone would be learnt by heart."""
    maps = torch.eye(2, 3) + 0.05 * torch.randn(len(images), 2, 3, generator=random)
    grid = nn.functional.affine_grid(maps, list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def pretrain(digits: Digits) -> None:
    """Train a whole model on the digits 0 to 4 and save it: the base model of everything that follows."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=96, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=192, hidden_dropout_prob=0.1, initializer_range=0.1, num_labels=5,
    )  # fmt: skip
    model = TwoViewViT(config)
    optimizer, schedule = optimizer_for(model, 2e-3, PRETRAINING_STEPS)
    for _, batch in batches(digits.only(digits.labels < 5), PRETRAINING_STEPS):
        model(**batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(PRETRAINED)


def optimizer_for(
    model: nn.Module, rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)


def pretrained_for_ten_digits() -> TwoViewViT:
    """Load the base model with a new, untrained head for ten classes."""
    torch.manual_seed(0)
    return TwoViewViT.from_pretrained(PRETRAINED, num_labels=10, ignore_mismatched_sizes=True)


def adapted() -> peft.PeftModel:
    """Put AdaLoRA on every linear layer, train the head as a whole, and freeze the adapters of the first block."""
    config = peft.AdaLoraConfig(
        target_modules="all-linear", modules_to_save=["classifier"], init_r=INIT_R, target_r=TARGET_R, lora_alpha=32,
        tinit=STEPS // 5, tfinal=STEPS // 5, deltaT=10, total_step=STEPS, orth_reg_weight=0.1,
    )  # fmt: skip
    model = peft.get_peft_model(pretrained_for_ten_digits(), config)
    for name, parameter in model.named_parameters():
        if re.search(r"\.layers?\.0\..*\.lora_", name):
            parameter.requires_grad = False
    return model


class Step(NamedTuple):
    number: int
    loss: float
    budget: int
    skipped: int
    """How many AdaLoRA parameters had no gradient at this step."""


def training(model: peft.PeftModel, digits: Digits) -> Iterator[Step]:
    """Train, calling AdaLoRA where PEFT documents it, and yield what happened at each step."""
    allocator = model.base_model.rankallocator
    optimizer, schedule = optimizer_for(model, 2e-2, STEPS)
    model.train()
    for number, batch in batches(digits, STEPS):
        # Without a task_type, model(...) would go around AdaLoraModel.forward, which adds the orthogonal regulariser.
        loss = model.base_model(**batch).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(number)
        skipped = sum(p.grad is None for name, p in model.named_parameters() if ".lora_" in name)
        optimizer.zero_grad()
        schedule.step()
        yield Step(number, loss.item(), allocator.budget_schedule(number)[0], skipped)


@contextmanager
def passed_on_remedy() -> Iterator[None]:
    """Assign ``RankAllocator.update_ipt`` with the line that people share as the fix, and take it back."""
    # vars, because plain attribute access would give a bound form of the guard's wrapper, which must not be put back.
    original = vars(RankAllocator)["update_ipt"]

    def update_ipt(allocator: RankAllocator, model: nn.Module) -> None:
        # As if PEFT's loop began with: if not p.requires_grad or p.grad is None: continue
        kept = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p.grad is not None]
        original(allocator, SimpleNamespace(named_parameters=lambda: kept))

    RankAllocator.update_ipt = update_ipt
    try:
        yield
    finally:
        RankAllocator.update_ipt = original


def show_failure(digits: Digits) -> None:
    """Train until PEFT fails, and print where and how."""
    done = 0
    try:
        for step in training(adapted(), digits):
            done = step.number
    except (TypeError, KeyError) as error:
        frames = [frame.name for frame in traceback.extract_tb(error.__traceback__) if "adalora" in frame.filename]
        print(f"Step {done + 1} of {STEPS} fails in RankAllocator's {', called from '.join(reversed(frames[-2:]))}:")
        print(f"    {type(error).__name__}: {error}")
    else:
        print(f"No failure in {STEPS} steps: PEFT {peft.__version__} would not need the guard here.")


class KeptRecords(logging.Handler):
    """Keep log records, to show them after the progress lines."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def train_guarded(digits: Digits) -> peft.PeftModel:
    model = adapted()
    kept = KeptRecords()
    logging.getLogger("peft_gradguard").addHandler(kept)
    print("budget: how many ranks may stay; the triplets of the branch count from step 3, when a batch first uses it")
    print("skipped: AdaLoRA parameters without a gradient at this step\n")
    print("    step   loss   budget   skipped")
    for step in training(model, digits):
        if step.number == 1 or step.number % 40 == 0:
            print(f"    {step.number:4}   {step.loss:.2f}   {step.budget:6}   {step.skipped:7}", flush=True)
    show_records(kept.records)
    return model


def show_records(records: Iterable[logging.LogRecord]) -> None:
    """Print what the guard logged, one line for each module; the guard gives one record for each reason."""
    print("\nThe guard logged each skipped parameter once, when it was first skipped:")
    factors: dict[tuple[int, str, str], list[str]] = {}
    for record in records:
        for name in getattr(record, "parameters", ()):
            module, _, factor = name.removesuffix(f".{record.adapter}").rpartition(".lora_")
            factors.setdefault((record.step, record.reason, module), []).append(factor)
        if not hasattr(record, "parameters"):
            print(f"    {record.getMessage()}")
    for (step, reason, module), names in factors.items():
        print(f"    step {step}   {module:<29}   lora_{', lora_'.join(sorted(names))}   {reason}")


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    model.eval()
    return (model(images=digits.images).logits.argmax(dim=1) == digits.labels).float().mean().item()


@torch.no_grad()
def exact_logits(model: nn.Module, digits: Digits) -> torch.Tensor:
    """Return the logits, with both views, so that every adapter takes part, and in double precision.

    Saving cuts pruned ranks away, and a float32 sum of fewer terms is rounded differently (here by some 1e-6). That is
    not what the comparison is about.
    """
    images = digits.images.double()
    return model.eval().double()(images=images, coarse=coarse_view(images)).logits


def reload(test: Digits) -> None:
    """Load the saved adapter as anybody would who has never heard of the guard, and compare the logits."""
    model = peft.PeftModel.from_pretrained(pretrained_for_ten_digits(), FOLDER)
    if "peft_gradguard" in sys.modules:
        sys.exit("The guard was imported, so this says nothing about plain PEFT.")
    difference = (exact_logits(model, test) - torch.load(LOGITS)).abs().max().item()
    print(f"Largest difference of any logit, in double precision: {difference:.1e} (allowed: {LARGEST_DIFFERENCE:.0e})")
    if not difference <= LARGEST_DIFFERENCE:
        sys.exit("The reloaded adapter does not give the same logits.")


def reload_in_plain_peft() -> None:
    environment = {**os.environ, "PEFT_GRADGUARD": "0"}
    sys.stdout.flush()
    if subprocess.run([sys.executable, __file__, RELOAD], env=environment, check=False).returncode != 0:
        sys.exit("Reloading without the guard failed.")


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def demo(train: Digits, test: Digits, picture: Path) -> None:
    # Not at the top of the file, which the process without the guard runs too.
    import peft_gradguard

    if not peft_gradguard.is_enabled():
        sys.exit("PEFT_GRADGUARD switches the guard off. Unset it to see the demo.")

    print(f"Pre-training a small vision transformer on {int((train.labels < 5).sum())} handwritten digits 0 to 4.")
    pretrain(train)
    print("AdaLoRA shall now teach it all ten digits. The adapters of its first block are frozen,")
    print("and two batches of three do not use its branch for a coarse second view.")

    heading("1. Plain PEFT")
    with peft_gradguard.disabled():
        show_failure(train)

    heading("2. The remedy that people share: skip such parameters in update_ipt")
    with peft_gradguard.disabled(), passed_on_remedy():
        show_failure(train)

    heading("3. The guard: import peft_gradguard")
    model = train_guarded(train)
    report = peft_gradguard.report(model)
    print(f"\n{report}\n")
    report.plot(picture)
    print(f"The same as a picture: {os.path.relpath(picture)}")
    reached = accuracy(model, test)
    print(f"\nAccuracy on {len(test.labels)} held-out digits: {reached:.1%}")
    if reached < NEEDED_ACCURACY:
        sys.exit(f"That is below the {NEEDED_ACCURACY:.0%} that this demo must reach.")

    heading("4. The saved adapter in plain PEFT: another process, without the guard")
    model.save_pretrained(FOLDER)
    torch.save(exact_logits(model, test), LOGITS)
    reload_in_plain_peft()

    modules = report.adapters[0].modules
    ranks = f"{sum(m.rank_kept for m in modules if m.ranked)} of {sum(m.rank_started for m in modules if m.ranked)}"
    print(f"\nWith the guard AdaLoRA ran to its end: {reached:.1%} right, {ranks} ranks kept where it ranks,")
    print("and plain PEFT loads the result.")


def quieten() -> None:
    """Silence what third parties say about themselves, and nothing else."""
    transformers.logging.set_verbosity_error()  # the replaced head is reported at length
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    # A triplet whose ranks are all pruned is saved with size 0, which PEFT takes for a shard of DeepSpeed or FSDP.
    warnings.filterwarnings("ignore", message="Adapter .* LoRA tensor.* have invalid shape")
    # PEFT looks up rank_pattern as LoRA means it, by module names; AdaLoRA's has the names of its E parameters.
    warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match", category=RuntimeWarning)


if __name__ == "__main__":
    # More threads only get into each other's way in matrices as small as these.
    torch.set_num_threads(1)
    quieten()
    train, test = load_digits()
    if sys.argv[1:] == [RELOAD]:
        reload(test)
    else:
        FOLDER.mkdir(exist_ok=True)
        demo(train, test, Path(sys.argv[1]) if sys.argv[1:] else PICTURE)
