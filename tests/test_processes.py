"""Several processes, jobs of an array, interruptions: one index, the same bytes. Processes are real, and as few as will do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import PartialState, cpu_offload, disk_offload, dispatch_model
from datasets_for_tests import save_model, token_rows
from pairs_for_tests import pair_rows, save_dual_encoder
from transformers import AutoModelForSequenceClassification

from hf_trak import AttributionIndex, TrakConfig
from hf_trak.building.passes import _see_shards
from hf_trak.cli.main import main
from hf_trak.distributed import Processes, _Watch, current_processes, share, warn_of_lone_process
from hf_trak.featurizing.devices import check_whole
from hf_trak.storage.columns import encode_columns
from hf_trak.storage.passes import PassWriter, gram_of, keep_stretch, stretches
from hf_trak.storage.writer import MemberWriter

N_TRAIN, SHARD_ROWS = 50, 12  # five shards, the last of two rows
TESTS, WORKER = Path(__file__).parent, Path(__file__).parent / "process_worker.py"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [save_model(folder / f"bert{seed}", seed=seed) for seed in (0, 1)]


def build_options(models: list[Path]) -> dict:
    return {
        "models": [str(model) for model in models],
        "dataset": token_rows(N_TRAIN),
        "config": TrakConfig(proj_dim=16),
        "sketch_seeds_per_checkpoint": 2,
        "shard_rows": SHARD_ROWS,
        "progress": False,
    }


@pytest.fixture(scope="module")
def expected(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes: four members, two per pass of gradients."""
    folder = tmp_path_factory.mktemp("one") / "index"
    AttributionIndex.build(folder, **build_options(models))
    return files_of(folder)


