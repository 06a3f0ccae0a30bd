"""A ``Trainer`` that is interrupted, resumed and told to load the best: with ``AdaLoraCallback`` nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import transformers
from adalora_callback import AdaLoraCallback
from torch import nn

import peft_gradguard

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS, TINIT, TFINAL, DELTA = 12, 2, 3, 2
FILE = "adalora_state.safetensors"


class Net(nn.Module):
    """``rest`` takes part in some steps only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.rest, self.drop = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 4), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor, labels: Any = None) -> dict[str, torch.Tensor]:
        out = self.b(torch.tanh(self.a(x)))
        if x[0, 0] > 0:
            out = out + self.rest(self.drop(out))
        return {"loss": (out - x.roll(1, 1)).pow(2).mean(), "out": out}


class Points(torch.utils.data.Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": torch.randn(4, generator=torch.Generator().manual_seed(index)), "labels": 0}


def base() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def adapted(frozen: bool = False, targets: tuple[str, ...] = ("a", "b", "rest")) -> peft.PeftModel:
    config = peft.AdaLoraConfig(
        target_modules=list(targets), init_r=4, target_r=2, total_step=STEPS, tinit=TINIT, tfinal=TFINAL,
        deltaT=DELTA,
    )  # fmt: skip
    config.total_step = None
    model = peft.get_peft_model(base(), config)
    if frozen:
        model.base_model.model.b.requires_grad_(False)
    return model


def trainer(model: nn.Module, folder: str, given: Any = None, **more: Any) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        **{
            "output_dir": folder, "max_steps": STEPS, "per_device_train_batch_size": 2, "use_cpu": True,
            "report_to": [], "disable_tqdm": True, "learning_rate": 1e-2, "dataloader_pin_memory": False,
            "logging_steps": 1, "save_strategy": "steps", "save_steps": 1, **more,
        }
    )  # fmt: skip
    return transformers.Trainer(
        model, arguments, train_dataset=Points(), callbacks=[AdaLoraCallback()], **(given or {})
    )


def facts(model: peft.PeftModel, run: transformers.Trainer) -> dict[str, Any]:
    allocator = model.base_model.rankallocator
    logged = ("loss", "grad_norm", "adalora/budget", "adalora/total_rank", "adalora/skipped")
    return {
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "scores": {name: score.clone() for name, score in allocator.exp_avg_ipt.items()},
        "pattern": model.peft_config["default"].rank_pattern,
        "budget": (allocator.init_bgt, allocator.target_bgt, allocator.name_set),
        "logs": [{key: row[key] for key in logged} for row in run.state.log_history if "loss" in row],
    }


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for key in ("pattern", "budget", "logs"):
        assert one[key] == other[key], key
    for key in ("weights", "scores"):
        assert one[key].keys() == other[key].keys()
        assert all(torch.equal(value, other[key][name]) for name, value in one[key].items()), key


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    # transformers 4.44 reads its own file of random states as torch no more does by itself.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    return tmp_path


@pytest.mark.peft
@pytest.mark.parametrize(("accumulation", "frozen"), [(1, False), (4, True)])
def test_stopped_at_any_step_and_resumed_it_ends_as_never_stopped(
    accumulation: int, frozen: bool, said: Callable[[], list[str]]
) -> None:
    model = adapted(frozen)
    run = trainer(model, "never", gradient_accumulation_steps=accumulation)
    run.train()
    end = facts(model, run)
    # In warm-up, at and after a masking step, where the ranks are settled, and in the final phase.
    for step in (1, 4, 5, STEPS - TFINAL, STEPS - 1):
        again = adapted(frozen)
        run = trainer(again, f"from{step}", gradient_accumulation_steps=accumulation)
        run.train(resume_from_checkpoint=f"never/checkpoint-{step}")
        assert_same(facts(again, run), end)
    assert said() == []


