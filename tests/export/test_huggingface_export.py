import ast
import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_run
import torch
import yaml
from safetensors.torch import load_file
from tiny_run import make_model, make_run
from tokenizer_models import train

from titans_pretrain.checkpoint import manifest
from titans_pretrain.errors import TitansError, UserError
from titans_pretrain.export import huggingface, verification, weights
from titans_pretrain.model import modeling_titans

CODE = Path(modeling_titans.__file__).parent
ENTRANCES = {"configuration_titans", "modeling_titans"}


def _relative_imports(module):
    """Sibling modules that a module of the model imports anywhere in its text."""
    nodes = ast.walk(ast.parse((CODE / f"{module}.py").read_text()))
    found = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level]
    assert all(node.level == 1 and node.module for node in found), module
    return {node.module for node in found}


def _needed_modules():
    known, waiting = set(), set(ENTRANCES)
    while waiting:
        known |= waiting
        waiting = set().union(*map(_relative_imports, waiting)) - known
    return known


def test_the_code_is_what_the_model_imports_directly_or_not_and_nothing_else(exported):
    needed = _needed_modules()
    assert {"fields", "memory", "mixers"} < needed
    assert {path.stem for path in exported.rglob("*.py")} == needed
    for module in needed:
        assert (exported / f"{module}.py").read_bytes() == (CODE / f"{module}.py").read_bytes()


def test_the_model_imports_every_module_itself_as_transformers_4_copies_no_others():
    assert _relative_imports("modeling_titans") == _needed_modules() - {"modeling_titans"}


