"""Hostile pickles and views of tensors, with what the refusal says."""

import struct


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def stack_named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


DANGEROUS = [
    *(
        ("os", "system"),
        ("posix", "system"),
        ("nt", "system"),
        ("subprocess", "Popen"),
        ("builtins", "eval"),
    ),
    *(
        ("builtins", "exec"),
        ("builtins", "getattr"),
        ("builtins", "__import__"),
        ("__builtin__", "eval"),
        ("builtins", "object"),
    ),
    *(
        ("collections", "OrderedDict.__init__.__globals__"),
        ("torch", "FloatStorage.__init__.__globals__"),
        ("torch", "load"),
    ),
    *(
        ("torch.hub", "load"),
        ("torch", "hub.load"),
        ("torch.jit", "load"),
        ("torch.serialization", "load"),
        ("numpy", "load"),
    ),
    *(
        ("numpy", "f2py.compile"),
        ("numpy.f2py", "compile"),
        ("numpy.testing._private.utils", "runstring"),
        ("numpy", "ndarray"),
    ),
    *(
        ("numpy.core.multiarray", "_reconstruct"),
        ("pickle", "loads"),
        ("operator", "attrgetter"),
        ("functools", "partial"),
    ),
    *(
        ("copyreg", "_reconstructor"),
        ("_codecs", "decode"),
        ("codecs", "encode"),
        ("importlib", "import_module"),
    ),
    *(
        ("argparse", "Action"),
        ("argparse", "Namespace.__init__.__globals__"),
        ("argparse", "_AttributeHolder"),
    ),
    *(
        ("torch._utils", "_rebuild_parameter_with_state"),
        ("dnnlib.util", "EasyDict"),
        ("", ""),
        ("os\n", "system"),
        ("a" * 300, "b"),
    ),
]


ORDERED = named("collections", "OrderedDict")


TENSOR = named("torch._utils", "_rebuild_tensor_v2") + b"(NNNNNNtR"


DICTS = named("torch.nn.modules.container", "ModuleDict") + b")\x81"


NAMESPACE = named("argparse", "Namespace") + b")\x81"


DTYPE = named("numpy", "dtype") + b"(" + text("f8") + b"\x89\x88tR"


