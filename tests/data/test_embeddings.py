"""Reading files of embeddings, and every file that must be refused."""

import pickle

import numpy as np
import pytest
from safetensors.numpy import save_file

from unclip import DataError, InputError, MissingFileError, UnclipError, UnsafeFileError, WeightsError, read_embeddings


@pytest.fixture
def rows():
    return np.random.default_rng(0).normal(size=(10, 6)).astype(np.float32)


def tables():
    return pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")


def write_parquet(path, **columns):
    arrow, parquet = tables()
    parquet.write_table(arrow.table(columns), path)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, ">f4"])
def test_npy_of_any_floating_type(rows, tmp_path, kind):
    np.save(tmp_path / "a.npy", rows.astype(kind))
    found = read_embeddings(tmp_path / "a.npy")
    assert (len(found), found.width) == (10, 6)
    assert found[:].dtype == np.float32
    np.testing.assert_allclose(found[3:7], rows[3:7].astype(kind), rtol=1e-6)
    assert isinstance(found.parts[0], np.memmap)


def test_npz_and_its_columns(rows, tmp_path):
    labels = np.array([f"row {k}" for k in range(10)])
    np.savez(tmp_path / "a.npz", image_embeds=rows, caption=labels, other=rows[:, :2])
    found = read_embeddings(tmp_path / "a.npz")
    np.testing.assert_array_equal(found[:], rows)
    assert found.column("caption") == list(labels)
    assert found.select(2, 4).column("caption") == ["row 2", "row 3"]
    assert read_embeddings(tmp_path / "a.npz", "other").width == 2
    with pytest.raises(DataError, match="no column 'label'; it has 'caption'"):
        found.column("label")


def test_safetensors(rows, tmp_path):
    save_file({"image_embeds": rows}, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(read_embeddings(tmp_path / "a.safetensors")[:], rows)
    save_file({"one": rows}, tmp_path / "b.safetensors")
    np.testing.assert_array_equal(read_embeddings(tmp_path / "b.safetensors")[:], rows)


@pytest.mark.parametrize("fixed", [False, True])
def test_parquet_with_a_column_of_lists(rows, tmp_path, fixed):
    arrow, _ = tables()
    kind = arrow.list_(arrow.float32(), 6) if fixed else arrow.list_(arrow.float32())
    write_parquet(tmp_path / "a.parquet", embedding=arrow.array(rows.tolist(), kind), caption=[*"abcdefghi", None])
    found = read_embeddings(tmp_path / "a.parquet")
    np.testing.assert_array_equal(found[:], rows)
    assert found.column("caption") == [*"abcdefghi", ""]
    with pytest.raises(DataError, match="no column 'label'; it has 'embedding', 'caption'"):
        found.column("label")


def test_parquet_with_one_column_for_each_dimension(rows, tmp_path):
    wide = np.concatenate([rows, rows], axis=1)
    write_parquet(tmp_path / "a.parquet", id=list(range(10)), **{f"emb_{k}": wide[:, k] for k in reversed(range(12))})
    np.testing.assert_array_equal(read_embeddings(tmp_path / "a.parquet", "emb_*")[:], wide)


def test_a_folder_as_clip_retrieval_writes_it(rows, tmp_path):
    for folder in ("img_emb", "metadata"):
        (tmp_path / folder).mkdir()
    for number in (0, 2, 10):  # as text, 10 would be before 2
        np.save(tmp_path / f"img_emb/img_emb_{number}.npy", rows + number)
        write_parquet(tmp_path / f"metadata/metadata_{number}.parquet", caption=[f"{number}-{k}" for k in range(10)])
    for path in (tmp_path, tmp_path / "img_emb"):
        found = read_embeddings(path)
        np.testing.assert_array_equal(found[:], np.concatenate([rows, rows + 2, rows + 10]))
        np.testing.assert_array_equal(found[8:22], np.concatenate([rows[8:], rows + 2, rows[:2] + 10]))
        assert found.column("caption")[19:21] == ["2-9", "10-0"]
        part = found.select(18, 21)
        np.testing.assert_array_equal(part[:], found[18:21])
        assert part.column("caption") == ["2-8", "2-9", "10-0"]


def test_rows_with_nan_are_named(rows, tmp_path):
    rows[[4, 7], 2] = np.nan, np.inf
    np.save(tmp_path / "a.npy", rows)
    found = read_embeddings(tmp_path / "a.npy")
    assert len(found[:4]) == 4
    with pytest.raises(DataError, match=r"NaN or infinity in row 4, 7 \(rows count from 0\)"):
        found[:]
    with pytest.raises(DataError, match="in row 4, 7"):
        found.select(3, None)[:]
    np.save(tmp_path / "b.npy", np.full((3, 2), 1e300))
    with pytest.raises(DataError, match="in row 0, 1, 2"):
        read_embeddings(tmp_path / "b.npy")[:]


class Evil:
    def __reduce__(self):
        return (print, ("it ran",))


@pytest.mark.parametrize("name", ["array.npy", "raw.npy", "array.npz"])
def test_pickles_are_refused_and_not_run(tmp_path, name, capsys):
    path = tmp_path / name
    if name == "raw.npy":
        path.write_bytes(pickle.dumps(Evil()))
    else:
        save = np.save if name.endswith("npy") else lambda file, array: np.savez(file, image_embeds=array)
        save(path, np.array([[Evil()]], dtype=object))
    capsys.readouterr()
    with pytest.raises(UnsafeFileError, match="pickle"):
        read_embeddings(path)
    assert "it ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(6, np.float32), r"shape \(6,\); it must be \[rows, width\]$"),
        (np.zeros((2, 3, 6), np.float32), "a grid of tokens"),
        (np.zeros((2, 6), np.int64), "type int64; embeddings are floating-point"),
        (np.zeros((2, 6), bool), "type bool"),
        (np.zeros((2, 6), complex), "type complex128"),
        (np.zeros((0, 6), np.float32), r"is empty: its array has shape \(0, 6\)"),
        (np.zeros((2, 0), np.float32), "is empty"),
    ],
)
def test_arrays_that_are_no_embeddings(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=message):
        read_embeddings(tmp_path / "a.npy")


