"""Small real trainings, each with something that plain PEFT cannot stand. Knows nothing of the guard.

Runs in the test's own process (guarded) and in a worker process that never imports the guard (plain).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import peft
import torch
import transformers
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

if TYPE_CHECKING:
    from collections.abc import Callable

torch.set_num_threads(1)

PEFT_VERSION = tuple(int(part) for part in peft.__version__.split(".")[:2])
TRANSFORMERS_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
TOTAL, TINIT, TFINAL, DELTA = 20, 3, 4, 2
FINALISING = TOTAL - TFINAL
FIRST_MASKING = TINIT + 1 + (TINIT + 1) % DELTA
INIT_R, TARGET_R = 6, 2


def adalora_config(**changes: Any) -> peft.AdaLoraConfig:
    settings: dict[str, Any] = {
        "init_r": INIT_R,
        "target_r": TARGET_R,
        "tinit": TINIT,
        "tfinal": TFINAL,
        "deltaT": DELTA,
        "total_step": TOTAL,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
    }
    return peft.AdaLoraConfig(**{**settings, **changes})


class TwoBranches(nn.Module):
    """A trunk that every batch takes, and a branch that only some do."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))
        self.branch = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))
        self.head = nn.Linear(8, 3)

    def forward(
        self, inputs: torch.Tensor, labels: torch.Tensor | None = None, branch: bool = True
    ) -> SequenceClassifierOutput:
        hidden = self.trunk(inputs)
        if branch:
            hidden = hidden + self.branch(hidden)
        logits = self.head(hidden)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def two_branches() -> nn.Module:
    return TwoBranches()


