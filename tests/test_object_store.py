"""Indexes on object stores: the bytes of one in a folder, whatever happens. The store is fsspec's own in memory, with faults put in."""

from __future__ import annotations

import errno
from pathlib import Path

import fsspec
import pytest
from datasets_for_tests import save_model, token_rows
from fsspec.implementations.memory import MemoryFileSystem
from test_disks import disk, mount  # noqa: F401 (a fixture)

from hf_trak import AttributionIndex, TrakConfig
from hf_trak.cli.main import main
from hf_trak.storage.object_store import ObjectPath, place
from hf_trak.storage.writer import MemberWriter

N_TRAIN, SHARD_ROWS = 50, 12  # five shards, the last of two rows


class FaultyStore(MemoryFileSystem):
    """A store in memory that fails as told: by the name of a method, what it raises from which call on."""

    protocol = "faulty"
    cachable = False
    faults: dict = {}  # noqa: RUF012 (fsspec makes instances)
    fetched: list = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("faulty://", "memory://", 1))

    def _fail(self, name):
        left, error = self.faults.get(name, (None, None))
        if left == 0:
            raise error
        if left is not None:
            self.faults[name] = (left - 1, error)

    def info(self, path, **options):
        self._fail("info")
        return super().info(path, **options)

    def put_file(self, *args, **options):
        self._fail("put_file")
        return super().put_file(*args, **options)

    def pipe_file(self, path, value, mode="overwrite", **options):
        self._fail(f"pipe_file:{mode}")
        return super().pipe_file(path, value, mode=mode, **options)

    def rm(self, path, **options):
        for one in path if isinstance(path, list) else [path]:
            self._fail("rm")
            super().rm(one, **options)

    def cp_file(self, *args, **options):
        self._fail("cp_file")
        return super().cp_file(*args, **options)

    def rm_file(self, path):
        self._fail("rm_file")
        return super().rm_file(path)

    def get_file(self, path, target, **options):
        self.fetched.append(path)
        return super().get_file(path, target, **options)


@pytest.fixture
def url(tmp_path, monkeypatch):
    """A place on an empty store, with an empty cache."""
    fsspec.register_implementation("faulty", FaultyStore, clobber=True)
    monkeypatch.setenv("HF_TRAK_CACHE", str(tmp_path / "cache"))
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    FaultyStore.faults.clear()
    FaultyStore.fetched.clear()
    return "faulty://bucket/index"


def objects(url: str) -> dict[str, bytes]:
    """What lies below a URL, by name."""
    store, key = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return {name[len(key) + 1 :]: store.cat_file(name) for name in store.find(key)}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def without_places(files: dict[str, bytes], model: Path) -> dict[str, bytes]:
    """Leave out what has to differ: where a local checkpoint lies as seen from the index."""
    return {
        name: b"\n".join(line for line in content.split(b"\n") if model.name.encode() not in line or b'"path"' not in line)
        for name, content in files.items()
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "bert0")


def options_of(model: Path, **changed) -> dict:
    return {
        "models": str(model),
        "dataset": token_rows(N_TRAIN),
        "config": TrakConfig(proj_dim=16),
        "sketch_seeds_per_checkpoint": 2,
        "shard_rows": SHARD_ROWS,
        "progress": False,
        **changed,
    }


@pytest.fixture(scope="module")
def local(model, tmp_path_factory):
    """The same index in a folder."""
    return AttributionIndex.build(tmp_path_factory.mktemp("one") / "index", **options_of(model))


@pytest.fixture(scope="module")
def expected(local, model):
    return without_places(files_of(local.folder), model)


def written(monkeypatch, *, stop_after: int | None = None) -> list[str]:
    """Note the shards that are written; be interrupted after some."""
    names, write = [], MemberWriter.write

    def noting(self, shard, columns):
        if stop_after is not None and len(names) == stop_after:
            raise KeyboardInterrupt
        write(self, shard, columns)
        names.append(f"{self.folder.name}/{self.path(shard).name}")

    monkeypatch.setattr(MemberWriter, "write", noting)
    return names


# The laws


def test_an_index_on_a_store_is_the_bytes_of_one_in_a_folder_and_answers_alike(url, model, local, expected):
    index = AttributionIndex.build(url, **options_of(model))
    assert without_places(objects(url), model) == expected
    queries = token_rows(4, seed=1)
    for asked in (index, AttributionIndex.from_pretrained(url), AttributionIndex.from_pretrained(f"{url}/")):
        assert (asked.score(queries, progress=False) == local.score(queries, progress=False)).all()
    hits = AttributionIndex.from_pretrained(url).attribute(queries, top_k=3, progress=False)
    assert hits.to_dict() == local.attribute(queries, top_k=3, progress=False).to_dict()


