"""What is drawn of a memory are the equations' own numbers."""

import json

import pytest
import torch
from tiny_run import make_model
from tokenizer_models import corpus

from titans_pretrain import cli
from titans_pretrain.errors import TitansError
from titans_pretrain.inference import memory_trace
from titans_pretrain.inference.memory_picture import draw
from titans_pretrain.inference.memory_trace import Inspection, LayerTrace, trace
from titans_pretrain.inference.prefill import new_cache, prefill
from titans_pretrain.model import memory_reference
from titans_pretrain.model.memory_chunk import MemoryState
from titans_pretrain.model.memory_coefficients import coefficients

VARIANTS = ["lmm", "mac", "mag", "mal"]
IDS = torch.randint(3, 500, (19,), generator=torch.Generator().manual_seed(0)).tolist()
PERSISTENT = 2


def double(variant, **fields):
    return make_model(variant, **fields).double()


def scans(model, layer):
    """What a layer's memory is given in one plain call: tokens and the state before them."""
    memory, kept = model.model.layers[layer].mixer.memory, []
    scan = memory.scan

    def keeping(tokens, state, resets=None):
        if tokens.queries.shape[2] != PERSISTENT:
            kept.append((tokens, state))
        return scan(tokens, state, resets)

    memory.scan = keeping
    with torch.no_grad():
        model(input_ids=torch.tensor([IDS]), use_cache=False)
    del memory.scan
    return kept


def gradients(tokens, state, rule, chunk):
    """Every token's gradient by autograd, at its chunk's first weights: a list of layers each."""
    found = []
    for first in range(0, tokens.queries.shape[2], chunk):
        part = tokens.at(first, first + chunk)
        found += [
            memory_reference._surprise(
                state.weights, part.keys[:, :, t], part.values[:, :, t], *rule[:2]
            )
            for t in range(part.queries.shape[2])
        ]
        _, state = memory_reference.memory_scan(*part, state, chunk_size=chunk, **rule._asdict())
    return found


def norm(layers):
    """Over the memory's layers, the mean of heads."""
    square = sum(u.square().sum((-2, -1)) for u in layers)
    return square.sqrt()


