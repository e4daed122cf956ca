"""Greedy answers: the full forward's tokens, whatever the batch, the pads and the pieces."""

import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import MODEL
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data_prep import tokenizer as sentencepieces
from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.evaluate.answering import greedy
from titans_pretrain.evaluate.loaded import Loaded
from titans_pretrain.evaluate.text_tokens import whole_ids
from titans_pretrain.export import tokenizer as exported
from titans_pretrain.model.configuration_titans import TitansConfig
from titans_pretrain.model.modeling_titans import TitansForCausalLM

BEGIN, END = 1, 2
PROMPTS = [
    " ".join(f"w{(7 * place * place + length) % 90}" for place in range(length))
    for length in (1, 29, 5, 17, 8)
]
EXTRA = {"mac": {"segment_length": 8}, "mag": {"window_size": 6}}


def _tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(90)), "a"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        special = [("<s>", BEGIN), ("</s>", END)]
        made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _loaded(network, **options) -> Loaded:
    return Loaded(Path("m"), network, _tokenizer(**options), torch.device("cpu"))


def _model(variant: str) -> Loaded:
    torch.manual_seed(0)
    sizes = {"vocab_size": 94, "chunk_size": 4, "initializer_range": 0.3, "variant": variant}
    config = TitansConfig(**MODEL | sizes | EXTRA.get(variant, {}), bos_token_id=1, eos_token_id=2)
    return _loaded(TitansForCausalLM(config).eval())


@pytest.fixture(scope="module", params=["lmm", "mac", "mag", "transformer"])
def model(request) -> Loaded:
    return _model(request.param)


def _by_full_forwards(model: Loaded, prompt: str, new: int) -> str:
    ids = model.tokenizer(prompt or "<s>", return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    for _ in range(new):
        with torch.no_grad():
            following = model.network(ids, use_cache=False).logits[0, -1].argmax()
        if following == END:
            break
        ids = torch.cat([ids, following.view(1, 1)], 1)
    return model.tokenizer.decode(ids[0, length:], skip_special_tokens=True)


def test_answers_are_those_of_full_forwards_one_by_one_and_in_batches(model):
    wanted = [_by_full_forwards(model, prompt, 3) for prompt in PROMPTS]
    assert len(set(wanted)) > 1
    assert greedy(model, PROMPTS, max_new_tokens=3) == wanted
    assert greedy(model, PROMPTS, max_new_tokens=3, batch=3, piece=5) == wanted


def test_no_call_reads_more_than_a_piece(monkeypatch):
    model, columns = _model("lmm"), []
    forward = model.network.model.forward

    def watch(input_ids=None, **options):
        columns.append(input_ids.shape[1])
        return forward(input_ids=input_ids, **options)

    monkeypatch.setattr(model.network.model, "forward", watch)
    greedy(model, PROMPTS[1:2], max_new_tokens=2, piece=8)
    assert columns == [8, 8, 8, 4, 1, 1]


class _Scripted(torch.nn.Module):
    """Says what it is told to, row by row."""

    def __init__(self, rows, eos=END, **config):
        super().__init__()
        self._rows = rows
        self.config = SimpleNamespace(model_type="llama", **config)
        self.generation_config = SimpleNamespace(eos_token_id=eos)

    def get_input_embeddings(self):
        return SimpleNamespace(weight=torch.zeros(94, 1))

    def generate(self, tokens, *, attention_mask, generation_config):
        self.settings, self.mask = generation_config, attention_mask
        return torch.cat([tokens, torch.tensor(self._rows)[: len(tokens)]], 1)


def test_an_answer_ends_where_the_document_does():
    rows = [[5, END, 7], [5, 6, 7], [END, 5, 6]]
    for eos in (END, [END, 6], None):
        model = _loaded(_Scripted(rows, eos))
        answers = greedy(model, ["w1", "w2", "w3"], max_new_tokens=3, batch=3)
        assert answers == ["w2", "w2" if eos == [END, 6] else "w2 w3 w4", ""]
        assert set(model.network.settings.eos_token_id) >= {END}


@pytest.mark.parametrize(
    "own",
    [{"no_repeat_ngram_size": 1}, {"sequence_bias": [[[5], 100.0]]}],
    ids=lambda own: next(iter(own)),
)
def test_a_models_own_generation_settings_change_no_answer(own):
    torch.manual_seed(0)
    sizes = {"vocab_size": 94, "hidden_size": 16, "intermediate_size": 16, "initializer_range": 0.3}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 1, "tie_word_embeddings": True}
    config = LlamaConfig(**sizes, **heads, bos_token_id=BEGIN, eos_token_id=END)
    network = LlamaForCausalLM(config).eval()
    model = _loaded(network)
    answers = greedy(model, PROMPTS, max_new_tokens=6)
    assert any(len(set(answer.split())) < len(answer.split()) for answer in answers)
    network.generation_config.update(**own)
    told = network.generation_config.to_dict()
    assert greedy(model, PROMPTS, max_new_tokens=6) == answers
    assert network.generation_config.to_dict() == told


def test_pads_are_on_the_left_and_masked_and_nothing_is_drawn():
    model = _loaded(_Scripted([[5], [5]]))
    greedy(model, ["w1 w2 w3", "w4"], max_new_tokens=1, batch=2)
    assert model.network.mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert model.network.settings.do_sample is False
    assert model.network.settings.num_beams == 1


