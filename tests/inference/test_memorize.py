"""A text read once goes on as if it stood before the prompt."""

import functools
import json
import shutil

import pytest
import torch
from test_streamer import streamed
from tiny_run import make_model
from tokenizer_models import corpus, train
from transformers import PreTrainedTokenizerFast

from titans_pretrain import cli
from titans_pretrain.errors import UserError
from titans_pretrain.export import tokenizer as tokenizers
from titans_pretrain.inference import generate, inspect_memory, memorize, memory_file
from titans_pretrain.inference.generate import Sampling
from titans_pretrain.inference.prefill import new_cache, prefill

TEXT = "\n".join(corpus(9)) + "\n漢字 mevu"
PIECE = 32  # of some 300 tokens
GREEDY = Sampling(max_new_tokens=2, temperature=0)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.write_text(TEXT, newline="")
    return path


@pytest.fixture(scope="module")
def memory_of_text(exported, tmp_path_factory):
    """The exported MAC's memory of ``TEXT``; not to be changed."""
    room = tmp_path_factory.mktemp("memory")
    (room / "text").write_text(TEXT, newline="")
    memorize.memorize(exported, room / "text", room / "memory", piece=PIECE, device="cpu")
    return room / "memory"


@pytest.fixture
def models(monkeypatch, exported):
    """Models of every variant in place of the exported one."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(exported)

    def put(variant, **fields):
        model = make_model(variant, **fields)
        monkeypatch.setattr(generate, "load", lambda *_, **__: (model, tokenizer))
        return model, tokenizer

    return put


def states(memory):
    return {
        (number, name): tensor
        for number, layer in enumerate(memory.cache.layers)
        for name, tensor in layer.state.items()
    }


def assert_close(one, other):
    ours, theirs = states(one), states(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
    assert (one.tokens, one.context, one.pending) == (other.tokens, other.context, other.pending)


@pytest.mark.parametrize("variant", ["lmm", "mac", "mag", "mal"])
def test_the_next_token_s_logits_are_those_behind_text_and_prompt(
    variant, models, exported, text, tmp_path
):
    model, tokenizer = models(variant)
    memorize.memorize(exported, text, tmp_path / "memory", piece=PIECE, device="cpu")
    owner = memory_file.Owner.of(exported, model)
    held = memory_file.load(tmp_path / "memory", model, owner)
    prompt = " ba rofoleli"
    stream = generate.TokenStream(tokenizer, held.context, held.pending)
    rest = stream.finish(prompt)
    whole = tokenizer(TEXT + prompt)["input_ids"]
    assert held.tokens + len(rest) == len(whole)
    with torch.inference_mode():
        found = model(input_ids=torch.tensor([rest]), past_key_values=held.cache).logits[0, -1]
        wanted = model(input_ids=torch.tensor([whole]), use_cache=False).logits[0, -1]
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("prompt", [" ba", "", "zo 漢 ba."])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=8, temperature=0),
        Sampling(max_new_tokens=8, seed=3),
        Sampling(max_new_tokens=6, beams=3),
    ],
    ids=["likeliest", "drawn", "beams"],
)
def test_the_continuation_is_that_of_text_and_prompt_in_one_go(
    sampling, prompt, models, exported, memory_of_text, capsys
):
    models("mac")
    found = generate.generate(exported, prompt, sampling, memory=memory_of_text, device="cpu")
    assert capsys.readouterr().out == found + "\n"
    wanted = generate.generate(exported, TEXT + prompt, sampling, device="cpu")
    assert wanted == TEXT + found
    assert found.startswith(prompt)
    assert len(found) > len(prompt)


@pytest.mark.parametrize("prompt", ["", " "])
def test_nothing_goes_on_from_text_and_prompt_of_no_token(
    prompt, models, exported, tmp_path, monkeypatch
):
    model, _ = models("mac")
    blind = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
    to_spaces = tokenizers.write(train(**blind), tmp_path)
    monkeypatch.setattr(generate, "load", lambda *_, **__: (model, to_spaces))
    (tmp_path / "text").write_text(" \n ")
    out = tmp_path / "memory"
    memorize.memorize(exported, tmp_path / "text", out, device="cpu")
    with pytest.raises(UserError, match="makes no token of") as caught:
        generate.generate(exported, prompt, GREEDY, memory=out, device="cpu")
    assert (caught.value.where, caught.value.fix) == ("PROMPT", "give a prompt with more in it")
    assert generate.generate(exported, "Bo", GREEDY, memory=out, device="cpu").startswith("Bo")


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("variant", ["mag", "transformer"])
def test_it_finds_what_transformers_finds_without_a_cache(
    variant, beams, models, exported, monkeypatch, capsys
):
    model, tokenizer = models(variant)
    monkeypatch.setattr(generate, "prefill", functools.partial(prefill, piece=3))
    sampling = Sampling(max_new_tokens=8, temperature=0, beams=beams)
    found = generate.generate(exported, "Bo mevu ro ba ro", sampling, device="cpu")
    tokens = model.generate(
        torch.tensor([tokenizer("Bo mevu ro ba ro")["input_ids"]]),
        max_new_tokens=8,
        num_beams=beams,
        do_sample=False,
        use_cache=False,
    )
    assert found == streamed(tokenizer, [], tokens[0].tolist())


@pytest.mark.parametrize("cut", [1, 200, 333])
def test_two_sittings_are_one(cut, models, exported, memory_of_text, tmp_path):
    model, _ = models("mac")
    memory = tmp_path / "memory"
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text(TEXT[:cut])
    second.write_text(TEXT[cut:])
    memorize.memorize(exported, first, memory, device="cpu")
    found = memorize.memorize(exported, second, memory, earlier=memory, device="cpu")
    owner = memory_file.Owner.of(exported, model)
    assert_close(found, memory_file.load(memory_of_text, model, owner))


def test_a_call_takes_no_more_than_a_piece_and_predicts_from_its_last_token(
    models, exported, text, tmp_path
):
    model, _ = models("mac")
    calls = []
    model.register_forward_hook(
        lambda _, args, given, out: calls.append((given["input_ids"].shape[1], out.logits.shape)),
        with_kwargs=True,
    )
    memory = memorize.memorize(exported, text, tmp_path / "memory", piece=PIECE, device="cpu")
    sizes = [size for size, _ in calls]
    assert sum(sizes) == memory.tokens
    assert set(sizes[:-1]) == {PIECE}
    assert sizes[-1] <= PIECE
    assert {tuple(shape) for _, shape in calls} == {(1, 1, 512)}


@pytest.mark.parametrize("variant", ["lmm", "mac", "mag", "mal"])
def test_a_memory_of_20_000_tokens_is_as_large_as_one_of_1_000(variant):
    sizes = {"mac": {"segment_length": 128}, "mag": {"window_size": 128}}
    wide = {"hidden_size": 16, "num_hidden_layers": 1, "chunk_size": 64, "memory_depth": 1}
    model = make_model(variant, **wide, **sizes.get(variant, {}))
    cache, bytes_ = new_cache(model), []
    with torch.inference_mode():
        for count in (1024, 20_480 - 1024):
            ids = torch.randint(3, 500, (1, count))
            prefill(model, ids, cache, piece=1024)
            layers = (tensor for layer in cache.layers for tensor in layer.state.values())
            bytes_.append(sum(tensor.numel() * tensor.element_size() for tensor in layers))
    assert int(cache.position(1, torch.device("cpu"))) == 20_480
    assert bytes_[0] == bytes_[1]


def _killed(monkeypatch, blocks):
    """Interrupt the reading after some blocks; every block is saved."""
    monkeypatch.setattr(memorize, "BLOCK_BYTES", 50)
    monkeypatch.setattr(memorize, "SAVE_SECONDS", 0.0)
    show, left = memorize._Progress.show, [blocks]

    def interrupted(self, *given, **options):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        show(self, *given, **options)

    return monkeypatch.setattr(memorize._Progress, "show", interrupted)


def test_an_interrupted_reading_goes_on_where_it_was_saved(
    models, exported, text, tmp_path, monkeypatch, capsys
):
    model, _ = models("mac")
    memory = tmp_path / "memory"
    wanted = memorize.memorize(exported, text, tmp_path / "whole", device="cpu")
    with monkeypatch.context() as patch:
        _killed(patch, blocks=7)
        with pytest.raises(KeyboardInterrupt):
            memorize.memorize(exported, text, memory, device="cpu")
    assert not memory.exists()
    read = []
    model.register_forward_pre_hook(
        lambda _, args, given: read.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    found = memorize.memorize(exported, text, memory, device="cpu")
    assert "going on at byte 350" in capsys.readouterr().err
    assert_close(found, wanted)
    assert 0 < sum(read) < 0.7 * wanted.tokens
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory", "text", "whole"]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_characters_may_lie_across_blocks_and_saves(
    size, models, exported, tmp_path, monkeypatch, capsys
):
    models("lmm")
    text = tmp_path / "text"
    text.write_text("漢字😀é bo\r\n ba")
    wanted = memorize.memorize(exported, text, tmp_path / "whole", device="cpu")
    with monkeypatch.context() as patch:
        _killed(patch, blocks=3)
        patch.setattr(memorize, "BLOCK_BYTES", size)
        with pytest.raises(KeyboardInterrupt):
            memorize.memorize(exported, text, tmp_path / "memory", device="cpu")
    assert_close(memorize.memorize(exported, text, tmp_path / "memory", device="cpu"), wanted)


def test_what_was_saved_of_another_text_or_memory_is_not_gone_on_from(
    models, exported, text, tmp_path, monkeypatch, capsys
):
    models("mac")
    memory, earlier = tmp_path / "memory", tmp_path / "earlier"
    with monkeypatch.context() as patch:
        _killed(patch, blocks=7)
        with pytest.raises(KeyboardInterrupt):
            memorize.memorize(exported, text, memory, device="cpu")
    left = memory.with_name("memory.unfinished")
    kept = left.read_bytes()
    memorize.memorize(exported, text, earlier, device="cpu")
    memorize.memorize(exported, text, memory, earlier=earlier, device="cpu")
    memory.unlink()
    left.write_bytes(kept)
    text.write_text("Another text: " + TEXT)
    memorize.memorize(exported, text, memory, device="cpu")
    told = capsys.readouterr().err
    assert "going on" not in told
    assert "is of another text, or of another memory before it: reading begins anew" in told


def test_a_text_not_read_to_its_end_is_no_memory_yet(
    models, exported, text, tmp_path, monkeypatch, capsys
):
    models("mac")
    with monkeypatch.context() as patch:
        _killed(patch, blocks=3)
        with pytest.raises(KeyboardInterrupt):
            memorize.memorize(exported, text, tmp_path / "memory", device="cpu")
    left = tmp_path / "memory.unfinished"
    with pytest.raises(UserError, match="not been read to its end"):
        generate.generate(exported, "Bo", Sampling(), memory=left, device="cpu")
    with pytest.raises(UserError, match="not been read to its end"):
        memorize.memorize(exported, text, tmp_path / "other", earlier=left, device="cpu")


def test_a_memory_that_is_not_finite_is_not_written(models, exported, text, tmp_path):
    model, _ = models("mac")
    with torch.no_grad():
        model.model.layers[1].mixer.memory.v_proj.weight.fill_(float("nan"))
    with pytest.raises(memorize.TitansError, match=r"layer 1's .* is not finite after"):
        memorize.memorize(exported, text, tmp_path / "memory", device="cpu")
    assert not (tmp_path / "memory").exists()


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("MODEL missing OUT", "missing is no file"),
        ("MODEL . OUT", "is no file"),
        ("MODEL empty OUT", "the text is empty"),
        ("MODEL latin OUT", "not UTF-8: byte 3 is 0xe9"),
        ("MODEL cut OUT", "not UTF-8: byte 2 is 0xe6"),
        ("MODEL text text", "text is there already"),
        ("MODEL text nowhere/OUT", "nothing can be written into nowhere"),
        ("MODEL text OUT --memory missing", "there is no such memory"),
        ("MODEL text OUT --memory text", "the memory cannot be read"),
        ("MODEL text OUT --memory .", "a directory is no memory"),
        ("MODEL OUT.unfinished OUT", "the text has the name"),
        ("MODEL text OUT --memory OUT.unfinished", "the earlier memory has the name"),
        ("MODEL text text2", "where reading is saved is another file"),
        ("MODEL text OUT --device abacus", "device 'abacus' cannot be used"),
        ("missing text OUT", "missing is no directory"),
    ],
)
def test_mistakes_are_told_in_three_lines(
    words, what, exported, text, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").touch()
    (tmp_path / "text2.unfinished").write_text("the user's own")
    if "OUT.unfinished" in words:
        (tmp_path / "OUT.unfinished").write_text("the user's own")
    (tmp_path / "latin").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "cut").write_bytes("a 漢".encode()[:-1])
    assert cli.main(["memorize", *words.replace("MODEL", str(exported)).split()]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("bytes")]
    assert what in told[0]
    assert len(told) == 3
    assert not (tmp_path / "OUT").exists()
    assert all(path.read_text() == "the user's own" for path in tmp_path.glob("*.unfinished"))


def test_a_text_is_not_read_twice_where_the_end_was_cut_off(
    models, exported, text, tmp_path, monkeypatch, capsys
):
    """Killed once the memory is written, before the part saved on the way is deleted."""
    models("lmm")
    memory, left = tmp_path / "memory", tmp_path / "memory.unfinished"
    memorize.memorize(exported, text, memory, device="cpu")
    text.write_text("Another text. " * 40)
    with monkeypatch.context() as patch:
        _killed(patch, blocks=3)
        with pytest.raises(KeyboardInterrupt):
            memorize.memorize(exported, text, memory, earlier=memory, device="cpu")
    kept = left.read_bytes()
    wanted = memorize.memorize(exported, text, memory, earlier=memory, device="cpu")
    left.write_bytes(kept)
    whole = memory.read_bytes()
    found = memorize.memorize(exported, text, memory, earlier=memory, device="cpu")
    assert "has already read" in capsys.readouterr().err
    assert found.tokens == wanted.tokens
    assert memory.read_bytes() == whole
    assert not left.exists()


def test_ids_that_the_model_does_not_know_are_refused(models, exported, text, tmp_path):
    models("lmm", vocab_size=300)
    with pytest.raises(UserError, match="ids exceed the model's 300"):
        memorize.memorize(exported, text, tmp_path / "memory", device="cpu")
    with pytest.raises(UserError, match="ids exceed the model's 300"):
        generate.generate(exported, TEXT, Sampling(), device="cpu")


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"model_type": "titans", "variant": "transformer"}, "transformer"),
        ({"model_type": "titans_baseline"}, "titans_baseline"),
        ({"model_type": "lantern", "auto_map": {"AutoModel": "code.Lantern"}}, "lantern"),
        ({"model_type": "mac"}, "mac"),
    ],
)
def test_a_model_without_memory_is_refused_before_it_is_loaded(settings, kind, text, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    for call in (
        lambda: memorize.memorize(tmp_path, text, tmp_path / "memory", device="cpu"),
        lambda: inspect_memory.inspect_memory(tmp_path, text, tmp_path / "a.png", device="cpu"),
        lambda: generate.generate(tmp_path, "Bo", GREEDY, memory=tmp_path / "m", device="cpu"),
    ):
        with pytest.raises(UserError, match=f"a {kind} model has no neural memory") as caught:
            call()
        assert caught.value.fix == "use a Titans model: lmm, mac, mag, mal"


def test_a_memory_is_not_for_another_model(models, exported, memory_of_text, tmp_path):
    models("mac")
    other = shutil.copytree(exported, tmp_path / "other")
    (other / "manifest.json").unlink()
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    with pytest.raises(UserError, match="the memory is another model's"):
        generate.generate(other, "Bo", Sampling(), memory=memory_of_text, device="cpu")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--memory", "m", "--no-cache"], "a memory is a cache"),
        (["--beams", "0"], "--beams is 0"),
        (["--beams", "2", "--temperature", "0.5"], "--temperature is 0.5 with 2 beams"),
        (["--beams", "2", "--top-k", "5"], "--top-k says nothing"),
        (["--temperature", "0", "--top-p", "0.5"], "--top-p says nothing"),
        (["--memory", "missing"], "there is no such memory"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words, what, exported, capsys):
    assert cli.main(["generate", str(exported), "Bo", *words]) == 2
    told = capsys.readouterr().err.splitlines()
    assert what in told[0]
    assert len(told) == 3
