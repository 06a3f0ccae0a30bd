"""Run the Python blocks of pages of the docs, in order; says on failure which one it was.

    python tests/support/run_docs.py docs/report.md docs/faq.md

The names that the blocks take for granted (``model``, ``optimizer``, ``batches`` ...) are made here, small and real.
The blocks of a page share one namespace; on the page about training stacks each block has a new one, since each is a
training of its own, and must have adapted the ranks.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

STACKS = "training-stacks.md"


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Return the fenced blocks in this language, with the number of each one's first line."""
    found: list[tuple[int, str]] = []
    inside: list[str] | None = None
    begin = 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if inside is None and line.strip() == f"```{language}":
            inside, begin = [], number + 1
        elif inside is not None and line.strip() == "```":
            found.append((begin, "\n".join(inside) + "\n"))
            inside = None
        elif inside is not None:
            inside.append(line)
    return found


def names() -> dict[str, Any]:
    import torch
    import transformers
    from scenarios import TOTAL, adalora_config, branches, build, two_branches, vectors
    from trainers import Examples

    import peft_gradguard

    model = build(branches())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batches = [vectors(step) for step in range(1, TOTAL + 1)]
    arguments = transformers.TrainingArguments(
        output_dir="run", max_steps=TOTAL, per_device_train_batch_size=4, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, label_names=["labels"], remove_unused_columns=False,
    )  # fmt: skip

    made: list[torch.nn.Module] = []

    def make_base_model() -> torch.nn.Module:
        made.append(two_branches())
        return made[-1]

    def train(model: Any) -> None:
        model.peft_config["default"].rank_pattern = None
        for step, batch in enumerate(batches, start=1):
            model.base_model(**batch).loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()

    return {
        "torch": torch, "model": model, "optimizer": optimizer, "batches": batches, "step": 1, "train": train,
        "loss": model(**batches[0]).loss, "arguments": arguments, "train_dataset": Examples(),
        "eval_dataset": torch.utils.data.Subset(Examples(), range(32)),
        "make_base_model": make_base_model, "made": made,
        "config": adalora_config(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        "device": torch.device("cpu"), "peft_gradguard": peft_gradguard,
    }  # fmt: skip


def language_model(given: dict[str, Any]) -> None:
    """Names for TRL: a model of language, its tokenizer and its data, in place of the others."""
    import datasets
    import tokenizers
    import transformers
    import trl
    from scenarios import TOTAL

    words = {word: number for number, word in enumerate(["<pad>", "<eos>", *"abcdefghij"])}
    given["tokenizer"] = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>", eos_token="<eos>",
    )  # fmt: skip
    given["base_model"] = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32,
        )
    )  # fmt: skip
    given["arguments"] = trl.SFTConfig(
        output_dir="run", max_steps=TOTAL, per_device_train_batch_size=4, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, bf16=False, dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    rows = [{"input_ids": [2 + (start + place) % 10 for place in range(8)]} for start in range(64)]
    given["train_dataset"] = datasets.Dataset.from_list(rows)


def one_process_world(given: dict[str, Any]) -> None:
    """A process group of one process, as torchrun would make it."""
    import torch.distributed as dist

    if not dist.is_initialized():
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def deepspeed_world(given: dict[str, Any]) -> None:
    from stacks.uncompiled import leave_out_shared_memory

    leave_out_shared_memory()
    one_process_world(given)


def twice_the_batches(given: dict[str, Any]) -> None:
    given["batches"] = given["batches"] * 2


NEEDS: dict[str, Callable[[dict[str, Any]], None]] = {
    "SFTTrainer": language_model,
    "gradient_accumulation_steps": twice_the_batches,
    "DistributedDataParallel": one_process_world,
    "deepspeed": deepspeed_world,
    "fsdp": one_process_world,
}
OPTIONAL = ("deepspeed", "lightning", "optuna", "trl")
"""Packages without which a block is passed over."""


def adapted(namespace: dict[str, Any]) -> None:
    """Look whether the block has done what its page is about."""
    from scenarios import FINALISING

    import peft_gradguard

    if "best" in namespace:
        # A sweep leaves no model in its Trainer. E of a new adapter is zero, so that one that never trained keeps 0.
        kept = [
            sum(int(p.count_nonzero()) for n, p in m.named_parameters() if "lora_E" in n) for m in namespace["made"]
        ]
        assert 2 * namespace["best"].hyperparameters["target_r"] in kept, kept
        assert sum(ranks in (2, 4, 6) for ranks in kept) == len(kept) - kept.count(0) == 3, kept
        return
    model = namespace["trainer"].model if "trainer" in namespace else namespace["model"]
    (adapter,) = peft_gradguard.report(model).adapters
    assert adapter.step == FINALISING, f"the last call was at step {adapter.step}"
    ranked = [module for module in adapter.modules if module.ranked]
    assert ranked
    kept = sum(module.rank_kept for module in ranked)
    assert kept == adapter.target_budget, f"{kept} ranks kept, budget {adapter.target_budget}"


def run(page: Path) -> None:
    shared = names()
    for line, source in blocks(page, "python"):
        print(f"{page.name}, line {line}", flush=True)
        missing = [package for package in OPTIONAL if package in source and find_spec(package) is None]
        if missing:
            print(f"passed over: {missing} not installed")
            continue
        namespace = names() if page.name == STACKS else shared
        for word, need in NEEDS.items():
            if word in source:
                need(namespace)
        exec(compile("\n" * (line - 1) + source, str(page), "exec"), namespace)
        if page.name == STACKS:
            adapted(namespace)


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu")
    for page in sys.argv[1:]:
        run(Path(page).resolve())
    sys.stdout.flush()
    # Not an orderly end: DeepSpeed and process groups have nobody to say goodbye to.
    os._exit(0)
