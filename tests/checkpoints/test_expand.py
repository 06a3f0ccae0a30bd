"""Cut tensors back in their rows, without a model that is trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_gradguard.checkpoints.expand import expanded, keeps_of, saved_triplets
from peft_gradguard.model.parameters import AdaLoraParameter, Factor, Triplet

KEEP = [False, True, False, True]
NAMES = {factor: f"block.lora_{factor}.default" for factor in "ABE"}


def shapes(ranks: int) -> dict[Factor, tuple[int, int]]:
    return {"A": (ranks, 3), "B": (2, ranks), "E": (ranks, 1)}


def zeros(ranks: int) -> dict[str, torch.Tensor]:
    """A state of so many ranks."""
    return {f"there.{NAMES[factor]}": torch.zeros(shape) for factor, shape in shapes(ranks).items()}


def triplet(value: float = 5.0, device: str = "cpu") -> Triplet:
    parts = {
        factor: AdaLoraParameter(NAMES[factor], nn.Parameter(torch.full(shape, value, device=device)), "block", factor)
        for factor, shape in shapes(4).items()
    }
    return Triplet(**parts)


def cut() -> dict[str, torch.Tensor]:
    return {
        f"there.{NAMES['A']}": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
        f"there.{NAMES['B']}": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        f"there.{NAMES['E']}": torch.tensor([[7.0], [8.0]]),
    }


def put_back(live: Triplet, untouched: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    saved = saved_triplets([live], cut(), "there.")
    keeps = keeps_of(saved, {"block.lora_E": KEEP}, "default")
    assert keeps == {NAMES["E"]: KEEP}
    whole = expanded(saved, keeps, untouched=untouched)
    return whole[NAMES["A"]], whole[NAMES["B"]], whole[NAMES["E"]]


def test_kept_ranks_stand_in_their_rows() -> None:
    A, B, E = put_back(triplet())
    assert A[1].tolist() == [1.0, 2.0, 3.0]
    assert A[3].tolist() == [4.0, 5.0, 6.0]
    assert B[:, 1].tolist() == [1.0, 3.0]
    assert B[:, 3].tolist() == [2.0, 4.0]
    assert E.flatten().tolist() == [0.0, 7.0, 0.0, 8.0]


def test_the_other_rows_are_those_of_an_untouched_adapter() -> None:
    A, B, _ = put_back(triplet())
    assert torch.equal(A[[0, 2]], torch.full((2, 3), 5.0))
    assert torch.equal(B[:, [0, 2]], torch.full((2, 2), 5.0))


@pytest.mark.parametrize(("value", "untouched"), [(5.0, False), (float("nan"), True), (float("inf"), False)])
def test_the_other_rows_are_new_where_training_has_changed_them(value: float, untouched: bool) -> None:
    before = torch.random.get_rng_state()
    A, B, E = put_back(triplet(value), untouched)
    assert A.isfinite().all()
    assert B.isfinite().all()
    assert 0 < A[[0, 2]].abs().max() < 0.2
    assert len({*A[[0, 2]].flatten().tolist(), *B[:, [0, 2]].flatten().tolist()}) == 10
    assert E[[0, 2]].flatten().tolist() == [0.0, 0.0]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(A, put_back(triplet(value), untouched)[0])


def test_an_adapter_without_values_yet_gets_the_type_of_what_is_saved() -> None:
    A, B, E = put_back(triplet(device="meta"))
    assert {tensor.device.type for tensor in (A, B, E)} == {"cpu"}
    assert A[1].tolist() == [1.0, 2.0, 3.0]


def test_under_another_default_device() -> None:
    with torch.device("meta"):
        live = triplet(device="cpu")
        saved = saved_triplets([live], {name: tensor.to("cpu") for name, tensor in _on_cpu().items()}, "there.")
        whole = expanded(saved, {NAMES["E"]: KEEP}, untouched=False)
    assert {tensor.device.type for tensor in whole.values()} == {"cpu"}


def _on_cpu() -> dict[str, torch.Tensor]:
    with torch.device("cpu"):
        return cut()


@pytest.mark.parametrize(
    "pattern", [{"block.lora_E": [True, True, True, False]}, {"block.lora_E": [True, True]}, {}, {"other.lora_E": KEEP}]
)
def test_the_pattern_of_another_state_fits_not(pattern: dict[str, list[bool]]) -> None:
    saved = saved_triplets([triplet()], cut(), "there.")
    assert keeps_of(saved, pattern, "default") is None


@pytest.mark.parametrize(
    ("factor", "shape"), [("A", (2, 4)), ("A", (2, 2)), ("B", (3, 2)), ("E", (2, 2)), ("A", (3, 3)), ("B", (2,))]
)
def test_tensors_that_lack_more_than_ranks(factor: str, shape: tuple[int, ...]) -> None:
    state = {**cut(), f"there.{NAMES[factor]}": torch.zeros(shape)}
    (saved,) = saved_triplets([triplet()], state, "there.")
    assert not saved.can_be_put_back


def test_more_ranks_than_the_model_has() -> None:
    (saved,) = saved_triplets([triplet()], zeros(5), "there.")
    assert not saved.is_whole
    assert not saved.can_be_put_back


@pytest.mark.parametrize("shape", [(12,), (4, 3, 1)])
def test_a_model_of_other_dimensions(shape: tuple[int, ...]) -> None:
    """FSDP1 has flat pieces."""
    live = triplet()
    other = live._replace(A=live.A._replace(parameter=nn.Parameter(torch.zeros(shape))))
    (saved,) = saved_triplets([other], cut(), "there.")
    assert not saved.can_be_put_back


def test_the_pattern_of_a_larger_adapter_fits_no_whole_state() -> None:
    saved = saved_triplets([triplet()], zeros(4), "there.")
    assert saved[0].is_whole
    assert saved[0].can_be_put_back
    assert keeps_of(saved, {"block.lora_E": [True] * 5}, "default") is None
    assert keeps_of(saved, {"block.lora_E": KEEP}, "default") == {NAMES["E"]: KEEP}
    assert keeps_of(saved, {}, "default") == {NAMES["E"]: [True] * 4}


def test_a_state_without_one_of_the_three_is_let_be() -> None:
    state = cut()
    del state[f"there.{NAMES['B']}"]
    assert saved_triplets([triplet()], state, "there.") == []
