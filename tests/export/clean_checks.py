"""What users of exported models do with torch and transformers alone; CHECKS says it in sentences.

No import of the project: it runs where only the exported directories are.
"""

import copy
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

NEW = 6
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
TEXTS = ["Ba", "Hello ba be bi bo bu", "ke ki ko ku ka", "x" * 9]
# of rows of 21 tokens; they end inside chunks of 4 and segments of 8, and between them
PADS = (0, 3, 8, 14, 20)
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-9}  # of the largest number


class Subject:
    """An exported model as a user has it, and the logits its maker had."""

    def __init__(self, directory: Path, reference: Path) -> None:
        self.directory = directory
        tensors = load_file(reference)
        self.ids: Tensor = tensors["ids"]
        self.logits: Tensor = tensors["logits"]

    def load(
        self,
        kind: Any = AutoModelForCausalLM,
        directory: str | Path | None = None,
        **options: Any,
    ) -> Any:
        """The model, of ``directory`` or of its own."""
        options = {"trust_remote_code": True, "dtype": torch.float32} | options
        return kind.from_pretrained(directory or self.directory, **options).eval()

    @cached_property
    def model(self) -> Any:
        """In float32; not to be changed."""
        return self.load()

    @cached_property
    def exact(self) -> Any:
        """In float64, where only rounding tells two ways of computing the same apart."""
        return self.load(dtype=torch.float64)

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.directory, trust_remote_code=True)

    @cached_property
    def greedy(self) -> Tensor:
        """The likeliest tokens after ``ids``."""
        return self.model.generate(self.ids, **GREEDY)


class Checks(dict[str, Callable[[Subject], None]]):
    """Functions by what their names say; one passes that raises nothing."""

    def add(self, function: Callable[[Subject], None]) -> Callable[[Subject], None]:
        self[function.__name__.replace("_", " ")] = function
        return function


CHECKS = Checks()


def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **{"use_cache": False} | options).logits


def same(found: Tensor, wanted: Tensor) -> None:
    """Equal to rounding: of float64, or of float32 summed in another order."""
    tolerance = TOLERANCES[wanted.dtype]
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * wanted.abs().max().item())


def refused(call: Callable[[], Any], words: str) -> None:
    told = ""
    try:
        call()
    except ValueError as error:
        told = str(error)
    assert words in told, told


@CHECKS.add
def the_logits_are_those_of_training_bit_by_bit(it: Subject) -> None:
    assert torch.equal(logits(it.model, it.ids), it.logits)