def roberta() -> nn.Module:
    config = transformers.RobertaConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=20,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.RobertaForSequenceClassification(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def opt(hidden: int = 16) -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=40, hidden_size=hidden, num_hidden_layers=4, ffn_dim=2 * hidden, num_attention_heads=2,
        word_embed_proj_dim=hidden,
        max_position_embeddings=20, dropout=0.0, layerdrop=0.5,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def switch_transformers() -> nn.Module:
    config = transformers.SwitchTransformersConfig(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=4,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, dropout_rate=0.0, decoder_start_token_id=0,
        pad_token_id=0, expert_capacity=64, router_jitter_noise=0.0,
    )  # fmt: skip
    return transformers.SwitchTransformersForConditionalGeneration(config)


def generator(step: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + step)


def vectors(step: int, **more: Any) -> dict[str, Any]:
    inputs = torch.randn(6, 8, generator=generator(step))
    return {"inputs": inputs, "labels": (inputs[:, :3].argmax(dim=1)), **more}


def tokens(step: int) -> dict[str, Any]:
    input_ids = torch.randint(4, 40, (4, 6), generator=generator(step))
    return {"input_ids": input_ids, "labels": input_ids[:, 0] % 3}


def sequences(step: int) -> dict[str, Any]:
    input_ids = torch.randint(4, 40, (2, 5), generator=generator(step))
    return {"input_ids": input_ids, "labels": input_ids}


def nothing(model: peft.PeftModel, step: int) -> None:
    pass


def every_step(model: peft.PeftModel, step: int) -> None:
    model.base_model.update_and_allocate(step)


@dataclass(frozen=True)
class Scenario:
    base: Callable[[], nn.Module]
    config: dict[str, Any]
    batch: Callable[[int], dict[str, Any]]
    prepare: Callable[[peft.PeftModel, int], None] = nothing
    """Called with step 0 before training."""
    before_step: Callable[[peft.PeftModel, int], None] = nothing
    after_backward: Callable[[peft.PeftModel, int], None] = nothing
    allocate: Callable[[peft.PeftModel, int], None] = every_step
    regularised: bool = True
    """Whether the loss is the model's own, to which PEFT adds its orthogonal regulariser, or computed outside."""
    plain_error: type[Exception] | None = TypeError
    """What plain PEFT raises."""
    unranked: tuple[str, ...] = ()
    """Parts of names of modules that must not be ranked at the end."""


def frozen(*parts: str, thaw: bool = False) -> Callable[[peft.PeftModel, int], None]:
    def freeze(model: peft.PeftModel, step: int) -> None:
        for name, parameter in model.named_parameters():
            if ".lora_" in name and name.endswith(".default") and all(part in name for part in parts):
                parameter.requires_grad = thaw

    return freeze


def at(*steps: int, do: Callable[[peft.PeftModel, int], None]) -> Callable[[peft.PeftModel, int], None]:
    return lambda model, step: do(model, step) if step in steps else None


def in_turn(*actions: Callable[[peft.PeftModel, int], None]) -> Callable[[peft.PeftModel, int], None]:
    def act(model: peft.PeftModel, step: int) -> None:
        for action in actions:
            action(model, step)

    return act


def add_inference_adapter(name: str) -> Callable[[peft.PeftModel, int], None]:
    def add(model: peft.PeftModel, step: int) -> None:
        targets = model.peft_config["default"].target_modules
        model.add_adapter(name, adalora_config(target_modules=targets, inference_mode=True))
        model.set_adapter("default")

    return add


def merged(model: peft.PeftModel, step: int) -> None:
    model.merge_adapter()


def unmerged(model: peft.PeftModel, step: int) -> None:
    model.unmerge_adapter()


def twice(model: peft.PeftModel, step: int) -> None:
    every_step(model, step)
    every_step(model, step)


def every(steps: int) -> Callable[[peft.PeftModel, int], None]:
    return lambda model, step: every_step(model, step) if step % steps == 0 or step > FINALISING else None


def precomputed_encoder(step: int) -> dict[str, Any]:
    batch = sequences(step)
    hidden = torch.randn(*batch.pop("input_ids").shape, 16, generator=generator(step))
    return {**batch, "encoder_outputs": (hidden,)}


def sometimes(step: int) -> dict[str, Any]:
    return vectors(step, branch=step % 3 == 0)


def never(step: int) -> dict[str, Any]:
    return vectors(step, branch=False)


LINEARS = ["trunk.0", "trunk.2", "branch.0", "branch.2"]
ATTENTION = ["query", "value"]


def branches(**changes: Any) -> Scenario:
    return Scenario(**{"base": two_branches, "config": {"target_modules": LINEARS}, "batch": vectors, **changes})


def classifier(**changes: Any) -> Scenario:
    settings = {"base": roberta, "config": {"target_modules": ATTENTION, "task_type": "SEQ_CLS"}, "batch": tokens}
    return Scenario(**{**settings, **changes})


SCENARIOS: dict[str, Scenario] = {
    "frozen layer": classifier(prepare=frozen("layer.0."), unranked=("layer.0.",)),
    "frozen layer, outside loss": classifier(
        prepare=frozen("layer.0."), unranked=("layer.0.",), regularised=False
    ),
    "frozen and thawed": classifier(
        before_step=in_turn(at(5, do=frozen("layer.1.")), at(10, do=frozen("layer.1.", thaw=True)))
    ),
    "frozen before the final phase": classifier(before_step=at(9, do=frozen("layer.1.")), unranked=("layer.1.",)),
    "branch unused in some steps": branches(batch=sometimes),
    "branch unused in some steps, outside loss": branches(batch=sometimes, regularised=False),
    "branch never used": branches(batch=never, unranked=("branch.",)),
    "branch never used, outside loss": branches(batch=never, regularised=False, unranked=("branch.",)),
    "only A frozen": branches(prepare=frozen("trunk.0", "lora_A")),
    "only B frozen": branches(prepare=frozen("trunk.0", "lora_B")),
    "only E frozen": branches(prepare=frozen("trunk.0", "lora_E"), unranked=("trunk.0",)),
    "A and B frozen": branches(
        prepare=in_turn(frozen("trunk.0", "lora_A"), frozen("trunk.0", "lora_B")), unranked=("trunk.0",)
    ),
    "precomputed encoder outputs": Scenario(
        base=t5, config={"target_modules": ["q", "v"]}, batch=precomputed_encoder,
        unranked=("encoder.",),
    ),
    "LayerDrop": Scenario(
        base=opt, config={"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}, batch=sequences
    ),
    "unrouted expert": Scenario(
        base=switch_transformers, config={"target_modules": ["wi", "wo"]}, batch=sequences,
        # Before 4.44 every expert is called, if with no token: its gradients are zeros.
        plain_error=TypeError if TRANSFORMERS_VERSION >= (4, 44) else None,
    ),
    "inference adapter of a longer name": branches(prepare=add_inference_adapter("default_eval")),
    "another adapter for a few steps": branches(
        prepare=add_inference_adapter("other"),
        before_step=in_turn(
            at(6, do=lambda model, step: model.set_adapter("other")),
            at(9, do=lambda model, step: model.set_adapter("default")),
        ),
    ),
    # Unmerged before the optimizer step: what changes while merged is subtracted wrongly from the base weights.
    "a step with the adapter merged": branches(before_step=at(7, do=merged), after_backward=at(7, do=unmerged)),
    "two calls per step": branches(allocate=twice, plain_error=KeyError),
    "calls that miss the finalising step": branches(allocate=every(15), plain_error=AttributeError),
    "head targeted and in modules_to_save": classifier(
        config={"target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS"},
        plain_error=TypeError if PEFT_VERSION < (0, 16) else None,
        unranked=("classifier.",),
    ),
}  # fmt: skip
if PEFT_VERSION < (0, 6):
    # PEFT 0.5 cannot unmerge (its transpose call lacks an argument).
    del SCENARIOS["a step with the adapter merged"]


@dataclass
class Outcome:
    """What a training left, in tensors and lists, so that it can go from process to process."""

    budgets: list[tuple[int, int, int]] = field(default_factory=list)
    """Per step: the budget that PEFT schedules, ``init_bgt`` and ``target_bgt``."""
    patterns: list[dict[str, list[bool]] | None] = field(default_factory=list)
    scores: list[dict[str, torch.Tensor]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    logits: torch.Tensor | None = None


def build(scenario: Scenario) -> peft.PeftModel:
    torch.manual_seed(0)
    base = scenario.base()
    torch.manual_seed(1)
    return peft.get_peft_model(base, adalora_config(**scenario.config))


def logits(model: nn.Module, scenario: Scenario) -> torch.Tensor:
    model.eval()
    batch = scenario.batch(0)
    # A batch with labels makes PEFT add the regulariser of the trainable adapter, which a loaded model has not got.
    labels = batch.pop("labels")
    if scenario.base in (t5, switch_transformers):
        batch["decoder_input_ids"] = labels
    with torch.no_grad():
        return model(**batch).logits


def loss_of(model: nn.Module, batch: dict[str, Any], regularised: bool) -> torch.Tensor:
    if regularised:
        # Not model(...): without a task_type PeftModel calls the inner model, around AdaLoraModel.forward.
        return model.base_model(**batch).loss
    labels = batch.pop("labels")
    return nn.functional.cross_entropy(model(**batch).logits, labels)


def train(scenario: Scenario | str, folder: str | None = None) -> Outcome:
    """Train through all three phases in the documented order, then save to ``folder``."""
    scenario = SCENARIOS[scenario] if isinstance(scenario, str) else scenario
    model = build(scenario)
    scenario.prepare(model, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    allocator = model.base_model.rankallocator
    outcome = Outcome()
    torch.manual_seed(2)
    for step in range(1, TOTAL + 1):
        model.train()
        scenario.before_step(model, step)
        loss = loss_of(model, scenario.batch(step), scenario.regularised)
        loss.backward()
        scenario.after_backward(model, step)
        optimizer.step()
        scenario.allocate(model, step)
        optimizer.zero_grad()
        outcome.losses.append(loss.item())
        outcome.budgets.append((allocator.budget_schedule(step)[0], allocator.init_bgt, allocator.target_bgt))
        outcome.patterns.append(model.peft_config["default"].rank_pattern)
        outcome.scores.append({name: score.clone() for name, score in allocator.exp_avg_ipt.items()})
    outcome.weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    outcome.logits = logits(model, scenario)
    if folder is not None:
        model.save_pretrained(folder)
    return outcome


def reloaded_logits(name: str, folder: str) -> torch.Tensor:
    """Load a saved adapter into a fresh base model, and give its logits."""
    scenario = SCENARIOS[name]
    torch.manual_seed(0)
    model = peft.PeftModel.from_pretrained(scenario.base(), folder)
    return logits(model, scenario)


def plain_failure(name: str, folder: str) -> BaseException | None:
    """Train and save, and return what is raised instead of raising it."""
    try:
        train(name, folder)
    except Exception as error:
        return error
    return None