def test_the_directory_holds_code_weights_tokenizer_and_card(exported):
    names = {path.name for path in exported.iterdir()}
    assert {
        "README.md",
        "config.json",
        "configuration_titans.py",
        "fields.py",
        "generation_config.json",
        "manifest.json",
        "memory.py",
        "model.safetensors",
        "modeling_titans.py",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= names
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pkl", ".model"))}
    config = json.loads((exported / "config.json").read_text())
    assert config["model_type"] == "titans"
    assert config["auto_map"] == {
        "AutoConfig": "configuration_titans.TitansConfig",
        "AutoModel": "modeling_titans.TitansModel",
        "AutoModelForCausalLM": "modeling_titans.TitansForCausalLM",
    }
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (2, 2, 0)
    assert config["dtype"] == "float32"
    generation = json.loads((exported / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (2, 0)


def test_the_manifest_covers_every_file(exported, tmp_path):
    listed = {entry["name"] for entry in manifest.read(exported)["files"]}
    assert listed == {path.name for path in exported.iterdir()} - {"manifest.json"}
    assert manifest.problems(exported) == []
    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / "memory.py").write_text("changed")
    assert len(manifest.problems(copy)) == 1


def test_the_weights_are_the_checkpoints_without_the_tied_twin(exported):
    stored = load_file(exported / "model.safetensors")
    parameters = dict(make_model().named_parameters())
    assert stored.keys() == parameters.keys()
    assert "lm_head.weight" not in stored
    for name, tensor in stored.items():
        assert torch.equal(tensor, parameters[name]), name


def test_untied_bfloat16_in_several_files_is_proven_too(tmp_path, proven_here):
    run = make_run(tmp_path / "run", tie_word_embeddings=False)
    out = tmp_path / "out"
    huggingface.export(run, out, dtype="bfloat16", max_shard_size="30KB")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    parameters = dict(make_model(tie_word_embeddings=False).named_parameters())
    assert index["weight_map"].keys() == parameters.keys()
    assert "lm_head.weight" in parameters
    assert index["metadata"]["total_size"] == 2 * sum(p.numel() for p in parameters.values())
    files = set(index["weight_map"].values())
    assert files == {path.name for path in out.glob("*.safetensors")}
    assert len(files) > 2
    for file in files:
        assert (out / file).stat().st_size < 40_000
        for name, tensor in load_file(out / file).items():
            assert index["weight_map"][name] == file
            assert torch.equal(tensor, parameters[name].bfloat16())
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_tensors_lie_where_kernels_want_them(exported):
    with open(exported / "model.safetensors", "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
    assert (8 + length) % 64 == 0
    for name, entry in header.items():
        if name != "__metadata__" and len(entry["shape"]) > 1:
            assert entry["data_offsets"][0] % 64 == 0, name


def test_the_card_tells_how_it_was_trained_and_nothing_of_the_machine(exported, run):
    card = (exported / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert "custom_code" in yaml.safe_load(front)["tags"]
    for fact in ("30 of 40", "| 960 |", "5.2500", "5.7500", "f" * 64, "torch 2.13.0"):
        assert fact in body
    assert "segment_length: 8" in body
    assert "/secret/place" not in card
    assert str(run) not in card


def test_the_card_says_what_nobody_recorded(tmp_path, unproven):
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    huggingface.export(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| last training loss (nats per token) | not recorded |" in card
    assert unproven.count == 1


def test_a_run_means_its_newest_good_checkpoint(tmp_path, unproven):
    run = make_run(tmp_path / "run", step=10)
    newer = make_run(run, step=20) / "checkpoints" / "step-20"
    assert huggingface.export(run, tmp_path / "a").checkpoint == newer
    (newer / "tensors.json").unlink()
    assert huggingface.export(run, tmp_path / "b").checkpoint.name == "step-10"
    with pytest.raises(TitansError, match=r"damaged: tensors.json is missing"):
        huggingface.export(newer, tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "run"]


def test_a_checkpoint_without_a_rank_s_file_is_refused(tmp_path, unproven):
    checkpoint = make_run(tmp_path / "run") / "checkpoints" / "step-30"
    (checkpoint / "rank-00000.safetensors").unlink()
    for source in (checkpoint, tmp_path / "run"):
        with pytest.raises(TitansError, match=r"rank-00000\.safetensors is missing"):
            huggingface.export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_more_pieces_than_the_model_has_is_refused(tmp_path, unproven):
    run = make_run(tmp_path / "run", vocab_size=400)
    with pytest.raises(TitansError, match="the tokenizer has 512 pieces, the model 400"):
        huggingface.export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _bad_weights(monkeypatch):
    def write(path, entries, tensors, metadata):
        changed = (
            tensor * (1 + 1e-6) if entry.key.endswith("layers.1.mixer.o_proj.weight") else tensor
            for entry, tensor in zip(entries, tensors, strict=True)
        )
        return original(path, entries, changed, metadata)

    original = weights.tensor_file.write
    monkeypatch.setattr(weights.tensor_file, "write", write)


def _missing_weight(monkeypatch):
    original = weights._groups
    monkeypatch.setattr(
        weights, "_groups", lambda entries, limit: [original(entries, limit)[0][:-1]]
    )


def _code_of_the_project(monkeypatch):
    def write(model, directory):
        original(model, directory)
        path = directory / "modeling_titans.py"
        path.write_text(path.read_text() + "\nimport titans_pretrain\n")

    original = huggingface._write_model_files
    monkeypatch.setattr(huggingface, "_write_model_files", write)


def _other_tokenizer(monkeypatch):
    original = huggingface.tokenizer.write
    other = train(model_type="unigram", vocab_size=400)
    monkeypatch.setattr(
        huggingface.tokenizer, "write", lambda _, directory: original(other, directory)
    )


SABOTAGES = {
    "its logits differ": _bad_weights,
    r"missing keys: model\.norm\.weight": _missing_weight,
    "encodes .* differently": _other_tokenizer,
}


@pytest.mark.parametrize("message", SABOTAGES)
def test_an_export_that_is_not_the_trained_model_leaves_nothing(
    message, run, tmp_path, monkeypatch, proven_here
):
    SABOTAGES[message](monkeypatch)
    with pytest.raises(TitansError, match=message) as caught:
        huggingface.export(run, tmp_path / "out")
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_code_that_uses_the_project_does_not_load_in_the_clean_process(run, tmp_path, monkeypatch):
    _code_of_the_project(monkeypatch)
    with pytest.raises(TitansError, match=r"does not load: .*titans_pretrain") as caught:
        huggingface.export(run, tmp_path / "out")
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_code_that_uses_the_project_is_refused_where_it_is_installed(run, tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "titans_pretrain"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(package.parent))
    _code_of_the_project(monkeypatch)
    with pytest.raises(TitansError, match="its code imports titans_pretrain"):
        huggingface.export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_arguments_are_the_users_mistakes(run, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "empty").mkdir()
    for message, arguments, options in [
        ("there exists", (run, tmp_path / "there"), {}),
        ("is no directory", (tmp_path / "nothing", tmp_path / "out"), {}),
        ("holds no checkpoint", (tmp_path / "empty", tmp_path / "out"), {}),
        ("'float16' is unknown", (run, tmp_path / "out"), {"dtype": "float16"}),
        ("'5 potatoes' is no size", (run, tmp_path / "out"), {"max_shard_size": "5 potatoes"}),
        ("'0GB' is no size", (run, tmp_path / "out"), {"max_shard_size": "0GB"}),
    ]:
        with pytest.raises(UserError, match=message):
            huggingface.export(*arguments, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "there"]


def test_the_same_export_again_changes_nothing_and_another_is_refused(run, tmp_path, unproven):
    out = tmp_path / "out"
    first = huggingface.export(run, out)
    assert first.is_new
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert huggingface.export(run, out) == huggingface.Exported(first.checkpoint, is_new=False)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(UserError, match=r"out exists.* its dtype is float32, not bfloat16"):
        huggingface.export(run, out, dtype="bfloat16")


def test_an_export_by_another_version_or_of_other_code_is_another(
    run, tmp_path, unproven, monkeypatch
):
    out = tmp_path / "out"
    huggingface.export(run, out)
    for name in ("version", "_code"):
        with monkeypatch.context() as patch:
            patch.setattr(huggingface, name, lambda _: "other")
            told = f"its {name.strip('_')} is .*, not other"
            with pytest.raises(UserError, match=f"out exists, and is not this export: {told}"):
                huggingface.export(run, out)


def test_a_changed_byte_of_what_is_there_is_found(run, tmp_path, unproven):
    out = tmp_path / "out"
    huggingface.export(run, out)
    with open(out / "model.safetensors", "r+b") as handle:
        handle.seek(-1, 2)
        handle.write(b"\x7f")
    with pytest.raises(TitansError, match=r"damaged: model\.safetensors differs"):
        huggingface.export(run, out)
    (out / "model.safetensors").unlink()
    with pytest.raises(TitansError, match=r"damaged: model\.safetensors is missing"):
        huggingface.export(run, out)


def test_what_cannot_be_read_is_not_told_as_a_full_disk(run, tmp_path, unproven, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(huggingface.weights, "write", refuse)
    with pytest.raises(TitansError, match=r"cannot read .*step-30: Permission denied") as caught:
        huggingface.export(run, tmp_path / "out")
    assert "free space" not in caught.value.fix
    monkeypatch.setattr(huggingface.weights, "write", lambda _, place, *__: refuse(place))
    with pytest.raises(TitansError, match=r"cannot write .*out.*: Permission denied") as caught:
        huggingface.export(run, tmp_path / "out")
    assert caught.value.fix.startswith("free space")


@pytest.mark.parametrize("kib", [64, 250])
def test_a_full_disk_leaves_nothing(kib, run, tmp_path, unproven):
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", tmp_path]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        with pytest.raises(TitansError, match="No space left on device") as caught:
            huggingface.export(run, tmp_path / "out")
        assert caught.value.exit_code == 1
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_models_of_ours_are_proven_beyond_chunks_and_others_within_their_positions(tmp_path):
    seen = []

    def compute(ids):
        seen.append(tuple(ids.shape))
        raise KeyboardInterrupt

    others = [{"max_position_embeddings": longest} for longest in (32, 2048, None)]
    for facts in (*({"grid": grid} for grid in (1, 530, 2048)), *others):
        config = SimpleNamespace(vocab_size=10, **facts)
        model = SimpleNamespace(config=config)
        with pytest.raises(KeyboardInterrupt):
            verification.verify(tmp_path, model, compute, torch.float32, b"")
    assert seen == [(2, tokens) for tokens in (517, 535, 600, 32, 69, 69)]


def test_a_checkpoint_that_is_broken_itself_is_not_told_as_a_bug(tmp_path, monkeypatch):
    def broken(*arguments, **fields):
        model = make_model(*arguments, **fields)
        with torch.no_grad():
            model.model.norm.weight[0] = float("nan")
        return model

    monkeypatch.setattr(tiny_run, "make_model", broken)
    run = make_run(tmp_path / "run")
    with pytest.raises(TitansError, match="the checkpoint's logits are not finite") as caught:
        huggingface.export(run, tmp_path / "out")
    assert caught.value.where == str(run / "checkpoints" / "step-30")
    assert caught.value.fix == "export an earlier checkpoint"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.yaml", "tokenizer.model"])
def test_a_checkpoint_without_its_files_is_named(name, tmp_path, unproven, monkeypatch):
    run = make_run(tmp_path / "run")
    (run / "checkpoints" / "step-30" / name).unlink()
    monkeypatch.setattr(huggingface.layout, "resolve", lambda path: path / "checkpoints/step-30")
    with pytest.raises(TitansError, match=f"holds no {name}"):
        huggingface.export(run, tmp_path / "out")


def test_parameters_of_another_model_are_named():
    with pytest.raises(TitansError, match=r"b is missing; c is unexpected; a is \(2,\) instead"):
        weights.check_names({"a": (2,), "c": (1,)}, {"a": (3,), "b": (1,)})


@pytest.mark.parametrize(("size", "wanted"), [("5GB", 5 * 10**9), ("1.5mb", 1_500_000)])
def test_sizes_are_decimal(size, wanted):
    assert weights.shard_bytes(size) == wanted