@pytest.mark.parametrize(
    ("variant", "fields"),
    [*((v, {}) for v in VARIANTS), ("mac", {"memory_depth": 3}), ("mac", {"surprise_clip": None})],
)
def test_surprise_and_writes_are_those_of_the_reference(variant, fields):
    model = double(variant, **fields)
    (one,) = trace(model, IDS, [1]).values()
    rule, chunk = model.model.layers[1].mixer.memory.rule, model.config.chunk_size
    surprise, clip, written, gates = [], [], [], []
    for tokens, state in scans(model, 1):
        state = MemoryState(*(tuple(x.double() for x in part) for part in state))
        found = gradients(tokens, state, rule, chunk)
        for t, layers in enumerate(found):
            bound = rule.surprise_clip
            clipped = layers
            if bound is not None:
                clipped = [memory_reference._clamp(u, bound) for u in layers]
            surprise.append(norm(layers).mean())
            clip.append((norm(clipped) / norm(layers)).mean())
            written.append((tokens.step[:, :, t] * norm(clipped)).mean())
            gates.append([g[:, :, t].mean() for g in (tokens.forget, tokens.momentum, tokens.step)])
    for found, wanted in (
        (one.surprise, surprise),
        (one.clip, clip),
        (one.written, written),
        (list(zip(one.forget, one.momentum, one.step, strict=True)), gates),
    ):
        torch.testing.assert_close(
            torch.tensor(found, dtype=torch.float64),
            torch.tensor(wanted, dtype=torch.float64),
            rtol=1e-6,
            atol=1e-9,
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_states_are_those_of_a_memory_that_nobody_looks_at(variant):
    model = double(variant)
    (one,) = trace(model, IDS, [1]).values()
    memory, cache = model.model.layers[1].mixer.memory, new_cache(model)
    mixer = model.model.layers[1].mixer
    written = mixer.persistent() if variant != "mac" else None
    x = torch.zeros(1, 1, 32, dtype=torch.float64)
    with torch.inference_mode():
        start = memory.start(x, written)
        prefill(model, torch.tensor([IDS]), cache)
    prefix = "" if variant == "lmm" else "memory/"
    state = cache.layers[1].state
    for group, before, found in (
        ("weights", start.weights, one.change[-1]),
        ("momentum", start.momentum, one.momentum_norm[-1]),
    ):
        moved = [
            state[f"{prefix}memory.{group}.{i}"] - (w if group == "weights" else 0)
            for i, w in enumerate(before)
        ]
        wanted = sum(w.square().sum() for w in moved).sqrt().item()
        assert found == pytest.approx(wanted, rel=1e-6)
    assert one.chunk_ends == [4, 8, 12, 16, 19]
    assert len(one.change) == len(one.momentum_norm) == 5


def test_what_is_left_at_the_end_is_what_the_unrolled_rule_says():
    dice = torch.Generator().manual_seed(0)
    forget, momentum = (
        torch.rand(2, 30, generator=dice, dtype=torch.float64) * 0.9 for _ in range(2)
    )
    ones = torch.ones(1, 2, 30, dtype=torch.float64)
    unrolled = coefficients(forget[None], momentum[None], ones, None)
    torch.testing.assert_close(memory_trace._left(forget, momentum), unrolled.surprise[0, :, -1])


def test_looking_changes_nothing():
    model = make_model("mag")
    ids = torch.tensor([IDS])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        names = set(vars(model.model.layers[0].mixer.memory))
        trace(model, IDS, [0, 1])
        assert torch.equal(model(input_ids=ids).logits, before)
    assert set(vars(model.model.layers[0].mixer.memory)) == names


def test_a_memory_that_is_not_finite_is_told_about():
    model = make_model("lmm")
    with torch.no_grad():
        model.model.layers[1].mixer.memory.v_proj.weight.fill_(float("nan"))
    trace(model, IDS, [0])
    with pytest.raises(TitansError, match="memory of layer 1 is not finite"):
        trace(model, IDS, [0, 1])


def test_the_picture_takes_any_token_and_any_length(tmp_path):
    for count in (1, 450):
        values = [0.5 + at % 7 for at in range(count)]
        names = ("surprise", "clip", "forget", "momentum", "step", "written", "remembered")
        one = LayerTrace(**dict.fromkeys(names, values))
        one.chunk_ends, one.change, one.momentum_norm, one.start = [count], [1.0], [0.5], 2.0
        tokens = (["$x_", "\\", "\x00", "漢", " $", "%"] * count)[:count]
        most = list(range(min(count, 12)))
        found = Inspection(tokens, {0: one, 3: one}, most, values)
        with open(tmp_path / "picture.png", "wb") as handle:
            draw(found, handle, title="model, $ text")
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_picture_numbers_and_table_are_written(exported, tmp_path, capsys):
    text, picture = tmp_path / "text.txt", tmp_path / "look.png"
    text.write_text("\n".join(corpus(3)))
    words = ["inspect-memory", str(exported), str(text), "--output", str(picture)]
    assert cli.main([*words, "--tokens", "30", "--layer", "1", "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    facts = json.loads((tmp_path / "look.memory.json").read_text())
    assert list(facts["layers"]) == ["1"]
    assert len(facts["tokens"]) == len(facts["moved"]) == 30
    assert text.read_text().startswith("".join(facts["tokens"]).strip())
    moved = facts["moved"]
    assert facts["most"][0] == moved.index(max(moved))
    assert f"{facts['tokens'][facts['most'][0]]!r} ({facts['most'][0]})" in told
    assert all(len(facts["layers"]["1"][name]) == 30 for name in ("surprise", "remembered"))
    assert str(tmp_path / "look.memory.json") in told
    words += ["--tokens", "9", "--layer", "1", "--device", "cpu"]
    assert cli.main(words) == 0  # numbers of its own may be replaced
    assert len(json.loads((tmp_path / "look.memory.json").read_text())["tokens"]) == 9


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("MODEL missing", "missing is no file"),
        ("MODEL empty", "the text is empty"),
        ("MODEL latin", "not UTF-8: byte 3 is 0xe9"),
        ("MODEL text --layer 2", "there is no layer 2"),
        ("MODEL text --output look.jpg", "look.jpg is no name of a PNG"),
        ("MODEL text --output nowhere/look.png", "nothing can be written into nowhere"),
        ("MODEL text.png --output text.png", "text.png would be written over"),
        ("MODEL look.memory.json --output look.png", "look.memory.json would be written over"),
        ("MODEL text --output foreign.png", "foreign.memory.json is there"),
        ("MODEL text --device abacus", "device 'abacus' cannot be used"),
    ],
)
def test_mistakes_are_told_in_three_lines(words, what, exported, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("Bo ba ro mevu.")
    for name in ("text.png", "look.memory.json", "foreign.memory.json"):
        (tmp_path / name).write_text('{"format": "mine"}')
    (tmp_path / "empty").touch()
    (tmp_path / "latin").write_bytes(b"caf\xe9 au lait")
    arguments = words.replace("MODEL", str(exported)).split()
    assert cli.main(["inspect-memory", *arguments]) == 2
    told = capsys.readouterr().err.splitlines()
    assert what in told[0]
    assert len(told) == 3
