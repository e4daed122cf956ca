"""A model that tells documents apart, exported: it still does."""

import json

import torch
from tiny_run import VOCABULARY, make_model, make_run
from transformers import AutoModelForCausalLM

from titans_pretrain.export import huggingface

FIELDS = {"attend_across_documents": False, "remember_across_documents": False}


def test_the_exported_model_keeps_the_fields_and_gives_the_same_logits_of_packed_rows(
    tmp_path, proven_here
):
    directory = tmp_path / "model"
    huggingface.export(make_run(tmp_path / "run", "mac", **FIELDS), directory)
    written = json.loads((directory / "config.json").read_text())
    assert {name: written[name] for name in FIELDS} == FIELDS
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
    ids = torch.randint(VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(0))
    starts = torch.tensor([[0] * 5 + [5] * 6 + [11] * 9])
    found, wanted = (
        one(ids, document_starts=starts).logits for one in (model, make_model("mac", **FIELDS))
    )
    assert torch.equal(found, wanted)
    assert not torch.equal(found, model(ids).logits)
