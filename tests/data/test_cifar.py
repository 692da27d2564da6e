"""CIFAR-10 and CIFAR-100: both official versions, as archive and as folder, and what may be wrong with them."""

import io
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fastnas.data import load

SMALL = 4  # images in each file here; the official files hold 10,000 or 50,000


class Python2Pickle:
    """Writes plain data the way Python 2's cPickle does under protocol 2, which is how the official files were made."""

    def __call__(self, value):
        return b"\x80\x02" + self.put(value) + b"."

    def put(self, value):
        if value is None:
            return b"N"
        if isinstance(value, bool):
            raise TypeError("not in these files")
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        if isinstance(value, bytes):  # Python 2's str
            if len(value) < 256:
                return b"U" + bytes([len(value)]) + value
            return b"T" + struct.pack("<i", len(value)) + value
        if isinstance(value, list):
            return b"](" + b"".join(map(self.put, value)) + b"e"
        if isinstance(value, tuple):
            return b"(" + b"".join(map(self.put, value)) + b"t"
        if isinstance(value, dict):
            return b"}(" + b"".join(self.put(k) + self.put(v) for k, v in value.items()) + b"u"
        if isinstance(value, np.ndarray):
            dtype = b"cnumpy\ndtype\n" + self.put((value.dtype.str[1:].encode(), 0, 1)) + b"R"
            dtype += self.put((3, value.dtype.str[:1].encode(), None, None, None, -1, -1, 0)) + b"b"
            head = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + self.put((0,)) + self.put(b"b") + b"tR"
            state = self.put(1) + self.put(value.shape) + dtype + self.put(0) + self.put(value.tobytes())
            return head + b"(" + state + b"tb"
        raise TypeError(type(value))


python2 = Python2Pickle()


def make_part(rng, classes, n=SMALL):
    return rng.integers(0, 256, (n, 3072), dtype=np.uint8), rng.integers(0, classes, n).tolist()


