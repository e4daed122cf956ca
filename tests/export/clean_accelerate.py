"""What users do with accelerate besides: placing layers, offloading them, pipelines of texts."""

import tempfile
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
import transformers
from accelerate import infer_auto_device_map, init_empty_weights
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from clean_checks import GREEDY, NEW, TEXTS, Checks, Subject, logits, padded, same
from transformers import AutoConfig, AutoModelForCausalLM, pipeline

CHECKS = Checks()


@CHECKS.add
def a_device_map_changes_nothing(it: Subject) -> None:
    for where in ("auto", "cpu", {"": "cpu"}):
        same(logits(it.load(device_map=where), it.ids), it.logits)


@CHECKS.add
def what_lies_on_disk_changes_nothing(it: Subject) -> None:
    ids, mask = padded(it)
    everything = list(_disk_map(it))
    if transformers.__version__.startswith("4.") and it.model.config.tie_word_embeddings:
        # transformers 4 finds no model's tied weights on disk
        everything = [
            place for place in everything if place not in ("model.embed_tokens", "lm_head")
        ]
    for on_disk in (["model.layers.1"], everything):
        with tempfile.TemporaryDirectory() as folder:
            places = _disk_map(it) | dict.fromkeys(on_disk, "disk")
            model = it.load(device_map=places, offload_folder=folder)
            assert any(p.is_meta for p in model.parameters())
            same(logits(model, it.ids), it.logits)
            assert torch.equal(model.generate(it.ids, **GREEDY), it.greedy)
            found, wanted = (
                m.generate(ids, attention_mask=mask, num_beams=2, **GREEDY)
                for m in (model, it.model)
            )
            assert torch.equal(found, wanted)


def _disk_map(it: Subject) -> dict[str, str]:
    layers = [f"model.layers.{index}" for index in range(it.model.config.num_hidden_layers)]
    return dict.fromkeys(["model.embed_tokens", *layers, "model.norm", "lm_head"], "cpu")


def _no_autocast(**_: Any) -> Any:
    """There is none on meta."""
    return nullcontext()


@CHECKS.add
def layers_may_lie_on_several_devices(it: Subject) -> None:
    """The second half on a device that holds no numbers: work with another's tensors raises."""
    model, layouts = it.load(), []
    second = [*model.model.layers[1:], model.model.norm, model.lm_head]
    for module in second:
        module.to("meta")
        add_hook_to_module(module, AlignDevicesHook("meta"))
    model.model.layers[1].mixer.register_forward_pre_hook(lambda _, given: layouts.append(given[1]))
    (ids, mask), cache = padded(it), None
    for columns in (slice(0, 9), slice(9, 21)):
        with torch.no_grad(), patch.object(torch, "autocast", _no_autocast):
            out = model(
                ids[:, columns],
                attention_mask=mask[:, : columns.stop],
                past_key_values=cache,
                use_cache=True,
                output_hidden_states=True,
            )
        cache = out.past_key_values
    assert out.logits.is_meta
    assert all(layout.valid.is_meta for layout in layouts)
    states = cache.layers[1].state
    assert all(t.is_meta for name, t in states.items() if name != "position")
    assert not any(t.is_meta for t in cache.layers[0].state.values())


@CHECKS.add
def blocks_are_not_split_over_devices(it: Subject) -> None:
    config = AutoConfig.from_pretrained(it.directory, trust_remote_code=True)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    needed = model.get_memory_footprint()
    room = {"cpu": needed * 2 // 3, "disk": needed}
    kept = type(model)._no_split_modules
    places = infer_auto_device_map(model, max_memory=room, no_split_module_classes=kept)
    assert set(places.values()) == {"cpu", "disk"}
    assert all(name.count(".") < 3 for name in places), places


@CHECKS.add
def a_pipeline_gives_the_same_texts_in_batches_and_alone(it: Subject) -> None:
    make = pipeline("text-generation", model=it.model, tokenizer=it.tokenizer)
    options = {"max_new_tokens": NEW, "do_sample": False}
    batched = [found[0]["generated_text"] for found in make(TEXTS, batch_size=3, **options)]
    assert batched == [make(text, **options)[0]["generated_text"] for text in TEXTS]
    assert all(len(found) > len(text) for found, text in zip(batched, TEXTS, strict=True))


@CHECKS.add
def a_pipeline_loads_a_directory_itself(it: Subject) -> None:
    make = pipeline("text-generation", model=str(it.directory), trust_remote_code=True)
    assert type(make.model).__name__ == "TitansForCausalLM"
    assert len(make("Ba", max_new_tokens=NEW, do_sample=False)[0]["generated_text"]) > 2
