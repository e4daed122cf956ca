from checkpoint_cases import cut, make_tensors

from titans_pretrain import cli
from titans_pretrain.checkpoint.save import save


def _run(directory, *steps):
    for step in steps:
        shards = cut(make_tensors(), 0, 1)
        save(directory / "checkpoints", step, shards, state={}, files={}, keep=9)
    return directory


def test_list_prints_every_step_with_size_and_plain_damage(tmp_path, capsys):
    run = _run(tmp_path, 5, 10)
    (run / "checkpoints" / "step-5" / "state.json").unlink()
    assert cli.main(["checkpoint", "list", str(run)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "step-5" in first
    assert "state.json is missing" in first
    assert "latest" not in first
    assert "step-10" in second
    assert second.endswith("5 tensors, latest")


def _config(run, text):
    (run / "config.yaml").write_text(
        "model: {variant: lmm}\ndata: {manifest: m, sequence_length: 64}\nrun: {directory: r}\n"
        "train: {steps: 9, global_batch_size: 1, learning_rate: 1}\n" + text
    )


def test_list_remarks_which_checkpoints_stay_for_good(tmp_path, capsys):
    run = _run(tmp_path, 5, 10, 15, 20)
    (run / "checkpoints" / "step-20" / "state.json").unlink()

    def remarked():
        assert cli.main(["checkpoint", "list", str(run)]) == 0
        return [line.endswith(", kept") for line in capsys.readouterr().out.splitlines()]

    assert remarked() == [False] * 4
    _config(run, "checkpoint: {every: 5, keep_every: 10}\n")
    assert remarked() == [False, True, False, False]
    _config(run, "checkpoint: {every: 5}\n")
    assert remarked() == [False] * 4
    _config(run, "checkpoint: {every: nonsense}\n")
    assert remarked() == [False] * 4


def test_verify_prints_each_and_fails_if_any_is_damaged(tmp_path, capsys):
    run = _run(tmp_path, 5, 10)
    assert cli.main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out == "step-5: good\nstep-10: good\n"
    path = run / "checkpoints" / "step-5" / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert cli.main(["checkpoint", "verify", str(run)]) == 1
    told = capsys.readouterr()
    assert "step-5: rank-00000.safetensors differs from its checksum" in told.out
    assert "1 of 2 checkpoints are damaged" in told.err
    assert cli.main(["checkpoint", "verify", str(run), "--step", "10"]) == 0
    assert capsys.readouterr().out == "step-10: good\n"


def test_no_checkpoint_is_the_users_mistake(tmp_path, capsys):
    run = _run(tmp_path / "run", 5)
    for arguments in (
        ["list", str(tmp_path)],
        ["list", str(tmp_path / "nowhere")],
        ["verify", str(tmp_path)],
        ["verify", str(run), "--step", "6"],
    ):
        assert cli.main(["checkpoint", *arguments]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 3