def make_files(name, version, n=SMALL, dumps=python2):
    """Returns a data set of random images as `{file: bytes}`, and the same as arrays in the official order."""
    rng = np.random.default_rng(0)
    ten = name == "cifar10"
    train = [f"data_batch_{i}" for i in range(1, 6)] if ten else ["train"]
    files, parts = {}, []
    for file in [*train, "test_batch" if ten else "test"]:
        data, labels = make_part(rng, 10 if ten else 100, n)
        parts.append((data, labels))
        if version == "python":
            coarse = {} if ten else {b"coarse_labels": [label // 5 for label in labels]}
            names = [f"image_{i}.png".encode() for i in range(n)]
            key = b"labels" if ten else b"fine_labels"
            files[file] = dumps(
                {b"batch_label": file.encode(), key: labels, **coarse, b"data": data, b"filenames": names}
            )
        else:
            columns = [np.array(labels, np.uint8)[:, None], data]
            if not ten:
                columns.insert(0, columns[0] // 5)
            files[f"{file}.bin"] = np.concatenate(columns, 1).tobytes()
    images = np.concatenate([data for data, _ in parts[:-1]]).reshape(-1, 3, 32, 32)
    labels = [label for _, labels in parts[:-1] for label in labels]
    return files, (images, labels, parts[-1][0].reshape(-1, 3, 32, 32), parts[-1][1])


FOLDERS = {
    ("cifar10", "python"): "cifar-10-batches-py",
    ("cifar10", "binary"): "cifar-10-batches-bin",
    ("cifar100", "python"): "cifar-100-python",
    ("cifar100", "binary"): "cifar-100-binary",
}
ARCHIVES = {
    ("cifar10", "python"): "cifar-10-python.tar.gz",
    ("cifar10", "binary"): "cifar-10-binary.tar.gz",
    ("cifar100", "python"): "cifar-100-python.tar.gz",
    ("cifar100", "binary"): "cifar-100-binary.tar.gz",
}


def write_folder(root, folder, files):
    path = root / folder
    path.mkdir(parents=True)
    for file, raw in files.items():
        (path / file).write_bytes(raw)
    return path


def write_archive(root, archive, folder, files):
    path = root / archive
    with tarfile.open(path, "w:gz") as tar:
        directory = tarfile.TarInfo(folder)
        directory.type = tarfile.DIRTYPE
        tar.addfile(directory)
        for file, raw in {"readme.html": b"<p>", **files}.items():
            member = tarfile.TarInfo(f"{folder}/{file}")
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    return path


def check(data, expected, name):
    images, labels, test_images, test_labels = expected
    assert torch.equal(data.images, torch.from_numpy(images))
    assert data.labels.tolist() == labels
    assert torch.equal(data.test_images, torch.from_numpy(test_images))
    assert data.test_labels.tolist() == test_labels
    assert (data.images.dtype, data.labels.dtype) == (torch.uint8, torch.int64)
    assert data.name == name
    assert len(set(data.classes)) == len(data.classes) == int(name[5:])


@pytest.mark.parametrize(("name", "version"), FOLDERS)
@pytest.mark.parametrize("place", ["archive", "folder", "folder of archive", "folder of folder"])
def test_every_version_in_every_place(tmp_path, name, version, place):
    files, expected = make_files(name, version)
    if "archive" in place:
        root = write_archive(tmp_path, ARCHIVES[name, version], FOLDERS[name, version], files)
    else:
        root = write_folder(tmp_path, FOLDERS[name, version], files)
    before = sorted(tmp_path.rglob("*"))
    data = load(name, root if "of" not in place else tmp_path, allow_partial=True)
    check(data, expected, name)
    assert sorted(tmp_path.rglob("*")) == before  # nothing was extracted
    data.images.zero_()  # memory of its own, writable


def test_root_as_text_and_archive_under_another_name(tmp_path):
    files, expected = make_files("cifar10", "binary")
    root = write_archive(tmp_path, "mine.tgz", "./some/where", files)
    check(load("cifar10", str(root), allow_partial=True), expected, "cifar10")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_pickles_written_again_by_python_3(tmp_path, name, protocol):
    files, expected = make_files(name, "python", dumps=lambda value: pickle.dumps(value, protocol))
    root = write_folder(tmp_path, FOLDERS[name, "python"], files)
    check(load(name, root, allow_partial=True), expected, name)


def test_text_keys_fortran_order_and_label_arrays(tmp_path):
    def dumps(value):
        value = {key.decode(): item for key, item in value.items()}
        value["data"] = np.asfortranarray(value["data"])
        value["labels"] = np.array(value["labels"], ">i4")
        return pickle.dumps(value, 2)

    files, expected = make_files("cifar10", "python", dumps=dumps)
    check(
        load("cifar10", write_folder(tmp_path, "cifar-10-batches-py", files), allow_partial=True), expected, "cifar10"
    )


@pytest.mark.slow
def test_official_size(tmp_path):
    files, expected = make_files("cifar10", "binary", n=10_000)
    root = write_folder(tmp_path, "cifar-10-batches-bin", files)
    data = load("cifar10", root)
    check(data, expected, "cifar10")
    assert data.images.shape == (50_000, 3, 32, 32)
    assert data.test_images.shape == (10_000, 3, 32, 32)


def test_constants(tmp_path):
    ten = load("cifar10", write_folder(tmp_path, "a", make_files("cifar10", "binary")[0]), allow_partial=True)
    hundred = load("cifar100", write_folder(tmp_path, "b", make_files("cifar100", "binary")[0]), allow_partial=True)
    assert ten.mean == (0.49139968, 0.48215827, 0.44653124)
    assert ten.std == (0.24703233, 0.24348505, 0.26158768)
    assert hundred.mean == pytest.approx((0.50706, 0.48667, 0.44078), abs=1e-4)
    assert hundred.std == pytest.approx((0.26745, 0.25647, 0.27608), abs=1e-4)
    assert ten.classes[3] == "cat"
    assert hundred.classes == tuple(sorted(hundred.classes))  # as in the official list


def test_mean_and_std_are_those_of_the_images():
    """The constants against real pixels: the first 4,000 training images, without loss."""
    path = Path(__file__).parents[3] / "shared/data/cifar10/cifar10_lossless_train4000.npz"
    if not path.exists():
        pytest.skip("no CIFAR-10 images here")
    from fastnas.data import cifar

    data = load("npz", path)
    assert data.mean == pytest.approx(cifar.MEAN["cifar10"], abs=0.005)
    assert data.std == pytest.approx(cifar.STD["cifar10"], abs=0.005)


# Pickles that would run something


class Call:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function, *args):
        self.reduced = (function, args)

    def __reduce__(self):
        return self.reduced


def attacks(marker):
    command = f"open({str(marker)!r}, 'w').close()"
    shell = f"touch '{marker}'"
    cat = b"\x80\x02"
    text = lambda value: b"X" + struct.pack("<I", len(value)) + value.encode()  # noqa: E731
    reconstruct = b"cnumpy.core.multiarray\n_reconstruct\n"
    return {
        "os.system": pickle.dumps({b"data": Call(os.system, shell)}),
        "eval": pickle.dumps({b"data": Call(eval, command)}),
        "exec, protocol 0": pickle.dumps({b"data": Call(exec, command)}, 0),
        "python 2 name": cat + b"c__builtin__\neval\n" + text(command) + b"\x85R.",
        "inst": b"(S" + repr(command).encode() + b"\ni__builtin__\neval\n.",
        "obj": b"(cbuiltins\neval\n" + text(command) + b"o.",
        "stack global": b"\x80\x04" + text("os") + text("system") + b"\x93" + text(shell) + b"\x85R.",
        "dotted name": b"\x80\x04" + text("numpy") + text("ndarray.__class__") + b"\x93.",
        "attribute of a builder": b"\x80\x04"
        + text("numpy.core.multiarray")
        + text("_reconstruct.__globals__")
        + b"\x93.",
        "numpy's loader": cat + b"cnumpy\nload\n" + text(str(marker)) + b"\x85R.",
        "state of a builder": cat + reconstruct + b"}(" + text("_call") + b"cos\nsystem\nub.",
        "state of a builder, slots": cat + reconstruct + b"N}(" + text("_call") + text("x") + b"u\x86b.",
        "new object": cat + b"cnumpy\nndarray\n)\x81.",
        "extension": cat + b"\x82\x01.",
        "persistent": cat + text("x") + b"Q.",
        "array of objects": cat
        + reconstruct
        + b")R(K\x01K\x01\x85cnumpy\ndtype\n"
        + text("O8")
        + b"\x85R\x89]"
        + text("x")
        + b"atb.",
        "codec": cat + b"c_codecs\nencode\n" + text("x") + text("rot13") + b"\x86R.",
    }


@pytest.mark.parametrize("attack", attacks(Path("marker")))
def test_malicious_pickle_is_refused_and_runs_nothing(tmp_path, attack):
    marker = tmp_path / "ran"
    raw = attacks(marker)[attack]
    files, _ = make_files("cifar10", "python")
    root = write_folder(tmp_path, "cifar-10-batches-py", files | {"data_batch_2": raw})
    with pytest.raises(ValueError, match=r"data_batch_2 .*cannot be read"):
        load("cifar10", root, allow_partial=True)
    assert not marker.exists()


@pytest.mark.parametrize(
    "attack", ["os.system", "eval", "exec, protocol 0", "python 2 name", "inst", "obj", "stack global"]
)
def test_the_attacks_are_real(tmp_path, attack):
    marker = tmp_path / "ran"
    pickle.loads(attacks(marker)[attack])
    assert marker.exists()


def test_a_refused_pickle_leaves_the_reader_intact(tmp_path):
    for raw in attacks(tmp_path / "ran").values():
        files, expected = make_files("cifar10", "python")
        root = tmp_path / "cifar-10-batches-py"
        if not root.exists():
            write_folder(tmp_path, root.name, files)
        good = (root / "test_batch").read_bytes()
        (root / "test_batch").write_bytes(raw)
        with pytest.raises(ValueError, match="test_batch"):
            load("cifar10", root, allow_partial=True)
        (root / "test_batch").write_bytes(good)
        check(load("cifar10", root, allow_partial=True), expected, "cifar10")


@pytest.mark.parametrize("seed", range(20))
def test_damaged_pickles_raise_value_error_or_read(tmp_path, seed):
    """Random bytes of a good file are changed: either nothing that matters, or a ValueError; never another error."""
    rng = np.random.default_rng(seed)
    files, _ = make_files("cifar10", "python")
    root = write_folder(tmp_path, "cifar-10-batches-py", files)
    for _ in range(20):
        raw = bytearray(files["test_batch"])
        for at in rng.integers(0, 300, 3):  # the structure lies at the beginning
            raw[at] = rng.integers(256)
        (root / "test_batch").write_bytes(raw)
        try:
            load("cifar10", root, allow_partial=True)
        except ValueError as error:
            if "test_batch" not in str(error):
                raise


# Damaged, missing and misplaced files


@pytest.mark.parametrize(("name", "version"), FOLDERS)
def test_truncated_file(tmp_path, name, version):
    files, _ = make_files(name, version)
    file = next(iter(files))
    root = write_folder(tmp_path, "x", files | {file: files[file][:-100]})
    with pytest.raises(ValueError, match=rf"{file}.*(cut short|truncated).*get it again"):
        load(name, root, allow_partial=True)


@pytest.mark.parametrize(("name", "version"), FOLDERS)
def test_empty_file(tmp_path, name, version):
    files, _ = make_files(name, version)
    file = list(files)[-1]
    root = write_folder(tmp_path, "x", files | {file: b""})
    with pytest.raises(ValueError, match=rf"{file}.*cut short"):
        load(name, root, allow_partial=True)


@pytest.mark.parametrize(("name", "version"), FOLDERS)
def test_missing_file(tmp_path, name, version):
    files, _ = make_files(name, version)
    file, _ = files.popitem()
    folder = write_folder(tmp_path, FOLDERS[name, version], files)
    with pytest.raises(FileNotFoundError, match=rf"has no {file} of {name}; get {ARCHIVES[name, version]} from http"):
        load(name, folder, allow_partial=True)
    archive = write_archive(tmp_path, "x.tar.gz", "x", files)
    with pytest.raises(FileNotFoundError, match=rf"has no {file} of {name}"):
        load(name, archive, allow_partial=True)


@pytest.mark.parametrize(("name", "version"), FOLDERS)
def test_fewer_images_than_official(tmp_path, name, version):
    files, _ = make_files(name, version)
    root = write_folder(tmp_path, "x", files)
    with pytest.raises(ValueError, match=r"holds 4 images where the official file has [15]0,000.*allow_partial"):
        load(name, root)


def test_more_images_than_official(tmp_path):
    files, _ = make_files("cifar10", "binary")
    root = write_folder(tmp_path, "x", files | {"test_batch.bin": bytes(3073 * 10_001)})
    with pytest.raises(ValueError, match="holds 10,001 images"):
        load("cifar10", root, allow_partial=True)


@pytest.mark.parametrize(("name", "version"), FOLDERS)
def test_label_out_of_range(tmp_path, name, version):
    files, _ = make_files(name, version)
    file = list(files)[-1]
    bad = 10 if name == "cifar10" else 100
    if version == "binary":
        record = bytearray(files[file])
        record[0 if name == "cifar10" else 1] = bad
        files[file] = bytes(record)
    else:
        data, labels = make_part(np.random.default_rng(0), 10)
        key = b"labels" if name == "cifar10" else b"fine_labels"
        files[file] = python2({b"data": data, key: [*labels[:-1], bad]})
    root = write_folder(tmp_path, "x", files)
    with pytest.raises(ValueError, match=rf"{file} has the label {bad}, outside 0 to {bad - 1}"):
        load(name, root, allow_partial=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({b"labels": [0]}, "has no data"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [0]}, "has no labels"),
        ({b"data": np.zeros((1, 3071), np.uint8), b"labels": [0]}, "3072 columns"),
        ({b"data": np.zeros((1, 3072), np.float32), b"labels": [0]}, "uint8"),
        ({b"data": [0] * 3072, b"labels": [0]}, "uint8"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, "each of the 2 images"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [b"cat"]}, "whole number"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [-1]}, "label -1"),
        ({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}, "holds 0 images"),
        ([0, 1], "not a dictionary"),
    ],
)
def test_wrong_content(tmp_path, content, message):
    files, _ = make_files("cifar10", "python")
    root = write_folder(tmp_path, "x", files | {"data_batch_3": python2(content)})
    with pytest.raises(ValueError, match=rf"data_batch_3.*{message}"):
        load("cifar10", root, allow_partial=True)


