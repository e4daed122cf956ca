import json
import shutil

import pytest
import torch
from tiny_run import make_model
from transformers import PreTrainedTokenizerFast

from titans_pretrain import cli
from titans_pretrain.errors import UserError
from titans_pretrain.generate import Sampling, generate, load

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
    assert text == tokenizer.decode(tokens[0], skip_special_tokens=True)
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
    assert text == tokenizer.decode(tokens[0], skip_special_tokens=True)


def test_the_code_in_the_directory_is_not_run_and_a_difference_is_told(exported, tmp_path, caplog):
    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / "modeling_titans.py").write_text("raise SystemExit('ran')\n")
    load(copy)
    assert "exported by another version (modeling_titans.py)" in caplog.text
    caplog.clear()
    load(exported)
    assert caplog.text == ""


def test_code_of_another_kind_needs_the_users_word(exported, tmp_path):
    copy = shutil.copytree(exported, tmp_path / "copy")
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "another"}))
    with pytest.raises(UserError, match=r"code of its own .*'another'"):
        load(copy)
    (copy / "modeling_titans.py").write_text("open('ran', 'w')\n")
    with pytest.raises(UserError):
        load(copy)
    assert not (tmp_path / "ran").exists()


def test_code_of_another_kind_runs_when_trusted(exported, tmp_path):
    copy = shutil.copytree(exported, tmp_path / "copy")
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "another"}))
    model, _ = load(copy, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules")


@pytest.mark.parametrize(
    ("arguments", "what", "fix"),
    [
        (["MISSING", "x"], "is no directory", "titans export RUN MODEL_DIR"),
        (["RUN", "x"], "config.json is missing", "export it first: titans export"),
        (["EXPORTED", "x", "--device", "cuda:99"], "device 'cuda:99' cannot be used", "use cpu"),
        (["EXPORTED", "x", "--device", "abacus"], "device 'abacus' cannot be used", "use cpu"),
        (["EXPORTED", "x", "--max-new-tokens", "0"], "--max-new-tokens is 0", "at least 1"),
        (["EXPORTED", "x", "--temperature", "-1"], "--temperature is -1.0", "0 or more"),
        (["EXPORTED", "x", "--temperature", "nan"], "--temperature is nan", "0 or more"),
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


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_model_is_told_about(damage, exported, tmp_path):
    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / damage).write_bytes((copy / damage).read_bytes()[:100])
    with pytest.raises(UserError, match=r"cannot be (loaded|read)"):
        load(copy)
