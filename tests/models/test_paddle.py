"""Paddle's files: every type and layout comes out as it was written; damage and attacks are one line, and never run."""

import codecs
import io
import os
import pickle
import pickletools
import struct
import subprocess
import tracemalloc
from collections import OrderedDict

import numpy as np
import pytest
import torch

from vlblocks.errors import UserError
from vlblocks.models.paddle import read_lod_tensor, read_paddle, read_parameter_folder, read_pdparams

TYPES = {
    torch.bool: 0,
    torch.int16: 1,
    torch.int32: 2,
    torch.int64: 3,
    torch.float16: 4,
    torch.float32: 5,
    torch.float64: 6,
    torch.uint8: 20,
    torch.int8: 21,
    torch.bfloat16: 22,
    torch.complex64: 23,
    torch.complex128: 24,
}


def varint(value):
    """Protobuf's, of a 64-bit number."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def described(kind, shape, packed=False):
    sizes = [varint(size) for size in shape]
    if packed:
        return b"\x08" + varint(kind) + b"\x12" + varint(len(b"".join(sizes))) + b"".join(sizes)
    return b"\x08" + varint(kind) + b"".join(b"\x10" + size for size in sizes)


def raw(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def lod(kind, shape, data, *, levels=(), packed=False, version=0, tensor_version=0):
    """A file as Paddle writes it."""
    head = struct.pack("<IQ", version, len(levels))
    head += b"".join(struct.pack("<Q", len(level)) + level for level in levels)
    description = described(kind, shape, packed)
    return head + struct.pack("<Ii", tensor_version, len(description)) + description + data


def sample(dtype, shape=(3, 2)):
    values = torch.randn(shape) * 3
    return values > 0 if dtype == torch.bool else values.to(dtype)


def refused(path, read=read_paddle):
    """The one line that a file is refused with."""
    with pytest.raises(UserError) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 400
    return message


# One file per parameter


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_type_comes_out_as_it_was_written(tmp_path, dtype):
    tensor = sample(dtype)
    (tmp_path / "w").write_bytes(lod(TYPES[dtype], tensor.shape, raw(tensor)))
    found = read_lod_tensor(tmp_path / "w")
    assert found.dtype == dtype and torch.equal(found, tensor)


def test_sizes_are_read_as_numbers(tmp_path):
    sizes = torch.tensor([3, 2**40])
    (tmp_path / "w").write_bytes(lod(19, sizes.shape, raw(sizes)))
    assert torch.equal(read_lod_tensor(tmp_path / "w"), sizes)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3, 4, 5), (1, 200, 3)], ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("levels", [(), (b"", struct.pack("<3Q", 0, 1, 3))], ids=["plain", "levels"])
def test_shapes_packings_and_levels(tmp_path, shape, packed, levels):
    tensor = torch.randn(shape)
    (tmp_path / "w").write_bytes(lod(5, shape, raw(tensor), packed=packed, levels=levels))
    found = read_lod_tensor(tmp_path / "w")
    assert found.shape == tensor.shape and torch.equal(found, tensor)


def test_every_cut_is_noticed(tmp_path):
    whole = lod(5, (3, 130), raw(torch.randn(3, 130)), levels=(b"12345678",))
    path = tmp_path / "w"
    for size in [*range(60), len(whole) - 4, len(whole) - 1]:
        path.write_bytes(whole[:size])
        message = refused(path, read_lod_tensor)
        assert "cut short" in message or "not a Paddle parameter" in message
    path.write_bytes(whole[:-1])
    assert f"cut short ({4 * 390 - 1} of {4 * 390} bytes of a tensor [3, 130])" in refused(path, read_lod_tensor)
    path.write_bytes(whole + b"\0")
    assert "1 bytes more than its tensor [3, 130]" in refused(path, read_lod_tensor)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cut short"),
        (b"not a parameter at all, but text", "version"),
        (lod(5, (1,), b"1234", version=1), "version is not 0"),
        (lod(5, (1,), b"1234", tensor_version=7), "tensor's version"),
        (lod(17, (1,), b"1234"), "unknown type 17"),
        (lod(5, (-1,), b"1234"), "no tensor"),
        (lod(5, (2**62, 2**62), b"1234"), "cut short"),
        (lod(5, [1] * 17, b"1234"), "no tensor"),
        (lod(5, (0, 2**62, 2**62), b""), "no tensor can be of shape"),
        (lod(5, (2**40,), b"1234"), "cut short (4 of 4398046511104 bytes"),
        (struct.pack("<IQQ", 0, 1, 2**60) + b"12345678", "cut short"),
        (struct.pack("<IQ", 0, 2**63) + b"12345678" * 4, "cut short"),
        (struct.pack("<IQIi", 0, 0, 0, 2**31 - 1), "cut short"),
        (struct.pack("<IQIi", 0, 0, 0, -1), "negative length"),
        (struct.pack("<IQIi", 0, 0, 0, 0), "no tensor"),
        (struct.pack("<IQIi", 0, 0, 0, 2) + b"\x18\x01", "unknown field"),
        (struct.pack("<IQIi", 0, 0, 0, 12) + b"\x08" + b"\xff" * 11, "damaged"),
        (struct.pack("<IQIi", 0, 0, 0, 4) + b"\x08\x05\x12\x09", "damaged"),
    ],
)
def test_garbled_headers_are_refused_without_the_memory_they_claim(tmp_path, content, words):
    (tmp_path / "w").write_bytes(content)
    tracemalloc.start()
    message = refused(tmp_path / "w", read_lod_tensor)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert words in message and peak < 2_000_000


def test_no_changed_byte_is_more_than_an_error(tmp_path):
    whole = lod(5, (3, 2), raw(torch.randn(3, 2)), levels=(b"12345678",))
    path, rng = tmp_path / "w", np.random.default_rng(3)
    outcomes = set()
    for _ in range(400):
        spoiled = bytearray(whole)
        spoiled[rng.integers(len(whole) - 24)] = rng.integers(256)
        path.write_bytes(spoiled)
        try:
            outcomes.add(read_lod_tensor(path).shape)
        except UserError:
            outcomes.add("refused")
    assert torch.Size([3, 2]) in outcomes and "refused" in outcomes


def test_a_folder_is_read_by_file_names(tmp_path):
    tensors = {name: torch.randn(2, 3) for name in ("vq_emb", "text.word_embedding", "a_0.w_0")}
    for name, tensor in tensors.items():
        (tmp_path / name).write_bytes(lod(5, (2, 3), raw(tensor)))
    (tmp_path / ".DS_Store").write_bytes(b"not ours")
    found = read_paddle(tmp_path)
    assert list(found) == sorted(tensors) and all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_folder_of_something_else_is_refused(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no files" in refused(empty)
    with pytest.raises(UserError, match=rf"^{empty}: not a parameter's file"):
        read_parameter_folder(tmp_path)
    (empty / "config.json").write_text('{"hidden_size": 768, "resolution": 16}')
    with pytest.raises(UserError, match=rf"^{empty / 'config.json'}: not a Paddle parameter"):
        read_paddle(empty)


@pytest.mark.parametrize("name", ["model.pdopt", "model.npz", "model", "model.bin"])
def test_other_files_are_refused_unread(tmp_path, name):
    path = tmp_path / name
    assert "no such file" in refused(path)
    path.write_bytes(pickle.dumps({"w": np.zeros(2, np.float32)}))
    assert "give a folder with a file for each parameter, or a .pdparams file" in refused(path)


# Pickled dictionaries


def pickled(tmp_path, content, protocol=4):
    path = tmp_path / "model.pdparams"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_every_protocol(tmp_path, protocol):
    rng = np.random.default_rng(0)
    whole = rng.standard_normal((4, 3))
    arrays = {
        **{kind: whole.astype(kind) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "c8", "c16")},
        **{"bool": whole > 0, "big-endian": whole.astype(">f4"), "one": np.array(2.5, np.float32)},
        **{"columns": np.asfortranarray(whole, dtype="f4"), "empty": np.zeros((0, 4), "f4"), "none": np.zeros(0, "i8")},
        "strided": np.ascontiguousarray(whole[::2, 1:], dtype="f4"),
    }
    found = read_pdparams(pickled(tmp_path, arrays, protocol))
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].shape == array.shape and found[name].dtype.itemsize == array.dtype.itemsize
        assert np.array_equal(found[name].numpy(), array), name
        assert found[name].is_contiguous()


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_bfloat16_is_written_as_its_bits(tmp_path, protocol):
    tensor = torch.randn(5, 3).bfloat16()
    bits = tensor.view(torch.int16).numpy().view(np.uint16)
    found = read_pdparams(pickled(tmp_path, {"w": bits, "one": np.array(bits[0, 0])}, protocol))
    assert found["w"].dtype == torch.bfloat16 and torch.equal(found["w"], tensor)
    assert torch.equal(found["one"], tensor[0, 0])


class OwnName:
    """Reduces as Paddle's tensors do: to a tuple of its name and its array."""

    def __init__(self, name, array):
        self.name, self.array = name, array

    def __reduce__(self):
        return tuple, ((self.name, self.array),)