@CHECKS.add
def no_weight_is_missing_and_none_is_left_over(it: Subject) -> None:
    _, told = AutoModelForCausalLM.from_pretrained(
        it.directory, trust_remote_code=True, output_loading_info=True
    )
    assert not any(told[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")), told


@CHECKS.add
def input_and_output_embeddings_are_one(it: Subject) -> None:
    assert it.model.lm_head.weight is it.model.get_input_embeddings().weight
    assert it.model.get_output_embeddings() is it.model.lm_head


@CHECKS.add
def token_by_token_equals_one_call(it: Subject) -> None:
    for model in (it.exact, it.model):
        cache, parts = None, []
        for piece in it.ids.split([9, *[1] * (it.ids.shape[1] - 9)], 1):
            with torch.no_grad():
                out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        same(torch.cat(parts, 1), logits(model, it.ids))


@CHECKS.add
def a_cache_changes_nothing_in_greedy_search(it: Subject) -> None:
    assert it.greedy.shape[1] == it.ids.shape[1] + NEW
    assert torch.equal(it.greedy, it.model.generate(it.ids, use_cache=False, **GREEDY))


@CHECKS.add
def a_cache_changes_nothing_in_beam_search(it: Subject) -> None:
    found = [
        it.model.generate(it.ids, num_beams=3, use_cache=use, **GREEDY) for use in (True, False)
    ]
    assert torch.equal(*found)


@CHECKS.add
def a_cache_changes_nothing_in_several_samples_of_a_prompt(it: Subject) -> None:
    found = []
    options = GREEDY | {"do_sample": True, "num_return_sequences": 3}
    for use in (True, False):
        torch.manual_seed(0)
        found.append(it.model.generate(it.ids, use_cache=use, **options))
    assert torch.equal(*found)
    assert len({tuple(row.tolist()) for row in found[0]}) == 3 * len(it.ids)


def padded(it: Subject) -> tuple[Tensor, Tensor]:
    """One row, cut from the left by each of PADS, and the mask."""
    ids = it.ids[:1].repeat(len(PADS), 1)
    mask = (torch.arange(ids.shape[1]) >= torch.tensor(PADS)[:, None]).long()
    return ids.masked_fill(mask == 0, it.model.config.pad_token_id), mask


@CHECKS.add
def pads_on_the_left_change_nothing(it: Subject) -> None:
    ids, mask = padded(it)
    for model in (it.exact, it.model):
        for use in (True, False):
            found = logits(model, ids, attention_mask=mask, use_cache=use)
            for row, pads in enumerate(PADS):
                same(found[row, pads:], logits(model, ids[row : row + 1, pads:])[0])


@CHECKS.add
def a_batch_padded_on_the_left_generates_what_its_rows_would(it: Subject) -> None:
    ids, mask = padded(it)
    for options in ({"num_beams": 2}, {"prefill_chunk_size": 5}):
        found = it.exact.generate(ids, attention_mask=mask, **GREEDY | options)
        for row, pads in list(enumerate(PADS))[1:4]:
            alone = it.exact.generate(ids[row : row + 1, pads:], **GREEDY | options)
            assert torch.equal(found[row, pads:], alone[0]), (options, pads)


@CHECKS.add
def pads_on_the_right_change_nothing_before_them_without_a_mask(it: Subject) -> None:
    for model in (it.exact, it.model):
        for tokens in (6, 13, 16):
            alone = logits(model, it.ids[:, :tokens])
            same(logits(model, it.ids)[:, :tokens], alone)


@CHECKS.add
def generation_goes_on_from_a_returned_cache(it: Subject) -> None:
    first = it.model.generate(it.ids, return_dict_in_generate=True, **GREEDY)
    ids = torch.cat([first.sequences, it.ids[:, :3]], 1)
    options = GREEDY | {"attention_mask": torch.ones_like(ids)}  # a pad may be among the generated
    wanted = it.model.generate(ids, **options)
    copied = copy.deepcopy(first.past_key_values)
    for cache in (first.past_key_values, copied):
        assert torch.equal(it.model.generate(ids, past_key_values=cache, **options), wanted)


@CHECKS.add
def a_prompt_in_pieces_generates_the_same(it: Subject) -> None:
    assert torch.equal(it.model.generate(it.ids, prefill_chunk_size=6, **GREEDY), it.greedy)


@CHECKS.add
def assisted_generation_is_refused(it: Subject) -> None:
    helper = copy.deepcopy(it.model)
    refused(
        lambda: it.model.generate(it.ids[:1], assistant_model=helper, **GREEDY),
        "assisted generation",
    )


@CHECKS.add
def prompt_lookup_is_refused(it: Subject) -> None:
    refused(
        lambda: it.model.generate(it.ids[:1], prompt_lookup_num_tokens=3, **GREEDY),
        "assisted generation",
    )


@CHECKS.add
def a_static_cache_is_refused(it: Subject) -> None:
    refused(
        lambda: it.model.generate(it.ids, cache_implementation="static", **GREEDY),
        "cache_implementation='static' cannot hold a memory",
    )


@CHECKS.add
def bfloat16_is_near_and_generates(it: Subject) -> None:
    model = it.load(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    found = logits(model, it.ids)
    assert found.dtype == torch.bfloat16
    assert (found.float() - it.logits).norm() < 0.1 * it.logits.norm()
    ids, mask = padded(it)
    assert model.generate(ids, attention_mask=mask, **GREEDY).shape[1] == ids.shape[1] + NEW


@CHECKS.add
def gradient_checkpointing_changes_no_gradient(it: Subject) -> None:
    found = []
    for checkpointing in (False, True):
        model = copy.deepcopy(it.model).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        loss = model(it.ids, labels=it.ids).loss
        loss.backward()
        found.append({"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}})
    for name, tensor in found[0].items():
        assert tensor.abs().sum() > 0, name
        assert torch.equal(found[1][name], tensor), name


@CHECKS.add
def the_loss_is_that_of_the_next_tokens(it: Subject) -> None:
    labels = it.ids.clone()
    labels[:, :5] = -100
    with torch.no_grad():
        found = it.model(it.ids, labels=labels).loss
    wanted = torch.nn.functional.cross_entropy(
        it.logits[:, 4:-1].flatten(0, 1), it.ids[:, 5:].flatten()
    )
    same(found, wanted)


@CHECKS.add
def embeddings_stand_in_for_ids(it: Subject) -> None:
    given = it.model.get_input_embeddings()(it.ids).detach()
    assert torch.equal(logits(it.model, None, inputs_embeds=given), it.logits)
    found = it.model.generate(inputs_embeds=given, **GREEDY)
    assert torch.equal(found, it.greedy[:, it.ids.shape[1] :])


@CHECKS.add
def more_rows_of_embeddings_keep_them_tied(it: Subject) -> None:
    model, known = copy.deepcopy(it.model), it.model.config.vocab_size
    model.resize_token_embeddings(known + 88)
    found = logits(model, it.ids)
    assert found.shape[-1] == model.config.vocab_size == known + 88
    same(found[..., :known], it.logits)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model(it.ids, labels=it.ids + 88).loss.backward()
    model.generate(it.ids, **GREEDY)


@CHECKS.add
def what_is_saved_again_is_whole(it: Subject) -> None:
    with tempfile.TemporaryDirectory() as room:
        it.model.save_pretrained(room)
        files = [{path.name for path in Path(p).glob("*.py")} for p in (it.directory, room)]
        assert files[0] == files[1], files
        again = it.load(directory=room)
        same(logits(again, it.ids), it.logits)  # its files leave tensors unaligned
        assert again.config.auto_map.keys() == it.model.config.auto_map.keys()
        assert torch.equal(again.generate(it.ids, **GREEDY), it.greedy)


@CHECKS.add
def the_model_without_its_head_is_AutoModel(it: Subject) -> None:  # noqa: N802
    model = it.load(AutoModel)
    with torch.no_grad():
        found = model(it.ids, use_cache=False).last_hidden_state
    assert torch.equal(it.model.lm_head(found), it.logits)


@CHECKS.add
def hidden_states_and_tuples_are_given_on_request(it: Subject) -> None:
    with torch.no_grad():
        out = it.model(it.ids, output_hidden_states=True)
        logits, *_ = it.model(it.ids, use_cache=False, return_dict=False)
    assert len(out.hidden_states) == it.model.config.num_hidden_layers + 1
    assert torch.equal(out.hidden_states[0], it.model.get_input_embeddings()(it.ids))
    same(it.model.lm_head(out.hidden_states[-1]), it.logits)
    assert torch.equal(logits, it.logits)


@CHECKS.add
def only_the_columns_asked_for_are_predicted_from(it: Subject) -> None:
    same(logits(it.model, it.ids, logits_to_keep=2), it.logits[:, -2:])
    columns = torch.tensor([3, 0])
    same(logits(it.model, it.ids, logits_to_keep=columns), it.logits[:, columns])


@CHECKS.add
def texts_generate_the_same_in_a_batch_and_alone(it: Subject) -> None:
    batch = it.tokenizer(TEXTS, return_tensors="pt", padding=True)
    lengths = batch["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) > 2
    assert (batch["attention_mask"][:, -1] == 1).all()
    together = it.model.generate(**batch, **GREEDY)[:, -NEW:]
    for row, text in zip(together, TEXTS, strict=True):
        alone = it.model.generate(**it.tokenizer(text, return_tensors="pt"), **GREEDY)
        assert torch.equal(row, alone[0, -NEW:]), text


@CHECKS.add
def without_trust_it_is_refused(it: Subject) -> None:
    refused(lambda: AutoModelForCausalLM.from_pretrained(it.directory), "trust_remote_code")