def test_files_that_cannot_be_read(rows, tmp_path):
    with pytest.raises(MissingFileError, match="does not exist"):
        read_embeddings(tmp_path / "none.npy")
    (tmp_path / "empty.npy").touch()
    (tmp_path / "text.npy").write_text("hello")
    np.save(tmp_path / "whole.npy", rows)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:200])
    (tmp_path / "cut.npz").write_bytes(b"PK\3\4 and no more")
    (tmp_path / "rows.csv").touch()
    (tmp_path / "folder").mkdir()
    for name in ("empty.npy", "text.npy", "cut.npy", "cut.npz", "rows.csv", "folder"):
        with pytest.raises((DataError, UnsafeFileError)) as error:
            read_embeddings(tmp_path / name)
        assert name in str(error.value)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsError):
        read_embeddings(tmp_path / "bad.safetensors")


def test_parquet_that_cannot_be_read(tmp_path):
    arrow, _ = tables()
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    write_parquet(tmp_path / "ragged.parquet", embedding=[[1.0, 2.0], [3.0]])
    write_parquet(tmp_path / "null.parquet", embedding=arrow.array([[1.0], None], arrow.list_(arrow.float32())))
    write_parquet(tmp_path / "whole.parquet", embedding=[[1, 2], [3, 4]])
    write_parquet(tmp_path / "none.parquet", caption=["a"])
    write_parquet(tmp_path / "empty.parquet", embedding=arrow.array([], arrow.list_(arrow.float32())))
    for name in ("bad", "ragged", "null", "whole", "none", "empty"):
        with pytest.raises(DataError, match=f"{name}.parquet"):
            read_embeddings(tmp_path / f"{name}.parquet")


def test_a_key_that_is_not_clear(rows, tmp_path):
    np.savez(tmp_path / "a.npz", one=rows, two=rows)
    with pytest.raises(DataError, match="it has 'one', 'two': name one with --key"):
        read_embeddings(tmp_path / "a.npz")
    with pytest.raises(DataError, match="no array 'three'"):
        read_embeddings(tmp_path / "a.npz", "three")


def test_parts_and_rows_that_do_not_exist(rows, tmp_path):
    np.save(tmp_path / "0.npy", rows)
    np.save(tmp_path / "1.npy", rows[:, :4])
    with pytest.raises(DataError, match="different widths: 4, 6"):
        read_embeddings(tmp_path)
    found = read_embeddings(tmp_path / "0.npy")
    with pytest.raises(InputError, match="has 10 rows"):
        found.select(10, None)
    with pytest.raises(UnclipError, match="no further columns"):
        found.column("caption")
