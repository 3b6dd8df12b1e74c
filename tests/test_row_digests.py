"""A row's digest is of its content alone: not of its file, its cache, its Arrow types or its neighbours."""

import io
import shutil

import numpy as np
import pyarrow as pa
import pytest
from datasets import Array3D, ClassLabel, Dataset, Features, Image, List, Value, load_dataset
from PIL import Image as pillow

from hf_trak.sources.row_digests import digest_rows, hash_digests, spell_digests


def digests(values, kind=None):
    """Return the digests of one column."""
    array = pa.array(values, type=kind)
    return spell_digests(digest_rows(Dataset(pa.table({"x": array})), ["x"]))


def png(seed, mode="RGB"):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    pillow.fromarray(pixels).convert(mode).save(buffer, format="PNG")
    return buffer.getvalue()


def test_digests_are_the_published_ones():
    """They are stored: another version of hf_trak must find the rows again."""
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    assert spell_digests(digest_rows(rows, ["text", "label"])) == [
        "c833feec081db8c0defbf6500c254b55",
        "7369c40817c9d68c8d1e30ae429186cd",
    ]
    assert hash_digests(digest_rows(rows, ["label", "text"]))[:16] == "15228b1b1e3cc8d1"


@pytest.mark.parametrize(
    ("values", "kinds"),
    [
        ([1, -2, None, 250], [pa.int16(), pa.int32(), pa.int64(), pa.float32(), pa.float64()]),
        ([0, 1, None], [pa.bool_(), pa.uint8(), pa.uint64(), pa.int8(), pa.float16()]),
        ([0.5, 1.0, float("nan"), None, -0.0], [pa.float32(), pa.float64()]),
        (["a", "", None, "é"], [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]),
        ([b"a", b"", None], [pa.binary(), pa.large_binary()]),
        ([[1, 2], [], None, [3, None]], [pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.float32())]),
        ([[[1.5, 2]], [[0, 0]]], [pa.list_(pa.list_(pa.float32())), pa.list_(pa.list_(pa.float64(), 2), 1)]),
        ([{"a": 1, "b": "x"}, None], [pa.struct([("a", pa.int8()), ("b", pa.string())]), pa.struct([("b", pa.large_string()), ("a", pa.int64())])]),
    ],
    ids=["integers", "bits", "floats", "strings", "bytes", "lists", "matrices", "structs"],
)  # fmt: skip
def test_a_value_has_one_digest_whatever_arrow_type_holds_it(values, kinds):
    expected = digests([bool(v) if v is not None else None for v in values] if kinds[0] == pa.bool_() else values, kinds[0])
    assert len(set(expected)) == len(expected)
    for kind in kinds[1:]:
        assert digests(values, kind) == expected, kind


def test_different_values_have_different_digests():
    columns = [
        (["1", "1.0", ""], None),
        ([1, 0, -1], None),
        ([1.5, float("inf"), 2.0**70], None),
        ([b"1", b""], None),
        ([[1, 2], [1], [12], []], pa.list_(pa.int64())),
        ([[1.5, 1], [1.5]], None),
        ([["1", "2"], ["12"], ["1"]], None),
        ([[[1], [2]], [[1, 2]], [[], [1, 2]]], None),
        ([{"a": "1"}, {"a": "1", "b": "2"}], None),
        ([None], pa.string()),
        ([2**64 - 1], pa.uint64()),
    ]
    found = [digest for values, kind in columns for digest in digests(values, kind)]
    assert len(set(found)) == len(found)


def test_a_row_has_the_same_digest_whatever_its_neighbours_are():
    for alone, others in (
        ([[1, 2]], [[1, None], [1.5]]),
        ([[]], [[1]]),
        ([{"role": "user"}], [{"role": "user", "tools": [1]}]),
        ([1], [1.5]),
    ):
        assert digests(alone)[0] == digests([*alone, *others])[0], alone


