import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_streamer import streamed
from test_token_stream import tokenizer_of
from tiny_run import make_model
from transformers import PreTrainedTokenizerFast

from titans_pretrain import cli
from titans_pretrain.checkpoint import manifest
from titans_pretrain.errors import UserError
from titans_pretrain.inference import memory_file
from titans_pretrain.inference.generate import Sampling, generate, load
from titans_pretrain.inference.prefill import new_cache, prefill
from titans_pretrain.inference.prompts import prompt_ids
from titans_pretrain.inference.token_stream import TokenStream

GREEDY = Sampling(max_new_tokens=12, temperature=0)


def test_it_prints_the_prompt_and_what_the_model_goes_on_with(exported, capsys):
    text = generate(exported, "Hello ba", GREEDY, device="cpu")
    assert capsys.readouterr().out == text + "\n"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(exported)
    tokens = make_model().generate(
        torch.tensor([tokenizer("Hello ba")["input_ids"]]),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=2,
    )
    assert text == streamed(tokenizer, [], tokens[0].tolist())
    assert text.startswith("Hello ba")
    assert len(text) > len("Hello ba")


def test_the_cache_changes_nothing(exported, capsys):
    with_cache = generate(exported, "Hello ba", GREEDY, device="cpu")
    without = Sampling(max_new_tokens=12, temperature=0, use_cache=False)
    assert generate(exported, "Hello ba", without, device="cpu") == with_cache


def test_the_seed_decides_the_draw(exported, capsys):
    one, two, other = (
        generate(exported, "Ba", Sampling(max_new_tokens=15, seed=seed), device="cpu")
        for seed in (1, 1, 2)
    )
    assert one == two != other


def test_an_empty_prompt_begins_a_document(exported, capsys):
    text = generate(exported, "", GREEDY, device="cpu")
    tokens = make_model().generate(
        torch.tensor([[2]]), max_new_tokens=12, do_sample=False, eos_token_id=2
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(exported)
    assert text == streamed(tokenizer, [], tokens[0].tolist())


def test_a_continuation_beyond_the_model_s_positions_is_refused(exported, monkeypatch):
    model, tokenizer = load(exported)
    model.config.max_position_embeddings = 16
    package = "titans_pretrain.inference.generate.load"
    monkeypatch.setattr(package, lambda *_, **__: (model, tokenizer))
    with pytest.raises(UserError, match="12 new ones are more than the model's 16 positions"):
        generate(exported, "Bo mevu ro ba", GREEDY, device="cpu")


def test_the_opening_token_is_not_put_twice(exported):
    from tokenizers.processors import TemplateProcessing

    tokenizer = PreTrainedTokenizerFast.from_pretrained(exported)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    assert prompt_ids(tokenizer, "") == [2]
    assert prompt_ids(tokenizer, "Bo")[0] == 2


@pytest.mark.parametrize(
    ("pending", "prompt", "shown"),
    [
        (" mevu", " ba", " ba"),  # what the memory's text held stands before it, and is not shown
        (" mevu", "", ""),
        (" e", "\u0301 ba", "é ba"),  # the prompt changes the last character that was held
    ],
)
def test_of_what_a_memory_still_held_only_what_the_prompt_changes_is_shown(
    pending, prompt, shown, exported, monkeypatch, capsys
):
    model, _ = load(exported)
    tokenizer = tokenizer_of(normalization_rule_name="nmt_nfkc")
    cache = new_cache(model)
    prefill(model, torch.tensor([tokenizer("Bo")["input_ids"]]), cache)
    memory = memory_file.Memory(cache, context="o", pending=pending)
    place = "titans_pretrain.inference.generate.load"
    monkeypatch.setattr(place, lambda *_, **__: (model, tokenizer))
    monkeypatch.setattr(memory_file, "load", lambda *_: memory)
    generated = []
    own = model.generate

    def watched(**options):
        generated.extend(own(**options))
        return torch.stack(generated)

    monkeypatch.setattr(model, "generate", watched)
    text = generate(exported, prompt, GREEDY, memory=exported, device="cpu")
    assert capsys.readouterr().out == text + "\n"
    (tokens,) = generated
    begun = TokenStream(tokenizer, "o", pending).finish(prompt)
    whole = streamed(tokenizer, [], [*begun, *tokens[1:].tolist()])
    before = "mevu" if pending == " mevu" else ""
    assert before + text == whole
    assert text.startswith(shown)
    assert len(tokens) > 2


@pytest.fixture
def copy(exported, tmp_path):
    """The exported model without its manifest: nothing but the weights tells of damage."""
    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / "manifest.json").unlink()
    return copy


def _configure(copy, **fields):
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_code_in_the_directory_is_not_run_and_a_difference_is_told(copy, exported, caplog):
    (copy / "modeling_titans.py").write_text("raise SystemExit('ran')\n")
    load(copy)
    assert "exported by another version (modeling_titans.py)" in caplog.text
    caplog.clear()
    load(exported)
    assert caplog.text == ""


def test_code_of_another_kind_needs_the_users_word(copy, tmp_path):
    _configure(copy, model_type="another")
    with pytest.raises(UserError, match=r"code of its own .*'another'"):
        load(copy)
    (copy / "modeling_titans.py").write_text("open('ran', 'w')\n")
    with pytest.raises(UserError):
        load(copy)
    assert not (tmp_path / "ran").exists()


