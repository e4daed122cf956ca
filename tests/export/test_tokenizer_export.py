import json

import pytest
import sentencepiece
from tokenizer_models import corpus, train
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.export import tokenizer

KINDS = {
    "Llama-2 style": {},
    "no space in front": {"add_dummy_prefix": False},
    "normalized": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "no byte fallback": {"byte_fallback": False, "vocab_size": 300},
    "trimmed": {"remove_extra_whitespaces": True},
    "case folded": {"normalization_rule_name": "nmt_nfkc_cf"},
    "unigram": {"model_type": "unigram", "vocab_size": 400},
    "user pieces": {"user_defined_symbols": ["[[name]]", "\t"]},
    "own pad": {"pad_id": 3},
}


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return train(**KINDS[request.param])


def _encoder(tokenizer_):
    return lambda text: tokenizer_(text)["input_ids"]


def test_ids_are_those_of_sentencepiece(model, tmp_path):
    tokenizer.write(model, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.check_identity(model, _encoder(loaded), corpus(50, seed=1)) > 150


def test_ids_decode_to_the_text_of_sentencepiece(model, tmp_path):
    loaded = tokenizer.write(model, tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in ("Hello  world", " a\tb\n", "naïve 漢字 😀"):
        ids = processor.encode(text)
        if processor.unk_id() in ids:
            continue
        assert loaded.decode(ids, skip_special_tokens=True) == processor.decode(ids)


def test_the_gate_refuses_another_tokenizer(model, tmp_path):
    loaded = tokenizer.write(model, tmp_path)
    encode = _encoder(loaded)
    with pytest.raises(TitansError, match="differently"):
        tokenizer.check_identity(model, lambda text: [0, *encode(text)])
    with pytest.raises(TitansError, match="differently"):
        tokenizer.check_identity(model, lambda text: encode(text.replace("b", "d")))


def test_the_gate_sees_every_text_but_those_with_control_pieces():
    model = train()
    seen = []
    encode = sentencepiece.SentencePieceProcessor(model_proto=model).encode
    compared = tokenizer.check_identity(
        model, lambda text: seen.append(text) or encode(text), ["plain", "has </s> in it"]
    )
    assert "plain" in seen
    assert "has </s> in it" not in seen
    assert compared == len(seen)


def test_a_literal_control_piece_is_the_known_exception(tmp_path):
    model = train()
    loaded = tokenizer.write(model, tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert processor.eos_id() not in processor.encode("a </s> b")
    assert processor.eos_id() in loaded("a </s> b")["input_ids"]


def test_nothing_is_added_batches_pad_left_and_documents_begin_after_eos(tmp_path):
    model = train()
    tokenizer.write(model, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("ba")["input_ids"] == sentencepiece.SentencePieceProcessor(
        model_proto=model
    ).encode("ba")
    batch = loaded(["ba", "ba be bi bo"], padding=True)
    assert batch["attention_mask"][0][0] == 0
    assert batch["attention_mask"][0][-1] == 1
    assert loaded.bos_token == loaded.eos_token == "</s>"
    assert loaded.pad_token == loaded.unk_token == "<unk>"
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert isinstance(loaded, PreTrainedTokenizerFast)


@pytest.mark.parametrize(
    ("options", "pad"),
    [
        ({}, "<unk>"),
        ({"byte_fallback": False, "vocab_size": 300}, "</s>"),
        ({"pad_id": 3}, "<pad>"),
    ],
)
def test_pads_are_pieces_that_text_never_holds(options, pad):
    assert tokenizer.pad_piece(train(**options)) == pad


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (b"", "no sentencepiece model"),
        (b"\x00\xff junk", "no sentencepiece model"),
        (train(eos_id=-1), "no EOS piece"),
        (
            train(model_type="char", hard_vocab_limit=False),
            "neither BPE nor unigram",
        ),
    ],
)
def test_what_is_no_fit_model_is_refused(model, message):
    with pytest.raises(UserError, match=message):
        tokenizer.convert(model)