@pytest.mark.parametrize("protocol", [2, 4])
def test_named_arrays_ordered_dictionaries_and_papers_beside_them(tmp_path, protocol):
    one, two = np.ones((2, 2), np.float32), np.arange(3, dtype=np.int64)
    content = OrderedDict(
        {
            "first": OwnName("linear_0.w_0", one),
            "second": ("linear_0.b_0", two),
            "same": one,
            "StructuredToParameterName@@": {"first": "linear_0.w_0", "second": "linear_0.b_0"},
        }
    )
    found = read_pdparams(pickled(tmp_path, content, protocol))
    assert list(found) == ["first", "second", "same"]
    assert torch.equal(found["first"], torch.ones(2, 2)) and found["second"].tolist() == [0, 1, 2]


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


def attacks(marker):
    touch = f"touch {marker}"
    array = np.zeros(3, np.float32)
    reconstruct = array.__reduce__()[0]
    return {
        "os.system": Calls(os.system, touch),
        "builtins.eval": Calls(eval, f"open({str(marker)!r}, 'w')"),
        "builtins.exec": Calls(exec, f"open({str(marker)!r}, 'w')"),
        "subprocess.Popen": Calls(subprocess.Popen, ["touch", str(marker)]),
        "builtins.getattr": Calls(getattr, int, "from_bytes"),
        "builtins.open": Calls(open, str(marker), "w"),
        "numpy.load": Calls(np.load, str(marker)),
        "numpy.fromfile": Calls(np.fromfile, str(marker)),
        "numpy.memmap": Calls(reconstruct, np.memmap, (0,), b"b"),
        "room of its own": Calls(reconstruct, np.ndarray, (2**40,), b"b"),
        "unknown encoding": Calls(codecs.encode, "cmd", "rot13"),
        "numpy.ndarray": Calls(np.ndarray, (2**40,)),
        "a tuple of something else": Calls(tuple, "ab"),
        "an array of objects": np.array([1, None, "x"], dtype=object),
        "arrays of records": np.zeros(2, dtype=[("a", "f4"), ("b", "i4")]),
        "an array of an unknown type": np.array(["ab", "c"]),
        "a state of its own": Calls(OrderedDict, state={"x": 1}),
    }


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("place", ["value", "nested", "whole"])
@pytest.mark.parametrize("asked", attacks("x"))
def test_what_a_pickle_asks_for_is_named_and_not_done(tmp_path, protocol, place, asked):
    marker = tmp_path / "ran"
    bad = attacks(marker)[asked]
    nested = {"a": np.zeros(2, np.float32), "w": [("n", {"x": bad})]}
    message = refused(pickled(tmp_path, {"value": {"w": bad}, "nested": nested, "whole": bad}[place], protocol))
    assert not marker.exists() and "was not run" in message
    assert asked.rpartition(".")[2] in message  # pickles know some modules under other names


