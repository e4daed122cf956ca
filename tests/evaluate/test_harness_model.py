"""Our model in lm-evaluation-harness gives what lm-eval's own ``hf`` gives on the export."""

import dataclasses
import random

import pytest
import torch
from benchmark_rows import write
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.models import huggingface
from tiny import WORDS
from tiny_model import write_model

from titans_pretrain.errors import Misfit, TitansError, UserError
from titans_pretrain.evaluate import harness, loaded
from titans_pretrain.evaluate.harness_model import HarnessModel
from titans_pretrain.model.configuration_baseline import BaselineConfig
from titans_pretrain.model.modeling_baseline import BaselineForCausalLM

LENGTH = 48


@pytest.fixture(scope="module")
def model(tiny_model):
    return loaded.load(tiny_model, device="cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def reference(tiny_model):
    """lm-eval's own model on the exported directory, with the directory's code."""
    return make_reference(tiny_model)


def make_reference(directory):
    return huggingface.HFLM(
        pretrained=str(directory),
        trust_remote_code=True,
        dtype="float32",
        max_length=LENGTH,
        batch_size=3,
        device="cpu",
    )


def scorer(model, **options):
    return HarnessModel(model, **{"max_length": LENGTH, "batch": 3} | options)


def requests(kind, arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=0, metadata=("task", number, 1))
        for number, one in enumerate(arguments)
    ]


def compare(name, model, reference, data):
    task = harness._open(name, data)
    ours = harness.score(task, scorer(model), len(task.eval_docs))
    told = evaluator.evaluate(
        reference, {"tasks": {name: harness._open(name, data)}}, bootstrap_iters=2
    )["results"][name]
    metrics = {key.split(",")[0]: value for key, value in told.items() if key.endswith(",none")}
    known = {key: value for key, value in metrics.items() if key in ours}
    assert len(known) >= 2 or name in ("winogrande", "social_iqa", "boolq")
    assert {key: ours[key] for key in known} == pytest.approx(known, rel=1e-6)


@pytest.mark.parametrize("name", ["wikitext", "lambada_openai", "piqa"])
def test_a_tasks_metrics_are_lm_evals(name, model, reference, data):
    compare(name, model, reference, data)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["hellaswag", "winogrande", "arc_easy", "arc_challenge", "social_iqa", "boolq"]
)
def test_the_other_tasks_metrics_are_lm_evals(name, model, reference, data):
    compare(name, model, reference, data)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["mac", "mag", "mal", "transformer"])
def test_every_variants_scores_are_lm_evals(
    variant, tokenizer_model, tmp_path, reference, data, monkeypatch
):
    settings = {"variant": variant, "segment_length": 16, "window_size": 16}
    directory = write_model(tmp_path / "model", tokenizer_model.read_bytes(), **settings)
    own = loaded.load(directory, device="cpu")
    for name in ("wikitext", "piqa"):
        compare(name, own, make_reference(directory), data)


def test_likelihoods_of_odd_pairs_are_lm_evals(model, reference):
    pairs = [
        ("river learns at", " test"),
        ("river learns at", " time"),  # of one token each: read once
        ("river learns at ", "test time"),  # the space moves
        ("", "small waves"),  # begins with BOS
        ("waves of surprise " * 20, "pass"),  # is cut
        ("time", " " + " ".join(WORDS)),
    ]
    asked = requests("loglikelihood", pairs)
    told = reference.loglikelihood(asked, disable_tqdm=True)
    found = scorer(model).loglikelihood(asked)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in told]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in told], rel=1e-6)


def test_generated_texts_are_lm_evals(model, reference):
    dice = random.Random(1)
    contexts = [" ".join(dice.choices(WORDS, k=count)) for count in (1, 3, 9, 40, 2)]
    settings = [{"until": ["e"], "max_gen_toks": 12}, {"until": ["\n"], "max_gen_toks": 5}]
    pairs = [(context, one) for one in settings for context in contexts]
    asked = requests("generate_until", pairs)
    found = scorer(model).generate_until(asked)
    assert found == reference.generate_until(asked, disable_tqdm=True)
    assert len(set(found)) > 3
    assert any(found)


def test_a_batch_changes_no_score(model):
    asked = requests("loglikelihood", [("river", " learns"), ("small waves of", " surprise at")])
    together, alone = (scorer(model, batch=size).loglikelihood(asked) for size in (2, 1))
    assert [score for score, _ in together] == pytest.approx([score for score, _ in alone])


def test_a_long_window_streamed_in_pieces_scores_as_at_once(model):
    asked = requests("loglikelihood_rolling", [("river learns at test time " * 12,), ("pass",)])
    whole, streamed = (
        scorer(model, max_length=200, piece=piece).loglikelihood_rolling(asked)
        for piece in (200, 7)
    )
    assert streamed == pytest.approx(whole, rel=1e-6)


def test_a_streamed_window_needs_logits_of_one_piece_only(model, monkeypatch):
    seen = []
    head = model.network.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, inputs, out: seen.append(len(inputs[0])))
    asked = requests("loglikelihood_rolling", [("river learns at test time " * 12,)])
    scorer(model, max_length=200, piece=16).loglikelihood_rolling(asked)
    handle.remove()
    assert max(seen) == 16


