"""How tables fit their width, and labels stay apart."""

from __future__ import annotations

import string

import peft
import pytest
from scenarios import LINEARS, adalora_config, two_branches
from torch import nn

import peft_gradguard
from peft_gradguard.report import tables
from peft_gradguard.report.sections import Section


class Deep(nn.Module):
    """Long names, alike in the middle, and some layers."""

    def __init__(self) -> None:
        super().__init__()
        self.head_of_no_layer = nn.Linear(4, 4)
        self.layers = nn.ModuleDict(
            {
                f"{side}_of_a_model_with_names_that_do_not_fit_into_any_line_of_a_terminal_layers": nn.ModuleList(
                    nn.ModuleDict({f"self_attention_{k}_projection_of_some_length": nn.Linear(4, 4) for k in "qv"})
                    for _ in range(30)
                )
                for side in ("left", "right")
            }
        )  # fmt: skip


@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize("phase", ["audit", "excluded", "pruned"])
def test_tables_fit_the_terminal(columns: int, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    config = adalora_config(target_modules=r".*(projection_of_some_length|no_layer)", init_r=12)
    model = peft.get_peft_model(Deep(), config)
    if phase == "excluded":
        with peft_gradguard.exclude("*right*q_projection*", f"begin{'_of_a_long_pattern' * 5}_end"):
            text = str(peft_gradguard.report(model))
        assert "excluded" in text
        # Cut in its middle, not broken.
        assert [word for word in text.split() if word.startswith("'begin_") and word.endswith("_end':")]
    elif phase == "pruned":
        names = [name for name, _ in model.base_model.model.named_parameters() if ".lora_E." in name]
        model.peft_config["default"].rank_pattern = {name: [i % 7 == 0] * 12 for i, name in enumerate(names)}
        text = str(peft_gradguard.report(model))
        assert "Ranks kept, by layer" in text
    else:
        text = str(peft_gradguard.report(model))
    lines = text.splitlines()
    assert max(map(len, lines)) <= min(columns, 160)
    assert len(lines) < 80
    assert text.isascii()
    assert "0-29" in text
    assert "head_of_no_layer" in text


def test_labels_stay_apart() -> None:
    names = [f"a_rather_long_name_{letter}_with_an_end_that_is_the_same" for letter in "abc"]
    for width in (12, 16, 30, 44):
        short = tables.told_apart(names, width)
        assert len(set(short.values())) == 3
        assert max(map(len, short.values())) <= width


def test_html_is_escaped() -> None:
    model = peft.get_peft_model(two_branches(), adalora_config(target_modules=LINEARS), adapter_name="<b>&")
    html = peft_gradguard.report(model)._repr_html_()
    assert "<b>" not in html
    assert "&lt;b&gt;&amp;" in html
    assert html.count("<table ") == html.count("</table>") > 0


@pytest.mark.parametrize(
    ("label", "width", "front", "said"),
    [
        ("abcdefghijkl", 12, 1 / 3, "abcdefghijkl"),
        ("abcdefghijklm", 12, 1 / 3, "abc...hijklm"),
        ("abcdefghijklm", 12, 1 / 2, "abcd...ijklm"),
        ("abcdefghijklm", 12, 2 / 3, "abcdef...klm"),
        ("abcdefghijklm", 12, 5 / 6, "abcdefg...lm"),
        ("abcdefgh", 7, 1 / 3, "a...fgh"),
        ("abcd", 3, 1 / 3, "..."),
    ],
)
def test_shortened(label: str, width: int, front: float, said: str) -> None:
    assert tables.shortened(label, width, front) == said


def test_a_third_of_a_shortened_label_is_its_beginning() -> None:
    assert tables.shortened(string.ascii_lowercase, 15) == "abcd...stuvwxyz"


TOLD_APART: dict[str, tuple[int, dict[str, str]]] = {
    "none": (12, {}),
    "all short": (3, {"abc": "abc", "d": "d"}),
    "by the end": (12, {"the_same_name_of_1": "the...e_of_1", "the_same_name_of_2": "the...e_of_2"}),
    "by half": (12, {"abc1____________end": "abc1...__end", "abc2____________end": "abc2...__end"}),
    "by two thirds": (12, {"abcde1___________end": "abcde1...end", "abcde2___________end": "abcde2...end"}),
    "by five sixths": (12, {"abcdef1__________end": "abcdef1...nd", "abcdef2__________end": "abcdef2...nd"}),
    "by numbers": (
        12,
        {
            "left_or_so_1_and_the_end": "le..._end~1",
            "left_or_so_2_and_the_end": "le..._end~2",
            "right_side_3_and_the_end": "ri..._end~1",
            "left_or_so_4_and_the_end": "le..._end~3",
            "four": "four",
            "nine_lett": "nine_lett",
            "ten_letter": "te...tter~1",
        },
    ),
}


@pytest.mark.parametrize("case", TOLD_APART)
def test_told_apart(case: str) -> None:
    width, labels = TOLD_APART[case]
    assert tables.told_apart([*labels, *labels], width) == labels
    assert max(map(len, labels.values()), default=0) <= width


def test_columns_side_by_side_or_beneath() -> None:
    def lines(label: str, width: int) -> list[str]:
        return tables._columns(Section("", ("module", "layers", "why"), ((label, "", "frozen"),)), width)

    # Two columns of six letters, a gap before each of the three: what is left is for the first one.
    assert lines("quite_short", 29) == ["  module       layers  why", "  quite_short          frozen"]
    assert lines("quite_short", 28) == ["  module", "    layers; why", "  quite_short", "    -; frozen"]
    sixteen, more = "abcdefghijklmnop", "abcdefghijklmnopq"
    assert lines(sixteen, 34) == ["  module            layers  why", f"  {sixteen}          frozen"]
    assert lines(sixteen, 33) == ["  module", "    layers; why", f"  {sixteen}", "    -; frozen"]
    assert lines(more, 35) == ["  module             layers  why", f"  {more}          frozen"]
    assert lines(more, 34) == ["  module            layers  why", "  abcd...ijklmnopq          frozen"]
    assert lines(more, 33) == ["  module", "    layers; why", f"  {more}", "    -; frozen"]
    assert lines(more, 19) == ["  module", "    layers; why", f"  {more}", "    -; frozen"]
    assert lines(more, 18) == ["  module", "    layers; why", "  abcd...ijklmnopq", "    -; frozen"]


@pytest.mark.parametrize(
    ("indent", "room", "cut"),
    [
        ("", 31, "abcdefghi...nopqrstuvwxyzabcdef"),
        ("  ", 29, "abcdefgh...mnopqrstuvwxyzabcd"),
        ("    ", 27, "abcdefgh...mnopqrstuvwxyzab"),
    ],
)
def test_words_longer_than_a_line_are_cut(indent: str, room: int, cut: str) -> None:
    word = string.ascii_lowercase * 2
    assert tables._wrapped(word[:room], 33, indent) == indent + word[:room]
    assert tables._wrapped(word[: room + 1], 33, indent) == indent + cut


def matrix(width: int, label: str, *ranks: str) -> list[str]:
    layers = map(str, range(len(ranks)))
    return tables._matrix(Section("", ("layer", *layers), ((label, *ranks),)), width)


def test_matrix_goes_on_beneath() -> None:
    assert matrix(15, "query", *"8888") == ["  layer 0 1 2 3", "  query 8 8 8 8"]
    assert matrix(14, "query", *"8888") == ["  layer 0 1 2", "  query 8 8 8", "", "  layer 3", "  query 8"]
    assert matrix(32, "query", "2-5", "", "8") == ["  layer   0   1   2", "  query 2-5       8"]
    # At least one layer a line, however wide.
    assert matrix(32, "q", "100-200", "8" * 30, "1") == [
        "  layer" + "0".rjust(31),
        "  q    " + "100-200".rjust(31),
        "",
        "  layer" + "1".rjust(31),
        "  q     " + "8" * 30,
        "",
        "  layer" + "2".rjust(31),
        "  q    " + "1".rjust(31),
    ]


@pytest.mark.parametrize(
    ("width", "label", "said"),
    [
        (32, "twelve_lette", "twelve_lette"),
        (32, "thirteen_lett", "thi...n_lett"),
        (51, "thirteen_lett", "thi...n_lett"),
        (52, "thirteen_lett", "thirteen_lett"),
        (80, "twenty_letters_of_it", "twenty_letters_of_it"),
        (80, "twenty_one_letters_it", "twent...e_letters_it"),
    ],
)
def test_matrix_leaves_room_for_numbers(width: int, label: str, said: str) -> None:
    assert matrix(width, label, "8")[1] == f"  {said} 8"
