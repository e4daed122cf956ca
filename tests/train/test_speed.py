"""The figures of a row that depend on the clock."""

import pytest
import torch

from titans_pretrain import config
from titans_pretrain.plan import flops
from titans_pretrain.train import speed

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 32}
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def run(precision="bf16", **model):
    return config.resolve(
        {
            "model": {"variant": "transformer", **SMALL, **model},
            "data": {"manifest": "m", "sequence_length": 8},
            "train": {
                "steps": 1,
                "global_batch_size": 6,
                "micro_batch_size": 3,
                "learning_rate": 1.0,
                "precision": precision,
            },
            "run": {"directory": "r"},
        },
        source="test",
    )


@pytest.fixture
def gpu(monkeypatch):
    """The name of the GPU that torch tells."""

    def install(name):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)

    return install


def test_a_rank_s_share_of_the_model_s_flops_is_told_per_second():
    one = run()
    row = speed.Speed(one, ranks=4, device=CPU).row(8, seconds=2.0)
    assert row == {
        "tokens_per_second": 6 * 8 / 2.0,
        "flops_per_second": flops.step(one) / 2.0 / 4,
        "seconds": 2.0,
    }


def test_shorter_sequences_of_a_step_are_counted_as_such():
    told = speed.Speed(run(), ranks=1, device=CPU)
    short, full = (told.row(length, 1.0) for length in (4, 8))
    assert short["tokens_per_second"] == full["tokens_per_second"]
    assert short["flops_per_second"] == flops.step(run(), 4) < full["flops_per_second"]


def test_mfu_is_told_where_the_peak_is_known(gpu):
    gpu("NVIDIA H100 80GB HBM3")
    row = speed.Speed(run(), ranks=2, device=GPU).row(8, 0.5)
    assert row["mfu"] == row["flops_per_second"] / 989.5e12
    gpu("NVIDIA Imaginary")
    assert "mfu" not in speed.Speed(run(), ranks=2, device=GPU).row(8, 0.5)


def test_the_peak_is_that_of_the_numbers_that_are_multiplied(gpu):
    gpu("NVIDIA A100-SXM4-80GB")
    assert speed.peak(GPU, "bf16") == 312e12
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert speed.peak(GPU, "fp32") == 19.5e12
        torch.set_float32_matmul_precision("high")
        assert speed.peak(GPU, "fp32") == 156e12
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_model_whose_flops_are_not_counted_tells_tokens_alone():
    keys = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 32}
    keys |= {"intermediate_size": 8, "max_position_embeddings": 8}
    one = run()
    other = one.model_copy(update={"model": config.resolve_model({"hf": "llama", **keys})})
    row = speed.Speed(other, ranks=1, device=CPU).row(8, 1.0)
    assert row.keys() == {"tokens_per_second", "seconds"}