def test_columns_count_by_name_and_not_by_place():
    rows = Dataset.from_dict({"a": ["x"], "b": ["y"], "c": ["z"]})
    expected = digest_rows(rows, ["a", "b"])
    assert (digest_rows(rows.select_columns(["b", "a"]), ["b", "a"]) == expected).all()
    assert (digest_rows(rows, ["a", "c"]) != expected).any()
    swapped = rows.rename_columns({"a": "b", "b": "a"})
    assert (digest_rows(swapped, ["a", "b"]) != expected).any()


def test_files_caches_and_selections_do_not_matter(tmp_path):
    rows = Dataset.from_dict(
        {"text": [f"text {i}" for i in range(30)], "label": [i % 3 for i in range(30)]},
        features=Features({"text": Value("string"), "label": ClassLabel(names=["a", "b", "c"])}),
    )
    expected = hash_digests(digest_rows(rows, rows.column_names))
    rows.to_parquet(tmp_path / "a.parquet")
    rows.to_json(tmp_path / "a.jsonl")
    rows.to_csv(tmp_path / "a.csv")
    rows.save_to_disk(tmp_path / "saved")
    for kind, name in (("parquet", "a.parquet"), ("json", "a.jsonl"), ("csv", "a.csv")):
        shutil.copy(tmp_path / name, tmp_path / f"moved-{name}")
        for file in (name, f"moved-{name}"):
            read = load_dataset(kind, data_files=str(tmp_path / file), split="train", cache_dir=str(tmp_path / "cache"))
            assert hash_digests(digest_rows(read, read.column_names)) == expected, file
    order = np.random.default_rng(0).permutation(30)
    shuffled = rows.select(order).select(np.argsort(order))
    filtered = Dataset.from_dict({"text": ["no", *rows["text"]], "label": [0, *rows["label"]]}).filter(
        lambda row: row["text"] != "no"
    )
    for same in (shuffled, filtered, rows.with_format("torch"), rows.with_transform(lambda batch: {"other": batch["text"]})):
        assert hash_digests(digest_rows(same, ["text", "label"])) == expected
    assert hash_digests(digest_rows(rows.select(order), ["text", "label"])) != expected
    changed = rows.map(lambda row, i: {"label": row["label"] if i != 17 else (row["label"] + 1) % 3}, with_indices=True)
    assert hash_digests(digest_rows(changed, ["text", "label"])) != expected


def test_images_are_their_files_content_wherever_it_lies(tmp_path):
    contents = [png(seed) for seed in range(4)]
    for i, content in enumerate(contents):
        (tmp_path / f"{i}.png").write_bytes(content)
    paths = [str(tmp_path / f"{i}.png") for i in range(4)]
    features = Features({"image": Image()})
    inside = Dataset.from_dict({"image": [{"bytes": content, "path": None} for content in contents]}, features=features)
    expected = digest_rows(inside, ["image"])
    named = Dataset.from_dict({"image": [{"bytes": c, "path": f"x{i}.png"} for i, c in enumerate(contents)]}, features=features)
    beside = Dataset.from_dict({"image": paths}, features=features)
    alone = Dataset.from_dict({"image": contents})
    for same in (named, beside, inside.cast_column("image", Image(decode=False)), alone):
        assert (digest_rows(same, ["image"]) == expected).all()
    strings = Dataset.from_dict({"image": paths})
    assert (digest_rows(strings, ["image"], file_columns=["image"]) == expected).all()
    assert (digest_rows(strings, ["image"]) != expected).any(axis=1).all()
    (tmp_path / "2.png").write_bytes(contents[3])
    assert (digest_rows(beside, ["image"]) != expected).any(axis=1).tolist() == [False, False, True, False]


def test_arrays_are_lists_of_numbers():
    pixels = np.random.default_rng(0).normal(size=(3, 2, 4, 4)).astype(np.float32)
    lists = Dataset.from_dict({"x": pixels.tolist()}, features=Features({"x": List(List(List(Value("float32"))))}))
    arrays = Dataset.from_dict({"x": pixels}, features=Features({"x": Array3D(shape=(2, 4, 4), dtype="float32")}))
    assert (digest_rows(lists, ["x"]) == digest_rows(arrays, ["x"])).all()
