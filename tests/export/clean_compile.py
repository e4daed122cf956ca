"""torch.compile of exported models, as one graph; see clean_checks."""

import os

import torch
from clean_checks import Checks, Subject, logits, padded, same

CHECKS = Checks()
BACKEND = os.environ.get("COMPILE_BACKEND", "aot_eager")


def compiled(model: torch.nn.Module) -> torch.nn.Module:
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend=BACKEND)


@CHECKS.add
def a_compiled_call_is_one_graph_and_the_same(it: Subject) -> None:
    same(logits(compiled(it.model), it.ids), it.logits)


@CHECKS.add
def a_compiled_padded_prompt_and_its_next_token_are_the_same(it: Subject) -> None:
    (ids, mask), model = padded(it), compiled(it.model)
    further = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    with torch.no_grad():
        found, wanted = (m(ids, attention_mask=mask, use_cache=True) for m in (model, it.model))
        same(found.logits[mask == 1], wanted.logits[mask == 1])
        after = [
            m(ids[:, -1:], attention_mask=further, past_key_values=out.past_key_values)
            for m, out in ((model, found), (it.model, wanted))
        ]
    same(after[0].logits, after[1].logits)
