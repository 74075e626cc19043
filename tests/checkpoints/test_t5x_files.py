"""A file that is no T5X checkpoint's, or lies, is refused in one line, and is not obeyed."""

import itertools
import os

import msgpack
import numpy as np
import pytest
from flax import serialization

from m2l.checkpoints import t5x, t5x_files
from m2l.errors import CheckpointError


def test_what_is_no_t5x_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such directory"):
        t5x.read(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="not a T5X checkpoint: neither"):
        t5x.read(tmp_path)
    (tmp_path / "state").mkdir()
    with pytest.raises(CheckpointError, match="it holds no parameters"):
        t5x.read(tmp_path)


def nested(depth):
    return b"\x81\xa1a" * depth + b"\x80"


def leaf(value):
    target = {"token_embedder": {"embedding": value}}
    content = {"version": 3, "optimizer": {"target": target, "state": {}}}
    return serialization.msgpack_serialize(content)


def spec(path):
    kvstore = {"driver": "file", "path": path}
    return leaf({"driver": "zarr", "kvstore": kvstore, "metadata": {}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated, damaged or not"),
        (b"model_checkpoint_path: 'x'", "a TensorFlow checkpoint; .*convert_tf_checkpoint"),
        (b"\x80\x04K\x01.", "truncated, damaged or not"),
        (leaf(np.ones(9, np.float32))[:-1], "truncated, damaged or not"),
        (nested(980), "truncated, damaged or not|has no 'target'"),
        (nested(100_000), "truncated, damaged or not"),
        (b"\x81\xa6target" + nested(900), "more than 32 names deep"),
        (b"\x81\xa6target\x81\xa1a" + b"\x91" * 900 + b"\xc0", "expected an array, found a list"),
        (msgpack.packb([1]), "has no 'target'"),
        (msgpack.packb({"version": 3, "optimizer": {"state": {}}}), "has no 'target'"),
        (msgpack.packb({"version": 1, "optimizer": {}}), "version 1 of T5X's format"),
        (msgpack.packb({"version": [3], "optimizer": {}}), "version of type list of T5X's"),
        (msgpack.packb({"target": {}}), "holds no parameters"),
        (msgpack.packb({"target": {"a/b": 1}}), "'a/b' is not the name of a parameter"),
        (msgpack.packb({"target": {"a\nb": 1}}), r"'a\\nb' is not the name of a parameter"),
        (msgpack.packb({"target": {7: 1}}), "'7' is not the name of a parameter"),
        (msgpack.packb({"target": msgpack.ExtType(1, b"x")}), "truncated, damaged or not"),
        (leaf("hello"), "token_embedder/embedding: expected an array, found a str"),
        (leaf(None), "token_embedder/embedding: expected an array, found a NoneType"),
        (leaf(np.ones(9, np.int32)), "token_embedder/embedding: expected an array of floats"),
        (leaf("PLACEHOLDER://../x"), "expected the name of a directory beside it"),
        (spec("/etc/x"), "expected the name of a directory beside it, found '/etc/x'"),
        (spec("../other/x"), "expected the name of a directory beside it"),
        (spec(".."), "expected the name of a directory beside it"),
        (spec(7), "expected the name of a directory beside it"),
        (b"\xdc\xff\xff" + b"\xc0" * 65535, "max_array_len"),
        (
            b"\xdc\x04\x00" + (b"\xdc\x04\x00" + b"\x90" * 1024) * 1024,
            "more than 1,048,576 entries",
        ),
    ],
    ids=itertools.count(),
)
def test_a_msgpack_that_is_not_whole_or_not_honest_is_refused_in_one_line(
    tmp_path, content, message
):
    (tmp_path / "checkpoint").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        t5x.read(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_msgpack_too_large_to_decode_is_refused(tmp_path):
    with open(tmp_path / "checkpoint", "wb") as file:
        os.truncate(file.fileno(), t5x_files._MSGPACK_BYTES + 1)
    with pytest.raises(CheckpointError, match="134,217,729 bytes, and at most 134,217,728"):
        t5x.read(tmp_path)
