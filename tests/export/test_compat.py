"""Exported models in environments without the project, on the oldest and newest transformers."""

import json
import os
import subprocess
from functools import cache
from pathlib import Path

import clean_checks
import clean_environment
import pytest
import test_baseline_export
import torch
from safetensors.torch import save_file
from tiny_run import VARIANTS, make_model, make_run

from titans_pretrain.export import huggingface

SCRIPT = Path(__file__).with_name("clean_script.py")
OLDEST = clean_environment.oldest("transformers")
# of that release, which pip does not choose by itself
WITH_OLDEST = (OLDEST, "huggingface_hub>=0.34,<1", "tokenizers>=0.22,<=0.23.0")


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """``exports(name)``: an exported directory; the logits it should give lie beside it."""
    room = tmp_path_factory.mktemp("exports")

    def make(run, name):
        if name in BASELINES:
            return test_baseline_export.make_run(run, name)
        make_run(run, name)
        return make_model(name)

    @cache
    def export(name):
        out, run = room / name, room / "runs" / name
        model = make(run, name)
        generator = torch.Generator().manual_seed(7)
        ids = torch.randint(3, model.config.vocab_size, (2, 21), generator=generator)
        with torch.no_grad():
            wanted = model(ids, use_cache=False).logits
        save_file({"ids": ids, "logits": wanted}, out.with_suffix(".safetensors"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(huggingface.verification, "verify", lambda *_, **__: None)
            huggingface.export(run, out)
        return out

    return export


@pytest.fixture(scope="module")
def pythons(tmp_path_factory):
    """``pythons(environment)``: its interpreter."""
    room = tmp_path_factory.mktemp("environments")
    contents = {
        "newest": {},
        "newest and accelerate": {"also": ["accelerate"]},
        "oldest": {"also": ["accelerate", "requests"], "instead": WITH_OLDEST},
    }

    @cache
    def make(environment):
        try:
            return clean_environment.make(room / environment, **contents[environment])
        except ConnectionError as error:
            pytest.skip(f"{OLDEST} cannot be installed here: {error}")

    return make


def run(python, checks, directories):
    """What a module of checks tells of each directory."""
    room = directories[0].parent
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [python, "-I", SCRIPT, checks, *directories],
        cwd=room,
        env=os.environ | threads | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(room / "home")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


BASELINES = ("linear", "h2", "rmt")
ALL, SLOW = tuple(VARIANTS), (pytest.mark.slow, pytest.mark.timeout(1800))


@pytest.mark.parametrize(
    ("environment", "checks", "variants"),
    [
        ("newest", "clean_checks", ("lmm", "mac", "mag")),
        ("newest and accelerate", "clean_accelerate", ("mac",)),
        ("oldest", "clean_checks", ("mac",)),
        pytest.param("newest", "clean_checks", ("mal", "transformer"), marks=SLOW),
        pytest.param("newest", "clean_compile", ALL, marks=SLOW),
        pytest.param("newest and accelerate", "clean_accelerate", ALL, marks=SLOW),
        pytest.param("oldest", "clean_checks", ALL, marks=SLOW),
        pytest.param("oldest", "clean_accelerate", ALL, marks=SLOW),
        pytest.param("newest", "clean_baselines", BASELINES, marks=SLOW),
        pytest.param("oldest", "clean_baselines", BASELINES, marks=SLOW),
    ],
)
def test_what_users_do_works(environment, checks, variants, exports, pythons, subtests):
    python = pythons(environment)
    told = run(python, checks, [exports(variant) for variant in variants])
    assert told.pop("importable") == []
    for variant in variants:
        assert told[variant]
        for check, failure in told[variant].items():
            with subtests.test(f"{variant}: {check}"):
                assert not failure, failure


@pytest.mark.parametrize(
    "check",
    ["the logits are those of training bit by bit", "the loss is that of the next tokens"],
)
def test_a_check_of_another_model_fails(check, exports):
    """The checks can tell one model from another."""
    subject = clean_checks.Subject(exports("lmm"), exports("lmm").with_suffix(".safetensors"))
    subject.model = make_model("lmm", memory_depth=2)
    with pytest.raises(AssertionError):
        clean_checks.CHECKS[check](subject)