def test_code_of_another_kind_runs_when_trusted(copy):
    _configure(copy, model_type="another")
    model, _ = load(copy, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules")
    save_file({"model.norm.weight": torch.ones(32)}, copy / "model.safetensors")
    with pytest.raises(UserError, match=r"missing keys: .* and [0-9]+ more"):
        load(copy, trust_remote_code=True)


def test_a_pickle_is_not_read(copy):
    _configure(copy, model_type="another")
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot be loaded: .*safetensors"):
        load(copy, trust_remote_code=True)


@pytest.mark.parametrize(
    ("arguments", "what", "fix"),
    [
        (["MISSING", "x"], "is no directory", "titans export RUN MODEL_DIR"),
        (["RUN", "x"], "config.json is missing", "export it first: titans export"),
        (["EXPORTED", "x", "--device", "cuda:99"], "device 'cuda:99' cannot be used", "use cpu"),
        (["EXPORTED", "x", "--device", "abacus"], "device 'abacus' cannot be used", "use cpu"),
        (["EXPORTED", "x", "--device", "meta"], "device 'meta' cannot be used", "use cpu"),
        (["EXPORTED", "a\udcff"], r"the prompt is not UTF-8: 'a\udcff'", "in UTF-8"),
        (["EXPORTED", "x", "--seed", "-1"], "--seed is -1", "0 or more"),
        (["EXPORTED", "x", "--seed", str(2**64)], f"--seed is {2**64}", "less than 2**64"),
        (["EXPORTED", "x", "--temperature", "1e-300"], "--temperature is 1e-300", "at least 1e-06"),
        (["EXPORTED", "x", "--temperature", "inf"], "--temperature is inf", "at least 1e-06"),
        (["EXPORTED", "x", "--max-new-tokens", "0"], "--max-new-tokens is 0", "at least 1"),
        (["EXPORTED", "x", "--temperature", "-1"], "--temperature is -1.0", "use 0"),
        (["EXPORTED", "x", "--temperature", "nan"], "--temperature is nan", "use 0"),
        (["EXPORTED", "x", "--top-p", "0"], "--top-p is 0.0", "at most 1"),
        (["EXPORTED", "x", "--top-k", "-3"], "--top-k is -3", "0 or more"),
    ],
)
def test_mistakes_are_told_in_three_lines(arguments, what, fix, exported, run, tmp_path, capsys):
    places = {"MISSING": tmp_path / "nothing", "RUN": run, "EXPORTED": exported}
    words = [str(places.get(word, word)) for word in arguments]
    assert cli.main(["generate", *words]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3
    assert what in told[0]
    assert fix in told[2]


def test_the_ends_of_what_may_be_chosen_work(exported, capsys):
    for sampling in (
        Sampling(max_new_tokens=2, temperature=1e-6, seed=2**64 - 1),
        Sampling(max_new_tokens=2, temperature=1e300, top_k=2**70),
    ):
        generate(exported, "Ba", sampling, device="cpu")


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_cut_short_is_told_about(damage, copy):
    (copy / damage).write_bytes((copy / damage).read_bytes()[:100])
    with pytest.raises(UserError, match=r"cannot be (loaded|read)"):
        load(copy)


def _without_one(stored):
    del stored["model.norm.weight"]


def _with_one_more(stored):
    stored["extra"] = torch.ones(1)


def _with_another_shape(stored):
    stored["model.norm.weight"] = torch.ones(31)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_one, r"missing keys: model\.norm\.weight\n"),
        (_with_one_more, r"unexpected keys: extra\n"),
        (_with_another_shape, r"mismatched keys: model\.norm\.weight\n"),
    ],
)
def test_weights_that_are_not_the_models_are_refused_by_name(change, message, copy, capsys):
    stored = load_file(copy / "model.safetensors")
    change(stored)
    save_file(stored, copy / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load(copy)
    assert cli.main(["generate", str(copy), "x", "--device", "cpu"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.splitlines()) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 64}, "mismatched keys: .* and [0-9]+ more"),
        ({"num_hidden_layers": 3}, "missing keys: .* and [0-9]+ more"),
        ({"hidden_size": "wide"}, "hidden_size: 'wide'"),
        ({"dtype": "float31"}, "float31"),
    ],
)
def test_a_configuration_that_is_not_the_models_is_refused(fields, message, copy):
    _configure(copy, **fields)
    with pytest.raises(UserError, match=message):
        load(copy)


@pytest.mark.parametrize("content", ["[1]", "null", '"titans"', "7"])
def test_a_configuration_that_is_no_mapping_is_refused(content, copy):
    (copy / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json holds a \w+ instead of a mapping"):
        load(copy)


def test_bytes_that_differ_from_the_manifest_are_refused(exported, tmp_path):
    copy = shutil.copytree(exported, tmp_path / "copy")
    size = (copy / "model.safetensors").stat().st_size
    with open(copy / "model.safetensors", "r+b") as handle:
        handle.seek(size - 1000)
        handle.write(bytes(1000))
    with pytest.raises(UserError, match=r"damaged: model\.safetensors differs from its checksum"):
        load(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"damaged: model\.safetensors is missing") as caught:
        load(copy)
    assert f"delete {manifest.NAME}" in caught.value.fix