# Real processes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(count: int, *arguments: str, **variables: str) -> list[subprocess.Popen]:
    """Start processes as a launcher does, but for its watching over them."""
    port = str(free_port())
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", **variables}
    return [
        subprocess.Popen(
            [sys.executable, str(WORKER), *arguments],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def start_jobs(*jobs: tuple[str, ...], **variables: str) -> list[subprocess.Popen]:
    """Start jobs that know nothing of each other, have them import what they need, and let them go at the same moment."""
    started = [
        subprocess.Popen(
            [sys.executable, str(WORKER), "part", *job],
            env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for job in jobs
    ]
    for process in started:
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    return started


def outcome(process: subprocess.Popen) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=400)
    finally:
        process.kill()
    return process.returncode, out, err


def test_two_processes_one_killed_then_three_make_the_bytes_of_one(models, expected, tmp_path):
    """Kill -9 of one of two: the other names it and ends. Three others finish, with shards left for no more than two of them."""
    folder = tmp_path / "index"
    arguments = ["build", str(folder), *map(str, models)]
    first, second = start(2, *arguments, HF_TRAK_PATIENCE="9", SLOW_RANK="1")
    for line in second.stdout:
        if line.startswith("wrote"):
            break
    second.send_signal(signal.SIGKILL)
    code, out, err = outcome(first)
    assert code == 1, err
    assert f"Process 1 of 2 (pid {second.pid} on {socket.gethostname()}) has not been heard of" in err
    assert "what was finished is kept" in err
    assert outcome(second)[0] == -signal.SIGKILL
    written = [line.split()[1:] for line in out.splitlines() if line.startswith("wrote")]
    assert len(written) == 2 * 2, "the first two of five shards, of both members of the first pass"
    kept = {name: content for name, content in files_of(folder).items() if name.endswith(".parquet")}
    assert len(kept) >= 5
    assert all(content == expected[name] for name, content in kept.items())

    results = [outcome(process) for process in start(3, *arguments)]
    assert [code for code, *_ in results] == [0, 0, 0], [err for *_, err in results]
    again = [line.split()[1] for _, out, _ in results for line in out.splitlines() if line.startswith("wrote")]
    assert not set(again) & set(kept), "no finished shard was computed again"
    assert files_of(folder) == expected
    assert len({out.splitlines()[-1] for _, out, _ in results}) == 1, "every process got the same index"


@pytest.mark.slow  # of the test above, three of which two have work
@pytest.mark.parametrize(("count", "shard_rows"), [(3, 25), (8, 12)])
def test_more_processes_than_shards_make_the_bytes_of_one(models, tmp_path, count, shard_rows):
    one = tmp_path / "one" / "index"
    AttributionIndex.build(one, **{**build_options(models), "shard_rows": shard_rows})
    folder = tmp_path / "many" / "index"
    results = [
        outcome(process) for process in start(count, "build", str(folder), *map(str, models), SHARD_ROWS=str(shard_rows))
    ]
    assert [code for code, *_ in results] == [0] * count, [err for *_, err in results]
    written = [[line for line in out.splitlines() if line.startswith("wrote")] for _, out, _ in results]
    n_shards = -(-N_TRAIN // shard_rows)
    assert sum(map(len, written)) == len({line for lines in written for line in lines}) == 4 * n_shards, (
        "each shard was made once"
    )
    assert sum(map(bool, written)) == n_shards < count, "some processes had nothing to do"
    assert files_of(folder) == files_of(one)


@pytest.mark.slow
def test_accelerate_launch_of_the_script(models, expected, tmp_path):
    """The command users type."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", str(free_port())]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    token_rows(N_TRAIN).to_parquet(tmp_path / "train.parquet")
    flags = ["--dataset", str(tmp_path / "train.parquet"), "--proj_dim", "16", "--shard_rows", str(SHARD_ROWS)]
    flags += ["--model", *map(str, models), "--output", str(tmp_path / "index"), "--sketch_seeds_per_checkpoint", "2"]
    script = [str(TESTS.parent / "scripts" / "featurize.py"), *flags]
    done = subprocess.run([*launch, *script], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("50 rows, 4 members") == 1, "the first process alone speaks"
    assert "2 processes" in done.stderr, "the bar says whose rows it counts"
    found = files_of(tmp_path / "index")
    shards = [name for name in expected if name.endswith((".parquet", "gram.safetensors"))]
    assert all(found[name] == expected[name] for name in shards)


def test_the_trainer_featurizes_in_all_processes_of_its_run(tmp_path):
    results = [outcome(process) for process in start(2, "train", str(tmp_path / "run"))]
    assert [code for code, *_ in results] == [0, 0], [err[-3000:] for *_, err in results]
    lines = [out.splitlines()[-1] for _, out, _ in results]
    assert lines[0] == lines[1]
    assert json.loads(lines[0])["n_rows"] == N_TRAIN
    assert all("refused: The parameters of this FSDPBertForSequenceClassification are sharded" in out for _, out, _ in results)
    assert not (tmp_path / "run" / "sharded").exists()


@pytest.mark.slow
def test_processes_that_do_not_know_of_each_other_are_refused(models, tmp_path):
    """A plain `Accelerator()` on a machine without GPUs: each process takes itself for the main one."""
    for code, _, err in map(outcome, start(2, "accelerator", str(tmp_path / "index"), *map(str, models))):
        assert code == 1
        assert "2 processes were launched (WORLD_SIZE), but they know of 1: each would do the work of all" in err
        assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu" in err
    assert not (tmp_path / "index").exists()


# What a process knows of the others


def test_one_process_waits_for_nobody():
    with current_processes() as processes:
        processes.wait()
        processes.check()
        assert (processes.rank, processes.count, processes.is_first) == (0, 1, True)
        assert processes.tell([1]) == [1]
        assert processes.share(range(5)) == range(5)


@pytest.mark.parametrize(("n_items", "count"), [(7, 1), (7, 2), (7, 3), (2, 5), (0, 3)])
def test_parts_are_even_stretches_that_cover_everything_once(n_items, count):
    parts = [share(range(n_items), index, count) for index in range(count)]
    assert [item for part in parts for item in part] == list(range(n_items))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_tasks_started_without_a_launcher_are_refused(monkeypatch, name):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(name, "4")
    with pytest.raises(ValueError, match=f"4 processes were started .{name}., but WORLD_SIZE is not set"):
        current_processes()


def test_deepspeed_is_refused_with_the_way_out(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="does not run under DeepSpeed.*Leave out --use_deepspeed"):
        current_processes()


def test_a_lone_process_of_accelerate_launch_cpu_is_warned(monkeypatch):
    assert warn_of_lone_process() is None
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert "starts one process" in warn_of_lone_process()


@pytest.fixture
def store():
    return torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_a_failure_is_told_to_the_others_with_its_reason(store, monkeypatch):
    monkeypatch.setattr("hf_trak.distributed._runs", 0)
    failing, waiting = Processes(1, 2, store), Processes(0, 2, store)
    waiting.__enter__()
    monkeypatch.setattr("hf_trak.distributed._runs", 0)
    with pytest.raises(ValueError, match="no such row"), failing:
        raise ValueError("no such row.")
    with pytest.raises(
        ConnectionError, match="Process 1 of 2 .pid .* has ended with ValueError: no such row. This process ends"
    ):
        waiting.wait()
    waiting.__exit__(None, ConnectionError(), None)


def test_silence_is_counted_in_own_beats_and_a_late_process_is_given_longer(store):
    processes = Processes(0, 2, store)
    processes._store = torch.distributed.PrefixStore("x", store)
    watch = _Watch(processes)
    assert [watch._find_silent() for _ in range(watch._patience + 1)] == [None] * (watch._patience + 1), "it has yet to come"
    for number in range(3):
        store.set("x/alive/1", json.dumps([number, "Process 1 of 2"]))
        store.set("x/alive/0", json.dumps([number, "Process 0 of 2"]))
        assert watch._find_silent() is None
    silence = []
    while not any(silence):
        store.set("x/alive/0", json.dumps([len(silence), "Process 0 of 2"]))
        silence.append(watch._find_silent())
    assert len(silence) == watch._patience
    assert "Process 1 of 2 has not been heard of for 60 s" in silence[-1]


def test_shards_that_other_machines_do_not_show_are_an_error_that_says_so(tmp_path):
    writer = MemberWriter(tmp_path / "m", identity={}, n_rows=4, shard_rows=2)
    with pytest.raises(FileNotFoundError, match="written shards 0, 1 to .*All machines must share that folder"):
        _see_shards(PassWriter([writer], [0]), patience=0)


# Where a model lies


def test_models_in_pieces_are_refused_by_name():
    model = torch.nn.Linear(2, 2)
    check_whole(model)
    model.hf_device_map = {"": "cpu"}
    check_whole(model)
    model.hf_device_map = {"bert": 0, "classifier": 1}
    with pytest.raises(ValueError, match="Linear is spread over 0, 1 by its `device_map`.*one device"):
        check_whole(model)
    with pytest.raises(ValueError, match="not loaded .meta tensors.. Load it without `device_map`"):
        check_whole(torch.nn.Linear(2, 2, device="meta"))
    model = torch.nn.Linear(2, 2)
    model.weight.ds_id = 0
    with pytest.raises(ValueError, match="(?s)DeepSpeed ZeRO-3.*Save it whole to a folder"):
        check_whole(model)


def test_models_that_accelerate_has_spread_or_offloaded_are_refused_by_name(models, tmp_path):
    def load():
        return AutoModelForSequenceClassification.from_pretrained(models[0])

    check_whole(dispatch_model(load(), {"": "cpu"}))
    spread = dispatch_model(
        load(), {"bert": "cpu", "classifier": "disk"}, main_device="cpu", offload_dir=tmp_path / "weights", force_hooks=True
    )
    with pytest.raises(ValueError, match="BertForSequenceClassification is spread over cpu, disk by its `device_map`"):
        check_whole(spread)
    for offloaded in (cpu_offload(load(), "cpu"), disk_offload(load(), tmp_path / "all", "cpu")):
        with pytest.raises(ValueError, match="not loaded .meta tensors.. Load it without `device_map` or offloading"):
            check_whole(offloaded)


def test_a_device_map_of_one_device_changes_nothing(models, expected, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(models[0], device_map="auto")
    devices = getattr(model, "hf_device_map", {"": "cpu"})  # not recorded by all versions where one device holds all
    assert len(set(devices.values())) == 1
    options = {**build_options(models[:1]), "models": model, "sketch_seeds_per_checkpoint": 1}
    found = files_of(AttributionIndex.build(tmp_path / "index", **options).folder)
    assert all(found[name] == expected[name] for name in found if name.endswith((".parquet", "gram.safetensors")))


# Gram matrices


def test_up_to_64_shards_are_one_stretch_and_a_million_are_64():
    assert stretches(64) == [range(64)]
    assert stretches(130) == [range(64), range(64, 128), range(128, 130)]
    assert len(stretches(1_000_000)) == 64
    assert [shard for stretch in stretches(977) for shard in stretch] == list(range(977))


def test_a_gram_is_the_same_bytes_whoever_sums_its_stretches(tmp_path):
    writer = MemberWriter(tmp_path / "m", identity={}, n_rows=66, shard_rows=1)
    features = torch.randn(66, 8, generator=torch.Generator().manual_seed(0))
    for shard in range(66):
        writer.write(shard, encode_columns(features[shard : shard + 1], torch.zeros(1), torch.zeros(1), dtype="float32"))
    alone = gram_of(writer, proj_dim=8)
    torch.testing.assert_close(alone, features.double().T @ features.double(), rtol=1e-6, atol=1e-6)
    keep_stretch(writer, stretches(66)[1], proj_dim=8)
    writer.path(65).unlink()
    assert torch.equal(gram_of(writer, proj_dim=8), alone), "what was kept is not summed again"


# Jobs of an array


def test_parts_made_in_any_order_by_any_number_of_jobs_merge_to_the_bytes_of_one_process(
    models, expected, tmp_path, capsys, monkeypatch
):
    def killed(*_, **__):
        raise KeyboardInterrupt

    folder, options = tmp_path / "index", build_options(models)
    AttributionIndex.build_shards(
        folder, shard_index=2, num_shards=3, command=["hf-trak", "featurize", "--dataset", "a b"], **options
    )
    with pytest.raises(FileNotFoundError, match="is unfinished"):
        AttributionIndex.from_pretrained(folder)
    assert main(["merge", str(folder)]) == 1
    err = capsys.readouterr().err
    assert "member_3 lacks 3 of 5 shards: 0 to 2" in err
    assert "hf-trak featurize --dataset 'a b' --shard-index 1 --num-shards 3" in err
    assert "--shard-index 2" not in err
    AttributionIndex.build_shards(folder, shard_index=0, num_shards=2, **options)
    AttributionIndex.build_shards(folder, shard_index=1, num_shards=3, **options)
    (folder / "member_0" / ".train-00000-of-00005.parquet.elsewhere.7.tmp").write_bytes(
        b"of a job that was killed on another machine"
    )
    with monkeypatch.context() as patch:
        patch.setattr("hf_trak.storage.writer.forget_progress", killed)
        with pytest.raises(KeyboardInterrupt):
            AttributionIndex.merge(folder)
    assert main(["merge", str(folder)]) == 0
    assert "50 rows, 4 members" in capsys.readouterr().out
    assert files_of(folder) == expected
    assert main(["merge", str(folder)]) == 1
    assert "is not made of parts" in capsys.readouterr().err


@pytest.mark.slow
def test_jobs_that_start_at_the_same_moment_one_of_them_twice_merge_to_the_bytes_of_one(models, expected, tmp_path):
    """A job that was started twice by mistake makes the same files: whoever is later replaces them by the same, whole at any time."""
    folder, given = tmp_path / "index", [str(model) for model in models]
    jobs = start_jobs(*((str(folder), index, "2", *given) for index in ("0", "1", "1")))
    results = [outcome(process) for process in jobs]
    assert [code for code, *_ in results] == [0, 0, 0], [err for *_, err in results]
    assert not list(folder.rglob("*.tmp"))
    AttributionIndex.merge(folder)
    assert files_of(folder) == expected


def test_folders_of_jobs_that_share_no_disk_merge_when_copied_together(models, expected, tmp_path):
    for index in range(2):
        AttributionIndex.build_shards(
            tmp_path / f"job{index}" / "index", shard_index=index, num_shards=2, **build_options(models)
        )
    for index in range(2):
        shutil.copytree(tmp_path / f"job{index}" / "index", tmp_path / "all" / "index", dirs_exist_ok=True)
    AttributionIndex.merge(tmp_path / "all" / "index")
    found = files_of(tmp_path / "all" / "index")
    assert {name for name in expected if found[name] != expected[name]} <= {
        f"member_{member}/member.json" for member in range(4)
    }, "where the checkpoint lies, as seen from the folder, may differ"
    assert {name: value for name, value in found.items() if name.endswith("safetensors")} == {
        name: value for name, value in expected.items() if name.endswith("safetensors")
    }


def test_jobs_share_a_bank_and_record_masks(tmp_path):
    options = {
        "models": save_dual_encoder(tmp_path / "clip", seed=0),
        "dataset": pair_rows(12),
        "config": TrakConfig(proj_dim=64, bank_size=7, bank_seed=1),
        "masks": torch.arange(12).remainder(2).eq(0).unsqueeze(0),
        "shard_rows": 5,
        "progress": False,
    }
    whole = AttributionIndex.build(tmp_path / "one" / "index", **options)
    for index in (1, 0):
        AttributionIndex.build_shards(tmp_path / "jobs" / "index", shard_index=index, num_shards=2, **options)
    merged = AttributionIndex.merge(tmp_path / "jobs" / "index")
    assert merged.members[0].tensors("bank.safetensors") is not None
    assert torch.equal(merged.members[0].mask(), options["masks"][0])
    assert files_of(merged.folder) == files_of(whole.folder)


def test_merging_refuses_a_shard_that_has_changed(models, tmp_path):
    options = {**build_options(models[:1]), "sketch_seeds_per_checkpoint": 1}
    for index in range(2):
        AttributionIndex.build_shards(tmp_path, shard_index=index, num_shards=2, **options)
    shard = tmp_path / "member_0" / "train-00003-of-00005.parquet"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="train-00003-of-00005.parquet has changed since it was written.*make it again"):
        AttributionIndex.merge(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match="(?s)member_0 lacks 1 of 5 shards: 3.*shard_index=1, num_shards=2"):
        AttributionIndex.merge(tmp_path)


def test_a_job_of_another_run_is_refused(models, tmp_path):
    options = {**build_options(models[:1]), "sketch_seeds_per_checkpoint": 1}
    AttributionIndex.build_shards(tmp_path, shard_index=0, num_shards=2, **options)
    with pytest.raises(ValueError, match=r"(?s)holds other features.*dataset\.sha256"):
        AttributionIndex.build_shards(
            tmp_path, shard_index=1, num_shards=2, **{**options, "dataset": token_rows(N_TRAIN, seed=3)}
        )
    with pytest.raises(ValueError, match="(?s)holds another index.*proj_dim"):
        AttributionIndex.build_shards(tmp_path, shard_index=1, num_shards=2, **{**options, "config": TrakConfig(proj_dim=8)})
    with pytest.raises(ValueError, match="`shard_index` must be 0 to 1"):
        AttributionIndex.build_shards(tmp_path, shard_index=2, num_shards=2, **options)
    with pytest.raises(ValueError, match="overwrite=True would delete what other jobs have made"):
        AttributionIndex.build_shards(tmp_path, shard_index=0, num_shards=2, overwrite=True, **options)
    with pytest.raises(TypeError, match="AttributionIndex.build has no argument 'shards_rows'"):
        AttributionIndex.build_shards(tmp_path, shard_index=0, num_shards=2, shards_rows=8, **options)


def test_one_process_can_finish_what_jobs_have_begun(models, expected, tmp_path):
    folder = tmp_path / "index"
    AttributionIndex.build_shards(folder, shard_index=7, num_shards=8, **build_options(models))
    AttributionIndex.build(folder, **build_options(models))
    assert files_of(folder) == expected


def test_flags_of_jobs_go_together(tmp_path, capsys):
    flags = ["featurize", "--model", "m", "--dataset", "d", "--output", str(tmp_path / "index")]
    assert main([*flags, "--shard-index", "0"]) == 1
    assert "--shard-index and --num-shards go together" in capsys.readouterr().err
    assert main([*flags, "--shard-index=0", "--num-shards=2", "--overwrite"]) == 1
    assert "--overwrite would delete what other jobs have made" in capsys.readouterr().err


# Stopping, and disks


def test_sigterm_ends_a_run_as_ctrl_c_does(models, tmp_path, monkeypatch, capsys):
    write = MemberWriter.write

    def terminated(self, shard, columns):
        write(self, shard, columns)
        if shard == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)  # the main thread has it by now, and waits for this shard

    monkeypatch.setattr(MemberWriter, "write", terminated)
    token_rows(N_TRAIN).to_parquet(tmp_path / "train.parquet")
    flags = ["--dataset", str(tmp_path / "train.parquet"), "--model", str(models[0]), "--output", str(tmp_path / "index")]
    flags += ["--proj_dim", "16", "--shard_rows", str(SHARD_ROWS)]
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        assert main(["featurize", *flags]) == 143
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    printed = capsys.readouterr()
    assert "of 5 shards are finished. Run the same again to go on." in printed.out
    assert "hf-trak: terminated" in printed.err
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.setattr(MemberWriter, "write", write)
    assert main(["featurize", *flags]) == 0
    assert not (tmp_path / "index" / "member_0" / ".progress").exists()


def test_no_group_is_left_in_this_process():
    """These tests run beside others: what they set up must not make those believe in other processes."""
    assert not torch.distributed.is_initialized()
    assert "WORLD_SIZE" not in os.environ
    assert PartialState._shared_state.get("num_processes", 1) == 1