@pytest.mark.parametrize("keep", [0, 10, 300, -300, -4])
def test_archive_cut_short(tmp_path, keep):
    files, _ = make_files("cifar10", "binary")
    path = write_archive(tmp_path, "cifar-10-binary.tar.gz", "cifar-10-batches-bin", files)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cifar-10-binary.tar.gz is not a whole tar archive.*get it again"):
        load("cifar10", path, allow_partial=True)


def test_archive_with_a_flipped_bit(tmp_path):
    files, _ = make_files("cifar10", "binary")
    path = write_archive(tmp_path, "cifar-10-binary.tar.gz", "cifar-10-batches-bin", files)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1  # random pixels are stored nearly as they are, so only the checksum tells
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"cifar-10-binary.tar.gz is not a whole tar archive"):
        load("cifar10", path, allow_partial=True)


def test_archive_links_are_not_followed(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(3073))
    files, _ = make_files("cifar10", "binary")
    del files["test_batch.bin"]
    path = write_archive(tmp_path, "x.tar.gz", "x", files)
    with tarfile.open(tmp_path / "y.tar", "w") as tar:
        for file, raw in files.items():
            member = tarfile.TarInfo(file)
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
        link = tarfile.TarInfo("test_batch.bin")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        tar.addfile(link)
    for archive in (path, tmp_path / "y.tar"):
        with pytest.raises(FileNotFoundError, match=r"has no test_batch\.bin"):
            load("cifar10", archive, allow_partial=True)


def test_huge_member_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "x.tar"
    member = tarfile.TarInfo("data_batch_1.bin")
    member.size = 1 << 40
    path.write_bytes(member.tobuf() + bytes(1024))
    with pytest.raises(ValueError, match=r"data_batch_1.bin .*far more than any CIFAR file"):
        load("cifar10", path)


def test_the_other_data_set(tmp_path):
    files, _ = make_files("cifar100", "python")
    archive = write_archive(tmp_path, "cifar-100-python.tar.gz", "cifar-100-python", files)
    with pytest.raises(FileNotFoundError, match=r"data_batch_1.* of cifar10"):
        load("cifar10", archive)
    with pytest.raises(FileNotFoundError, match=r"none of cifar-10-batches-py, cifar-10-python\.tar\.gz.*http"):
        load("cifar10", tmp_path)
