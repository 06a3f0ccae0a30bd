"""Folded names unfold, as a shell unfolds them, to exactly the names that were folded."""

from __future__ import annotations

import itertools
import random
import re
import shutil
import subprocess
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from peft_gradguard.memory.fold import fold

TOKEN = re.compile(r"\\(.)|\$'\\U([0-9a-f]{8})'|(.)", re.DOTALL)


def unfold(expression: str) -> list[str]:
    """Expand braces as bash does, from the text of its manual; quoted characters stand for themselves."""
    tokens = [
        (escaped or chr(int(code, 16)), True) if escaped or code else (plain, False)
        for escaped, code, plain in TOKEN.findall(expression)
    ]
    (words,), rest = expand(tokens, inside=False)
    assert not rest
    return words


def expand(tokens: list[tuple[str, bool]], inside: bool) -> tuple[list[list[str]], list[tuple[str, bool]]]:
    """Return the words of each alternative up to the closing brace, and what comes after it."""
    alternatives: list[list[str]] = [[""]]
    while tokens:
        (character, quoted), tokens = tokens[0], tokens[1:]
        if character == "{" and not quoted:
            found, rest = expand(tokens, inside=True)
            raw = "".join(c for c, _ in tokens[: len(tokens) - len(rest) - 1])
            words = [word for alternative in found for word in alternative]
            if len(found) == 1:
                first, last = map(int, raw.split(".."))
                words = [str(number) for number in range(first, last + 1)]
            tokens = rest
            alternatives[-1] = [word + more for word in alternatives[-1] for more in words]
        elif inside and character == "}" and not quoted:
            return alternatives, tokens
        elif inside and character == "," and not quoted:
            alternatives.append([""])
        else:
            alternatives[-1] = [word + character for word in alternatives[-1]]
    assert not inside
    return alternatives, []


PARTS = ["q_proj", "v_proj", "lora_A", "lora_B", "lora_E", "0", "1", "2", "3", "10", "007", "01", "h1", "h2", "h_3"]
part = st.one_of(
    st.sampled_from(PARTS),
    st.integers(0, 30).map(str),
    st.text(alphabet="{},.\\ $~*'\"ä界_01a-\n", max_size=4),
    st.text(max_size=3),
)
names = st.one_of(
    st.lists(st.lists(part, min_size=1, max_size=4).map(".".join), max_size=40),
    st.tuples(*[st.lists(part, min_size=1, max_size=5, unique=True)] * 3).map(
        lambda places: [".".join(parts) for parts in itertools.product(*places)]
    ),
)


@given(names)
@example(["a{0..3}", "a{0,1}", "a,b", "", ".", "..", "a..c"])
@example(["x.9999999999999999999999", "x.9999999999999999999998", "x.9999999999999999999997"])
def test_folded_names_unfold_to_exactly_the_names(given_names: list[str]) -> None:
    unfolded = [name for expression in fold(given_names) for name in unfold(expression)]
    assert sorted(unfolded) == sorted(set(given_names))


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_unfolds_them_too() -> None:
    generator = random.Random(3)
    odd = [*PARTS, "a b", "a,b", "$x", "'", '"', "`ls`", "\\", "é世", "x\ny", "-n", *"{}$~*#!ü"]
    for _ in range(40):
        some = {".".join(generator.choices(odd, k=generator.randint(1, 4))) for _ in range(generator.randint(1, 60))}
        folded = fold(sorted(some))
        script = "printf '%s\\0' " + " ".join(folded)
        found = subprocess.run(
            ["bash", "-c", script], capture_output=True, text=True, env={"LC_ALL": "C.UTF-8"}, timeout=60, check=True
        )
        assert sorted(found.stdout.split("\0")[:-1]) == sorted(some)


def test_names_of_a_model_fold_as_one_would_write_them() -> None:
    attention = [
        f"model.layers.{layer}.self_attn.{kind}.lora_{factor}.default"
        for layer in range(16)
        for factor in "EAB"
        for kind in ("q_proj", "v_proj")
    ]
    assert fold(attention) == ["model.layers.{0..15}.self_attn.{q_proj,v_proj}.lora_{A,B,E}.default"]
    experts = [f"blocks.{block}.expert_{expert}.w" for block in ("08", "09") for expert in (1, 2, 3, 7, 10)]
    assert fold([*experts, "head.dense"]) == ["blocks.{08,09}.expert_{{1..3},7,10}.w", "head.dense"]
    assert fold(["h1.a", "h2.a", "h10.a"]) == ["h{1,2,10}.a"]
    assert fold(["a.dense", "a.down"]) == ["a.{dense,down}"]
    assert fold([]) == []


def test_thousands_of_names_fold_in_no_time() -> None:
    generator = random.Random(0)
    every = [
        f"model.layers.{layer}.mlp.experts.{expert}.{kind}.lora_{factor}.default"
        for layer in range(48)
        for expert in range(16)
        for kind in ("gate_proj", "up_proj", "down_proj")
        for factor in "ABE"
    ][:6000]
    unlike = [".".join(str(generator.random()) for _ in range(4)) for _ in range(6000)]
    for names_ in (every, generator.sample(every, 3000), unlike):
        start = time.perf_counter()
        fold(names_)
        assert time.perf_counter() - start < 3