def test_a_model_around_the_adapted_one() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = adapted()

        def forward(self, x: torch.Tensor, labels: Any = None) -> dict[str, torch.Tensor]:
            return self.inner(x)

    model = Around()
    run = trainer(model, "never")
    run.train()
    again = Around()
    resumed = trainer(again, "resumed")
    resumed.train(resume_from_checkpoint="never/checkpoint-5")
    assert_same(facts(again.inner, resumed), facts(model.inner, run))


@pytest.mark.parametrize("step", [1, 6, STEPS - 1])
def test_a_checkpoint_that_was_made_without_the_callback(step: int, said: Callable[[], list[str]]) -> None:
    trainer(adapted(), "run").train()
    (Path("run") / f"checkpoint-{step}" / FILE).unlink()
    model = adapted()
    trainer(model, "again").train(resume_from_checkpoint=f"run/checkpoint-{step}")
    pattern = model.peft_config["default"].rank_pattern
    assert pattern is not None
    lost = [message for message in said() if FILE in message]
    assert len(lost) == 1
    assert f"scores and counts begin anew at step {step}" in lost[0]


def test_a_file_half_written_is_never_there(monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]) -> None:
    from peft_gradguard.integrations import resume

    def fail(tensors: Any, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(resume, "save_file", fail)
    model = adapted()
    trainer(model, "run", save_steps=6).train()
    assert not list(Path("run").rglob(FILE))
    assert ["No space left" in message and "begins AdaLoRA's scores anew" in message for message in said()] == [
        True
    ] * 2
    assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) == 6


def test_a_spoilt_file_and_another_schedule_are_said(said: Callable[[], list[str]]) -> None:
    trainer(adapted(), "run", save_steps=6).train()
    trainer(adapted(), "longer", max_steps=STEPS + 4).train(resume_from_checkpoint="run/checkpoint-6")
    assert any(f"total_step is {STEPS} in the state and {STEPS + 4} here" in message for message in said())
    (Path("run") / "checkpoint-6" / FILE).write_bytes(b"spoilt")
    trainer(adapted(), "again").train(resume_from_checkpoint="run/checkpoint-6")
    assert sum("could not use" in message for message in said()) == 2


@pytest.mark.parametrize(("more", "expected"), [({"save_only_model": True}, 0), ({"save_total_limit": 2}, 2), ({}, 4)])
def test_it_is_where_the_checkpoints_are(more: dict[str, Any], expected: int) -> None:
    trainer(adapted(), "run", save_steps=3, **more).train()
    assert len(list(Path("run").rglob("adalora_state*"))) == expected


def test_it_is_there_before_the_file_that_says_that_the_checkpoint_is_whole() -> None:
    trainer(adapted(), "run", save_steps=6).train()
    for step in (6, 12):
        ours, last = (Path("run") / f"checkpoint-{step}" / name for name in (FILE, "trainer_state.json"))
        assert ours.stat().st_mtime_ns <= last.stat().st_mtime_ns


def test_a_state_saved_elsewhere_gets_no_file() -> None:
    run = trainer(adapted(), "run", save_strategy="no")
    run.train()
    run.save_state()
    run.save_model("model")
    assert not list(Path().rglob("adalora_state*"))


def best_of(model: nn.Module, best: int, **more: Any) -> transformers.Trainer:
    """A ``Trainer`` that takes the checkpoint of this step for the best, and loads it at its end."""
    evaluated = iter(range(1, STEPS + 1))
    given = {
        "eval_dataset": torch.utils.data.Subset(Points(), range(4)),
        "compute_metrics": lambda predicted: {"badness": float(abs(next(evaluated) - best))},
    }
    return trainer(
        model, "best", given, load_best_model_at_end=True, metric_for_best_model="badness", greater_is_better=False,
        eval_strategy="steps", eval_steps=1, label_names=["labels"], **more,
    )  # fmt: skip