def test_an_interrupted_build_goes_on_with_what_is_missing(url, model, expected, monkeypatch):
    with monkeypatch.context() as patch:
        first = written(patch, stop_after=3)
        with pytest.raises(KeyboardInterrupt):
            AttributionIndex.build(url, **options_of(model))
    with pytest.raises(FileNotFoundError, match="faulty://bucket/index/member_0 is unfinished; run the command that began it"):
        AttributionIndex.from_pretrained(url)
    again = written(monkeypatch)
    AttributionIndex.build(url, **options_of(model))
    assert not set(first) & set(again)
    assert len(first) + len(again) == 2 * 5
    assert without_places(objects(url), model) == expected


def test_a_connection_that_breaks_ends_the_run_and_keeps_what_was_finished(url, model, expected, monkeypatch):
    FaultyStore.faults["put_file"] = (4, OSError(errno.EIO, "Connection reset by peer"))
    with pytest.raises(ConnectionError, match="faulty://bucket/index/.* cannot be reached: .*reset by peer.*run again"):
        AttributionIndex.build(url, **options_of(model))
    kept = {name for name in objects(url) if name.endswith(".parquet")}
    assert kept
    FaultyStore.faults.clear()
    again = written(monkeypatch)
    AttributionIndex.build(url, **options_of(model))
    whole = {name for name in kept if name not in again}
    assert len(kept - whole) <= 1, "at most the shard that was put and not recorded"
    assert without_places(objects(url), model) == expected


def test_jobs_make_parts_in_any_order_and_merging_makes_the_bytes_of_one_process(url, model, expected, tmp_path):
    AttributionIndex.build_shards(url, shard_index=1, num_shards=2, **options_of(model))
    with pytest.raises(
        ValueError, match="(?s)faulty://bucket/index is not complete.*lacks 2 of 5 shards: 0 to 1.*shard_index=0"
    ):
        AttributionIndex.merge(url)
    AttributionIndex.build_shards(url, shard_index=0, num_shards=2, **options_of(model))
    assert AttributionIndex.merge(url).n_rows == N_TRAIN
    assert without_places(objects(url), model) == expected


def test_a_store_and_a_folder_copy_to_each_other(url, model, local, expected, tmp_path):
    local.save_pretrained(url)
    assert without_places(objects(url), model) == expected
    with pytest.raises(ValueError, match="faulty://bucket/index is not empty"):
        local.save_pretrained(url)
    AttributionIndex.from_pretrained(url).save_pretrained(tmp_path / "back" / "index")
    assert without_places(files_of(tmp_path / "back" / "index"), model) == expected


# What is refused


def test_nothing_is_overwritten_unless_asked(url, model, expected):
    AttributionIndex.build(url, **options_of(model, config=TrakConfig(proj_dim=8)))
    before = objects(url)
    with pytest.raises(ValueError, match="(?s)faulty://bucket/index holds another index.*proj_dim: 16 here, 8 there"):
        AttributionIndex.build(url, **options_of(model))
    assert objects(url) == before
    AttributionIndex.build(url, **options_of(model), overwrite=True)
    assert without_places(objects(url), model) == expected
    with pytest.raises(ValueError, match=r"(?s)holds other features.*dataset\.sha256"):
        AttributionIndex.build(url, **options_of(model, dataset=token_rows(N_TRAIN, seed=3)))


