"""`longtrain verify --nproc P` passes on what is right, and says how often it was wrong."""

import pytest

from longtrain import cli
from tests.train.conftest import write_config


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(write_config(tmp_path, tmp_path / "out").replace("train:", "memory: {chunk_tokens: 24, store_outputs: 0.5}\ntrain:"))
    return path


def verify(file, processes, capfd, *overrides):
    code = cli.main(["verify", "--nproc", str(processes), str(file), *overrides])
    return code, capfd.readouterr().out


@pytest.mark.slow
def test_two_processes_compute_what_one_does(file, capfd):
    code, said = verify(file, 2, capfd)
    assert code == 0 and said.endswith("\nexact\n") and "FAIL" not in said
    assert "rings of 2 x 1" in said and "rings of 1 x 2" in said and "zigzag" in said


@pytest.mark.slow
def test_four_processes_and_a_ring(file, capfd):
    code, said = verify(file, 4, capfd, "parallel.way=ring", "model.num_heads=4", "model.num_kv_heads=2", "memory.segment_layers=1")
    assert code == 0 and said.endswith("\nexact\n"), said


@pytest.mark.slow
@pytest.mark.parametrize("states, conv", [("heads", "channels"), ("scan", "halo")])
def test_the_config_says_how_states_and_convolutions_go(states, conv, file, capfd):
    model = ("model.layers=[conv, linear, attention]", "model.window=null", "model.conv_taps=9")
    code, said = verify(file, 2, capfd, *model, f"parallel.states={states}", f"parallel.conv={conv}", "memory.segment_layers=1")
    assert code == 0 and said.endswith("\nexact\n"), said
    assert said.count(f", conv {conv}, states {states}, ") == (4 if states == "heads" else 8), said


@pytest.mark.slow
def test_blocks_and_tiers_of_the_config(file, tmp_path, capfd):
    tiers = ("memory.kv_block_tokens=48", f"memory.disk={{path: {tmp_path}, budget: 4MiB}}", "memory.staging=1MiB")
    code, said = verify(file, 2, capfd, *tiers, "memory.offload={kv: disk, outputs: {device: 0.3}, inputs: disk}")
    assert code == 0 and said.endswith("\nexact\n"), said


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "lfm2"])
def test_models_of_transformers(family, tmp_path, capfd):
    """lfm2: its convolutions' states go from process to process."""
    pytest.importorskip("transformers", reason='needs pip install "longtrain[hf]"')
    from tests.train.tiny_hf import write_run, write_shape

    file = write_run(tmp_path / "hf.yaml", write_shape(tmp_path / "given", family), tmp_path, tmp_path / "out")
    code, said = verify(file, 2, capfd)
    assert code == 0 and said.endswith("\nexact\n"), said