def output(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(Points()[0]["x"].abs()[None])["out"]  # type: ignore[no-any-return]


def assert_chosen(run: transformers.Trainer, checkpoint: str) -> None:
    """The model has become that of the checkpoint, and is saved as plain PEFT loads it."""
    with peft_gradguard.disabled():
        expected = peft.PeftModel.from_pretrained(base(), checkpoint)
    assert torch.allclose(output(run.model), output(expected), atol=1e-6)
    run.save_model("chosen")
    with peft_gradguard.disabled():
        chosen = peft.PeftModel.from_pretrained(base(), "chosen")
    assert torch.allclose(output(chosen), output(expected), atol=1e-6)
    assert chosen.peft_config["default"].rank_pattern == expected.peft_config["default"].rank_pattern


@pytest.mark.peft
@pytest.mark.parametrize("best", [1, 4, 7, STEPS - TFINAL, STEPS])
def test_the_best_is_loaded_whatever_ranks_it_had(best: int, said: Callable[[], list[str]]) -> None:
    model = adapted()
    run = best_of(model, best)
    run.train()
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    settled = json.loads(Path("best", f"checkpoint-{STEPS}", "adapter_config.json").read_text())["rank_pattern"]
    (found,) = peft_gradguard.report(model).adapters
    assert found.final is (True if model.peft_config["default"].rank_pattern == settled else None)
    assert found.final or best < STEPS - TFINAL
    assert_chosen(run, run.state.best_model_checkpoint)
    assert said() == []


@pytest.mark.peft
def test_the_best_of_a_training_that_stops_early(said: Callable[[], list[str]]) -> None:
    model = adapted()
    run = best_of(model, 4)
    run.add_callback(transformers.EarlyStoppingCallback(3))
    run.train()
    assert run.state.global_step == 7
    assert f"the ranks are not final: AdaLoRA settles them at step {STEPS - TFINAL}" in " ".join(
        str(peft_gradguard.report(model)).split()
    )
    assert_chosen(run, "best/checkpoint-4")
    assert said() == []


def test_with_the_guard_off_the_best_is_warned_of(said: Callable[[], list[str]]) -> None:
    with peft_gradguard.disabled(), pytest.raises(RuntimeError, match="size mismatch"):
        best_of(adapted(targets=("a", "b")), 4).train()
    assert ["peft_gradguard is off, and load_best_model_at_end is set" in message for message in said()] == [True]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_killed_between_any_two_writes_the_last_whole_checkpoint_loses_nothing() -> None:
    """The process dies inside of a save: at each of the files, in turn, that a checkpoint gets."""
    program = textwrap.dedent(
        """
        import os, signal, sys
        sys.path[:0] = sys.argv[3].split(os.pathsep)
        import builtins, torch
        import test_callback_resume as test
        import safetensors.torch
        countdown = int(sys.argv[1])
        def mortal(save):
            def act(*args, **kwargs):
                global countdown
                countdown -= 1
                if countdown == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return save(*args, **kwargs)
            return act
        torch.save = mortal(torch.save)
        os.replace = mortal(os.replace)
        from transformers import TrainerState
        TrainerState.save_to_json = mortal(TrainerState.save_to_json)
        from pathlib import Path
        whole = [path.parent for path in Path("run").glob("*/trainer_state.json")]
        last = max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)
        model = test.adapted()
        run = test.trainer(model, "run", save_steps=2)
        run.train(resume_from_checkpoint=last and str(last))
        torch.save({key: value for key, value in test.facts(model, run).items() if key != "logs"}, sys.argv[2])
        """
    )
    here = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    deaths = 0
    for countdown in (7, 9, 6, 8, 10**6):
        ran = subprocess.run([sys.executable, "-c", program, str(countdown), "end.pt", here], capture_output=True)
        deaths += ran.returncode == -signal.SIGKILL
    assert (ran.returncode, deaths) == (0, 4), ran.stderr.decode()[-2000:]
    model = adapted()
    run = trainer(model, "never")
    run.train()
    end = torch.load("end.pt", weights_only=False)
    assert_same({**end, "logs": None}, {**facts(model, run), "logs": None})
