"""Layers of transformers run on a CPU where packages of GPU kernels are installed, too."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from titans_pretrain import cli_model
from titans_pretrain.baselines import foreign, gpu_packages
from titans_pretrain.errors import UserError
from titans_pretrain.evaluate import loaded, of_checkpoint
from titans_pretrain.inference import generate

KERNELS = """
def causal_conv1d_fn(x, weight, bias=None, activation=None):
    raise RuntimeError("Expected x.is_cuda() to be true, but got false.")

causal_conv1d_update = causal_conv1d_fn
"""
MODULE = "transformers.models.mamba.modeling_mamba"


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """A package of kernels is installed, and Mamba's module is not imported."""
    package = tmp_path / "x-packages" / "causal_conv1d"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(KERNELS)
    monkeypatch.syspath_prepend(package.parent)
    known = importlib.import_module(MODULE)
    monkeypatch.setitem(sys.modules, MODULE, known)
    monkeypatch.delitem(sys.modules, MODULE)
    yield package.parent
    sys.modules.pop("causal_conv1d", None)
    sys.modules["transformers.models.mamba"].modeling_mamba = known


def takes_kernels():
    """Whether Mamba's convolution, imported now, refuses what lies on the CPU."""
    sys.modules.pop(MODULE, None)
    convolve = importlib.import_module(MODULE).causal_conv1d_fn
    try:
        convolve(torch.ones(1, 2, 3), torch.ones(2, 2))
    except RuntimeError:
        return True
    return False


def test_layers_imported_for_the_cpu_take_no_kernels(kernels):
    with gpu_packages.for_device("cpu"):
        assert not takes_kernels()
        assert not gpu_packages.are_taken()
    if not takes_kernels():
        pytest.skip("this release of transformers asks for the device itself")
    assert gpu_packages.are_taken()
    with gpu_packages.for_device("cpu"):
        assert not takes_kernels()
    assert sys.modules["causal_conv1d"].causal_conv1d_fn  # there again


def test_layers_take_no_kernels_on_a_machine_without_a_gpu(kernels, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    foreign.classes("mamba")
    assert "causal_conv1d" not in sys.modules
    with gpu_packages.for_device():
        assert not takes_kernels()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with gpu_packages.for_device():
        assert "causal_conv1d" not in sys.modules
        importlib.import_module("causal_conv1d")


def test_a_package_that_is_asked_for_by_name_stays(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla", SimpleNamespace())
    with gpu_packages.for_device("cpu", keep="fla"):
        assert sys.modules["fla"] is not None
        assert sys.modules["mamba_ssm"] is None
    assert "mamba_ssm" not in sys.modules


@pytest.mark.parametrize(
    ("outer", "told", "fix"),
    [
        ("cpu", "GPU kernels, which no CPU runs", "use --device cuda"),
        ("cuda", "needs the package 'fla'", "pip install 'titans-pretrain[gpu]'"),  # not all there
    ],
)
def test_layers_that_are_kernels_are_refused_where_the_cpu_is_asked_for(
    outer, told, fix, tmp_path, monkeypatch
):
    (tmp_path / "fla").mkdir()
    (tmp_path / "fla" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fla", raising=False)
    with gpu_packages.for_device(outer), pytest.raises(UserError, match=told) as caught:
        foreign.classes("fla.models:GLAForCausalLM")
    assert caught.value.fix.startswith(fix)
    sys.modules.pop("fla", None)


@pytest.mark.parametrize(("device", "hidden"), [("cpu", True), ("cuda", False)])
def test_a_model_that_goes_to_the_cpu_is_loaded_without_them(device, hidden, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    seen = []

    def load(*_, **__):
        seen.append("mamba_ssm" in sys.modules)
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "_load", load)
    monkeypatch.setattr(generate, "choose_device", torch.device)
    for use in (
        lambda: generate.generate(Path("model"), "Bo", generate.Sampling(), device=device),
        lambda: loaded.load(Path("model"), device=device),
    ):
        with pytest.raises(KeyboardInterrupt):
            use()
    assert seen == [hidden, hidden]


def test_all_of_an_evaluation_on_the_cpu_does_without_them(monkeypatch):
    seen = []
    monkeypatch.setattr(of_checkpoint, "load", lambda _: seen.append({**sys.modules}))
    found = SimpleNamespace(step=1, metrics={})
    monkeypatch.setattr(
        of_checkpoint, "evaluate", lambda *_, **__: seen.append({**sys.modules}) or found
    )
    for device, hidden in (("cpu", True), ("cpu:0", True), ("cuda:1", False)):
        options = SimpleNamespace(config=Path("c"), checkpoint=Path("step-1"), device=device)
        cli_model.evaluate_checkpoint(options)
        assert [known.get("mamba_ssm", 0) is None for known in seen] == [hidden, hidden]
        seen.clear()


SCRIPT = """
import sys
from pathlib import Path

import torch

torch.cuda.device_count = lambda: 1  # layers are bound as on a machine with a GPU
import test_baseline_export
from titans_pretrain.baselines import gpu_packages
from titans_pretrain.export import huggingface

sys.path.append(sys.argv[1])
room = Path(sys.argv[2])
test_baseline_export.make_run(room / "run", "mamba")
if not gpu_packages.are_taken():
    sys.exit("this release of transformers asks for the device itself")
huggingface.export(room / "run", room / "model")
"""


@pytest.mark.slow
def test_an_export_is_proven_where_kernels_are_installed(kernels, tmp_path):
    tests = Path(__file__).parents[1]
    path = [str(tests / name) for name in ("support", "export")]
    script = f"import sys\nsys.path[:0] = {path}\n{SCRIPT}"
    done = subprocess.run(
        [sys.executable, "-c", script, kernels, tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    if "asks for the device itself" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "model" / "manifest.json").is_file()
