"""A sentencepiece model as Hugging Face tokenizer files that need no sentencepiece.

The ids are sentencepiece's own, with these exceptions:

* Text that literally holds a control piece such as ``</s>`` becomes that piece's id, as with every
  Hugging Face tokenizer, while sentencepiece spells it out.
* Where the model normalizes (NFKC; Llama-2 style models do not), control characters and characters
  that join the one before may be normalized differently.
* A text that is one user-defined piece and nothing else gets no space in front.
"""

import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as schema

from titans_pretrain.errors import TitansError, UserError

SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
BPE, UNIGRAM = 2, 1
_PLAIN_CONTROLS = {ord("\t"): " ", ord("\n"): " "}
_JOINING_KINDS = {"Mn", "Mc", "Me", "Cc", "Cf", "Cn"}
_JAMO = (range(0x1100, 0x1200), range(0xA960, 0xA980), range(0xD7B0, 0xD800))
_JOINING = {"\u0e33", "\u0eb3"} | {chr(code) for block in _JAMO for code in block}
_WORDS = (
    "Hello world",
    " leading space",
    "  two leading",
    "a  double  space",
    "tabs\tand\nnew lines\r\n\n",
    "trailing ",
    "   ",
    "",
    "123456 7.89 1,000",
    "naïve café — “quotes” 漢字 😀 \u200d\ufe0f",
    "def f(x):\n    return x + 1\n",
    "x" * 40,
    "e\u0301 ﬁ ½ ① \u00a0\u2009\u3000 wide",
    f"{SPACE} a literal mark{SPACE}{SPACE}twice",
    "\x00\x07\x7f\ufffd\U0010ffff",
)