HOSTILE = {
    "call of a result": (ORDERED + b")R)R", "it calls a dict"),
    "call of a tensor": (TENSOR + b")R", "it calls a View"),
    "call of a string": (text("os.system") + b")R", "it calls a str"),
    "call of a class": (named("torch", "FloatStorage") + b")R", "it calls 'torch.FloatStorage'"),
    "call of a container": (DICTS[:-2] + b")R", "it calls 'torch.nn.modules.container.ModuleDict'"),
    "call with a list": (ORDERED + b"]R", "it calls 'collections.OrderedDict'"),
    "call with too much": (ORDERED + b"(NNtR", "TypeError"),
    "object of a function": (
        named("torch.storage", "_load_from_bytes") + b")\x81",
        "an object of 'torch.storage._load_from_bytes'",
    ),
    "object of a value": (b"})\x81", "an object of a dict"),
    "object with arguments": (
        DICTS[:-2] + b"K\x01\x85\x81",
        "an object of 'torch.nn.modules.container.ModuleDict'",
    ),
    "state of a name": (
        named("torch", "FloatStorage") + b"}" + text("a") + b"Nsb",
        "the state of 'torch.FloatStorage' from a dict",
    ),
    "slots of a name": (
        ORDERED + b"N}" + text("module") + text("os") + b"s\x86b",
        "the state of 'collections.OrderedDict'",
    ),
    "slots of a container": (
        DICTS + b"N}" + text("state") + b"Ns\x86b",
        "the state of a ModuleDict from a tuple",
    ),
    "state twice": (DICTS + b"}b}b", "the state of a ModuleDict"),
    "call of a namespace": (NAMESPACE[:-2] + b")R", "it calls 'argparse.Namespace'"),
    "namespace with arguments": (
        NAMESPACE[:-2] + b"K\x01\x85\x81",
        "an object of 'argparse.Namespace'",
    ),
    "slots of a namespace": (
        NAMESPACE + b"N}" + text("state") + b"Ns\x86b",
        "the state of a Namespace from a tuple",
    ),
    "state of a namespace twice": (NAMESPACE + b"}b}b", "the state of a Namespace"),
    "items of a namespace": (NAMESPACE + text("a") + b"Ns", "items into a Namespace"),
    "foreign object of a namespace": (
        NAMESPACE + b"}" + text("model") + named("os", "system") + text("true") + b"\x85Rsb",
        "it names 'os.system'",
    ),
    "state of a tensor": (TENSOR + b"}" + text("storage") + b"Nsb", "the state of a View"),
    "state of a dict": (b"}}b", "the state of a dict"),
    "items of a name": (ORDERED + text("a") + b"Ns", "items into 'collections.OrderedDict'"),
    "items of a list": (b"]K\x00Ns", "items into a list"),
    "items of a container": (DICTS + b"(" + text("a") + b"Nu", "items into a ModuleDict"),
    "append to a dict": (b"}Na", "items into a dict"),
    "append to a tensor": (TENSOR + b"(NNe", "items into a View"),
    "add to a list": (b"](N\x90", "items into a list"),
    "half an item": (b"}(Nu", "ValueError"),
    "parameter of no tensor": (
        named("torch._utils", "_rebuild_parameter") + b"N\x89}\x87R",
        "a parameter",
    ),
    "network of no dict": (
        named("torch_utils.persistence", "_reconstruct_persistent_obj") + b"N\x85R",
        "a persistent object",
    ),
    "storage of a string": (
        named("torch.storage", "_load_from_bytes") + text("a") + b"\x85R",
        "a storage is made from a str",
    ),
    "dtype of objects": (
        named("numpy", "dtype") + b"(" + text("O") + b"\x89\x88tR",
        "numpy.dtype 'O'",
    ),
    "dtype of a name": (
        named("numpy", "dtype") + b"(" + ORDERED + b"\x89\x88tR",
        "numpy.dtype 'collections.OrderedDict'",
    ),
    "big-endian dtype": (
        DTYPE + b"(K\x03" + text(">") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
        "byte order '>'",
    ),
    "dtype with fields": (DTYPE + b"(K\x03" + text("<") + b"NNtb", "the state of a DType"),
    "scalar of objects": (
        named("numpy.core.multiarray", "scalar") + b"NC\x00\x86R",
        "numpy scalar",
    ),
    "short scalar": (
        named("numpy._core.multiarray", "scalar") + DTYPE + b"C\x02ab\x86R",
        "numpy scalar",
    ),
    "encode to zip": (
        named("_codecs", "encode") + text("a") + text("zip") + b"\x86R",
        "_codecs.encode",
    ),
    "encode a name": (
        named("_codecs", "encode") + ORDERED + text("latin1") + b"\x86R",
        "_codecs.encode",
    ),
    "encode much": (
        named("_codecs", "encode") + text("a" * 9999) + text("latin1") + b"\x86R",
        "_codecs.encode",
    ),
    "name of no strings": (b"K\x01K\x02\x93", "STACK_GLOBAL"),
    "tuple as a key": (b"}))s", "a dict with a tuple as a key"),
    "tensor as a key": (b"}" + TENSOR + b"Ns", "a dict with a View as a key"),
    "absurd bytes": (b"\x8e" + struct.pack("<Q", 2**62), "ends early"),
    "more absurd bytes": (b"\x8e" + struct.pack("<Q", 2**64 - 1), "ends early"),
    "long bytes": (b"B" + struct.pack("<I", 2**32 - 1), "ends early"),
    "absurd string": (b"\x8d" + struct.pack("<Q", 2**62), "ends early"),
    "long string": (b"X" + struct.pack("<I", 2**32 - 1), "ends early"),
    "no string": (b"\x8c\x01\xff", "UnicodeDecodeError"),
    "absurd memo": (b"Nr\xff\xff\xff\xffj\xfe\xff\xff\xff", "Memo value not found"),
    "absurd frame": (b"\x95" + struct.pack("<Q", 2**63) + b"h\x07", "Memo value not found"),
    "absurd protocol": (b"\x80\x09", "protocol"),
    "name without end": (b"cos", "ends early"),
    "nothing on the stack": (b"", "IndexError"),
    "no mark": (b"t", "IndexError"),
    "unknown opcode": (b"\xff", "the pickle opcode 0xff"),
}