@pytest.mark.parametrize("method", ["cp_file", "rm_file"])
@pytest.mark.parametrize("calls", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(3, marks=pytest.mark.slow), 5])
def test_a_run_killed_while_it_replaces_an_index_leaves_the_old_or_the_new_one(url, model, expected, calls, method):
    other = options_of(model, config=TrakConfig(proj_dim=8))
    AttributionIndex.build(url, **other)
    store, key = fsspec.core.url_to_fs(url)
    store.pipe_file(f"{key}/member_0/thesis.tex", b"years of work")
    FaultyStore.faults[method] = (calls, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        AttributionIndex.build(url, **options_of(model), overwrite=True)
    FaultyStore.faults.clear()
    assert AttributionIndex.from_pretrained(url).config.proj_dim in (8, 16)
    AttributionIndex.build(url, **options_of(model), overwrite=True)
    assert store.cat_file(f"{key}/member_0/thesis.tex") == b"years of work"
    store.rm_file(f"{key}/member_0/thesis.tex")
    assert without_places(objects(url), model) == expected


@pytest.mark.parametrize("name", ["member_1/train-00002-of-00005.parquet", "member_0/gram.safetensors"])
@pytest.mark.parametrize(
    ("damage", "told"), [(lambda b: b[:-9], "it has .* bytes, where"), (lambda b: b[:-1] + b"?", "another SHA-256")]
)
def test_a_damaged_object_is_refused_by_name(url, model, local, name, damage, told):
    local.save_pretrained(url)
    store, key = fsspec.core.url_to_fs(url)
    store.pipe_file(f"{key}/{name}", damage(store.cat_file(f"{key}/{name}")))
    index = AttributionIndex.from_pretrained(url)
    with pytest.raises(ValueError, match=f"{url}/{name} is not what was written: .*{told}"):
        index.score(token_rows(2), progress=False)
    assert not (index.folder / name).exists()
    store.rm_file(f"{key}/{name}")
    with pytest.raises(ValueError, match=f"{url}/{name} is missing, which member.json lists"):
        index.score(token_rows(2), progress=False)


def test_a_truncated_shard_of_an_unfinished_index_is_made_again_and_a_changed_one_refused(url, model, expected, monkeypatch):
    for index in (0, 1):
        AttributionIndex.build_shards(url, shard_index=index, num_shards=2, **options_of(model))
    store, key = fsspec.core.url_to_fs(url)
    shard = f"{key}/member_0/train-00003-of-00005.parquet"
    content = store.cat_file(shard)
    store.pipe_file(shard, content[:200] + b"?" + content[201:])
    with pytest.raises(ValueError, match="faulty://.*train-00003-of-00005.parquet has changed since it was written"):
        AttributionIndex.merge(url)
    store.pipe_file(shard, content[:-1])
    again = written(monkeypatch)
    AttributionIndex.build(url, **options_of(model))
    assert again == ["member_0/train-00003-of-00005.parquet"]
    assert without_places(objects(url), model) == expected


def test_another_index_under_the_same_url_is_not_answered_from_the_cache(url, model, local):
    queries = token_rows(3, seed=1)
    AttributionIndex.build(url, **options_of(model, config=TrakConfig(proj_dim=8))).score(queries, progress=False)
    AttributionIndex.build(url, **options_of(model), overwrite=True)
    found = AttributionIndex.from_pretrained(url).score(queries, progress=False)
    assert (found == local.score(queries, progress=False)).all()


def test_only_what_a_call_reads_is_fetched_and_only_once(url, local):
    local.save_pretrained(url)
    index = AttributionIndex.from_pretrained(url)
    assert FaultyStore.fetched == []
    index.members[0].gram()
    assert [Path(name).name for name in FaultyStore.fetched] == ["gram.safetensors"]
    index.score(token_rows(2), progress=False)
    assert len(FaultyStore.fetched) == 2 * (1 + 5)
    AttributionIndex.from_pretrained(url).score(token_rows(2), progress=False)
    assert len(FaultyStore.fetched) == 2 * (1 + 5)


# Names that several processes write at once


def test_of_two_that_put_an_object_once_the_first_is_believed(url, monkeypatch):
    path = ObjectPath(f"{url}/a.json")
    assert path.put_once(lambda file: file.write_text("1"))
    assert not path.put_once(lambda file: file.write_text("2"))
    monkeypatch.setattr(ObjectPath, "exists", lambda self: False)  # both have looked before either has put
    assert not path.put_once(lambda file: file.write_text("2"))
    assert path.read_text() == "1"


def test_a_store_that_knows_no_conditions_will_do(url):
    FaultyStore.faults["pipe_file:create"] = (
        0,
        OSError(errno.ENOSYS, "A header you provided implies functionality that is not here"),
    )
    path = ObjectPath(f"{url}/a.json")
    assert path.put_once(lambda file: file.write_text("1"))
    assert not path.put_once(lambda file: file.write_text("2"))
    assert path.read_text() == "1"


# Places


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("hf://datasets/me/x", "push_to_hub"),
        ("https://example.org/x", "Nothing can be written there"),
        ("sftp://host/x", "half written"),
        ("s3://", "not a URL on an object store"),
        ("simplecache::s3://bucket/x", "not a URL on an object store"),
        (Path("s3://bucket/x"), r"give it as a string, 's3://...'"),
    ],
)
def test_places_that_cannot_hold_an_index_are_refused_with_the_way_out(given, told, model):
    with pytest.raises(ValueError, match=told):
        AttributionIndex.build(given, **options_of(model))
    assert not Path("s3:").exists()