def convert(model: bytes) -> Any:
    """A ``tokenizers.Tokenizer`` with the same ids as a sentencepiece model.

    Args:
        model: contents of a ``.model`` file, BPE or unigram.

    Raises:
        UserError: it is no such model.
    """
    from tokenizers import AddedToken, Tokenizer

    proto = _parse(model)
    if proto.trainer_spec.model_type == BPE:
        core = _bpe(proto)
    elif proto.trainer_spec.model_type == UNIGRAM:
        core = _unigram(proto)
    else:
        raise UserError(
            "the sentencepiece model is neither BPE nor unigram",
            where="tokenizer.model",
            fix="train one with titans data tokenizer",
        )
    tokenizer = Tokenizer(core)
    user_pieces = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    tokenizer.normalizer = _normalizer(proto.normalizer_spec, user_pieces)
    tokenizer.decoder = _decoder(proto.normalizer_spec)
    special = [piece.piece for piece in proto.pieces if piece.type in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens(
        [AddedToken(piece, normalized=False, special=True) for piece in special]
    )
    tokenizer.add_tokens([AddedToken(piece, normalized=True) for piece in user_pieces])
    return tokenizer


def size(model: bytes) -> int:
    """How many ids there are."""
    return len(_parse(model).pieces)


def pad_piece(model: bytes) -> str:
    """The piece that pads: the model's own, else one that never stands in text.

    With byte fallback that is the unknown piece; without, text may hold it, and EOS pads.
    """
    return _parse(model).pieces[special_ids(model)["pad_token_id"]].piece


def end_piece(model: bytes) -> str:
    """The piece that ends documents."""
    return _parse(model).pieces[special_ids(model)["eos_token_id"]].piece


def special_ids(model: bytes) -> dict[str, int]:
    """Ids under the names of Hugging Face's configuration; a document begins after EOS."""
    trainer = _parse(model).trainer_spec
    pad = trainer.unk_id if trainer.byte_fallback else trainer.eos_id
    return {
        "bos_token_id": trainer.eos_id,
        "eos_token_id": trainer.eos_id,
        "pad_token_id": trainer.pad_id if trainer.pad_id >= 0 else pad,
    }


def write(model: bytes, directory: Path) -> Any:
    """Write ``tokenizer.json`` and its companions into ``directory``.

    Nothing is put before or after a text, as in training. A document begins after EOS there, so
    EOS is the beginning of sequence, too. Batches are padded on the left.

    Returns:
        The ``PreTrainedTokenizerFast`` that was written.
    """
    from transformers import PreTrainedTokenizerFast

    proto = _parse(model)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=convert(model),
        bos_token=end_piece(model),
        eos_token=end_piece(model),
        unk_token=proto.pieces[proto.trainer_spec.unk_id].piece,
        pad_token=pad_piece(model),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(directory)
    # transformers 5 writes a class name that 4.57 does not know; both know this one.
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return tokenizer


def check_identity(
    model: bytes, encode: Callable[[str], Sequence[int]], texts: Sequence[str] = ()
) -> int:
    """Compare the ids of ``encode`` with sentencepiece's; the known exceptions are left out.

    Args:
        model: contents of the ``.model`` file.
        encode: text to ids, by the converted tokenizer.
        texts: what to compare besides a built-in sample.

    Returns:
        How many texts were compared.

    Raises:
        TitansError: the ids of a text differ.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    proto = _parse(model)
    controls = [piece.piece for piece in proto.pieces if piece.type in (UNKNOWN, CONTROL)]
    user_pieces = {piece.piece for piece in proto.pieces if piece.type == USER_DEFINED}
    normalizes = bool(proto.normalizer_spec.precompiled_charsmap)
    compared = 0
    for text in (*sample_texts(model), *texts):
        forged = any(control in text for control in controls)
        if forged or text in user_pieces or (normalizes and _may_join(text)):
            continue
        theirs, ours = processor.encode(text), list(encode(text))
        if theirs != ours:
            raise TitansError(
                f"the exported tokenizer encodes {text[:80]!r} differently: {ours[:20]} instead "
                f"of {theirs[:20]}",
                where="tokenizer.json",
                fix="report this tokenizer.model as a bug",
            )
        compared += 1
    return compared


def sample_texts(model: bytes, count: int = 1000, seed: int = 0) -> Iterator[str]:
    """Texts that try a tokenizer: its own pieces, any Unicode, runs of spaces; always the same."""
    yield from _WORDS
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    rng = random.Random(seed)
    for _ in range(count):
        pieces = [rng.randrange(processor.vocab_size()) for _ in range(rng.randint(1, 40))]
        yield processor.decode(pieces)
        yield "".join(_character(rng) for _ in range(rng.randint(1, 60)))


def _may_join(text: str) -> bool:
    """Whether characters join the one before, or control others than tab and newline."""
    plain = text.translate(_PLAIN_CONTROLS)
    kinds = {unicodedata.category(character) for character in plain}
    return bool(kinds & _JOINING_KINDS) or any(character in _JOINING for character in plain)


def _character(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.3:
        return " " * rng.randint(1, 3)
    if kind < 0.6:
        return chr(rng.randrange(0x20, 0x7F))
    if kind < 0.8:
        return chr(rng.randrange(0x2000))
    code = rng.randrange(0x110000)
    return chr(code) if not 0xD800 <= code < 0xE000 else "\n"


def _parse(model: bytes) -> Any:
    proto = schema.ModelProto()
    try:
        proto.ParseFromString(model)
    except DecodeError:
        proto = None
    if proto is None or not proto.pieces:
        raise UserError("no sentencepiece model", where="tokenizer.model", fix="give a .model file")
    if proto.trainer_spec.eos_id < 0:
        raise UserError(
            "the sentencepiece model has no EOS piece",
            where="tokenizer.model",
            fix="train one with titans data tokenizer",
        )
    return proto


def _bpe(proto: Any) -> Any:
    """Merges: every way to make a piece of two others, the best-scored piece first."""
    from tokenizers import models

    ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    merges = []
    for piece, score in normal.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                merges.append((-score, ids[piece], ids[left], ids[right], (left, right)))
    merges.sort()
    return models.BPE(
        ids,
        [pair for *_, pair in merges],
        unk_token=proto.pieces[proto.trainer_spec.unk_id].piece,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _unigram(proto: Any) -> Any:
    from tokenizers import models

    trainer = proto.trainer_spec
    vocabulary = [(piece.piece, piece.score) for piece in proto.pieces]
    return models.Unigram(vocabulary, trainer.unk_id, byte_fallback=trainer.byte_fallback)


def _normalizer(spec: Any, user_pieces: Sequence[str]) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        # User pieces are normalized, too, before they are looked for: they get no space in front.
        alone = "|".join(map(re.escape, user_pieces)) or "(?!)"
        steps.append(normalizers.Replace(Regex(rf"\A(?!(?:{alone})\z)"), SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def _decoder(spec: Any) -> Any:
    from tokenizers import decoders

    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
