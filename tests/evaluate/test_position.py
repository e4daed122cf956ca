"""Loss by position: the one-shot forward's losses, streamed, in buckets that double."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import MODEL, prepare
from tiny_model import write_model

from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.evaluate import heldout, loaded, position, position_text
from titans_pretrain.evaluate.position_text import Document, TextFiles
from titans_pretrain.evaluate.tasks import Options
from titans_pretrain.model.configuration_baseline import BaselineConfig
from titans_pretrain.model.configuration_titans import TitansConfig
from titans_pretrain.model.modeling_baseline import BaselineForCausalLM
from titans_pretrain.model.modeling_titans import TitansForCausalLM


def _network(variant):
    torch.manual_seed(0)
    sizes = {"chunk_size": 4, "segment_length": 8, "window_size": 6, "initializer_range": 0.3}
    return TitansForCausalLM(TitansConfig(**MODEL | sizes | {"variant": variant})).eval()


def _one_shot(network, tokens):
    with torch.no_grad():
        logits = network(tokens[None, :-1], use_cache=False).logits[0]
    return torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")


@pytest.mark.parametrize("variant", ["lmm", "mac", "mag", "mal", "transformer"])
@pytest.mark.parametrize("piece", [7, 64])
def test_streamed_losses_are_those_of_one_forward(variant, piece):
    network, tokens = _network(variant), torch.randint(0, 300, (51,))
    parts = list(position.token_losses(network, tokens, piece))
    assert [first for first, _ in parts] == list(range(0, 50, piece))
    found = torch.cat([losses for _, losses in parts])
    torch.testing.assert_close(found, _one_shot(network, tokens), rtol=1e-5, atol=1e-5)


def test_a_network_without_a_cache_to_go_on_from_reads_all_at_once():
    network, tokens = _network("lmm"), torch.randint(0, 300, (21,))

    class Bare:
        device = network.device

        def __call__(self, ids, use_cache):
            return SimpleNamespace(logits=network(ids, use_cache=False).logits)

    ((first, losses),) = position.token_losses(Bare(), tokens, 6)
    assert first == 0
    torch.testing.assert_close(losses, _one_shot(network, tokens))


def test_a_baseline_of_ours_is_streamed_too():
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    network = BaselineForCausalLM(BaselineConfig(num_hidden_layers=1, **sizes)).eval()
    tokens = torch.randint(0, 300, (21,))
    firsts, losses = zip(*position.token_losses(network, tokens, 6), strict=True)
    assert firsts == (0, 6, 12, 18)
    torch.testing.assert_close(torch.cat(losses), _one_shot(network, tokens))


@pytest.mark.parametrize(
    ("length", "borders"),
    [(1, [0, 1]), (2, [0, 1, 2]), (8, [0, 1, 2, 4, 8]), (11, [0, 1, 2, 4, 8, 11])],
)
def test_buckets_double_up_to_the_length(length, borders):
    assert position.buckets(length) == borders


class _Given:
    """Documents whose losses are given."""

    def __init__(self, *documents):
        self._documents = documents

    def identity(self):
        return {}

    def documents(self, model, length, count):
        for losses, counts, joined in self._documents[:count]:
            yield Document(torch.tensor(losses), counts, joined)


@pytest.fixture
def losses_as_tokens(monkeypatch):
    def token_losses(network, tokens, piece):
        yield 0, tokens[:3].float()
        yield 3, tokens[3:].float()

    monkeypatch.setattr(position, "token_losses", token_losses)


def _run(*documents, samples=None, lengths=("5",), longest=None):
    task = position.PositionTask(_Given(*documents), Options(lengths=lengths, samples=samples))
    told = []
    model = SimpleNamespace(network=None, longest=longest)
    return task.run(model, lengths[0], told.append), told


def test_a_bucket_has_the_mean_over_documents_and_its_standard_error(losses_as_tokens):
    result, _ = _run(([1, 2, 3, 5, 6], None, False), ([3, 2, 5, 5, 8], None, True), samples=2)
    rows = [(row["from"], row["to"], row["loss"], row["stderr"]) for row in result["curve"]]
    assert rows == [(0, 1, 2, 1), (1, 2, 2, 0), (2, 4, 4.5, 0.5), (4, 5, 7, 1)]
    assert [row["documents"] for row in result["curve"]] == [2] * 4
    assert result["curve"][1]["perplexity"] == pytest.approx(math.exp(2))
    assert result["loss"] == 4
    assert (result["tokens"], result["samples"], result["joined"]) == (10, 2, 1)


def test_masked_targets_do_not_count_and_empty_buckets_are_left_out(losses_as_tokens):
    mask = torch.tensor([False, True, True, False, False])
    result, _ = _run(([1, 2, 3, 5, 6], mask, False), samples=1)
    rows = [(row["from"], row["loss"], row["stderr"]) for row in result["curve"]]
    assert rows == [(1, 2, None), (2, 3, None)]
    assert result["loss"] == 2.5
    with pytest.raises(UserError, match="all are masked"):
        _run(([1, 2, 3, 5, 6], torch.zeros(5, dtype=torch.bool), False))


def test_fewer_documents_than_wanted_are_told(losses_as_tokens):
    result, told = _run(([1, 2, 3, 5, 6], None, False))
    assert result["samples"] == 1
    assert "position 5: 1 documents, not 10" in told


def test_losses_that_are_not_finite_and_lengths_beyond_the_model_are_errors(losses_as_tokens):
    with pytest.raises(TitansError, match="not finite"):
        _run(([1.0, math.nan, 3, 5, 6], None, False))
    with pytest.raises(UserError, match="5 tokens are more than the model's 4"):
        _run(([1, 2, 3, 5, 6], None, False), longest=4)


def test_lengths_beyond_a_models_positions_are_refused_before_it_is_loaded():
    task = position.PositionTask(_Given(), Options(lengths=("4", "8")))
    task.check(8)
    task.check(None)
    with pytest.raises(UserError, match="8 tokens are more than the model's 7") as caught:
        task.check(7)
    assert (caught.value.where, caught.value.fix) == ("--lengths", "use at most 7")


class _Letters:
    eos_token_id = 0

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) for letter in text]}


MODEL_OF_LETTERS = SimpleNamespace(tokenizer=_Letters())


def _texts(tmp_path, *texts):
    paths = [tmp_path / str(number) for number in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    return TextFiles(paths)


def _found(source, length, count=9):
    return [
        ("".join(map(chr, document.tokens.tolist())), document.joined)
        for document in source.documents(MODEL_OF_LETTERS, length, count)
    ]


def test_long_files_are_read_from_their_beginning_and_short_ones_joined(tmp_path):
    source = _texts(tmp_path, "abcdefg", "hi", "jk", "lmnopqrs", "t")
    assert _found(source, 4) == [("abcde", False), ("hi\0jk", True), ("lmnop", False)]
    assert _found(source, 4, count=1) == [("abcde", False)]


def test_of_a_long_file_only_what_is_needed_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(position_text, "READ_BYTES", 2)
    assert _found(_texts(tmp_path, "abcd€€hij"), 3) == [("abcd", False)]  # 8 bytes end in the €
    (tmp_path / "a").write_bytes(b"abcdefgh\xff")
    assert _found(TextFiles([tmp_path / "a"]), 3) == [("abcd", False)]


def test_too_little_text_and_unreadable_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="hold 4 tokens, no document of 9"):
        _found(_texts(tmp_path, "ab", "cd"), 8)
    with pytest.raises(UserError, match="No such file"):
        TextFiles([tmp_path / "none"])
    (tmp_path / "b").write_bytes(b"a\xffb")
    with pytest.raises(UserError, match="not UTF-8"):
        _found(TextFiles([tmp_path / "b"]), 1)


def test_the_identity_tells_the_texts_and_the_samples(tmp_path):
    def identity(text, **options):
        (tmp_path / "a").write_text(text)
        (task,) = position.open_tasks(["position"], Options(text=(tmp_path / "a",), **options))
        return task.identity()

    first = identity("text")
    assert first == identity("text", lengths=("8",))
    assert first != identity("other")
    assert first != identity("text", samples=3)
    assert first["definition"] == 1


def test_the_task_needs_text_or_data_and_lengths_above_zero(tmp_path):
    with pytest.raises(UserError, match="no long documents"):
        position.open_tasks(["position"], Options())
    with pytest.raises(UserError, match="given twice"):
        position.open_tasks(["position"], Options(text=(Path(__file__),), data="missing.json"))
    with pytest.raises(UserError, match="no tokens"):
        position.open_tasks(["position"], Options(text=(Path(__file__),), lengths=("0k",)))


def test_the_held_out_part_of_prepared_data_has_the_loss_of_the_held_out_evaluation(tmp_path):
    manifest = prepare(tmp_path / "own", "--held-out", "0.2")
    pieces = (tmp_path / "own/tokenizer.model").read_bytes()
    saved_model = write_model(tmp_path / "model", pieces)
    choice = heldout.Choice(sequence_length=32)
    wanted = heldout.evaluate(saved_model, tmp_path / "out", str(manifest), choice)
    options = Options(data=str(manifest), lengths=("32",), samples=wanted["sequences"])
    (task,) = position.open_tasks(["position"], options)
    result = task.run(loaded.load(saved_model, device="cpu"), "32", lambda _: None)
    assert result["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert result["tokens"] == wanted["tokens"]
    assert result["samples"] == wanted["sequences"]
    assert result["joined"] > 0
    assert [row["from"] for row in result["curve"]] == [0, 1, 2, 4, 8, 16]
    assert task.identity()["data"] == wanted["fingerprint"]


def test_data_of_which_no_part_is_known_to_be_held_out_is_refused(tiny_model, manifest):
    (task,) = position.open_tasks(["position"], Options(data=str(manifest), lengths=("32",)))
    with pytest.raises(UserError, match="which share of the data its training left out") as caught:
        task.run(loaded.load(tiny_model, device="cpu"), "32", lambda _: None)
    assert "--held-out" in caught.value.fix