def test_a_prompt_beyond_the_models_positions_is_refused_with_its_index():
    model = _loaded(_Scripted([[5]], max_position_embeddings=8))
    assert greedy(model, [PROMPTS[2]], max_new_tokens=3) == ["w2"]
    with pytest.raises(UserError, match="17 tokens and 3 new ones are more than the model's 8"):
        greedy(model, [PROMPTS[2], PROMPTS[3]], max_new_tokens=3)
    with pytest.raises(UserError) as caught:
        greedy(model, [PROMPTS[2], PROMPTS[2], PROMPTS[2]], max_new_tokens=4)
    assert caught.value.where == "prompt 0"
    with pytest.raises(UserError) as caught:
        greedy(model, [PROMPTS[2], PROMPTS[3]], max_new_tokens=3)
    assert caught.value.where == "prompt 1"


def test_tokens_that_the_model_lacks_are_refused():
    model = _loaded(_Scripted([[5]]))
    model.network.get_input_embeddings = lambda: SimpleNamespace(weight=torch.zeros(50, 1))
    with pytest.raises(UserError, match="exceed the model's 50"):
        greedy(model, ["w89"], max_new_tokens=1)


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(UserError, match="no token of '  '") as caught:
        greedy(_loaded(_Scripted([[5]])), ["w1", "  "], max_new_tokens=1)
    assert caught.value.where == "prompt 1"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), TitansError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 5 bytes"), TitansError),
        (RuntimeError("shapes differ"), RuntimeError),
    ],
)
def test_a_batch_that_memory_does_not_hold_is_told_as_that(error, told):
    model = _loaded(_Scripted([[5]]))

    def generate(*_, **__):
        raise error

    model.network.generate = generate
    with pytest.raises(told) as caught:
        greedy(model, ["w1 w2"], max_new_tokens=1)
    if told is TitansError:
        assert "1 prompts of up to 2 tokens do not fit in the memory of cpu" in caught.value.what


def test_an_empty_prompt_begins_a_document_once_with_a_tokenizer_that_begins_every_text():
    given = []
    model = _loaded(_Scripted([[5]]), bos=True)
    generate = model.network.generate

    def watch(tokens, **options):
        given.append(tokens.tolist())
        return generate(tokens, **options)

    model.network.generate = watch
    assert greedy(model, [""], max_new_tokens=1) == ["w2"]
    assert greedy(model, ["w1"], max_new_tokens=1) == ["w2"]
    assert given == [[[BEGIN]], [[BEGIN, 4]]]


def test_a_long_text_has_the_ids_of_the_whole_with_its_special_tokens():
    tokenizer, text = _tokenizer(bos=True), " ".join(["w1", "w22", "w3"] * 10_000)
    assert whole_ids(tokenizer, text).tolist() == tokenizer(text)["input_ids"]
    assert whole_ids(tokenizer, "w1").tolist() == [BEGIN, 4]


@pytest.mark.parametrize("words", [5, 30_000])
def test_a_special_token_that_a_text_spells_is_plain_text_of_any_length(words, tokenizer_model):
    place = tokenizer_model.parent / "exported"
    place.mkdir(exist_ok=True)
    exported.write(tokenizer_model.read_bytes(), place)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(place)
    text = "river learns " * words + "</s> small waves <s> " + "test time " * words
    found = whole_ids(tokenizer, text).tolist()
    assert found == list(sentencepieces.Tokenizer(tokenizer_model).encode([text])[0])
    assert tokenizer.eos_token_id not in found
    assert found == tokenizer(text, split_special_tokens=True)["input_ids"]


def test_no_prompt_is_held_while_a_model_answers():
    held, model = weakref.WeakSet(), _loaded(_Scripted([[5]]))

    class Text(str):
        __slots__ = ("__weakref__",)

    def prompts():
        text = Text("w1 w2")
        held.add(text)
        yield text

    generate = model.network.generate

    def watch(*given, **options):
        assert not held
        return generate(*given, **options)

    model.network.generate = watch
    assert greedy(model, prompts(), max_new_tokens=1) == ["w2"]


def test_only_the_last_token_of_a_prompt_without_pads_is_generated_from(monkeypatch):
    model, given = _model("lmm"), []
    generate = model.network.generate

    def watch(tokens, **options):
        given.append((tuple(tokens.shape), tuple(options["attention_mask"].shape)))
        return generate(tokens, **options)

    monkeypatch.setattr(model.network, "generate", watch)
    alone = greedy(model, PROMPTS[1:2], max_new_tokens=2)
    assert greedy(model, PROMPTS[1:2] * 2, max_new_tokens=2, batch=2) == alone * 2
    assert given == [((1, 1), (1, 1)), ((2, 1), (2, 1))]


def test_a_long_text_is_encoded_whole_where_parts_would_differ():
    def encode(texts):  # ids depend on how long the text is
        return [[len(text), *map(ord, text)] for text in texts]

    from titans_pretrain.evaluate.text_tokens import TextTokens

    text = "one two " * 10_000
    assert TextTokens(encode, str).long(text).tolist() == encode([text])[0]
