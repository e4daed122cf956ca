"""Decoding with a baseline is one long call in parts: pieces, tokens, pads, beams, exports."""

import copy
from pathlib import Path

import pytest
import torch
from tiny_baseline import SIZE
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

from titans_pretrain.evaluate.answering import greedy
from titans_pretrain.evaluate.loaded import Loaded
from titans_pretrain.export import huggingface
from titans_pretrain.inference.prefill import new_cache, prefill
from titans_pretrain.model.cache import TitansCache
from titans_pretrain.model.configuration_baseline import KINDS, BaselineConfig
from titans_pretrain.model.mamba_mixers import selective_scan
from titans_pretrain.model.modeling_baseline import BaselineForCausalLM

SIZE = SIZE | {"initializer_range": 0.15}
MIXED = {"mixers": ["mamba2", "ttt_mlp", "gated_deltanet", "window"], "num_hidden_layers": 4}
RMT = {"mixers": ["window"], "window_size": 32, "memory_embeddings": 2, "segment_length": 6}
MODELS = {kind: {"mixers": [kind]} for kind in KINDS} | {"mixed": MIXED, "rmt": RMT}
TIME, PADS = 23, (0, 2, 5, 11)


def make(fields):
    torch.manual_seed(0)
    return BaselineForCausalLM(BaselineConfig(**SIZE | fields)).eval()


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return make(MODELS[request.param])


@pytest.fixture(scope="module")
def mixed():
    return make(MIXED)


def tokens(rows, columns):
    return torch.randint(3, 50, (rows, columns), generator=torch.Generator().manual_seed(1))


def whole(model, ids):
    with torch.inference_mode():
        return model(ids, use_cache=False).logits


def in_parts(model, ids, sizes, mask=None):
    cache, outputs, last = None, [], 0
    for part in ids.split(sizes, 1):
        last += part.shape[1]
        known = {} if mask is None else {"attention_mask": mask[:, :last]}
        with torch.inference_mode():
            out = model(part, past_key_values=cache, use_cache=True, **known)
        cache = out.past_key_values
        outputs.append(out.logits)
    return torch.cat(outputs, 1), cache


def size(cache):
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in layer.state.values())


def check(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [[7, 1, 8, 1, 1, 1, 1, 1, 2], [1] * 8 + [15]])
def test_pieces_and_single_tokens_give_the_logits_of_one_call(model, sizes):
    ids = tokens(2, TIME)
    check(in_parts(model, ids, sizes)[0], whole(model, ids))


def test_rows_that_are_padded_on_the_left_are_those_of_rows_alone(model):
    ids = tokens(len(PADS), TIME)
    mask = torch.ones_like(ids)
    for row, pads in enumerate(PADS):
        mask[row, :pads] = 0
    found, _ = in_parts(model, ids, [10, 6, *[1] * 7], mask)
    for row, pads in enumerate(PADS):
        check(found[row : row + 1, pads:], whole(model, ids[row : row + 1, pads:]))


def test_bfloat16_decodes_to_about_the_same(model):
    ids, half = tokens(2, TIME), copy.deepcopy(model).bfloat16()
    wanted = whole(model, ids)
    found, _ = in_parts(half, ids, [16, *[1] * 7])
    assert found.dtype == torch.bfloat16
    assert (found - wanted).std() < 0.15 * wanted.std()


def test_pads_between_tokens_are_no_tokens(mixed):
    ids = tokens(2, TIME)
    mask = torch.ones_like(ids)
    mask[0, 5:9] = mask[1, 12] = mask[0, 20] = 0
    found, _ = in_parts(mixed, ids, [6, 8, *[1] * 9], mask)
    for row in range(2):
        kept = mask[row].bool()
        check(found[row : row + 1, kept], whole(mixed, ids[row : row + 1, kept]))


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 3}, {"num_beams": 3}])
def test_text_with_a_cache_is_that_without_token_for_token(model, options):
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    beams = {name: value for name, value in options.items() if name == "num_beams"}
    wanted = model.generate(ids, use_cache=False, **settings, **beams)
    assert torch.equal(model.generate(ids, **settings, **options), wanted)


def test_the_cache_does_not_grow(model):
    cache = new_cache(model)
    with torch.inference_mode():
        prefill(model, tokens(1, 40), cache, piece=16)
        short = size(cache)
        prefill(model, tokens(1, 60), cache, piece=16)
        assert size(cache) == short
        model(tokens(1, 1), past_key_values=cache)
    assert size(cache) == short
    assert int(cache.position(1, torch.device("cpu"))) == 101


def test_a_cache_goes_on_from_a_copy_of_its_rows(mixed):
    ids = tokens(2, TIME)
    _, cache = in_parts(mixed, ids[:, :-1], [TIME - 1])
    cache.reorder_cache(torch.tensor([1, 1]))
    with torch.inference_mode():
        found = mixed(ids[1:, -1:].expand(2, 1), past_key_values=cache).logits
    check(found, whole(mixed, ids)[1:, -1:].expand_as(found))


def test_calls_keep_a_cache_unless_they_are_told_not_to_or_train(mixed):
    ids = tokens(1, 3)
    assert isinstance(mixed(ids).past_key_values, TitansCache)
    assert mixed(ids, use_cache=False).past_key_values is None
    assert make(MIXED).train()(ids).past_key_values is None