def test_a_file_url_is_a_folder():
    assert place("file:///data/index") == Path("/data/index")
    assert place("data/index") == Path("data/index")
    assert place(Path("index")) == Path("index")
    assert str(place("s3://bucket/index/")) == "s3://bucket/index"


# Errors of a store's client, whose types are its own


class NoCredentialsError(Exception):
    """As botocore has it."""


@pytest.mark.parametrize(
    ("method", "error", "kind", "told"),
    [
        ("info", PermissionError("Access Denied"), PermissionError, "denies access to .*Access Denied.*AWS_ACCESS_KEY_ID"),
        (
            "info",
            NoCredentialsError("Unable to locate credentials"),
            PermissionError,
            "Unable to locate credentials.*aws configure",
        ),
        ("info", TimeoutError("timed out"), ConnectionError, "cannot be reached: timed out.*AWS_ENDPOINT_URL"),
        (
            "pipe_file:create",
            FileNotFoundError("no such bucket"),
            FileNotFoundError,
            "was not written: no such bucket. Make the bucket",
        ),
    ],
)
def test_errors_of_a_store_say_what_to_do(url, model, capsys, tmp_path, method, error, kind, told):
    FaultyStore.faults[method] = (0, error)
    with pytest.raises(kind, match=told):
        AttributionIndex.build(url, **options_of(model))
    token_rows(N_TRAIN).to_parquet(tmp_path / "train.parquet")
    assert (
        main(
            [
                "featurize",
                "--model",
                str(model),
                "--dataset",
                str(tmp_path / "train.parquet"),
                "--output",
                url,
                "--proj_dim",
                "16",
            ]
        )
        == 1
    )
    assert "hf-trak: " in capsys.readouterr().err


def test_a_package_that_is_missing_is_named(monkeypatch, model):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    fsspec.get_filesystem_class.cache_clear() if hasattr(fsspec.get_filesystem_class, "cache_clear") else None
    monkeypatch.delitem(fsspec.registry._registry if hasattr(fsspec.registry, "_registry") else {}, "s3", raising=False)
    with pytest.raises(ImportError, match="pip install s3fs"):
        AttributionIndex.build("s3://bucket/index", **options_of(model))
    with pytest.raises(ImportError, match="Protocol not known: nowhere.*install the package that serves it"):
        AttributionIndex.from_pretrained("nowhere://bucket/index")


def test_a_local_disk_too_full_for_a_file_on_its_way_is_said(url, disk, monkeypatch):  # noqa: F811
    mount("-t", "tmpfs", "-o", "size=16k", "tmpfs", disk)
    monkeypatch.setattr("tempfile.tempdir", str(disk))
    with pytest.raises(OSError, match="There is not enough disk space for a.bin in .*set TMPDIR to another disk"):
        ObjectPath(f"{url}/a.bin").put(lambda file: file.write_bytes(b"x" * 100_000))
    assert not ObjectPath(f"{url}/a.bin").exists()
    assert list(disk.iterdir()) == []


# The command line


def test_the_commands_take_urls(url, model, expected, tmp_path, capsys):
    token_rows(N_TRAIN).to_parquet(tmp_path / "train.parquet")
    token_rows(3, seed=1).to_parquet(tmp_path / "queries.parquet")
    flags = ["featurize", "--model", str(model), "--dataset", str(tmp_path / "train.parquet"), "--output", url]
    flags += ["--proj_dim", "16", "--shard_rows", str(SHARD_ROWS), "--sketch_seeds_per_checkpoint", "2"]
    for index in ("1", "0"):
        assert main([*flags, "--shard-index", index, "--num-shards", "2"]) == 0
    assert f"hf-trak merge {url}" in capsys.readouterr().out
    assert main(["merge", url]) == 0
    printed = capsys.readouterr().out
    assert f"The index lies in {url}." in printed
    assert f'load_dataset("parquet", data_files="{url}/member_0/*.parquet", split="train")' in printed
    found, shards = objects(url), [name for name in expected if name.endswith((".parquet", "gram.safetensors"))]
    assert {name: found[name] for name in shards} == {name: expected[name] for name in shards}
    asked = ["attribute", "--index", url, "--queries", str(tmp_path / "queries.parquet"), "--split", "train"]
    assert main([*asked, "--output", str(tmp_path / "hits.jsonl")]) == 0
    assert len((tmp_path / "hits.jsonl").read_text().splitlines()) == 3
    assert main(["card", url, "--license", "mit"]) == 0
    assert "# " in capsys.readouterr().out
