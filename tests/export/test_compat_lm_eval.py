"""lm-eval's own model for Hugging Face directories runs exported models."""

from types import SimpleNamespace

import pytest

TEXTS = [
    ("ba be", " bi"),
    ("Hello ba be bi bo bu", " ke ki ko"),
    ("", "ku"),
    ("ka " * 20, "ba ba"),
    ("x" * 9, " bo bu ba be"),
    ("ke", " ki ko ku ka ke ki"),
]


@pytest.fixture(scope="module")
def lm_eval():
    """Its ``HFLM`` over a directory, by batch size."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")

    def make(directory, batch):
        return huggingface.HFLM(
            pretrained=str(directory),
            trust_remote_code=True,
            dtype="float32",
            device="cpu",
            max_length=96,
            batch_size=batch,
        )

    return make


def test_log_likelihoods_and_texts_do_not_depend_on_the_batch(exported, lm_eval):
    scored = [SimpleNamespace(args=pair) for pair in TEXTS]
    until = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    asked = [SimpleNamespace(args=(context or "ba", until)) for context, _ in TEXTS]
    alone, together = (lm_eval(exported, batch) for batch in (1, 8))
    found, wanted = [model.loglikelihood(scored, disable_tqdm=True) for model in (together, alone)]
    for (one, greedy), (other, also) in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, abs=2e-5)
        assert greedy == also
    assert len({round(one) for one, _ in found}) > 3
    texts = [model.generate_until(asked, disable_tqdm=True) for model in (together, alone)]
    assert texts[0] == texts[1]
    assert any(texts[0])