@torch.inference_mode()
def test_caches_and_positions_that_the_model_cannot_continue_are_refused(mixed):
    ids = tokens(2, 4)
    with pytest.raises(TypeError, match="expected a TitansCache"):
        mixed(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="cannot hold a memory"):
        mixed.generate(ids, cache_implementation="static", max_new_tokens=1)
    _, cache = in_parts(mixed, ids, [4])
    mixed(ids[:, :1], past_key_values=cache, position_ids=torch.full((2, 1), 4))
    with pytest.raises(TypeError, match="takes no position_ids but"):
        mixed(ids[:, :1], past_key_values=cache, position_ids=torch.zeros(2, 1).long())
    with pytest.raises(ValueError, match="holds 2 rows, the call brings 1"):
        mixed(ids[:1, :1], past_key_values=cache)
    with pytest.raises(TypeError, match="does not take output_hidden_states"):
        mixed(ids, output_hidden_states=True)


def columns_of_calls(model, monkeypatch):
    columns, forward = [], model.model.forward

    def watch(input_ids=None, **options):
        columns.append(input_ids.shape[1])
        return forward(input_ids=input_ids, **options)

    monkeypatch.setattr(model.model, "forward", watch)
    return columns


@pytest.mark.parametrize("fields", [{**MIXED, "mixers": ["mamba", *MIXED["mixers"][1:]]}, RMT])
def test_an_export_brings_all_it_needs_and_decodes_token_by_token(fields, tmp_path, monkeypatch):
    network, ids = make(fields), tokens(1, 6)
    network.save_pretrained(tmp_path)
    huggingface._write_model_files(network, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert type(loaded) is not type(network)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    wanted = network.generate(ids, use_cache=False, **settings)
    columns = columns_of_calls(loaded, monkeypatch)
    assert torch.equal(loaded.generate(ids, **settings), wanted)
    assert columns == [6, 1, 1, 1]


def test_weights_that_lie_on_disk_until_they_are_needed_change_nothing(model, tmp_path):
    ids = tokens(2, 9)
    model.save_pretrained(tmp_path)
    names = [
        "embed_tokens",
        "layers",
        "norm",
        *(["memory"] if hasattr(model.model, "memory") else []),
    ]
    places = {f"model.{name}": "disk" for name in names} | {"lm_head": "disk"}
    loaded = BaselineForCausalLM.from_pretrained(
        tmp_path, device_map=places, offload_folder=tmp_path / "off"
    ).eval()
    assert all(p.is_meta for p in loaded.parameters())
    check(whole(loaded, ids), whole(model, ids))
    check(in_parts(loaded, ids, [7, 1, 1])[0], whole(model, ids))


@torch.inference_mode()
def test_rmt_may_begin_on_another_device_than_its_tokens(monkeypatch):
    model, ids = make(RMT), tokens(2, 9)
    memory = copy.deepcopy(model.model.memory)
    model.to("meta").model.memory = memory
    assert model(ids.to("meta"), use_cache=False).logits.is_meta
    monkeypatch.setattr(
        torch.compiler, "is_compiling", lambda: True
    )  # asks no tensor: meta has none
    assert model(ids.to("meta"), use_cache=True).past_key_values.layers[0].state["memory"].is_meta


def test_a_graph_gives_the_same_with_room_for_what_it_cannot_ask(model, monkeypatch):
    ids, mask = tokens(2, 17), torch.ones(2, 17, dtype=torch.long)
    mask[0, :4] = 0
    wanted, _ = in_parts(model, ids, [9, 6, 1, 1], mask)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found, _ = in_parts(model, ids, [9, 6, 1, 1], mask)
    check(found[mask.bool()], wanted[mask.bool()])


def test_mambas_recurrence_is_one_graph_for_lengths_known_by_their_bounds():
    torch.compiler.reset()
    compiled = torch.compile(selective_scan, backend="eager", fullgraph=True, dynamic=True)
    for time in (9, 11):
        x, steps = torch.randn(2, 1, time, 6)
        given = x, steps.abs(), -torch.ones(6, 3), *torch.randn(2, 1, time, 3)
        for found, wanted in zip(compiled(*given), selective_scan(*given), strict=True):
            check(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba", "rmt"])
@torch.no_grad()
def test_calls_with_a_cache_are_one_graph(name):
    model = make(MODELS[name] | {"num_hidden_layers": 1})
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for columns in (9, 17):
        ids, mask = tokens(2, columns), torch.ones(2, columns, dtype=torch.long)
        mask[0, :3] = 0
        found, wanted = (m(ids, attention_mask=mask, use_cache=True) for m in (compiled, model))
        check(found.logits[mask.bool()], wanted.logits[mask.bool()])
        after = [
            m(ids[:, -1:], past_key_values=out.past_key_values).logits
            for m, out in ((compiled, found), (model, wanted))
        ]
        check(*after)


def test_answers_to_long_prompts_are_read_in_pieces(mixed, monkeypatch):
    words = Tokenizer(models.WordLevel({"<unk>": 0, **{f"w{i}": i for i in range(1, 50)}}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    model = Loaded(Path("m"), mixed, tokenizer, torch.device("cpu"))
    prompts = [" ".join(f"w{i}" for i in row) for row in tokens(3, 20).tolist()]
    prompts[1] = prompts[1][:40].rpartition(" ")[0]
    wanted = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        made = mixed.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False)
        wanted.append(tokenizer.decode(made[0, ids.shape[1] :]))
    assert greedy(model, prompts, max_new_tokens=3, batch=3, piece=4) == wanted
    columns = columns_of_calls(mixed, monkeypatch)
    greedy(model, prompts[:1], max_new_tokens=2, piece=8)
    assert columns == [8, 8, 3, 1, 1]
