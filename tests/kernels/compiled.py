"""Compiles a `Launch` for a GPU that is not there, and reads what the compiler made of it."""

import re
import subprocess
import tempfile
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import native_specialize_impl


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    ptx: str
    shared: int
    registers: int
    spilled: int
    """Bytes of a thread's stack: registers that did not fit."""


def source(launch, target: GPUTarget) -> ASTSource:
    """What Triton's launcher would compile for these arguments."""
    backend = make_backend(target)
    signature, constants, attributes = {}, {}, {}

    def add(kind, key, value, at: tuple) -> None:
        if isinstance(kind, tuple):
            for index, item in enumerate(kind):
                add(item, key and key[index], value[index], (*at, index))
        elif kind == "constexpr":
            constants[at] = value
        elif isinstance(key, str):
            attributes[at] = backend.parse_attr(key)

    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        kind, key = "constexpr", None
        if not parameter.is_constexpr:
            kind, key = native_specialize_impl(backend, value, False, not parameter.do_not_specialize, True)
        signature[parameter.name] = kind
        add(kind, key, value, (index,))
    return ASTSource(launch.kernel, signature, constants, attributes)


def compiled(launch, capability: int) -> Compiled:
    """The cubin of a launch for sm_`capability`."""
    target = GPUTarget("cuda", capability, 32)
    kernel = triton.compile(source(launch, target), target=target, options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        program = triton.knobs.nvidia.cuobjdump.path
        said = subprocess.run([program, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", said)[1]) for name in ("REG", "STACK"))
    return Compiled(ptx=kernel.asm["ptx"], shared=kernel.metadata.shared, registers=registers, spilled=stack)
