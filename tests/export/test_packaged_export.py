"""Models of an installed package that neither transformers nor the project knows."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from test_baseline_export import MODELS, make_run

from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.export import huggingface, verification
from titans_pretrain.inference import generate

NAME = "lanterns.models:LanternForCausalLM"
CODE = """
    from transformers import LlamaConfig, LlamaForCausalLM

    class LanternConfig(LlamaConfig):
        model_type = "lantern"

    class LanternForCausalLM(LlamaForCausalLM):
        config_class = LanternConfig

        def forward(self, *args, **options):
            out = super().forward(*args, **options)
            out.logits = out.logits.flip(-1)
            return out
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a package, a run of its class, and the export, proven in a clean process."""
    room = tmp_path_factory.mktemp("lantern")
    package = room / "packages" / "lanterns"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "models.py").write_text(textwrap.dedent(CODE))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(package.parent)
        patch.setitem(MODELS, "lantern", MODELS["llama"] | {"hf": NAME})
        model = make_run(room / "run", "lantern")
        huggingface.export(room / "run", room / "model")
    _forget()
    return package.parent, model, room / "model"


@pytest.fixture
def installed(made, monkeypatch):
    monkeypatch.syspath_prepend(made[0])
    yield made
    _forget()


def _forget():
    for name in ("lanterns", "lanterns.models"):
        sys.modules.pop(name, None)


def test_the_export_names_the_class_and_how_it_is_loaded(made):
    manifest = json.loads((made[2] / "manifest.json").read_text())
    assert manifest["training"]["hf"] == NAME
    card = (made[2] / "README.md").read_text()
    (code,) = [part.split("```")[0] for part in card.split("```python\n")[1:]]
    assert "from lanterns.models import LanternForCausalLM\n" in code
    assert "LanternForCausalLM.from_pretrained(PATH)\n" in code
    assert "the package\n`lanterns` is needed" in card


def test_the_package_runs_at_the_users_word_only(installed):
    _, trained, directory = installed
    with pytest.raises(UserError, match="code of the installed package 'lanterns'") as caught:
        generate.load(directory)
    assert "--trust-remote-code" in caught.value.fix
    assert "lanterns.models" not in sys.modules
    network, tokenizer = generate.load(directory, trust_remote_code=True)
    ids = tokenizer("river", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(network(ids).logits, trained(ids).logits)


def test_a_package_that_is_imported_needs_no_word(installed):
    import lanterns.models

    network, _ = generate.load(installed[2])
    assert type(network) is lanterns.models.LanternForCausalLM


def test_what_evaluates_a_runs_checkpoint_needs_no_word(installed):
    directory = installed[2]
    assert not huggingface.export(directory.parent / "run", directory).is_new
    generate.load(directory)


def test_a_package_that_is_missing_or_lacks_the_class_is_told(installed, monkeypatch):
    packages, _, directory = installed
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [entry for entry in sys.path if entry != str(packages)])
        with pytest.raises(UserError, match="'lanterns' is not installed") as caught:
            generate.load(directory, trust_remote_code=True)
    assert (caught.value.where, caught.value.fix) == (str(directory), "install lanterns")
    import lanterns.models

    monkeypatch.delattr(lanterns.models, "LanternForCausalLM")
    with pytest.raises(UserError, match="no causal language model") as caught:
        generate.load(directory)
    assert caught.value.fix.startswith("install the lanterns that the model was trained with")


def test_a_model_of_no_known_kind_is_told_without_an_export(made, tmp_path):
    (tmp_path / "config.json").write_text((made[2] / "config.json").read_text())
    with pytest.raises(UserError, match="transformers knows no model_type 'lantern'") as caught:
        generate.load(tmp_path, trust_remote_code=True)
    assert "export it again" not in caught.value.fix


def test_a_package_that_does_not_run_on_the_cpu_is_told(installed, tmp_path, monkeypatch):
    import lanterns.models

    def refuse(*_, **__):
        raise RuntimeError("0 active drivers")

    monkeypatch.setattr(lanterns.models.LanternForCausalLM, "forward", refuse)
    told = "the trained model does not run on the CPU: RuntimeError: 0 active drivers"
    with pytest.raises(TitansError, match=told) as caught:
        huggingface.export(installed[2].parent / "run", tmp_path / "model")
    assert "without GPU kernels" in caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_needs_kernels_in_the_clean_process_is_told(
    installed, tmp_path, monkeypatch
):
    def fail(*_, **__):
        told = "Traceback\nModuleNotFoundError: import of fla halted; None in sys.modules"
        return subprocess.CompletedProcess([], 1, "", told)

    monkeypatch.setattr(verification.subprocess, "run", fail)
    told = f"{NAME} does not load or run in a clean process on the CPU: .*import of fla halted"
    with pytest.raises(TitansError, match=told) as caught:
        huggingface.export(installed[2].parent / "run", tmp_path / "model")
    assert "without causal_conv1d, mamba_ssm, fla" in caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_a_package_whose_layers_need_a_gpu_is_refused_before_any_work(installed, monkeypatch):
    packages, _, directory = installed
    monkeypatch.setattr(huggingface.foreign, "NEEDS_GPU", ("lanterns",))
    with pytest.raises(UserError, match="an export is proven on the CPU") as caught:
        huggingface.export(directory.parent / "run", packages / "model")
    assert caught.value.where == "model.hf"
    assert not (packages / "model").exists()