FLOAT = named("torch", "FloatStorage")
IDS = {
    "string": (text("os.system"), "a persistent id that is not a storage"),
    "short": (b"(" + text("storage") + FLOAT + b"t", "a persistent id that is not a storage"),
    "long": (
        b"(" + text("storage") + FLOAT + text("0") + text("cpu") + b"K\x01NNt",
        "a persistent id that is not a storage",
    ),
    "other": (b"(" + text("module") + FLOAT + text("0") + text("cpu") + b"K\x01t", "'module'"),
    "type as a string": (
        b"(" + text("storage") + text("FloatStorage") + text("0") + text("cpu") + b"K\x01t",
        "a str",
    ),
    "other type": (
        b"(" + text("storage") + ORDERED + text("0") + text("cpu") + b"K\x01t",
        "'collections.OrderedDict'",
    ),
    "number as key": (
        b"(" + text("storage") + FLOAT + b"K\x00" + text("cpu") + b"K\x01t",
        "a persistent id that is not a storage",
    ),
    "bool elements": (
        b"(" + text("storage") + FLOAT + text("key") + text("cpu") + b"\x88t",
        "'key'",
        "impossible",
    ),
    "text elements": (
        b"(" + text("storage") + FLOAT + text("key") + text("cpu") + text("1") + b"t",
        "'key'",
        "impossible",
    ),
    "negative elements": (
        b"(" + text("storage") + FLOAT + text("key") + text("cpu") + b"J\xff\xff\xff\xfft",
        "'key'",
        "impossible",
    ),
    "absurd elements": (
        b"("
        + text("storage")
        + FLOAT
        + text("key")
        + text("cpu")
        + b"\x8a\x09"
        + b"\xff" * 8
        + b"\0t",
        "impossible",
    ),
    "view": (
        b"(" + text("storage") + FLOAT + text("0") + text("cpu") + b"K\x01)t",
        "a persistent id that is not a storage",
    ),
}


VIEWS = {
    "beyond the storage": ((0, (5,), (1,)), "beyond its storage of 4"),
    "offset beyond": ((2, (3,), (1,)), "beyond its storage of 4"),
    "empty beyond": ((5, (0,), (1,)), "beyond its storage of 4"),
    "stride beyond": ((0, (2, 2), (1, 3)), "beyond its storage of 4"),
    "stride 0": ((0, (1_000_000_000,), (0,)), "its elements overlap"),
    "overlapping itself": ((0, (2, 2), (1, 1)), "its elements overlap"),
    "absurd size": ((0, (2**62,), (1,)), "2^40"),
    "absurd product": ((0, (2**30, 2**30), (2**30, 1)), "2^40"),
    "absurd and empty": ((0, (2**30, 2**30, 0), (1, 1, 1)), "2^40"),
    "absurd stride": ((0, (1,), (2**62,)), "2^40"),
    "huge number": ((0, (2**2000,), (1,)), "2^40"),
    "negative size": ((0, (-1,), (1,)), "2^40"),
    "negative stride": ((3, (4,), (-1,)), "2^40"),
    "negative offset": ((-1, (1,), (1,)), "2^40"),
    "offset as text": (("0", (1,), (1,)), "not all numbers"),
    "size as text": ((0, ("4",), (1,)), "not all numbers"),
    "size as bool": ((0, (True,), (1,)), "not all numbers"),
    "size as float": ((0, (4.0,), (1,)), "not all numbers"),
    "offset as None": ((None, (4,), (1,)), "not all numbers"),
    "size as list": ((0, [4], (1,)), "two tuples"),
    "size as number": ((0, 4, 1), "two tuples"),
    "another length": ((0, (2, 2), (1,)), "two tuples"),
    "many dimensions": ((0, (1,) * 9, (1,) * 9), "two tuples"),
}