@pytest.mark.parametrize(
    ("code", "asked"),
    [
        (b"(S'touch x'\nios\nsystem\n.", "INST"),
        (b"(cos\nsystem\nS'touch x'\no.", "os.system"),
        (b"\x80\x02cos\nsystem\nq\x00)\x81.", "os.system"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
        (b"Psomething\n.", "PERSID"),
        (b"\x80\x02K\x01Q.", "BINPERSID"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (b"\x80\x02}}b.", "a state of its own"),
        (b"\x80\x02]]\x85R.", "a call of something else"),
        (b"\x80\x02cnumpy\nndarray\n)R.", "numpy.ndarray"),
        (b"\x80\x04\x8c\x03o\ns\x8c\x03\x1b[2\x93.", r"o\ns.\x1b[2"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.", "builtins.eval"),
    ],
)
def test_other_ways_to_run_something(tmp_path, code, asked):
    message = refused(pickled(tmp_path, code))
    assert asked in message and "was not run" in message


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [(b"", b".", "no dictionary"), (b"}", b"K\x01s.", "garbled"), (b"}X\x01\x00\x00\x00w", b"s.", "w is no array")],
)
def test_tuples_in_tuples_without_end_do_not_use_up_the_stack(tmp_path, before, after, words):
    assert words in refused(pickled(tmp_path, b"\x80\x02" + before + b")" + b"\x85" * 200_000 + after))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (b"\x80\x04B" + struct.pack("<I", 2**31) + b"abc", "cut short"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"abc", "cut short"),
        (b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"abc", "cut short"),
        (b"\x80\x05\x96" + struct.pack("<Q", 2**60) + b"abc", "cut short"),
        (b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"}.", None),
        (b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + b".", None),
        (b"\x80\x02\x8b" + struct.pack("<i", 2**30) + b"1.", "cut short"),
        (b"\x80\x02}K\x01K\x02s.", "garbled"),
        (b"\x80\x02}}K\x01s.", "garbled"),
        (b".", "garbled"),
        (b"\x80\x02}}.", "garbled"),
        (b"\x80\x02}0.", "garbled"),
        (b"\x80\x02h\x05.", "garbled"),
        (b"\x80\x02}u.", "garbled"),
        (b"", "empty"),
        (b"}", "cut short"),
        (b"PK\x03\x04 a zip file, as PyTorch writes", "no pickle"),
        # A type's code of tuples in tuples, whose text is deeper than the stack, or 2 ** 60 characters long.
        (b"\x80\x02cnumpy\ndtype\n)" + b"\x85" * 2000 + b"\x85R.", "unknown type"),
        (b"\x80\x02cnumpy\ndtype\n)" + b"2\x86" * 60 + b"\x85R.", "unknown type"),
        (b"\x80\x02cnumpy\ndtype\nX" + struct.pack("<I", 9000) + b"f" * 9000 + b"\x85R.", "unknown type"),
        # One text of 100,000 characters, encoded 40 times.
        (
            b"\x80\x02](X" + struct.pack("<I", 10**5) + b"a" * 10**5 + b"q\x000"
            b"X\x06\x00\x00\x00latin1q\x010" + b"c_codecs\nencode\n(h\x00h\x01tR" * 40 + b"e.",
            "more bytes than the file",
        ),
        # An array without elements has strides nevertheless.
        (
            b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR(K\x01(K\x00"
            + (b"\x8a\x08" + struct.pack("<q", 2**62)) * 2
            + b"tcnumpy\ndtype\nX\x02\x00\x00\x00f4\x85R\x89c__builtin__\nbytes\n)Rtb.",
            "larger than any",
        ),
    ],
)
def test_claims_cost_no_memory(tmp_path, code, words):
    path = pickled(tmp_path, code)
    tracemalloc.start()
    if words is None:
        assert read_pdparams(path) == {}
    else:
        assert words in refused(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_one_array_named_many_times_over_is_no_bomb(tmp_path):
    class Same:
        """A new array over the same bytes each time."""

        data = bytes(40_000)

        def __reduce__(self):
            function, arguments, _ = np.zeros(1, np.float32).__reduce__()
            return function, arguments, (1, (10_000,), np.dtype("f4"), False, Same.data)

    path = pickled(tmp_path, {str(n): Same() for n in range(50)})
    assert path.stat().st_size < 100_000
    assert "more bytes than the file" in refused(path)
    shared = np.zeros(10_000, np.float32)
    found = read_pdparams(pickled(tmp_path, {str(n): shared for n in range(50)}))  # but one array under many names is
    assert len(found) == 50


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ((1, (3,), np.dtype("f4"), False, b"12345678"), "garbled"),
        ((1, (2**40,), np.dtype("f4"), False, b""), "garbled"),
        ((1, (-1, -2), np.dtype("f4"), False, b"12345678"), "garbled"),
        ((1, (True,), np.dtype("f4"), False, b"1234"), "garbled"),
        ((1, (1 << 5000, 0), np.dtype("f4"), False, b""), "garbled"),
        ((1, (1,) * 40, np.dtype("f4"), False, b"1234"), "garbled"),
        ((1, ("1",), np.dtype("f4"), False, b"1234"), "garbled"),
        ((1, (1,), "f4", False, b"1234"), "was not run"),
        ((1, (1,), np.dtype("f4"), False, [1.0]), "was not run"),
        ((1, (1,), np.dtype("f4")), "was not run"),
        ({}, "was not run"),
    ],
    ids=str,
)
def test_arrays_that_contradict_themselves(tmp_path, state, words):
    function, arguments, _ = np.zeros(1, np.float32).__reduce__()
    assert words in refused(pickled(tmp_path, {"w": Calls(function, *arguments, state=state)}))


def test_an_array_without_a_state_and_other_values_are_named(tmp_path):
    function, arguments, _ = np.zeros(1, np.float32).__reduce__()
    for value in (Calls(function, *arguments), None, 3, "text", [np.zeros(2)], {"x": np.zeros(2)}):
        assert "layer.w is no array" in refused(pickled(tmp_path, {"layer.w": value}))
    assert "no dictionary" in refused(pickled(tmp_path, [np.zeros(2)]))
    # Names go to the user's terminal.
    assert "garbled" in refused(pickled(tmp_path, {"w\x1b[2J\n": np.zeros(2)}))


@pytest.mark.parametrize("protocol", [2, 4])
def test_every_cut_of_a_pickle_is_noticed(tmp_path, protocol):
    whole = pickle.dumps({"a": np.ones((2, 3), np.float32), "b": ("n", np.zeros(2))}, protocol=protocol)
    assert len(read_pdparams(pickled(tmp_path, whole))) == 2
    for size in range(len(whole)):
        message = refused(pickled(tmp_path, whole[:size]))
        assert "cut short" in message or "empty" in message


def test_no_changed_byte_of_a_pickle_is_more_than_an_error(tmp_path):
    whole = pickle.dumps({"a": np.ones((2, 3), np.float32), "b": ("n", np.zeros(2, np.int64))}, protocol=4)
    rng, outcomes = np.random.default_rng(5), {"read": 0, "refused": 0}
    for _ in range(600):
        spoiled = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            spoiled[rng.integers(len(whole))] = rng.integers(256)
        try:
            assert all(
                isinstance(value, torch.Tensor) for value in read_pdparams(pickled(tmp_path, bytes(spoiled))).values()
            )
            outcomes["read"] += 1
        except UserError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20


def test_the_pickle_that_paddle_wrote_mentions_nothing_else(reference):
    """What the reader allows suffices for Paddle itself, in both forms, to the bit of the golden weights."""
    folder = reference / "golden/paddle_checkpoint"
    operations = {op.name for op, *_ in pickletools.genops(io.BytesIO((folder / "model.pdparams").read_bytes()))}
    assert {"REDUCE", "BUILD", "STACK_GLOBAL"} <= operations
    with np.load(reference / "golden/unimo2/text_topk.npz") as file:
        golden = {key.removeprefix("param."): file[key] for key in file.files if key.startswith("param.")}
    for source in (folder / "per_parameter", folder / "model.pdparams"):
        found = read_paddle(source)
        assert found.keys() == golden.keys()
        for name, array in golden.items():
            assert found[name].dtype == torch.float32 and np.array_equal(found[name].numpy(), array), name