def test_another_model_of_transformers_is_scored_too(model):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=300, num_hidden_layers=1, **sizes)
    llama = dataclasses.replace(model, network=LlamaForCausalLM(config).eval())
    told = huggingface.HFLM(
        pretrained=llama.network, tokenizer=llama.tokenizer, max_length=LENGTH, batch_size=2
    )
    pairs = [("river learns", " at test"), ("small", " waves of surprise"), ("a", " time")]
    asked = requests("loglikelihood", pairs)
    wanted = [score for score, _ in told.loglikelihood(asked, disable_tqdm=True)]
    assert [score for score, _ in scorer(llama).loglikelihood(asked)] == pytest.approx(wanted)


def test_a_baseline_of_ours_is_streamed_and_scores_as_at_once(model):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "num_hidden_layers": 1}
    network = BaselineForCausalLM(BaselineConfig(vocab_size=300, **sizes)).eval()
    seen = []
    network.model.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    ours = dataclasses.replace(model, network=network)
    asked = requests("loglikelihood_rolling", [("river learns at test time " * 12,)])
    whole, streamed = (
        scorer(ours, max_length=200, piece=piece).loglikelihood_rolling(asked) for piece in (200, 7)
    )
    assert streamed == pytest.approx(whole, rel=1e-6)
    assert max(seen[1:]) == 7


def test_documents_that_are_cut_are_counted_once_each(model):
    long = "waves of surprise " * 30
    pairs = [(long, " pass"), ("river", " pass"), (long, " time")]
    asked = requests("loglikelihood", pairs)
    asked[2].metadata = ("task", 0, 1)
    asked[2].doc_id = asked[0].doc_id
    one = scorer(model)
    one.loglikelihood(asked)
    assert one.cut == {0}
    one = scorer(model)
    one.generate_until(requests("generate_until", [(long, {"until": [], "max_gen_toks": 4})] * 2))
    assert one.cut == {0, 1}


def test_an_answer_longer_than_the_maximum_is_refused(model):
    with pytest.raises(UserError, match=r"answer of \d+ tokens .* --max-length 4"):
        scorer(model, max_length=4).loglikelihood(
            requests("loglikelihood", [("river", " learns at test time of surprise")])
        )


def test_an_answer_longer_than_the_maximum_is_found_before_anything_is_scored(model, data):
    pairs = [("river", " learns"), ("river", " learns at test time of surprise")]
    asked = requests("loglikelihood", pairs)
    _, tokens = scorer(model)._encode_pair(*pairs[1])
    scorer(model, max_length=len(tokens)).check(asked)
    with pytest.raises(
        Misfit, match=rf"answer of {len(tokens)} tokens .* --max-length 3"
    ) as caught:
        scorer(model, max_length=3).check(asked)
    assert caught.value.fix == f"use at least {len(tokens)}"
    small = harness.HarnessTask(
        "piqa", harness._open("piqa", data), 1, harness.Options(samples=2, batch=1)
    )
    with pytest.raises(Misfit, match=r"--max-length 1"):
        small.fit(model, "")


def test_the_requests_that_were_looked_at_are_those_that_are_scored(model, data, monkeypatch):
    options = harness.Options(samples=2, batch=1)
    task = harness.HarnessTask("piqa", harness._open("piqa", data), LENGTH, options)
    built = []
    build = task._task.build_all_requests

    def count(**given):
        built.append(given)
        return build(**given)

    monkeypatch.setattr(task._task, "build_all_requests", count)
    task.fit(model, "")
    first = task.run(model, "", print)
    assert len(built) == 1
    assert task.run(model, "", print) == first
    assert len(built) == 2


def test_no_room_to_generate_is_refused(model):
    asked = requests("generate_until", [("river", {"until": [], "max_gen_toks": LENGTH})])
    with pytest.raises(UserError, match="adds up to 48 tokens, and --max-length is 48"):
        scorer(model).generate_until(asked)


def test_an_answer_without_a_token_is_refused(model):
    with pytest.raises(TitansError, match="no token of its own"):
        scorer(model)._loglikelihood_tokens([(None, [5], [])])


def test_a_tokenizer_without_a_first_token_is_refused(model):
    class Bare:
        bos_token_id = eos_token_id = None

    bare = dataclasses.replace(model, tokenizer=Bare())
    with pytest.raises(UserError, match="neither a BOS nor an EOS"):
        scorer(bare).prefix_token_id  # noqa: B018


def test_a_model_with_fewer_positions_than_the_maximum_is_refused(model, data):
    class Positions:
        max_position_embeddings = 8

    class Network:
        config = Positions()

    small = dataclasses.replace(model, network=Network())
    task = harness.HarnessTask(
        "piqa", harness._open("piqa", data), 16, harness.Options(samples=1, batch=1)
    )
    with pytest.raises(UserError, match="16 tokens are more than the model's 8 positions"):
        task.run(small, "", print)
